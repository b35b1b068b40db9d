"""Waiting for groups: the next batch of any, a batch of these very prompts, or an evaluation.

- Nothing leaves here that was not judged at the version it leaves with: if one was published while
  payloads were loaded, everything is judged again.
- Every wait is bounded, logs what it waits for, and ends in a StarvedError that says so. Nothing
  that came is lost by that.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import structlog

from rollfleet.batch import Batch
from rollfleet.capacity import Pacer
from rollfleet.commit import Commits
from rollfleet.consume import Consumer
from rollfleet.groups import Group
from rollfleet.payloads import Payloads
from rollfleet.settings import TrainerSettings
from rollfleet.submit import Submitter
from rollfleet_common.errors import BrokerUnavailableError, SettingsError, StarvedError
from rollfleet_common.messages import Kind, Rollout
from rollfleet_common.redis import retry

__all__ = ["Gather"]

log = structlog.get_logger("rollfleet.trainer")

#: How long a waiting trainer goes without looking at the ledger itself.
LOOK_S = 1.0
#: How often a trainer that waits says why.
SAY_S = 30.0
#: How often a prompt that is given up is submitted in one `batch_of`.
TRIES = 8


class Gather:
    """Gathers groups for one trainer.

    `version()` is the trainer's, `check()` raises what failed in the background, `reason()` says
    what the fleet is waiting for.
    """

    def __init__(
        self,
        *,
        settings: TrainerSettings,
        consumer: Consumer,
        payloads: Payloads,
        commits: Commits,
        submitter: Submitter,
        pacer: Pacer,
        version: Callable[[], int],
        check: Callable[[], None],
        reason: Callable[[], Awaitable[str]],
    ) -> None:
        self.settings = settings
        self.consumer = consumer
        self.payloads = payloads
        self.commits = commits
        self.submitter = submitter
        self.pacer = pacer
        self.version = version
        self.check = check
        self.reason = reason
        #: One gathers at a time: two would choose the same groups.
        self._turn = asyncio.Lock()

    async def submit(self, item: Any, limit_s: float) -> str:
        """Submit one prompt when there is room for it; returns its group's name.

        Raises:
            StarvedError: There was none within `limit_s`.
        """
        async with _Patience("room for one more prompt", limit_s, self.reason):
            return await self.submitter.submit(item)

    async def next(self, want: int, limit_s: float) -> Batch | None:
        """A batch of `want` fresh samples; a smaller one, then None, when the feed has ended.

        Raises:
            StarvedError: They did not come within `limit_s`.
            SettingsError: They could never be outstanding at once.
        """
        self._fit(want)
        async with self._turn:
            return await self._next(want, limit_s)

    async def _next(self, want: int, limit_s: float) -> Batch | None:
        began = time.monotonic()
        async with _Patience(f"a batch of {want} samples", limit_s, self.reason) as patience:
            while True:
                version = self.version()
                groups = await self._fresh(want, patience)
                if not groups:
                    return None
                rollouts = await self.payloads.load(groups, version)
                fresh = [group for group in groups if group.name in rollouts]
                enough = sum(len(group.members) for group in fresh) >= want
                # Published meanwhile, or some fell out: judge and choose again.
                if version == self.version() and (enough or (fresh and self._last(fresh, want))):
                    break
        return await self.commits.hand_over(fresh, rollouts, version, time.monotonic() - began)

    async def _fresh(self, want: int, patience: "_Patience") -> list[Group]:
        """Wait for `want` fresh samples; fewer (or none) when the feed has ended."""
        while True:
            self.check()
            self.consumer.news.clear()
            chosen = self.consumer.choose(want)
            groups = await self.consumer.sweep(chosen)
            enough = sum(len(group.members) for group in groups) >= want
            if enough and not self._must_wait(groups):
                return groups
            if len(groups) < len(chosen):
                continue  # others may be ready in place of those that were dropped
            if self._last(groups, want):
                return groups
            await self._news(patience)

    def _must_wait(self, groups: Sequence[Group]) -> bool:
        """Whether the policy has this batch wait for what is still to come."""
        policy, version = self.consumer.policy, self.version()
        if not policy.waits:
            return False
        ready, chosen = self.consumer.ready, {group.name for group in groups}
        submitted = self.submitter.submitted
        coming = [
            submitted[name]
            for name, prompt in self.submitter.out.items()
            if prompt.kind is Kind.TRAIN and name not in ready
            for _ in range(prompt.n)
        ]
        left = [g.oldest for g in ready.values() if g.name not in chosen for _ in g.members]
        each = self.settings.samples_per_version
        given = self.commits.given[1] if self.commits.given[0] == version else 0
        spare = max(each - given - sum(len(group.members) for group in groups), 0)
        return policy.must_wait(coming, version, left=left, per_version=each, spare=spare)

    def _last(self, groups: Sequence[Group], want: int) -> bool:
        """Whether these are all that is left, and nothing more will come."""
        return self.ended and len(groups) == len(self.consumer.choose(want))

    @property
    def ended(self) -> bool:
        """Whether nothing more will come: the feed is exhausted and all it sent is here."""
        if not self.submitter.fed or self.consumer.groups.open:
            return False
        here = sum(len(group.members) for group in self.consumer.ready.values())
        return self.pacer.outstanding <= here + self.commits.handed

    async def batch_of(self, items: Sequence[Any], limit_s: float) -> Batch:
        """Submit `items` and hand over as many groups; what is given up is submitted again.

        Raises:
            StarvedError: They did not come in time, or one was given up :data:`TRIES` times.
            SettingsError: They could never be outstanding at once.
        """
        self._fit(len(items) * self.settings.group_size)
        async with self._turn:
            return await self._batch_of(items, limit_s)

    async def _batch_of(self, items: Sequence[Any], limit_s: float) -> Batch:
        began = time.monotonic()
        wanted: dict[str, tuple[Any, int]] = {}
        try:
            async with _Patience(f"{len(items)} groups", limit_s, self.reason) as patience:
                for item in items:
                    await self._want(wanted, item, 1)
                while True:
                    self.check()
                    self.consumer.news.clear()
                    version = self.version()
                    ready = self.consumer.ready
                    fresh = await self.consumer.sweep([ready[g] for g in wanted if g in ready])
                    whole = len(fresh) == len(wanted)
                    rollouts = await self.payloads.load(fresh, version) if whole else {}
                    if len(rollouts) == len(wanted) and version == self.version():
                        break
                    await self._again(wanted)
                    await self._news(patience)
            return await self.commits.hand_over(fresh, rollouts, version, time.monotonic() - began)
        finally:
            self.consumer.reserved = set()

    async def evaluate(self, items: Sequence[Any], limit_s: float) -> list[list[Rollout]]:
        """Run `items` outside of pacing and staleness; returns their rollouts, in order.

        A sample that died is missing from its list.

        Raises:
            StarvedError: They did not come in time.
        """
        async with _Patience(f"{len(items)} evaluations", limit_s, self.reason) as patience:
            names = [await self.submitter.submit(item, kind=Kind.EVAL) for item in items]
            evals = self.consumer.evals
            while not all(name in evals for name in names):
                self.check()
                self.consumer.news.clear()
                await self._news(patience)
        groups = [evals.pop(name) for name in names]
        loaded = await self.payloads.load(
            [group for group in groups if group.members], self.version()
        )
        await self.consumer.finish(groups)
        return [loaded.get(name, []) for name in names]

    def _fit(self, samples: int) -> None:
        s = self.settings
        room = (s.depth + 1) * s.samples_per_version
        if samples > room:
            raise SettingsError(
                f"{samples} samples cannot be outstanding at once; only (pipeline_depth + 1) x "
                f"samples_per_version = ({s.depth} + 1) x {s.samples_per_version} = {room} may, so "
                "the wait would never end"
            )

    async def _want(self, wanted: dict[str, tuple[Any, int]], item: Any, tried: int) -> None:
        name = self.submitter.name()
        wanted[name] = (item, tried)
        self.consumer.reserved = set(wanted)  # before it can arrive
        await self.submitter.submit(item, name=name)

    async def _again(self, wanted: dict[str, tuple[Any, int]]) -> None:
        """Submit once more what was given up among the wanted groups."""
        given_up, self.consumer.given_up = self.consumer.given_up, set()
        for name in given_up & wanted.keys():
            item, tried = wanted.pop(name)
            if tried >= TRIES:
                raise StarvedError(f"prompt {item!r:.200} was given up {tried} times")
            await self._want(wanted, item, tried + 1)

    async def _news(self, patience: "_Patience") -> None:
        """Wait for an arrival, a moment at most; then look at the ledger's truth."""
        await patience.say()
        try:
            async with asyncio.timeout(LOOK_S):
                await self.consumer.news.wait()
        except TimeoutError:
            with suppress(BrokerUnavailableError):
                await retry(self.submitter.look, what="read the ledger", deadline_s=LOOK_S)


class _Patience:
    """A bound on a wait, whatever it hangs in, that knows what was waited for."""

    def __init__(self, what: str, limit_s: float, reason: Callable[[], Awaitable[str]]) -> None:
        self.what = what
        self.limit_s = limit_s
        self.reason = reason
        self.began = time.monotonic()
        self._say_at = self.began + SAY_S
        self._timeout = asyncio.timeout(limit_s)
        self._late = TimeoutError()

    async def __aenter__(self) -> Self:
        await self._timeout.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        late = exc is self._late
        try:
            await self._timeout.__aexit__(kind, exc, tb)
        except TimeoutError:
            late = True
        if late:
            raise StarvedError(
                f"{self.what} did not come within {self.limit_s:g} s: {await self.reason()}"
            ) from None

    async def say(self) -> None:
        """Now and then, log what is waited for."""
        if self._timeout.expired():
            raise self._late  # its cancellation was lost on the way (rollfleet_common.tasks)
        now = time.monotonic()
        if now >= self._say_at:
            self._say_at = now + SAY_S
            why = await self.reason()
            log.warning("waiting", for_s=round(now - self.began), what=self.what, why=why)
