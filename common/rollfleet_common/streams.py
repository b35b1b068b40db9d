"""The path, one method a verb: submit, claim, deliver, consume; and settle, which ends it.

- Every method is one atomic step in one partition (a script, a read, or a pipeline whose last
  command is the script that decides).
- Only `submit`, `deliver` and `settle` write, and all three may be repeated after a lost reply:
  submit knows its submission ids, deliver its leases, settle the entries that are still there.
- Errors are redis-py's own; callers wrap what may be repeated in
  :func:`rollfleet_common.redis.retry`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from redis.exceptions import ResponseError

from rollfleet_common.codec import decode_header, decode_prompt, encode_prompt
from rollfleet_common.errors import WireError
from rollfleet_common.keys import PartitionKeys
from rollfleet_common.messages import NO_VERSION, Claim, Header, Kind, Prompt, Tombstone
from rollfleet_common.scripts import trainer
from rollfleet_common.scripts.script import MAX_ARGUMENTS, chunks
from rollfleet_common.scripts.trainer import Submission, Submitted
from rollfleet_common.scripts.worker import Delivered, Delivery, deliver
from rollfleet_common.text import I31, decoded, whole

__all__ = [
    "Arrivals",
    "Delivered",
    "Delivery",
    "Garbage",
    "Streams",
    "Submission",
    "Submitted",
]

#: Fields of a prompt's entry: ours have nine. One of very many could not be handed back.
MAX_FIELDS = 100


@dataclass(frozen=True, slots=True)
class Garbage:
    """A stream entry that is no message of ours."""

    entry: str
    why: str
    fields: Mapping[bytes, bytes]
    #: The route of the prompts stream it was found on; "" on the trainer's streams.
    route: str = ""


@dataclass(frozen=True, slots=True)
class Arrivals:
    """What one read of the trainer brought, by stream entry, in the order of arrival."""

    headers: list[tuple[str, Header]]
    tombstones: list[tuple[str, Tombstone]]
    garbage: list[Garbage]
    #: Garbage among the tombstones.
    garbage_tombstones: list[Garbage]


class Streams:
    """The streams of one partition."""

    def __init__(self, client: Any, keys: PartitionKeys) -> None:
        self.client = client
        self.keys = keys
        #: Members of a group come in a row and share their body: it is decoded once for all.
        self._last: tuple[bytes, Prompt] | None = None

    # ---- 1. submit ---------------------------------------------------------------------------

    async def open(
        self,
        token: str,
        epoch: int,
        version: int,
        min_useful: int,
        *,
        keep: tuple[int, int] = (0, 0),
    ) -> int:
        """Fence the partition for one trainer; returns the position of its last fed prompt.

        Args:
            token: The trainer's.
            epoch: Its epoch.
            version: Its version.
            min_useful: The oldest version that is of use to it.
            keep: Dead letters that the partition keeps at most, and for how many ms; 0: no bound.

        Raises:
            SupersededError: A younger trainer has opened it.
        """
        dead_max, dead_age_ms = keep
        return await trainer.open_(
            self.client,
            self.keys,
            token=token,
            epoch=epoch,
            version=version,
            min_useful=min_useful,
            dead_max=dead_max,
            dead_age_ms=dead_age_ms,
        )

    async def advance(self, token: str, version: int, min_useful: int) -> None:
        """Tell workers (through deliver) which versions are still useful.

        Raises:
            SupersededError: Another trainer has opened the run.
        """
        await trainer.advance(
            self.client, self.keys, token=token, version=version, min_useful=min_useful
        )

    async def submit(
        self, token: str, limit: int, groups: Sequence[Submission], max_bytes: int
    ) -> tuple[list[Submitted], int]:
        """Put whole groups on the stream; returns the state of each, and the outstanding samples.

        Args:
            token: The trainer's.
            limit: Training samples that may be outstanding in this partition; -1 for no limit.
            groups: What to submit, in order.
            max_bytes: Cap on one encoded prompt.

        Raises:
            InvalidPromptError, OversizeError: Before anything was sent.
            SupersededError: Another trainer has opened the run.
        """
        rows = [(group, encode_prompt(group.prompt, max_bytes)) for group in groups]
        return await trainer.submit(self.client, self.keys, token=token, limit=limit, groups=rows)

    async def cancel(self, token: str, prompt: Prompt, reason: str, at_most: int) -> int:
        """Settle up to `at_most` members of a group that were not delivered yet.

        Each gets a tombstone and gives its credit back; a worker that runs one learns it at its
        next renewal.

        Raises:
            SupersededError: Another trainer has opened the run.
        """
        return await trainer.cancel(
            self.client, self.keys, token=token, prompt=prompt, reason=reason, at_most=at_most
        )

    async def make_trainer_groups(self) -> None:
        """Create the trainer's consumer groups where their stream was deleted. Idempotent."""
        for stream in (self.keys.rollouts, self.keys.tombstones):
            try:
                await self.client.xgroup_create(stream, "trainer", id="0", mkstream=True)
            except ResponseError as exc:
                if "BUSYGROUP" not in str(exc):
                    raise

    # ---- 2. claim ----------------------------------------------------------------------------

    async def make_groups(self, routes: Sequence[str]) -> None:
        """Create the workers' consumer groups, from the stream's beginning. Idempotent."""
        for route in routes:
            try:
                await self.client.xgroup_create(
                    self.keys.prompts(route), "workers", id="0", mkstream=True
                )
            except ResponseError as exc:
                if "BUSYGROUP" not in str(exc):
                    raise

    async def claim(
        self, reader: Any, worker: str, routes: Sequence[str], count: int, block_ms: int | None
    ) -> tuple[list[Claim], list[Garbage]]:
        """Lease up to `count` samples (of each route), waiting up to `block_ms` for the first.

        Args:
            reader: The client whose connection may block; never cancel this call while it blocks,
                or leases are granted in a reply that is discarded.
            worker: Who claims.
            routes: Streams to read.
            count: Leases wanted of each route.
            block_ms: None: do not wait.
        """
        names = {self.keys.prompts(route): ">" for route in routes}
        reply = await reader.xreadgroup("workers", worker, names, count=count, block=block_ms)
        claims: list[Claim] = []
        garbage: list[Garbage] = []
        for name, entries in _by_stream(reply):
            route = decoded(name).removeprefix(self.keys.prompts(""))
            for raw_entry, fields in entries:
                made = self.read_claim(route, raw_entry.decode(), fields)
                (claims if isinstance(made, Claim) else garbage).append(made)  # type: ignore[arg-type]
        return claims, garbage

    def read_claim(
        self, route: str, entry: str, fields: Mapping[bytes, bytes] | None
    ) -> Claim | Garbage:
        """A stream entry as a claim, or as what it is when it is not ours."""
        if not fields:
            return Garbage(entry, "the entry was deleted while it was pending", {}, route)
        if len(fields) > MAX_FIELDS:
            return Garbage(entry, f"the entry has {len(fields):,} fields", fields, route)
        try:
            body = fields[b"d"]
            if self._last is None or self._last[0] != body:
                self._last = (body, decode_prompt(body))
            index, attempt = whole(fields[b"i"], 0, I31), whole(fields[b"a"], 1, I31)
        except (KeyError, ValueError, WireError) as exc:
            why = f"missing field {exc}" if isinstance(exc, KeyError) else str(exc)
            return Garbage(entry, why, fields, route)
        prompt = self._last[1]
        if (
            not (index < prompt.n and prompt.route == route)
            or fields.get(b"g") != prompt.group.encode()
        ):
            # Such a lease could not be found again by the names that its prompt gives.
            why = (
                f"the entry is attempt {attempt} at member {index} of group {fields.get(b'g')!r} "
                f"on route {route!r}, its prompt is group {prompt.group!r} of {prompt.n} on route "
                f"{prompt.route!r}"
            )
            return Garbage(entry, why, fields, route)
        return Claim(
            prompt=prompt,
            index=index,
            attempt=attempt,
            entry=entry,
            partition=self.keys.partition,
            queued_ms=int(entry.partition("-")[0]),
            history=fields.get(b"e", b""),
            since=_since(fields.get(b"v", b"")),
        )

    # ---- 3. deliver --------------------------------------------------------------------------

    async def deliver(self, worker: str, items: Sequence[Delivery]) -> list[Delivered]:
        """Publish rollouts and take their prompts off, in one round trip."""
        return await deliver(self.client, self.keys, consumer=worker, items=items)

    # ---- 4. consume --------------------------------------------------------------------------

    async def consume(
        self,
        reader: Any,
        consumer: str,
        count: int,
        block_ms: int | None,
        *,
        since: tuple[str, str] = (">", ">"),
    ) -> Arrivals:
        """Read headers and tombstones; payloads stay where they are.

        Args:
            reader: The client whose connection may block.
            consumer: The trainer's name in the consumer group.
            count: At most this many of each.
            block_ms: None: do not wait.
            since: Of rollouts and of tombstones: ``">"`` for what nobody has read; an entry id
                for this consumer's own unsettled ones after it.
        """
        k = self.keys
        reply = await reader.xreadgroup(
            "trainer",
            consumer,
            {k.rollouts: since[0], k.tombstones: since[1]},
            count=count,
            block=block_ms,
        )
        arrivals = Arrivals([], [], [], [])
        for name, entries in _by_stream(reply):
            for raw_entry, fields in entries:
                entry = raw_entry.decode()
                if name.decode() == k.rollouts:
                    _sort(arrivals.headers, arrivals.garbage, entry, fields, _read_header)
                else:
                    _sort(
                        arrivals.tombstones,
                        arrivals.garbage_tombstones,
                        entry,
                        fields,
                        _read_tombstone,
                    )
        return arrivals

    async def fetch(self, payloads: Sequence[str]) -> list[bytes | None]:
        """Payloads by their key suffix; None where one is missing."""
        found: list[bytes | None] = []
        for some in chunks(payloads, MAX_ARGUMENTS - 1):
            found += await self.client.mget([self.keys.payload(suffix) for suffix in some])
        return found

    async def settle(
        self,
        token: str,
        verb: str,
        rollouts: Sequence[tuple[str, Kind, str]],
        groups: Sequence[str] = (),
        tombstones: Sequence[str] = (),
    ) -> int:
        """The trainer's verdict: ``train``, ``commit[:<of which batch>]`` or ``drop:<reason>``.

        Args:
            token: The trainer's.
            verb: What is decided.
            rollouts: (stream entry, kind, payload suffix) of each.
            groups: Groups of the rollouts; all but ``train`` closes them, and their records go.
            tombstones: Entries of tombstones that go with them.

        Returns:
            How many rollouts changed state; repeats change none.

        Raises:
            SupersededError: Another trainer has opened the run.
        """
        return await trainer.settle(
            self.client,
            self.keys,
            token=token,
            verb=verb,
            rollouts=rollouts,
            groups=groups,
            tombstones=tombstones,
        )

    async def untrain(self, token: str, rollouts: Sequence[tuple[str, Kind]]) -> int:
        """Owe rollouts to a trainer again that it had trained before its checkpoint was lost.

        Raises:
            SupersededError: Another trainer has opened the run.
        """
        return await trainer.untrain(self.client, self.keys, token=token, rollouts=rollouts)

    async def adopt(self, token: str, consumer: str) -> tuple[list[str], list[str]]:
        """Own all that is unsettled, whoever read it; returns entries of rollouts and tombstones.

        Raises:
            SupersededError: Another trainer has opened the run.
        """
        rollouts, tombstones = [
            await trainer.adopt(
                self.client, self.keys, token=token, consumer=consumer, stream=stream
            )
            for stream in (self.keys.rollouts, self.keys.tombstones)
        ]
        return rollouts, tombstones


