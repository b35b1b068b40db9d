"""Waiting for groups: the next batch of any, a batch of these very prompts, or an evaluation.

- Nothing leaves here that was not judged at the version it leaves with: if one was published while
  payloads were loaded or the plan was written, or since a batch was prepared, everything is judged
  again.
- Every wait is bounded, logs what it waits for, and ends in a StarvedError that says so. Nothing
  that came is lost by that.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from typing import Any

from rollfleet.batch import Batch
from rollfleet.consume.evaluation import Evaluation, failures_of
from rollfleet.consume.payloads import Payloads
from rollfleet.consume.prefetch import Prefetcher
from rollfleet.consume.reader import RolloutReader
from rollfleet.consume.settler import Settler
from rollfleet.records import Group
from rollfleet.settings import TrainerSettings
from rollfleet.state.capacity import Pacer
from rollfleet.submit.submitter import Submitter
from rollfleet.waiting import BoundedWait
from rollfleet_common.errors import BrokerUnavailableError, SettingsError, StarvedError
from rollfleet_common.messages import Kind
from rollfleet_common.redis import retry

__all__ = ["BatchSource"]

#: How long a waiting trainer goes without looking at the ledger itself.
LOOK_S = 1.0
#: How often a prompt that is given up is submitted in one `batch_of`.
TRIES = 8


class BatchSource:
    """Gathers groups for one trainer.

    `version()` is the trainer's, `check()` raises what failed in the background, `reason()` says
    what the fleet is waiting for; tensors are made ahead in `thread`.

    Whoever plans batches of his own ahead calls :meth:`pick` and, when he hands one over,
    :meth:`recheck` and :meth:`must_wait`; what he picked stays ready, in the books and here.
    """

    def __init__(
        self,
        *,
        settings: TrainerSettings,
        consumer: RolloutReader,
        payloads: Payloads,
        commits: Settler,
        submitter: Submitter,
        pacer: Pacer,
        version: Callable[[], int],
        check: Callable[[], None],
        reason: Callable[[], Awaitable[str]],
        thread: Executor,
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
        self.ahead = Prefetcher(
            depth=settings.prefetch,
            per_version=settings.samples_per_version,
            payloads=payloads,
            consumer=consumer,
            commits=commits,
            version=version,
            last=self._last,
            turn=self._turn,
            thread=thread,
        )

    async def submit(self, item: Any, limit_s: float) -> str:
        """Submit one prompt when there is room for it; returns its group's name.

        Raises:
            StarvedError: There was none within `limit_s`.
        """
        async with BoundedWait("room for one more prompt", limit_s, self.reason):
            return await self.submitter.submit(item)

    async def next(self, want: int, limit_s: float) -> Batch | None:
        """A batch of `want` fresh samples; a smaller one, then None, when the feed has ended.

        Raises:
            StarvedError: They did not come within `limit_s`.
            SettingsError: They could never be outstanding at once.
        """
        self._fit(want)
        began = time.monotonic()
        async with BoundedWait(f"a batch of {want} samples", limit_s, self.reason) as patience:
            while True:
                seen = self.consumer.news.count
                async with self._turn:
                    version = self.version()
                    groups = await self._fresh(want)
                    if groups is not None and not groups:
                        return None
                    batch = await self._take(groups, want, version, began) if groups else None
                if batch is not None:
                    return batch
                if groups is None:
                    await self._news(patience, seen)

    async def _take(
        self, groups: Sequence[Group], want: int, version: int, began: float
    ) -> Batch | None:
        """The batch of `groups`, judged at `version`; None if it must be chosen again."""
        ready = self.consumer.ready
        if any(ready.get(group.name) is not group for group in groups):
            return None  # Redis lost the run since: they are sent again
        before = sum(len(g.members) for g in groups if self.payloads.holds(g))
        self.payloads.keep_only([*groups, *self.ahead.groups])
        rollouts = await self.payloads.load(groups, version)
        fresh = [group for group in groups if group.name in rollouts]
        # Some fell out, or a version was published meanwhile.
        if _samples(fresh) < want and not (fresh and self._last(fresh, want)):
            return None
        if version != self.version():
            return None
        batch = await self.commits.hand_over(fresh, rollouts, version, time.monotonic() - began)
        if batch is not None:
            batch.counted = {**batch.counted, "rollfleet/prefetched": before / len(batch)}
            self.payloads.release(fresh)
            self.ahead.handed(batch, want)
        return batch

    async def pick(
        self, want: int, patience_s: float, besides: Collection[str] = frozenset()
    ) -> list[Group]:
        """Groups of `want` samples, judged fresh now and not loaded; they stay ready.

        Args:
            want: Samples.
            patience_s: Longest wait.
            besides: Groups that are not to be taken: those of batches planned before this one.

        Returns:
            Fewer when the feed has ended, none when nothing is left.

        Raises:
            StarvedError: They did not come within `patience_s`.
            SettingsError: They could never be outstanding at once.
        """
        self._fit(want)
        async with BoundedWait(f"{want} samples", patience_s, self.reason) as patience:
            while True:
                seen = self.consumer.news.count
                async with self._turn:
                    groups = await self._fresh(want, besides)
                if groups is not None:
                    return groups
                await self._news(patience, seen)

    async def recheck(self, groups: Sequence[Group]) -> list[Group]:
        """Those of `groups` that may still be trained on at this moment, in order.

        What became stale is dropped and counted. What a Redis that lost the run took with it is
        only left out: it is sent again.
        """
        ready = self.consumer.ready
        return await self.consumer.sweep([g for g in groups if ready.get(g.name) is g])

    async def _fresh(self, want: int, besides: Collection[str] | None = None) -> list[Group] | None:
        """`want` fresh samples; fewer (or none) when the feed has ended; None: not yet.

        Args:
            want: Samples.
            besides: As in :meth:`pick`; None for the next batch, which may be a prepared one.
        """
        while True:
            self.check()
            others = besides or frozenset()
            chosen = (
                self.ahead.choose(want) if besides is None else self.consumer.choose(want, besides)
            )
            groups = await self.consumer.sweep(chosen)
            if _samples(groups) >= want and not self.must_wait(groups, others):
                return groups
            if len(groups) < len(chosen):
                continue  # others may be ready in place of those that were dropped
            return groups if self._last(groups, want, others) and await self._over() else None

    async def _over(self) -> bool:
        """Whether nothing more will come, by the ledger: the count here may be too low for a while.

        A submit that is answered before a commit that Redis carried out first counts its credit twice.
        """
        books = await self.submitter.line(self.submitter.books, "read the ledger")
        self.pacer.outstanding = max(self.pacer.outstanding, books.outstanding)
        return self.ended

    def must_wait(self, groups: Sequence[Group], besides: Collection[str] = frozenset()) -> bool:
        """Whether the policy has a batch of `groups` wait, at this moment, for what is to come.

        `besides` are groups of batches that go before it.
        """
        policy, version = self.consumer.policy, self.version()
        if not policy.waits:
            return False
        ready = self.consumer.ready
        chosen = {group.name for group in groups} | set(besides)
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
        given += _samples([ready[name] for name in chosen if name in ready])
        spare = max(each - given, 0)
        return policy.must_wait(coming, version, left=left, per_version=each, spare=spare)

    def _last(
        self, groups: Sequence[Group], want: int, besides: Collection[str] = frozenset()
    ) -> bool:
        """Whether these are all that is left, and nothing more will come."""
        return self.ended and len(groups) == len(self.consumer.choose(want, besides))

    @property
    def ended(self) -> bool:
        """Whether nothing more will come: the feed is exhausted and all it sent is here."""
        if not self.submitter.fed or self.consumer.owing:
            return False
        # An open group that nobody submitted may never close; of an earlier trainer's, what is
        # missing is outstanding.
        if any(name in self.submitter.out for name in self.consumer.groups.open):
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
        async with (
            BoundedWait(f"{len(items)} groups", limit_s, self.reason) as patience,
            self._turn,
        ):
            try:
                return await self._batch_of(items, patience)
            finally:
                self.consumer.reserved = set()

    async def _batch_of(self, items: Sequence[Any], patience: BoundedWait) -> Batch:
        wanted: dict[str, tuple[Any, int]] = {}
        for item in items:
            await self._want(wanted, item, 1)
        while True:
            self.check()
            seen = self.consumer.news.count
            version, ready = self.version(), self.consumer.ready
            fresh = await self.consumer.sweep([ready[g] for g in wanted if g in ready])
            whole = len(fresh) == len(wanted)
            rollouts = await self.payloads.load(fresh, version) if whole else {}
            if len(rollouts) == len(wanted) and version == self.version():
                waited_s = time.monotonic() - patience.began
                batch = await self.commits.hand_over(fresh, rollouts, version, waited_s)
                if batch is not None:
                    self.payloads.release(fresh)
                    return batch
            await self._again(wanted)
            await self._news(patience, seen)

    async def evaluate(self, items: Sequence[Any], limit_s: float) -> Evaluation:
        """Run `items` outside of pacing and staleness; returns their rollouts, in order.

        A sample that died is missing from its list, and is named in `failures`.

        Raises:
            StarvedError: They did not come in time.
        """
        async with BoundedWait(f"{len(items)} evaluations", limit_s, self.reason) as patience:
            names = [await self.submitter.submit(item, kind=Kind.EVAL) for item in items]
            evals = self.consumer.evals
            while not all(name in evals for name in names):
                self.check()
                await self._news(patience, self.consumer.news.count)
        groups = [evals.pop(name) for name in names]
        loaded = await self.payloads.read([group for group in groups if group.members])
        await self.consumer.finish(groups)
        return Evaluation(
            (loaded.get(name, []) for name in names), [failures_of(group) for group in groups]
        )

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

    async def _news(self, patience: BoundedWait, seen: int) -> None:
        """Wait for an arrival after `seen`, a moment at most; then look at the ledger's truth."""
        await patience.say()
        try:
            async with asyncio.timeout(LOOK_S):
                await self.consumer.news.wait(seen)
        except TimeoutError:
            with suppress(BrokerUnavailableError):
                await retry(self.submitter.look, what="read the ledger", deadline_s=LOOK_S)


def _samples(groups: Sequence[Group]) -> int:
    return sum(len(group.members) for group in groups)
