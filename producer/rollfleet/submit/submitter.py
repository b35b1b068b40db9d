"""1. submit: prompts onto the stream, no faster than the ledger allows.

- The server remembers the position of the last fed prompt it took, so a feed that begins anew
  resumes where it stood, and a repeat after a lost reply sends nothing twice.
- A stateful source is put back where it stood at the checkpoint, and read on from there up to what
  the server has.
- A prompt that could never fit is refused at once, with the arithmetic.
"""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from dataclasses import replace
from typing import Any

from rollfleet.line import Line
from rollfleet.settings import TrainerSettings
from rollfleet.state.capacity import Pacer
from rollfleet.state.deadlines import Deadlines
from rollfleet.submit.feed import Feeder, to_prompt
from rollfleet.submit.resumable import Mark, Stateful
from rollfleet_common.errors import InvalidPromptError, SettingsError
from rollfleet_common.keys import partition_of
from rollfleet_common.ledger import Books
from rollfleet_common.logs import get_logger
from rollfleet_common.messages import Kind, Prompt
from rollfleet_common.streams import Streams, Submission, Submitted

__all__ = ["Submitter"]

log = get_logger("rollfleet.trainer")

#: How long a blocked submission goes without looking at the ledger itself.
LOOK_S = 1.0
#: How many groups that are no longer out may be remembered.
KEEP = 1000


