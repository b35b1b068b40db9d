"""4. consume: headers off the stream, groups whole, the stale dropped, batches chosen.

- Only headers are read here; a group that is dropped moves no payload.
- Whatever was read and not settled is this trainer's to settle: after a lost reply, after a crash,
  and from a reader that was superseded, it is found again in the pending list.
- Nothing is acknowledged before its verdict is final. A group that is dropped is settled to the end,
  whether or not whoever dropped it still waits.
- What was read of a run that Redis lost means nothing in its next life: not read on, not settled.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import (
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from typing import Any

from redis.exceptions import ResponseError

from rollfleet.consume.drop_log import DropLog
from rollfleet.line import Line
from rollfleet.policy.checked import CheckedPolicy
from rollfleet.policy.metrics import BiasMeter
from rollfleet.policy.version_history import VersionHistory
from rollfleet.records import Group, Member
from rollfleet.state.groups import Groups
from rollfleet.submit.breaker import Breaker
from rollfleet.tasks import OwnedTasks
from rollfleet.waiting import News
from rollfleet_common.errors import SupersededError
from rollfleet_common.keys import partition_of
from rollfleet_common.leases import quarantine
from rollfleet_common.logs import get_logger
from rollfleet_common.messages import Header, Kind, Prompt, Tombstone
from rollfleet_common.redis import is_transient
from rollfleet_common.streams import Arrivals, Garbage, Streams
from rollfleet_common.text import I31, decoded, printable, whole

__all__ = ["RolloutReader"]

log = get_logger("rollfleet.trainer")

BLOCK_MS = 500
#: Headers of one read.
COUNT = 500
#: Seconds between two looks for entries that were read in a reply we never saw.
ADOPT_S = 10.0
#: Trained samples that are remembered: many times what one second can lose.
RECENT = 20_000


class RolloutReader:
    """Reads all partitions of a run for one trainer."""

    def __init__(
        self,
        *,
        token: str,
        streams: Sequence[Streams],
        readers: Sequence[Any],
        policy: CheckedPolicy,
        version: Callable[[], int],
        history: VersionHistory,
        on_rollback: str,
        meter: BiasMeter,
        settled: Callable[[int], None],
        surplus: Callable[[int], int],
        least: Callable[[Group], int],
        out: MutableMapping[str, Prompt],
        line: Line,
        breaker: Breaker | None = None,
    ) -> None:
        self.token = token
        self.streams = streams
        self.readers = readers
        self.policy = policy
        self.version = version
        self.history = history
        self.on_rollback = on_rollback
        self.meter = meter
        self.settled = settled
        self.surplus = surplus
        #: Members without which a group is torn.
        self.least = least
        #: Prompts of the groups that are out.
        self.out = out
        self.line = line
        self.breaker = breaker or Breaker(0, 1)
        self.groups = Groups(surplus)
        #: How often Redis lost the run.
        self.life = 0
        #: Closed groups that may be trained on, for train and eval.
        self.ready: dict[str, Group] = {}
        self.evals: dict[str, Group] = {}
        #: Groups that are in a batch which is not committed yet.
        self.handed: dict[str, Group] = {}
        #: Of whatever arrived, for those who wait.
        self.news = News()
        #: Batch of an earlier life by group: served first and in that order.
        self.replay: dict[str, int] = {}
        #: (group, index) trained since the last checkpoint.
        self.recent: OrderedDict[tuple[str, int], None] = OrderedDict()
        #: Groups that are waited for by name, and so are no part of other batches.
        self.reserved: set[str] = set()
        #: Of these, the ones that were dropped.
        self.given_up: set[str] = set()
        #: Groups that are closed, youngest last: what still comes of them is surplus.
        self.over: OrderedDict[str, None] = OrderedDict()
        self.drops: dict[str, int] = {}
        self.drop_log = DropLog()
        self._held: list[set[str]] = [set() for _ in streams]
        self._tombs: list[set[str]] = [set() for _ in streams]
        #: Partitions of which what an earlier trainer left is not all here.
        self._unadopted = set(range(len(streams)))
        #: Drops that are not settled yet.
        self._drops = OwnedTasks("rollfleet-drop")

    # ---- reading -----------------------------------------------------------------------------

    async def run(self, partition: int) -> None:
        """Read one partition until cancelled."""
        adopt_at = 0.0
        while True:
            self._drops.check()
            try:
                if time.monotonic() >= adopt_at:
                    await self.adopt(partition)
                    adopt_at = time.monotonic() + ADOPT_S
                    if partition in self._unadopted:
                        self._unadopted.remove(partition)
                        self.news.set()
                life = self.life
                arrivals = await self.streams[partition].consume(
                    self.readers[partition], self.token, COUNT, BLOCK_MS
                )
            except Exception as exc:
                adopt_at = 0.0  # a reply may be lost, or the stream anew: look at what is pending
                if isinstance(exc, SupersededError) or _group_gone(exc):
                    if not await self.line.revive():
                        raise SupersededError.of(self.streams[partition].keys.run) from exc
                    continue
                if not is_transient(exc):
                    raise
                self.line.on_wait(exc, 1.0)
                await asyncio.sleep(0.2)
                continue
            if life != self.life:
                adopt_at = 0.0  # of which life this is, only Redis knows: ask for what is pending
                continue
            await self._take_in(partition, arrivals)
            self.breaker.check()

    async def close(self) -> None:
        """Stop to settle what was dropped: it is unsettled still, and the next trainer's."""
        await self._drops.close()
        self.drop_log.tell()

    async def adopt(self, partition: int) -> None:
        """Own what is unsettled, and take in what we have not seen of it."""
        streams = self.streams[partition]
        rollouts, tombstones = await streams.adopt(self.token, self.token)
        unseen = set(rollouts) - self._held[partition] | set(tombstones) - self._tombs[partition]
        if not unseen:
            return
        since = ("0-0", "0-0")
        life = self.life
        while life == self.life:
            arrivals = await streams.consume(streams.client, self.token, COUNT, None, since=since)
            if life != self.life:
                return
            await self._take_in(partition, arrivals)
            after = (
                _last(arrivals.headers, arrivals.garbage, since[0]),
                _last(arrivals.tombstones, arrivals.garbage_tombstones, since[1]),
            )
            if after == since:
                return
            since = after

    async def _take_in(self, partition: int, arrivals: Arrivals) -> None:
        """Sort what a read brought; what was seen before changes nothing.

        It ends early if Redis lost the run meanwhile: the rest is of a life that is over.
        """
        life = self.life
        closed, useless = self._take_headers(partition, arrivals)
        buried, late = self._take_tombstones(partition, arrivals)
        closed += buried
        closed += await self._quarantine(partition, arrivals)
        if life != self.life:
            return
        for reason, found in useless.items():
            rollouts = [(entry, header.kind, header.payload) for entry, header in found]
            # The record of a group that is over may have come back with a Redis that lost a second.
            over = {header.group for _, header in found if not self.knows(header.group)}
            await self._settle(partition, f"drop:{reason}", rollouts, over=sorted(over))
            if life != self.life:
                return
            self.settled(sum(kind is Kind.TRAIN for _, kind, _ in rollouts))
        if late:
            await self._settle(partition, "drop:surplus", [], tombstones=late)
        for group in closed:
            if life != self.life:
                return
            self.over[group.name] = None
            await self._judge(group)
        if life != self.life:
            return
        await self._cancel_doomed(arrivals, closed)
        while len(self.over) > RECENT:
            self.over.popitem(last=False)
        if closed or useless:
            self.news.set()

    def _take_headers(
        self, partition: int, arrivals: Arrivals
    ) -> tuple[list[Group], dict[str, list[tuple[str, Header]]]]:
        """Groups that these rollouts closed, and the rollouts that nobody needs, by reason."""
        closed: list[Group] = []
        useless: dict[str, list[tuple[str, Header]]] = {}
        for entry, header in arrivals.headers:
            if entry in self._held[partition]:
                continue
            reason = ""
            if (header.group, header.index) in self.recent or self._known(header):
                reason = "duplicate"
            elif header.group in self.over:
                reason = "surplus"
            if reason:
                useless.setdefault(reason, []).append((entry, header))
                continue
            member = Member(entry, header, *self.history.span(header))
            group, twice = self.groups.arrive(partition, member)
            if twice:
                useless.setdefault("duplicate", []).append((entry, header))
                continue
            self._held[partition].add(entry)
            self.breaker.delivered()
            if group is not None:
                closed.append(group)
        return closed, useless

    def _take_tombstones(self, partition: int, arrivals: Arrivals) -> tuple[list[Group], list[str]]:
        """Groups that these tombstones closed, and those that came after their group closed."""
        closed: list[Group] = []
        late: list[str] = []
        for entry, tombstone in arrivals.tombstones:
            if entry in self._tombs[partition]:
                continue
            if tombstone.kind is Kind.TRAIN:
                self.settled(1)
            self.breaker.died(tombstone)
            if tombstone.group in self.over:
                late.append(entry)
                continue
            self._tombs[partition].add(entry)
            if (group := self.groups.add_tombstone(partition, entry, tombstone)) is not None:
                closed.append(group)
        return closed, late

    async def _cancel_doomed(self, arrivals: Arrivals, closed: Sequence[Group]) -> None:
        """Cancel what is still out of groups that need no more, or cannot become whole any more.

        It saves work; what slips through is dropped when it arrives.
        """
        needless = [(group, "surplus") for group in closed if group.n > group.arrived]
        touched = {tombstone.group for _, tombstone in arrivals.tombstones}
        for group in (g for name in touched if (g := self.groups.open.get(name)) is not None):
            could_be = group.n - len(group.tombstones.keys() - group.members.keys())
            if group.kind is Kind.TRAIN and could_be < self.least(group):
                needless.append((group, _torn(group)))
        life = self.life
        for group, reason in needless:
            if life == self.life:
                await self.cancel(group.name, reason)

    async def cancel(self, name: str, reason: str) -> None:
        """Settle all of a group that was not delivered yet."""
        prompt = self.out.get(name)
        if prompt is None:  # submitted by an earlier trainer: it runs to its end
            return
        streams = self.streams[partition_of(name, len(self.streams))]
        await self._while_it_lives(
            lambda: streams.cancel(self.token, prompt, reason, prompt.n), f"cancel group {name}"
        )

    async def _while_it_lives(self, call: Callable[[], Awaitable[object]], what: str) -> None:
        """Await `call()` until it is answered, or until Redis has lost what it is about.

        In the life after that, the same names may be groups that were sent again.
        """
        life = self.life

        async def once() -> None:
            if self.life == life:
                await call()

        await self.line(once, what)

    def _known(self, header: Header) -> bool:
        """Whether a closed group holds this sample already."""
        name = header.group
        group = self.ready.get(name) or self.handed.get(name) or self.evals.get(name)
        return group is not None and header.index in group.members

    async def _quarantine(self, partition: int, arrivals: Arrivals) -> list[Group]:
        """Put aside what cannot be read; returns the groups that this closed.

        A header that a worker of another release wrote stands beside plain fields that tell whose
        it is, and the group's record names the entry: it is dropped and counted like any rollout, and
        its group closes. Anything else came from no script of ours.
        """
        streams, life = self.streams[partition], self.life
        closed: list[Group] = []
        for garbage in arrivals.garbage:
            log.error("header cannot be read", entry=garbage.entry, why=printable(garbage.why))
            lost = _whose(garbage)
            if lost is None or not await self._delivered(streams, garbage.entry, lost):
                await self._put_aside(streams, streams.keys.rollouts, garbage)
                continue
            rollout = (garbage.entry, lost.kind, decoded(garbage.fields[b"p"]))
            await self._settle(partition, "drop:undecodable", [rollout])
            if life != self.life:
                return []
            self.settled(int(lost.kind is Kind.TRAIN))
            if (group := self.groups.add_tombstone(partition, "", lost)) is not None:
                closed.append(group)
        for garbage in arrivals.garbage_tombstones:
            log.error("tombstone cannot be read", entry=garbage.entry, why=printable(garbage.why))
            await self._put_aside(streams, streams.keys.tombstones, garbage)
        return closed

    async def _delivered(self, streams: Streams, entry: str, lost: Tombstone) -> bool:
        """Whether `deliver` wrote this entry: the record of its group says so."""
        record = streams.keys.group(lost.group)
        place: bytes | None = await self.line(
            lambda: streams.client.hget(record, str(lost.index)), f"look up {entry}"
        )
        return place == b"r" + entry.encode()

    async def _put_aside(self, streams: Streams, stream: str, garbage: Garbage) -> None:
        await self.line(
            lambda: quarantine(streams.client, streams.keys, stream, "trainer", garbage),
            f"quarantine {garbage.entry}",
        )

    # ---- verdicts ----------------------------------------------------------------------------

    async def _judge(self, group: Group) -> None:
        if group.kind is Kind.EVAL:
            self.evals[group.name] = group
        elif not group.members:
            await self.drop([group], max(group.reasons, key=group.reasons.count))
        elif self._lost(group):
            await self.drop([group], "rollback")
        elif (reason := self.policy.judge(group, self.version())) is None or reason == "future":
            self.ready[group.name] = group  # the future may come: judged again at hand-over
            self.breaker.whole()
        else:
            await self.drop([group], reason)

    def _lost(self, group: Group) -> bool:
        """Whether weights that a rollback lost had a part in it, and the run is to drop that."""
        members = group.members.values()
        return self.on_rollback == "drop" and any(self.history.lost(m.header) for m in members)

    def choose(self, samples: int, besides: Collection[str] = frozenset()) -> list[Group]:
        """Ready groups, in the policy's order, until they hold `samples`, if there are so many.

        `besides` are passed over, as are groups that are waited for by name.
        """
        chosen: list[Group] = []
        for group in self.in_order(besides):
            if samples <= 0:
                break
            chosen.append(group)
            samples -= len(group.members)
        return chosen

    def in_order(self, besides: Collection[str] = frozenset()) -> Iterator[Group]:
        """All that :meth:`choose` would ever take, one by one.

        None while some of what is served first may not have been read yet.
        """
        if self.owing:
            return
        for group in sorted(self.ready.values(), key=self._order):
            if group.name not in self.reserved and group.name not in besides:
                yield group

    @property
    def owing(self) -> bool:
        """Whether batches of an earlier life may not all be here."""
        return bool(self.replay and self._unadopted)

    def _order(self, group: Group) -> tuple[float, ...]:
        replay = self.replay.get(group.name, float("inf"))
        return replay, *self.policy.order(group, self.version()), group.seq

    async def sweep(self, groups: Iterable[Group]) -> list[Group]:
        """THE guarantee: judge at the version of this moment; returns what may be trained on."""
        fresh: list[Group] = []
        stale: dict[str, list[Group]] = {}
        for group in groups:
            reason = self.policy.judge(group, self.version())
            if reason is None:
                fresh.append(group)
            else:
                stale.setdefault(reason, []).append(group)
        for reason, dropped in stale.items():
            await self.drop([g for g in dropped if self.ready.get(g.name) is g], reason)
        return [g for g in fresh if self.ready.get(g.name) is g]

    async def drop(self, groups: Sequence[Group], reason: str) -> None:
        """Drop whole groups; their credit returns, though the caller may be cancelled meanwhile."""
        # After a revival the same name is a prompt that was sent again, and may be a group of its own.
        groups = [g for g in groups if g.life == self.life and self.ready.get(g.name, g) is g]
        self.given_up |= {group.name for group in groups} & self.reserved
        sorted_out: dict[tuple[int, str], list[Group]] = {}
        for group in groups:
            why = _torn(group) if reason == "torn" else reason
            sorted_out.setdefault((group.partition, why), []).append(group)
            self.ready.pop(group.name, None)
            self.out.pop(group.name, None)
            self.meter.dropped(group, why, self.version())
            self.drop_log.note(group, why, self.version())
            if group.kind is Kind.TRAIN:
                self.breaker.spoiled(why)
                if "dead" in group.reasons:
                    self.breaker.tore()
        await self._drops(self._settle_dropped(sorted_out))

    async def _settle_dropped(self, dropped: Mapping[tuple[int, str], Sequence[Group]]) -> None:
        """Settle groups that are nowhere but here any more, by partition and reason."""
        life = self.life
        for (partition, why), here in dropped.items():
            if life != self.life:
                return
            members = [member for group in here for member in group.members.values()]
            rollouts = [(m.entry, m.header.kind, m.header.payload) for m in members]
            await self._settle(partition, f"drop:{why}", rollouts, here)
            self.drops[why] = self.drops.get(why, 0) + len(members)
            self.settled(sum(m.header.kind is Kind.TRAIN for m in members))

    def knows(self, name: str) -> bool:
        """Whether all of a group has come; what is missing of an open one may be lost."""
        places = (self.ready, self.handed, self.evals)
        return any(name in place for place in places)

    def settles(self, name: str) -> bool:
        """Whether a group is in a batch, or closed and perhaps being settled."""
        return name in self.handed or name in self.over

    def holds(self, name: str) -> dict[int, str]:
        """Entry of every member of a group that is here, by index."""
        group = self.ready.get(name) or self.evals.get(name) or self.groups.open.get(name)
        members = {} if group is None else group.members
        return {index: member.entry for index, member in members.items()}

    def take_back(self, name: str, indices: Iterable[int]) -> None:
        """These members of a group were submitted again or closed, because their header is gone."""
        ready = self.ready.pop(name, None) or self.evals.pop(name, None)
        group = ready or self.groups.open.get(name)
        if group is None:
            return
        for index in indices:
            member = group.members.pop(index, None)
            if member is not None:
                self._held[group.partition].discard(member.entry)
        self.over.pop(name, None)
        self.groups.open[name] = group
        self.news.set()

    def reset(self) -> None:
        """Redis lost the run: forget what was read of it, but not what was handed over."""
        self.life += 1
        self.groups = Groups(self.surplus, self.life)
        for place in (self.ready, self.evals, self.replay, self.over):
            place.clear()
        for entries in (*self._held, *self._tombs):
            entries.clear()

    def hand(self, groups: Iterable[Group]) -> None:
        """These groups leave in a batch."""
        for group in groups:
            self.handed[group.name] = self.ready.pop(group.name)
            self.out.pop(group.name, None)

    async def finish(self, groups: Sequence[Group]) -> None:
        """Evaluations that were read to the end are freed."""
        for group in groups:
            self.out.pop(group.name, None)
            rollouts = [(m.entry, m.header.kind, m.header.payload) for m in group.members.values()]
            await self._settle(group.partition, "commit", rollouts, [group])

    def remember(self, trained: Iterable[tuple[str, int]]) -> None:
        """Note what was trained, so that a Redis that lost its last second cannot repeat it."""
        self.recent.update(dict.fromkeys(trained))
        while len(self.recent) > RECENT:
            self.recent.popitem(last=False)

    def forget(self, group: Group) -> None:
        """A group left for a batch that was committed."""
        self.ready.pop(group.name, None)
        self.handed.pop(group.name, None)
        self.replay.pop(group.name, None)
        self._held[group.partition] -= {member.entry for member in group.members.values()}
        self._tombs[group.partition] -= {entry for entry, _ in group.tombstones.values()}

    async def _settle(
        self,
        partition: int,
        verb: str,
        rollouts: Sequence[tuple[str, Kind, str]],
        groups: Sequence[Group] = (),
        tombstones: Sequence[str] = (),
        over: Sequence[str] = (),
    ) -> None:
        names = [*over, *(group.name for group in groups)]
        entries = [*tombstones]
        entries += [e for group in groups for e, _ in group.tombstones.values() if e]
        life = self.life
        await self._while_it_lives(
            lambda: self.streams[partition].settle(self.token, verb, rollouts, names, entries),
            f"{verb} {len(rollouts)} rollouts",
        )
        if life == self.life:
            for group in groups:
                self.forget(group)


def _torn(group: Group) -> str:
    """Why a group is torn, as the ledger counts it: for age, if that is what tore it."""
    return "stale" if "stale" in group.reasons else "torn"


def _whose(garbage: Garbage) -> Tombstone | None:
    """Whose rollout an unreadable header was, from the plain fields beside it; None: nobody's."""
    fields = garbage.fields
    try:
        n = whole(fields[b"n"], 1, I31)
        return Tombstone(
            group=fields[b"g"].decode(),
            index=whole(fields[b"i"], 0, n - 1),
            n=n,
            kind=Kind(fields[b"k"].decode()),
            task="?",
            reason="undecodable",
            detail=garbage.why if fields[b"p"] else "",
        )
    except (KeyError, ValueError):
        return None


def _group_gone(exc: Exception) -> bool:
    text = str(exc)
    return isinstance(exc, ResponseError) and ("NOGROUP" in text or "UNBLOCKED" in text)


def _last(rows: Sequence[tuple[str, Any]], garbage: Sequence[Garbage], since: str) -> str:
    """The last entry of a read, by its two numbers."""
    entries = [since, *(entry for entry, _ in rows), *(g.entry for g in garbage)]
    return max(entries, key=lambda entry: tuple(map(int, entry.split("-"))))
