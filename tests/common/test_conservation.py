"""Random histories of a run, in Redis through the real steps and in tests/model.py side by side.

After every event the books are read and compared term by term. ROLLFLEET_TEST_EXAMPLES asks for
more histories than the suite has time for.
"""

import asyncio
import os
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest
from fixtures.rig import INFRA, SHAPE, TOKEN, delivery_of, prompt_of
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from model import Model

from rollfleet.records import Group as Gathered
from rollfleet.records import Member, Plan
from rollfleet.run.recover import recover
from rollfleet.state.groups import Groups
from rollfleet_common.board import Board
from rollfleet_common.codec import decode_header
from rollfleet_common.errors import SupersededError
from rollfleet_common.keys import RunKeys
from rollfleet_common.leases import Leases
from rollfleet_common.ledger import Books, read_books
from rollfleet_common.messages import Claim, Kind
from rollfleet_common.redis import connect
from rollfleet_common.streams import Arrivals, Streams, Submission

T = TypeVar("T")

EXAMPLES = int(os.environ.get("ROLLFLEET_TEST_EXAMPLES", "80"))
#: A failure is made small only where there is time for it.
PHASES = [Phase.generate, *([Phase.shrink] if "ROLLFLEET_TEST_EXAMPLES" in os.environ else [])]
STEPS = 45
WORKERS = ("w0", "w1", "w2")
#: Longer than any of these histories takes: only aged leases are older.
LEASE_MS = 600_000

workers = st.sampled_from(WORKERS)
picks = st.integers(0, 10_000)
counts = st.integers(1, 6)
groups = st.tuples(st.integers(1, 4), st.sampled_from(["train", "train", "eval"]))