class Submitter:
    """Submits for one trainer.

    Args:
        token: The trainer's.
        prefix: What names of groups submitted by hand begin with; unique to this trainer.
        streams: Of every partition, in order.
        settings: Of the trainer.
        pacer: Decides how much may be out.
        books: Reads the ledger.
        check: Raises whatever failed in the background.
        line: To Redis.
        version: The trainer's.
        out: Takes the prompts of the groups that are out, in case Redis forgets them.
        cursor: Position of the last prompt that was fed before; -1 if none was.
        again: Positions up to that which are to be fed again.
        stood: Where a stateful source stood at the checkpoint.
    """

    def __init__(
        self,
        *,
        token: str,
        prefix: str,
        streams: Sequence[Streams],
        settings: TrainerSettings,
        pacer: Pacer,
        books: Callable[[], Awaitable[Books]],
        version: Callable[[], int],
        check: Callable[[], None],
        line: Line,
        out: MutableMapping[str, Prompt],
        cursor: int,
        again: frozenset[int] = frozenset(),
        stood: Mark | None = None,
    ) -> None:
        self.token = token
        self.prefix = prefix
        self.streams = streams
        self.settings = settings
        self.pacer = pacer
        self.books = books
        self.check = check
        self.line = line
        self.version = version
        self.cursor = cursor
        self.again = again
        self.stood = stood
        self.out = out
        self.deadlines = Deadlines(out)
        #: The version at which each of them was submitted.
        self.submitted: dict[str, int] = {}
        #: Training groups submitted by this trainer.
        self.sent = 0
        #: Set whenever credit may have come back.
        self.credit = asyncio.Event()
        self.feeder: Feeder | None = None
        #: The source of the feed is exhausted, and all of it was submitted.
        self.fed = False

    @property
    def feeding(self) -> bool:
        """Whether an iterable is being submitted."""
        return self.feeder is not None and not self.fed

    def begin(self, source: Iterable[Any]) -> None:
        """Start to pull an iterable; :meth:`feed` submits what it yields.

        Raises:
            SettingsError: A feed is running already.
        """
        if self.feeding:
            raise SettingsError("a feed is running; one run is fed from one iterable at a time")
        skip, again, self.again = self.cursor + 1, self.again, frozenset()
        if skip:
            log.info("resuming the feed", skip=skip)
        self.fed = False
        self.feeder = Feeder(
            source,
            skip,
            self.settings.launched,
            asyncio.get_running_loop(),
            again,
            self._stood(source, min((skip, *again))),
            self._oldest,
            self._dated,
        )
        self.feeder.start()

    def _stood(self, source: Iterable[Any], due: int) -> Mark | None:
        """The checkpoint's place in `source`, if the prompt of position `due` can be had from it."""
        stood, self.stood = self.stood, None
        if stood is None:
            return None
        if not isinstance(source, Stateful):
            why = "the source has no load_state_dict"
        elif stood.position > due:
            why = f"Redis lost what was submitted since position {due}"
        else:
            return stood
        log.warning("the source is read from its beginning", why=why, stood=stood.position)
        return None

    def _oldest(self) -> int:
        """The oldest position that a trainer that resumes from now might have to feed."""
        reached = self.cursor + 1 if self.feeder is None else self.feeder.reached
        return min((reached, *(p.position for p in self.out.values() if p.position >= 0)))

    @property
    def source_state(self) -> dict[str, Any] | None:
        """Where the source of the feed stands, as a checkpoint must know it; None if it cannot say."""
        mark = self.stood if self.feeder is None else self.feeder.marks.before(self._oldest())
        return None if mark is None else mark.as_dict()

    async def feed(self) -> None:
        """Submit until the source is exhausted.

        Raises:
            RollfleetError: The source raised, or yielded what is no prompt.
        """
        assert self.feeder is not None, "begin() comes first"  # noqa: S101 - a defect
        while (prompt := await self.feeder.peek()) is not None:
            self.check()
            self._fits(prompt)
            await self._room(prompt.n)
            row = self.feeder.more(max(self.pacer.room, prompt.n))
            for other in row[1:]:
                self._fits(other)
            await self._submit([Submission(f"@{p.position}", p) for p in row])
            self.cursor = max(self.cursor, row[-1].position)
            self.feeder.took(len(row))
        self.fed = True

    def name(self) -> str:
        """A name for a group that is submitted by hand."""
        return f"{self.prefix}-{secrets.token_hex(6)}"

    async def submit(self, item: Any, *, name: str = "", kind: Kind | None = None) -> str:
        """Submit one prompt, waiting for room; returns its group's name.

        Args:
            item: For :func:`rollfleet.submit.feed.to_prompt`.
            name: Of the group; a new one if not given.
            kind: In place of the item's own.

        Raises:
            InvalidPromptError, OversizeError: Nothing was sent.
            SupersededError: Another trainer has opened the run.
        """
        self.check()
        group = name or self.name()
        prompt = self._dated(to_prompt(item, group=group, group_size=self.settings.launched))
        if kind is not None:
            prompt = replace(prompt, kind=kind, n=self.settings.group_size)
        if prompt.kind is Kind.TRAIN or kind is None:
            self._fits(prompt)
            await self._room(prompt.n)
        await self._submit([Submission(group, prompt)])
        return group

    def _dated(self, prompt: Prompt) -> Prompt:
        """A deadline is given by this host's clock, and judged by Redis's."""
        if prompt.deadline_ms <= 0:
            return prompt
        return replace(
            prompt, deadline_ms=max(1, int(self.line.clock.from_wall_ms(prompt.deadline_ms)))
        )

    async def look(self) -> None:
        """Take the ledger's word for what is outstanding."""
        self.pacer.outstanding = (await self.books()).outstanding

    def _fits(self, prompt: Prompt) -> None:
        if prompt.kind is Kind.EVAL:
            raise InvalidPromptError(
                f"prompt of group {prompt.group} is an evaluation; use evaluate(), which waits for "
                "its rollouts: batches are for training"
            )
        s = self.settings
        room = (s.depth + 1) * s.samples_per_version
        if prompt.n > room:
            raise InvalidPromptError(
                f"prompt of group {prompt.group} asks for n = {prompt.n} samples, but only "
                f"(pipeline_depth + 1) x samples_per_version = ({s.depth} + 1) x "
                f"{s.samples_per_version} = {room} may be outstanding: it could never be submitted"
            )

    async def _room(self, samples: int) -> None:
        """Wait until the ledger has room for `samples`."""
        while True:
            if not self.pacer.tallied:
                await self.line(self.look, "read the ledger")
            if self.pacer.room >= samples:
                return
            self.credit.clear()
            try:
                async with asyncio.timeout(LOOK_S):
                    await self.credit.wait()
            except TimeoutError:
                await self.line(self.look, "read the ledger")
            self.check()

    async def _submit(self, groups: Sequence[Submission]) -> None:
        """Submit all, in order; one script call takes a row of one partition."""
        left = list(groups)
        while left:
            partition = self.partition(left[0].prompt)
            row = [left[0]]
            for group in left[1:]:
                if self.partition(group.prompt) != partition:
                    break
                row.append(group)
            taken = await self._submit_row(partition, row)
            del left[:taken]
            if left and taken < len(row):
                await self._room(left[0].prompt.n)

    async def _submit_row(self, partition: int, row: Sequence[Submission]) -> int:
        """Submit to one partition; returns how many were taken before it was full."""
        # A partition knows its own part only: with several, the sum is ours to watch.
        limit = self.pacer.limit if len(self.streams) == 1 else -1
        version = self.version()  # before the call: what is claimed during it is no older
        states, outstanding = await self.line(
            lambda: self.streams[partition].submit(
                self.token, limit, row, self.settings.max_prompt_bytes
            ),
            f"submit {len(row)} prompts",
        )
        for group, state in zip(row, states, strict=True):
            if state is Submitted.YES:
                self.out[group.prompt.group] = group.prompt
                self.submitted[group.prompt.group] = version
                self.sent += group.prompt.kind is Kind.TRAIN
        self.deadlines.add(group.prompt for group in row if group.prompt.group in self.out)
        if len(self.submitted) > 2 * len(self.out) + KEEP:
            self.submitted = {name: self.submitted[name] for name in self.out}
        if len(self.streams) == 1:
            self.pacer.outstanding = outstanding
        else:
            self.pacer.outstanding += sum(
                group.prompt.n
                for group, state in zip(row, states, strict=True)
                if state is Submitted.YES and group.prompt.kind is Kind.TRAIN
            )
        return sum(state is not Submitted.FULL for state in states)

    def partition(self, prompt: Prompt) -> int:
        """Where a group lives."""
        return partition_of(prompt.group, len(self.streams))