def _since(text: bytes) -> tuple[int, int]:
    """Epoch and version at submission; before all of them if the entry does not say."""
    epoch, _, version = text.partition(b":")
    try:
        return whole(epoch, -1, I31), whole(version, NO_VERSION, I31)
    except ValueError:
        return -1, NO_VERSION


def _by_stream(reply: Any) -> Iterator[tuple[bytes, list[tuple[bytes, Mapping[bytes, bytes]]]]]:
    """XREADGROUP's reply in the one shape that all redis-py versions and protocols mean."""
    pairs = reply.items() if isinstance(reply, dict) else reply or ()
    for name, entries in pairs:
        # RESP3 nests the entries once more.
        yield name, (entries[0] if entries and isinstance(entries[0], list) else entries)


def _sort(
    good: list[tuple[str, Any]], bad: list[Garbage], entry: str, fields: Any, read: Any
) -> None:
    try:
        good.append((entry, read(fields)))
    except (KeyError, ValueError, WireError) as exc:
        bad.append(Garbage(entry, f"{type(exc).__name__}: {exc}", fields or {}))


def _read_header(fields: Mapping[bytes, bytes]) -> Header:
    return decode_header(fields[b"h"])


def _read_tombstone(fields: Mapping[bytes, bytes]) -> Tombstone:
    n = whole(fields[b"n"], 1, I31)
    return Tombstone(
        # Names are compared with others, so they are read as they are or not at all.
        group=fields[b"g"].decode(),
        index=whole(fields[b"i"], 0, n - 1),
        n=n,
        kind=Kind(fields[b"k"].decode()),
        task=decoded(fields[b"t"]),
        reason=decoded(fields[b"r"]),
        detail=decoded(fields[b"e"]),
        position=whole(fields[b"p"], -1),
    )