class History(RuleBasedStateMachine):
    """One run of one partition: its trainer, three workers, and what they believe they hold."""

    url = ""
    loop: asyncio.AbstractEventLoop

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.client: Any = connect(self.url, role="test")
        self.keys = RunKeys("history")
        self.part = self.keys.partition(0)
        self.board = Board(self.client, self.keys)
        self.streams = Streams(self.client, self.part)
        self.lives = 0
        #: Claims that each worker believes are its own, with the ticket and epoch of each.
        self.held: dict[str, list[tuple[Claim, int, int]]] = {worker: [] for worker in WORKERS}
        self.submitted: list[tuple[str, int, str, int]] = []
        self.batches = 0
        self.checkpoint = 0
        self.committed: set[tuple[str, int]] = set()
        self._born()

    def do(self, step: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(step)

    def _born(self) -> None:
        """A trainer's memory, which dies with it."""
        self.lives += 1
        self.token = f"{TOKEN}-{self.lives}"
        self.groups = Groups()
        self.ready: dict[str, Gathered] = {}
        #: Batches that are handed out or trained, by number.
        self.open: dict[int, tuple[str, list[Gathered]]] = {}

    @initialize(sizes=st.lists(groups, min_size=3, max_size=6))
    def begin(self, sizes: list[tuple[int, str]]) -> None:
        self.do(self.client.flushdb())
        self.do(self._open(-1))
        self.do(self.streams.make_groups(["default"]))
        self.submit(sizes, fed=True, limit=-1)

    async def _open(self, version: int) -> None:
        seized = await self.board.seize(
            self.token, 60_000, "test", SHAPE, version=version, take_over=True
        )
        assert seized.epoch == self.lives
        useful = max(seized.version - 2, 0)
        cursor = await self.streams.open(self.token, seized.epoch, seized.version, useful)
        assert cursor == self.model.cursor
        m = self.model
        m.epoch, m.version, m.min_useful = seized.epoch, seized.version, useful

    # ---- submit ------------------------------------------------------------------------------

    @rule(
        sizes=st.lists(groups, min_size=1, max_size=4),
        fed=st.booleans(),
        limit=st.sampled_from([-1, 4, 8, 20]),
    )
    def submit(self, sizes: list[tuple[int, str]], fed: bool, limit: int) -> None:
        start = self.model.cursor + 1 if fed else len(self.model.groups)
        rows = [
            (f"p{start + i}", n, kind, start + i)
            if fed
            else (f"m{self.lives}-{start + i}", n, kind, -1)
            for i, (n, kind) in enumerate(sizes)
        ]
        self._submit(rows, limit)

    @precondition(lambda self: len(self.submitted) % 3 == 0)
    @rule(pick=picks, limit=st.sampled_from([-1, 0]))
    def submit_again(self, pick: int, limit: int) -> None:
        self._submit([self.submitted[pick % len(self.submitted)]], limit)

    def _submit(self, rows: list[tuple[str, int, str, int]], limit: int) -> None:
        prompts = [
            Submission(name, prompt_of(name, n, kind=Kind(kind), position=position))
            for name, n, kind, position in rows
        ]
        states, outstanding = self.do(self.streams.submit(self.token, limit, prompts, 1 << 20))
        assert [int(state) for state in states] == self.model.submit(rows, limit)
        assert outstanding == self.model.outstanding
        self.submitted += [row for row, state in zip(rows, states, strict=True) if state == 1]

    # ---- workers -----------------------------------------------------------------------------

    @precondition(lambda self: self.model.waiting)
    @rule(worker=workers, count=counts)
    def claim(self, worker: str, count: int) -> None:
        claims, garbage = self.do(self.streams.claim(self.client, worker, ["default"], count, None))
        assert not garbage
        expected = self.model.claim(worker, count)
        assert [(c.prompt.group, c.index, c.attempt) for c in claims] == [
            (s.group, s.index, s.attempt) for s in expected
        ]
        for claim, sample in zip(claims, expected, strict=True):
            assert claim.history.count(b"\n") + bool(claim.history) == sample.failures
            self.held[worker].append((claim, sample.ticket, self.model.epoch))

    def _take(self, worker: str, pick: int, count: int) -> list[tuple[Claim, int, int]]:
        """Some of what a worker believes it holds; it lets go of them."""
        held = self.held[worker]
        at = pick % len(held)
        taken = held[at : at + count]
        del held[at : at + count]
        return taken

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data(), count=counts, behind=st.integers(0, 3), lost=st.booleans())
    def deliver(self, data: st.DataObject, count: int, behind: int, lost: bool) -> None:
        worker = data.draw(self._busy())
        taken = self._take(worker, data.draw(picks), count)
        version = max(self.model.version - behind, 0)
        items = [
            delivery_of(claim, version=version, epoch=epoch, nonce=f"{worker}-{self.lives}")
            for claim, _, epoch in taken
        ]
        expected = [
            self.model.deliver(worker, (claim.prompt.group, claim.index), ticket, epoch, version)
            for claim, ticket, epoch in taken
        ]
        states = self.do(self.streams.deliver(worker, items))
        assert [int(state) for state in states] == expected
        if lost:
            again = self.do(self.streams.deliver(worker, items))
            assert all(int(b) in (0, -1) for b in again)

    def _busy(self) -> st.SearchStrategy[str]:
        return st.sampled_from([worker for worker in WORKERS if self.held[worker]])

    @precondition(lambda self: self.model.waiting)
    @rule(worker=workers, count=st.integers(4, 30))
    def work(self, worker: str, count: int) -> None:
        """What mostly happens: prompts are claimed, answered, and read by the trainer."""
        before = len(self.held[worker])
        self.claim(worker, count)
        taken = self.held[worker][before:]
        del self.held[worker][before:]
        version = self.model.version
        for claim, ticket, epoch in taken:
            key = (claim.prompt.group, claim.index)
            expected = self.model.deliver(worker, key, ticket, epoch, version)
            item = delivery_of(claim, version=version, epoch=epoch, nonce=f"{worker}-{self.lives}")
            (state,) = self.do(self.streams.deliver(worker, [item]))
            assert state == expected
        self.consume(20)

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data(), delay_ms=st.sampled_from([0, LEASE_MS, None]), lost=st.booleans())
    def fail(self, data: st.DataObject, delay_ms: int | None, lost: bool) -> None:
        worker = data.draw(self._busy())
        ((claim, ticket, _),) = self._take(worker, data.draw(picks), 1)
        leases = Leases(self.client, self.part, worker)
        key = (claim.prompt.group, claim.index)
        ours = self.do(leases.fail(claim, INFRA, delay_ms))
        assert ours == self.model.fail(worker, key, ticket, last=delay_ms is None)
        if lost:
            assert not self.do(leases.fail(claim, INFRA, delay_ms))

    @precondition(lambda self: self.model.delayed())
    @rule(worker=workers, count=counts, time_passes=st.booleans())
    def promote(self, worker: str, count: int, time_passes: bool) -> None:
        self.do(self._promote(worker, count, time_passes))

    async def _promote(self, worker: str, count: int, time_passes: bool) -> None:
        if time_passes:
            delayed = self.part.delayed("default")
            for member in await self.client.zrange(delayed, 0, -1):
                await self.client.zadd(delayed, {member: 0})
        before = self.model.delayed()
        promoted, _ = await Leases(self.client, self.part, worker).promote("default", count)
        if time_passes:
            assert promoted == min(len(before), count)
        # Several may be due in one millisecond: their order is read, not foretold.
        rows = await self.client.xrevrange(self.part.prompts("default"), count=max(promoted, 1))
        keys = [(f[b"g"].decode(), int(f[b"i"])) for _, f in reversed(rows[:promoted])]
        assert len(set(keys)) == promoted
        assert set(keys) <= before
        self.model.promote(keys)

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data(), worker=workers, count=counts, dead=st.booleans())
    def reclaim(self, data: st.DataObject, worker: str, count: int, dead: bool) -> None:
        """A worker died, or was frozen past its lease (then it still believes that it holds)."""
        victim = data.draw(self._busy())
        if dead and victim != worker:
            self.held[victim].clear()
        self.do(self._reclaim(worker, [victim], count))

    async def _reclaim(self, worker: str, victims: list[str], count: int) -> None:
        key = self.part.prompts("default")
        rows = await self.client.xpending_range(key, "workers", "-", "+", 10_000)
        for row in rows:
            if (owner := row["consumer"].decode()) in victims:
                await self.client.xclaim(
                    *(key, "workers", owner, 0, [row["message_id"]]), idle=LEASE_MS, justid=True
                )
        leases = Leases(self.client, self.part, worker)
        taken = await leases.reclaim(self.streams, "default", LEASE_MS // 2, count)
        expected = self.model.reclaim(worker, victims, count)
        for (claim, deliveries, owner), sample in zip(taken, expected, strict=True):
            assert isinstance(claim, Claim)
            assert (claim.prompt.group, claim.index) == (sample.group, sample.index)
            assert (claim.attempt, deliveries) == (sample.attempt, sample.deliveries)
            assert owner in victims
            mine = self.held[worker]
            if sample.ticket not in {ticket for _, ticket, _ in mine}:
                mine.append((claim, sample.ticket, self.model.epoch))
        # Those that were not reached are renewed again.
        for row in await self.client.xpending_range(key, "workers", "-", "+", 10_000):
            await self.client.xclaim(
                *(key, "workers", row["consumer"].decode(), 0, [row["message_id"]]), justid=True
            )

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data(), count=counts, lost=st.booleans())
    def hand_back(self, data: st.DataObject, count: int, lost: bool) -> None:
        worker = data.draw(self._busy())
        taken = self._take(worker, data.draw(picks), count)
        leases = Leases(self.client, self.part, worker)
        mine = [(claim.entry, claim.prompt.group) for claim, _, _ in taken]
        back = self.do(leases.hand_back("default", mine))
        tickets = [((claim.prompt.group, claim.index), ticket) for claim, ticket, _ in taken]
        assert back == len(self.model.hand_back(worker, tickets))
        if lost:
            assert self.do(leases.hand_back("default", mine)) == 0

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        worker = data.draw(self._busy())
        held = self.held[worker]
        leases = Leases(self.client, self.part, worker)
        lost = self.do(leases.renew("default", [claim.entry for claim, _, _ in held]))
        assert lost == [
            claim.entry
            for claim, ticket, _ in held
            if self.model.holds(worker, (claim.prompt.group, claim.index), ticket) != 1
        ]
        self.held[worker] = [row for row in held if row[0].entry not in lost]

    # ---- the trainer -------------------------------------------------------------------------

    @precondition(lambda self: self.model.unread or self.model.unread_stones)
    @rule(count=st.integers(1, 20))
    def consume(self, count: int) -> None:
        arrivals = self.do(self.streams.consume(self.client, self.token, count, None))
        rollouts, stones = self.model.read(count)
        assert [(h.group, h.index) for _, h in arrivals.headers] == rollouts
        assert [(t.group, t.index) for _, t in arrivals.tombstones] == stones
        self._take_in(arrivals)

    def _take_in(self, arrivals: Arrivals) -> None:
        assert not arrivals.garbage
        assert not arrivals.garbage_tombstones
        for entry, header in arrivals.headers:
            assert (header.group, header.index) not in self.committed
            member = Member(entry, header, header.min_version, header.max_version)
            closed, duplicate = self.groups.arrive(0, member)
            assert not duplicate
            if closed is not None:
                self.ready[closed.name] = closed
        for entry, tombstone in arrivals.tombstones:
            if (closed := self.groups.add_tombstone(0, entry, tombstone)) is not None:
                self.ready[closed.name] = closed
        for group in self.model.groups.values():
            whole = not group.closed and self.model.came(group) == group.n
            in_batch = any(
                group.name == each.name for _, batch in self.open.values() for each in batch
            )
            assert (group.name in self.ready or in_batch) == whole

    @precondition(lambda self: self.ready)
    @rule(pick=picks, count=st.integers(1, 3), reach=st.sampled_from(["handed", "trained"]))
    def hand_over(self, pick: int, count: int, reach: str) -> None:
        names = sorted(name for name, group in self.ready.items() if group.whole)
        names = names[pick % len(names) :][:count] if names else []
        if names:
            self.batches += 1
            batch = [self.ready.pop(name) for name in names]
            self.open[self.batches] = ("handed", batch)
            self.do(self._reach(self.batches, "handed", settle=True))
            if reach == "trained":
                self.do(self._reach(self.batches, "trained", settle=True))

    async def _reach(self, number: int, state: str, *, settle: bool) -> None:
        """Move a batch; without `settle`, its trainer dies right after the plan was written."""
        _, batch = self.open[number]
        plan = Plan.of(number, state, batch, 0)
        await self.board.plan(self.token, number, plan.dumps())
        if not settle:
            return
        names = [group.name for group in batch]
        for _ in range(2):  # the second time, as after a lost reply
            if state == "trained":
                await plan.settle("train", self.token, [self.streams])
            elif state == "committed":
                await plan.settle("commit", self.token, [self.streams])
        if state == "trained":
            self.model.train(names)
        elif state == "committed":
            self._committed(number)
            await self.board.plan(self.token, number, None)
            return
        self.open[number] = (state, batch)

    def _committed(self, number: int) -> None:
        _, batch = self.open.pop(number)
        for group in batch:
            for index in group.members:
                assert (group.name, index) not in self.committed, "committed twice"
                self.committed.add((group.name, index))
        self.model.close([group.name for group in batch], "committed")

    @precondition(lambda self: self.open)
    @rule(pick=picks)
    def advance_batch(self, pick: int) -> None:
        number = sorted(self.open)[pick % len(self.open)]
        state = "trained" if self.open[number][0] == "handed" else "committed"
        self.do(self._reach(number, state, settle=True))

    @precondition(lambda self: self.ready)
    @rule(pick=picks, reason=st.sampled_from(["stale", "rejected"]))
    def drop(self, pick: int, reason: str) -> None:
        name = sorted(self.ready)[pick % len(self.ready)]
        self.do(self._drop(self.ready.pop(name), reason))

    async def _drop(self, group: Gathered, reason: str) -> None:
        rows = [(m.entry, m.header.kind, m.header.payload) for m in group.members.values()]
        stones = [entry for entry, _ in group.tombstones.values()]
        for expected in (len(rows), 0):
            done = await self.streams.settle(
                self.token, f"drop:{reason}", rows, [group.name], stones
            )
            assert done == expected
        self.model.close([group.name], f"dropped:{reason}")

    @precondition(lambda self: any(self.model.unsettled()))
    @rule(pick=picks, at_most=st.integers(1, 2))
    def cancel(self, pick: int, at_most: int) -> None:
        names = sorted({sample.group for sample in self.model.unsettled()})
        group = self.model.groups[names[pick % len(names)]]
        prompt = prompt_of(group.name, group.n, kind=Kind(group.kind), position=group.position)
        settled = self.do(self.streams.cancel(self.token, prompt, "surplus", at_most))
        assert settled == self.model.cancel(group.name, "surplus", at_most)

    @precondition(lambda self: self.model.version < len(self.model.groups) // 2)
    @rule()
    def publish(self) -> None:
        self.model.version += 1
        self.model.min_useful = max(self.model.version - 2, 0)
        self.do(self.board.publish(self.token, {"version": self.model.version}))
        self.do(self.streams.advance(self.token, self.model.version, self.model.min_useful))

    @precondition(lambda self: self.lives < 6 and any(self.model.unsettled()))
    @rule(
        back=st.integers(0, 2),
        checkpointed=st.booleans(),
        midway=st.sampled_from(["", "trained", "committed"]),
        pick=picks,
    )
    def crash_and_reopen(self, back: int, checkpointed: bool, midway: str, pick: int) -> None:
        """The trainer dies, perhaps between a plan and what it plans; another one opens the run."""
        if midway and self.open:
            number = sorted(self.open)[pick % len(self.open)]
            if midway == "committed" or self.open[number][0] == "handed":
                self.do(self._reach(number, midway, settle=False))
                self.open[number] = (midway, self.open[number][1])
        if checkpointed:
            handed = [n for n, (state, _) in self.open.items() if state == "handed"]
            self.checkpoint = min(handed) - 1 if handed else self.batches
        last = self.checkpoint if checkpointed else 0
        old, old_open = self.token, self.open
        self._born()
        self.open = old_open
        self.do(self._reopen(old, max(self.model.version - back, 0), last))

    async def _reopen(self, old: str, version: int, last: int) -> None:
        await self._open(version)
        with pytest.raises(SupersededError):
            await self.streams.advance(old, 99, 99)
        owed: dict[str, int] = {}
        await recover(self.board, self.token, [self.streams], last, owed)
        names: dict[str, int] = {}
        for number, (state, batch) in sorted(self.open.items()):
            if state == "committed" or number <= last:
                self._committed(number)
            else:
                names |= dict.fromkeys((group.name for group in batch), number)
        self.open = {}
        self.model.untrain(names)
        assert owed == names
        assert await self.board.plans() == {}
        assert await self.board.last_batch() == self.batches
        await self._adopt()

    async def _adopt(self) -> None:
        rollouts, stones = await self.streams.adopt(self.token, self.token)
        arrivals = await self.streams.consume(
            self.client, self.token, 10_000, None, since=("0-0", "0-0")
        )
        assert [entry for entry, _ in arrivals.headers] == rollouts
        assert [entry for entry, _ in arrivals.tombstones] == stones
        assert {(h.group, h.index) for _, h in arrivals.headers} == {
            (s.group, s.index) for s in self.model.all() if s.place == "handed_out"
        }
        assert {(t.group, t.index) for _, t in arrivals.tombstones} == self.model.stones
        self._take_in(arrivals)

    # ---- what always holds -------------------------------------------------------------------

    @invariant()
    def the_books_agree(self) -> None:
        if not self.model.groups:
            return
        books, records, entries = self.do(self._read())
        m = self.model
        assert books.balance == 0
        assert {
            name: getattr(books, name)
            for name in (
                *("submitted", "waiting", "delayed", "in_flight", "ready", "handed_out"),
                *("trained", "committed", "dead", "dead_letters", "dropped", "outstanding"),
                "tombstones",
            )
        } == {
            "submitted": sum(group.n for group in m.groups.values()),
            **{
                place: m.count(place)
                for place in (
                    *("waiting", "delayed", "in_flight", "ready", "handed_out", "trained"),
                    *("committed", "dead"),
                )
            },
            "dead_letters": m.count("dead"),
            "dropped": m.dropped(),
            "outstanding": m.outstanding,
            "tombstones": len(m.unread_stones) + len(m.stones),
        }
        for group, record in zip(m.groups.values(), records, strict=True):
            places = {int(k): v.decode() for k, v in record.items() if k.isdigit()}
            letters = {index: place[:1] for index, place in places.items()}
            assert letters == ({} if group.closed else m.record(group)), group
            for index, place in places.items():
                if place[0] in "pr":
                    assert entries[place] == (group.name, index)

    async def _read(self) -> tuple[Books, list[dict[bytes, bytes]], dict[str, tuple[str, int]]]:
        """The books, every group's record, and what stands at every place that it may name."""
        books = await read_books(self.client, [self.part])
        pipe = self.client.pipeline(transaction=False)
        pipe.xrange(self.part.prompts("default"))
        pipe.xrange(self.part.rollouts)
        for name in self.model.groups:
            pipe.hgetall(self.part.group(name))
        prompts, rollouts, *records = await pipe.execute()
        entries = {f"p{e.decode()}": (f[b"g"].decode(), int(f[b"i"])) for e, f in prompts}
        for entry, fields in rollouts:
            header = decode_header(fields[b"h"])
            entries[f"r{entry.decode()}"] = (header.group, header.index)
        assert len(set(entries.values())) == len(entries), "a sample is in two places"
        return books, records, entries

    # ---- progress ----------------------------------------------------------------------------

    def teardown(self) -> None:
        try:
            if self.model.groups:  # it did begin
                self.do(self._drain())
                self.do(self._is_empty())
        finally:
            self.do(self.client.flushdb())
            self.do(self.client.aclose())

    async def _drain(self) -> None:
        """From any state, one round of good events settles everything."""
        m = self.model
        await self._promote("w0", 10_000, time_passes=True)
        await self._reclaim("w0", list(WORKERS), 10_000)
        claims, _ = await self.streams.claim(self.client, "w0", ["default"], 10_000, None)
        for claim, sample in zip(claims, m.claim("w0", 10_000), strict=True):
            self.held["w0"].append((claim, sample.ticket, m.epoch))
        items = [
            delivery_of(claim, version=m.version, epoch=m.epoch, nonce="last")
            for claim, _, _ in self.held["w0"]
        ]
        await self.streams.deliver("w0", items)
        for claim, ticket, _ in self.held["w0"]:
            m.deliver("w0", (claim.prompt.group, claim.index), ticket, m.epoch, m.version)
        arrivals = await self.streams.consume(self.client, self.token, 10_000, None)
        m.read(10_000)
        self._take_in(arrivals)
        for number in sorted(self.open):
            await self._reach(number, "committed", settle=True)
        for name, group in list(self.ready.items()):
            del self.ready[name]
            if group.whole:
                self.batches += 1
                self.open[self.batches] = ("handed", [group])
                await self._reach(self.batches, "committed", settle=True)
            else:
                await self._drop(group, "torn")

    async def _is_empty(self) -> None:
        m = self.model
        books = await read_books(self.client, [self.part])
        assert books.outstanding == m.outstanding == 0
        assert books.balance == 0
        ended = m.count("committed") + m.count("dead") + sum(m.dropped().values())
        assert ended == books.submitted
        assert books.committed == len(self.committed)
        assert not self.groups.open
        for stream in (self.part.prompts("default"), self.part.rollouts, self.part.tombstones):
            assert await self.client.xlen(stream) == 0
            for group in await self.client.xinfo_groups(stream):
                assert group["pending"] == 0
        names = set()
        async for raw in self.client.scan_iter(match=f"{self.part.prefix}*", count=1000):
            if await self.client.ttl(raw) == -1:
                names.add(raw.decode().removeprefix(self.part.prefix))
        assert names <= {
            *("fence", "ledger", "marks", "routes", "dead"),
            *("prompts:default", "rollouts", "tombstones"),
        }


@pytest.mark.slow
@pytest.mark.timeout(60 + EXAMPLES)
def test_random_histories_agree_with_the_model(redis_url: str, declared_keys: None):
    runner = asyncio.Runner()

    class Bound(History):
        url = redis_url
        loop = runner.get_loop()

    with runner:
        run_state_machine_as_test(
            Bound,
            settings=settings(
                max_examples=EXAMPLES,
                stateful_step_count=STEPS,
                deadline=None,
                database=None,
                phases=PHASES,
                # Drawing a history takes as long as living it.
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
                print_blob=True,
            ),
        )
