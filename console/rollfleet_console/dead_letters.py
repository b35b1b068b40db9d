"""Dead letters: prompts that ran out of attempts, with the history of every one.

- A letter is named ``<entry>``, or ``<partition>/<entry>`` beyond partition 0.
- Retrying makes a *new* group of one sample: the old group has closed without it. The new group's
  name and submission id follow from the letter alone, so a retry that is repeated does nothing.
- What is retried is outside pacing: it was let in once, and lost its place through no fault.
"""

import json
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rollfleet_common.board import Board
from rollfleet_common.codec import decode_prompt
from rollfleet_common.errors import RollfleetError, SettingsError, SupersededError, WireError
from rollfleet_common.keys import RunKeys, check_name, partition_of
from rollfleet_common.messages import Prompt
from rollfleet_common.streams import Streams, Submission, Submitted
from rollfleet_common.text import cleaned, decoded, json_safe, parse_json, printable
from rollfleet_console.status.explain import ago

__all__ = [
    "DeadLetter",
    "find",
    "purge",
    "read",
    "render_letter",
    "render_list",
    "retry",
    "select",
    "to_json",
]

#: Letters read by one command.
PAGE = 200
#: Token ids of a prompt that are shown to people.
SHOWN_TOKENS = 32


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One dead prompt."""

    partition: int
    entry: str
    group: str
    #: Which member of the group; -1 for garbage.
    index: int
    #: "train" or "eval"; "" for garbage.
    kind: str
    attempts: int
    #: The failure kind that ended it, or "garbage".
    why: str
    age_s: float
    #: What was wrong the last time, in one line.
    detail: str
    #: One record for each failed attempt: attempt, kind, detail, worker, at_ms.
    history: tuple[Mapping[str, Any], ...]
    #: None if it cannot be decoded; `detail` then says why.
    prompt: Prompt | None

    @property
    def id(self) -> str:
        """Its name on the command line."""
        return f"{self.partition}/{self.entry}" if self.partition else self.entry

    @property
    def retry_group(self) -> str:
        """The group that a retry makes."""
        return f"{self.group}-r{self.entry}"


# ---- reading -------------------------------------------------------------------------------------


async def _partitions(client: Any, keys: RunKeys) -> int:
    board = await Board(client, keys).read()
    return board[1].partitions if board else 1


async def read(client: Any, run: str) -> AsyncIterator[DeadLetter]:
    """All dead letters of a run, partition by partition, the newest first."""
    keys = RunKeys(check_name(run, "the run"))
    for partition in range(await _partitions(client, keys)):
        stream, last = keys.partition(partition).dead, "+"
        while rows := await client.xrevrange(stream, max=last, count=PAGE):
            now_ms = await _now_ms(client)
            for entry, fields in rows:
                yield _letter(partition, entry.decode(), fields, now_ms)
            last = f"({rows[-1][0].decode()}"


async def find(client: Any, run: str, ids: Iterable[str]) -> list[DeadLetter]:
    """The letters of these ids, in this order.

    Raises:
        RollfleetError: There is no such letter; the message names it.
    """
    keys = RunKeys(check_name(run, "the run"))
    partitions = await _partitions(client, keys)
    found = []
    for name in ids:
        partition, entry = _parse(name, partitions)
        rows = await client.xrange(keys.partition(partition).dead, min=entry, max=entry)
        if not rows:
            raise RollfleetError(
                f"run {run!r} has no dead letter {name!r}: see `rollfleet dead list`; it may have "
                "been retried or purged"
            )
        found.append(_letter(partition, entry, rows[0][1], await _now_ms(client)))
    return found


def _parse(name: str, partitions: int) -> tuple[int, str]:
    where, _, entry = name.rpartition("/")
    millis, dash, seq = entry.partition("-")
    if (where and not where.isdecimal()) or not (millis.isdecimal() and dash and seq.isdecimal()):
        raise SettingsError(
            f"{name!r} is no id of a dead letter: they look like 1755000000000-0, as in "
            "`rollfleet dead list`"
        )
    if int(where or 0) >= partitions:
        raise SettingsError(f"{name!r}: this run has {partitions} partition(s), counted from 0")
    return int(where or 0), entry


async def _now_ms(client: Any) -> int:
    seconds, micros = await client.time()
    return int(seconds) * 1000 + int(micros) // 1000


def _letter(partition: int, entry: str, fields: Mapping[bytes, bytes], now_ms: int) -> DeadLetter:
    text = {decoded(k): decoded(v) for k, v in fields.items()}
    # What was quarantined came from no attempt: its text is a sentence.
    history = () if text.get("why") == "garbage" else tuple(_records(text.get("e", "")))
    prompt, detail = None, str(history[-1].get("detail", "")) if history else text.get("e", "")
    try:
        prompt = decode_prompt(fields[b"d"])
    except KeyError:
        detail = detail or "it holds no prompt"
    except WireError as exc:
        detail = detail or str(exc)
    return DeadLetter(
        partition=partition,
        entry=entry,
        group=text.get("g", ""),
        index=_number(text.get("i", ""), -1),
        kind=text.get("k", ""),
        attempts=_number(text.get("a", ""), 0),
        why=text.get("why", "?"),
        age_s=max(0.0, (now_ms - int(entry.partition("-")[0])) / 1000),
        detail=detail,
        history=history,
        prompt=prompt,
    )


def _records(lines: str) -> Iterable[Mapping[str, Any]]:
    """The history, one JSON object a line; a line of anything else is kept as it is."""
    for line in lines.splitlines():
        try:
            record = parse_json(line)
        except ValueError:
            record = None
        yield record if isinstance(record, dict) else {"detail": line}


def _number(text: str, otherwise: int) -> int:
    # Python refuses to read thousands of digits, which garbage may have.
    return int(text) if len(text) < 20 and text.removeprefix("-").isdecimal() else otherwise


# ---- acting --------------------------------------------------------------------------------------


async def retry(client: Any, run: str, letter: DeadLetter) -> bool:
    """Submit a dead prompt again as a new group of one, and remove the letter.

    Returns:
        False if it had been submitted before, and only the letter was left.

    Raises:
        RollfleetError: It holds no prompt, or no trainer has opened the run.
    """
    keys = RunKeys(run)
    if letter.prompt is None:
        raise RollfleetError(
            f"dead letter {letter.id} holds no prompt that can be read ({letter.detail}): it can "
            "only be purged"
        )
    token = await client.hget(keys.board, "token")
    if token is None:
        raise RollfleetError(f"run {run!r} was never opened by a trainer: nobody to retry for")
    # No deadline, which may have passed, and no position, which belongs to the group that closed.
    prompt = replace(letter.prompt, group=letter.retry_group, n=1, deadline_ms=0, position=-1)
    partitions = await _partitions(client, keys)
    home = Streams(client, keys.partition(partition_of(prompt.group, partitions)))
    submission = Submission(f"retry:{letter.id}", prompt)
    try:
        states, _ = await home.submit(token.decode(), -1, [submission], max_bytes=2**31)
    except SupersededError as exc:
        raise RollfleetError(
            f"a trainer is opening run {run!r} at this moment: try again in a second"
        ) from exc
    await client.xdel(keys.partition(letter.partition).dead, letter.entry)
    return states[0] is Submitted.YES


async def purge(client: Any, run: str, letters: Iterable[DeadLetter]) -> int:
    """Delete letters for good; returns how many were still there."""
    keys = RunKeys(run)
    gone = 0
    for letter in letters:
        gone += int(await client.xdel(keys.partition(letter.partition).dead, letter.entry))
    return gone


async def select(
    client: Any,
    run: str,
    *,
    ids: Iterable[str] = (),
    why: str | None = None,
    older_than_s: float | None = None,
    limit: int | None = None,
) -> list[DeadLetter]:
    """Letters by id, or all that match; the newest first within a partition."""
    if ids := list(ids):
        letters = await find(client, run, ids)
        return [letter for letter in letters if _matches(letter, why, older_than_s)]
    chosen: list[DeadLetter] = []
    async for letter in read(client, run):
        if limit is not None and len(chosen) >= limit:
            break
        if _matches(letter, why, older_than_s):
            chosen.append(letter)
    return chosen


def _matches(letter: DeadLetter, why: str | None, older_than_s: float | None) -> bool:
    return why in (None, letter.why) and (older_than_s is None or letter.age_s > older_than_s)


# ---- showing -------------------------------------------------------------------------------------


def to_json(letter: DeadLetter, *, whole: bool) -> dict[str, Any]:
    """A letter in types that JSON knows; `whole` adds the prompt and the history."""
    tree = {"id": letter.id} | asdict(replace(letter, prompt=None, history=()))
    tree["history"] = letter.history
    del tree["prompt"]
    if not whole:
        del tree["history"]
        return tree
    tree["prompt"] = None
    if (prompt := letter.prompt) is not None:
        fields = asdict(replace(prompt, data={}, sampling={}))
        fields |= {"data": json_safe(prompt.data), "sampling": json_safe(prompt.sampling)}
        tree["prompt"] = fields | {"token_ids": prompt.token_ids.tolist()}
    return tree


def render_list(letters: list[DeadLetter]) -> RenderableType:
    """Letters, one a line."""
    if not letters:
        return Text("No dead letters.", style="green")
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for name in ("id", "why", "attempts", "kind", "age"):
        table.add_column(name, no_wrap=True, justify="right" if name == "attempts" else "left")
    table.add_column("group, and what was wrong last", overflow="fold")
    for x in cleaned([replace(letter, prompt=None) for letter in letters]):
        what = Text(f"{x.group} #{x.index}\n" if x.group else "")
        what.append(x.detail, style="dim")
        table.add_row(
            x.id, Text(x.why), str(x.attempts or "-"), Text(x.kind or "-"), ago(x.age_s), what
        )
    return table


def render_letter(letter: DeadLetter) -> RenderableType:
    """One letter: its prompt and the history of its attempts."""
    prompt, letter = letter.prompt, cleaned(replace(letter, prompt=None))
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row("id", letter.id)
    grid.add_row("why", Text(f"{letter.why}, {ago(letter.age_s)} ago", style="red"))
    if (p := prompt) is None:
        grid.add_row("prompt", Text(f"cannot be read: {letter.detail}"))
    else:
        tokens = p.token_ids.tolist()
        more = f" and {len(tokens) - SHOWN_TOKENS} more" if len(tokens) > SHOWN_TOKENS else ""
        grid.add_row("group", Text(f"{printable(p.group)}, index {letter.index} of {p.n}"))
        grid.add_row("kind", Text(printable(f"{p.kind.value}, route {p.route}, task {p.task}")))
        grid.add_row("position", str(p.position) if p.position >= 0 else "-")
        grid.add_row("tokens", Text(f"{len(tokens)}: {tokens[:SHOWN_TOKENS]}{more}"))
        grid.add_row("data", Text(printable(json.dumps(json_safe(p.data), ensure_ascii=False))))
        if p.sampling:
            grid.add_row("sampling", Text(printable(json.dumps(json_safe(p.sampling)))))
    history: list[RenderableType] = []
    for record in letter.history:
        at = f"attempt {record.get('attempt', '?')}: {record.get('kind', '?')}"
        where = f" on {record['worker']}" if record.get("worker") else ""
        history.append(Text(printable(f"{at}{where}"), style="bold"))
        history.append(Text(printable(f"  {record.get('detail', '')}")))
    return Group(grid, "", *history)
