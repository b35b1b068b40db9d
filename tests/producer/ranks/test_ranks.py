"""Many ranks, one ledger: the same step on all ranks or the same error, whatever fails where."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.ranks import Hub, Outcome, ThreadWorker, run_ranks
from fixtures.rig import delivery_of
from fixtures.servers import MakeServer
from support import wait_until

import rollfleet
from rollfleet.ranks import RedisCollective
from rollfleet_common.codec import encode_samples
from rollfleet_common.errors import (
    CollectiveError,
    RankError,
    SettingsError,
    StarvedError,
    SupersededError,
)
from rollfleet_common.keys import RunKeys
from rollfleet_common.messages import Claim
from rollfleet_common.redis import connect_sync
from rollfleet_common.streams import Delivery, Streams

RUN = "ranks"


def prompts(count: int) -> Iterator[dict[str, Any]]:
    for _ in range(count):
        yield {"token_ids": [1, 2, 3]}


def members(batch: rollfleet.RankBatch) -> list[tuple[str, int]]:
    return [(r.header.group, r.header.index) for r in batch.rollouts]


def values(outcomes: list[Outcome]) -> list[Any]:
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error
    return [outcome.value for outcome in outcomes]


def errors(outcomes: list[Outcome], kind: type[Exception], what: str) -> None:
    for outcome in outcomes:
        assert type(outcome.error) is kind, outcome
        assert what in str(outcome.error)


def once(seen: list[list[tuple[str, int]]], groups: int) -> None:
    wanted = {(f"p{g}", i): 1 for g in range(groups) for i in range(4)}
    assert Counter(each for rank in seen for each in rank) == Counter(wanted)


def ready(fleet: rollfleet.RankFleet) -> int:
    assert fleet.leader is not None
    return sum(len(g.members) for g in list(fleet.leader.aio.consumer.ready.values()))


def settled(fleet: rollfleet.RankFleet) -> None:
    if fleet.leader is not None:
        books = fleet.leader.books()
        assert (books.balance, books.outstanding) == (0, 0), books


# ---- batches -----------------------------------------------------------------------------------


def test_every_rollout_is_on_one_rank_and_all_ranks_know_the_whole(redis_url: str) -> None:
    def program(fleet: rollfleet.RankFleet) -> Any:
        fleet.feed(prompts(10))
        seen, whole = [], []
        for batch in fleet.batches():
            seen += members(batch)
            assert len(batch) == 0 or batch.tensors.rows == len(batch)
            numbers = (batch.stats["rollfleet/reward_mean"], batch.stats["rollfleet/staleness_max"])
            whole.append((batch.number, batch.version, batch.samples, batch.tokens, *numbers))
            assert fleet.publish() == batch.version + 1
        settled(fleet)
        return seen, whole

    with ThreadWorker(redis_url, RUN):
        outcomes, _ = run_ranks(redis_url, 3, program, run=RUN)
    seen, whole = zip(*values(outcomes), strict=True)
    once(list(seen), 10)
    assert whole[0] == whole[1] == whole[2]
    # Two and a half batches: the remainder is a batch of its own, over fewer groups than ranks.
    assert [row[:3] for row in whole[0]] == [(1, 0, 16), (2, 1, 16), (3, 2, 8)]
    assert {row[4] for row in whole[0]} == {1.5}


def test_a_step_takes_one_collective_while_rollouts_wait(redis_url: str) -> None:
    def program(fleet: rollfleet.RankFleet) -> int:
        fleet.feed(prompts(12))
        if fleet.leader is not None:
            wait_until(lambda: ready(fleet) == 48, "all rollouts are here")
        return sum(1 for _ in fleet.batches(3))

    with ThreadWorker(redis_url, RUN):
        outcomes, hub = run_ranks(redis_url, 2, program, run=RUN)
    assert values(outcomes) == [3, 3]
    # One to meet, one to spread the first plan, and one a step.
    assert hub.count == 1 + 1 + 3


def test_a_rank_reads_only_its_own_headers_and_payloads(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: dict[Any, list[str]] = {}
    fetch = Streams.fetch

    async def noted(self: Streams, payloads: Any) -> Any:
        fetched.setdefault(self.client, []).extend(payloads)
        return await fetch(self, payloads)

    monkeypatch.setattr(Streams, "fetch", noted)

    def program(fleet: rollfleet.RankFleet) -> Any:
        fleet.feed(prompts(8))
        stats = [
            b.stats | {"mine": sum(r.header.payload_bytes for r in b.rollouts)}
            for b in fleet.batches()
        ]
        settled(fleet)
        return stats

    with ThreadWorker(redis_url, RUN):
        outcomes, _ = run_ranks(redis_url, 2, program, run=RUN)
    for rank in values(outcomes):
        for stats in rank:
            assert stats["rollfleet/rank/payload_bytes"] == stats["mine"]
            assert 0 < stats["rollfleet/rank/header_bytes"] < 8 * 250
    names = [name for each in fetched.values() for name in each]
    assert len(fetched) == 2  # rank 0's ledger client fetches none
    assert len(names) == len(set(names)) == 32


def test_groups_may_be_divided_and_micro_batches_are_as_many_on_every_rank(redis_url: str) -> None:
    def program(fleet: rollfleet.RankFleet) -> Any:
        fleet.feed(prompts(4))
        (batch,) = fleet.batches()
        micros = batch.micro_batches()
        assert len(micros) == len(batch.micro)
        assert sorted(at for positions in batch.micro for at in positions) == [*range(len(batch))]
        for positions, micro in zip(batch.micro, micros, strict=True):
            ours = [members(batch)[at] for at in positions]
            rows = [] if micro.filler else micro.tensors.rollout_ids.tolist()
            assert [members(batch)[at] for at in rows] == ours
            assert micro.tensors.input_ids.numel() <= 80 or micro.filler
        weight = sum(float(micro.weights().sum()) for micro in micros)
        tokens = sum(r.header.tokens for r in batch.rollouts)
        return members(batch), len(micros), tokens, weight

    with ThreadWorker(redis_url, RUN, length=lambda claim: 4 + 8 * claim.index):
        outcomes, _ = run_ranks(
            redis_url, 3, program, run=RUN, whole_groups=False, budget_tokens=80, form="padded"
        )
    seen, count, tokens, weight = zip(*values(outcomes), strict=True)
    once(list(seen), 4)
    assert len(set(count)) == 1
    assert sum(weight) == pytest.approx(1)
    assert max(tokens) - min(tokens) <= 8


def test_one_rank_alone(redis_url: str) -> None:
    with (
        ThreadWorker(redis_url, RUN),
        rollfleet.connect_ranks(redis_url, run=RUN, samples_per_version=8, group_size=4) as fleet,
    ):
        fleet.feed(prompts(4))
        seen = [members(batch) for batch in fleet.batches()]
        once(seen, 4)
        settled(fleet)


# ---- judged at hand-over -----------------------------------------------------------------------


def test_what_was_planned_ahead_and_became_stale_is_not_trained_on(redis_url: str) -> None:
    def program(fleet: rollfleet.RankFleet) -> Any:
        fleet.feed(prompts(12))
        if fleet.leader is not None:
            wait_until(lambda: ready(fleet) == 48, "all rollouts are here")
        first = fleet.next_batch()
        fleet.commit(first)
        fleet.publish(9)  # the second batch is planned, and fetched, and now hopeless
        fleet.feed(prompts(16)) if not fleet.leader or not fleet.leader.aio.feeding else None
        second = fleet.next_batch()
        fleet.commit(second)
        assert second is not None
        assert set(second.staleness) == {0}
        if fleet.leader is not None:
            assert fleet.leader.books().dropped == {"stale": 32}
        return second.number, second.version

    with ThreadWorker(redis_url, RUN):
        outcomes, _ = run_ranks(redis_url, 2, program, run=RUN)
    assert values(outcomes) == [(2, 9)] * 2


def test_a_version_that_only_rank_0_published_holds_for_all(redis_url: str) -> None:
    def program(fleet: rollfleet.RankFleet) -> Any:
        fleet.feed(prompts(8))
        versions = []
        for batch in fleet.batches(2):
            versions.append((batch.version, fleet.version))
            if fleet.rank == 0:
                fleet.publish()
        return versions

    with ThreadWorker(redis_url, RUN):
        outcomes, _ = run_ranks(redis_url, 2, program, run=RUN)
    assert values(outcomes) == [[(0, 0), (1, 1)]] * 2


def test_the_policy_refines_on_the_rank_that_has_the_rollouts(redis_url: str) -> None:
    class Half(rollfleet.StandardPPO):
        def refine(self, rollouts: Any, current: int) -> Any:
            return [
                rollfleet.Rollout(replace(r.header, trained_tokens=1), r.samples) for r in rollouts
            ]

    def program(fleet: rollfleet.RankFleet) -> Any:
        fleet.feed(prompts(4))
        (batch,) = fleet.batches()
        if batch.whole is not None:
            assert {r.header.trained_tokens for r in batch.whole.rollouts} == {1}
        return batch.trained_tokens, len(batch)

    with ThreadWorker(redis_url, RUN):
        outcomes, _ = run_ranks(redis_url, 2, program, run=RUN, policy=Half())
    assert values(outcomes) == [(64, 8)] * 2  # counted where they are: in the masks


# ---- what fails on one rank --------------------------------------------------------------------


@pytest.mark.parametrize("how", ["lost", "corrupt", "oversize", "form"])
def test_a_payload_that_one_rank_cannot_use_costs_its_group_alone(redis_url: str, how: str) -> None:
    def spoil(claim: Claim, made: Delivery) -> Delivery:
        named = {"x": np.zeros(made.header.tokens, np.float32)}
        if (claim.prompt.group, claim.index) == ("p6", 2):
            if how == "lost":
                return replace(made, payload=b"gone")
            if how == "corrupt":
                return replace(made, header=replace(made.header, tokens=made.header.tokens + 1))
            if how == "form":
                named = {"x": np.zeros(made.header.tokens)}
            if how == "oversize":
                named = {str(k): np.zeros(1) for k in range(9)}
        return delivery_of(
            claim,
            epoch=made.header.epoch,
            version=made.header.min_version,
            reward=made.header.reward,
            arrays=named,
        )

    fetch = Streams.fetch

    async def without(self: Streams, payloads: Any) -> Any:
        return [None if p == b"gone" else p for p in await fetch(self, payloads)]

    def program(fleet: rollfleet.RankFleet) -> Any:
        fleet.feed(prompts(9))
        seen = [each for batch in fleet.batches() for each in members(batch)]
        settled(fleet)
        if fleet.leader is not None:
            assert fleet.leader.books().dropped == {how: 4}
        return seen

    with pytest.MonkeyPatch.context() as patch, ThreadWorker(redis_url, RUN, spoil):
        patch.setattr(Streams, "fetch", without)
        outcomes, _ = run_ranks(redis_url, 2, program, run=RUN, max_names=8)
    seen = [each for rank in values(outcomes) for each in rank]
    assert Counter(seen) == {(f"p{g}", i): 1 for g in range(9) if g != 6 for i in range(4)}


@pytest.mark.parametrize("whole_groups", [True, False])
def test_ranks_agree_on_one_form_of_arrays(redis_url: str, whole_groups: bool) -> None:
    """Each of them sees other groups first, of two forms."""

    def spoil(claim: Claim, made: Delivery) -> Delivery:
        odd = int(claim.prompt.group[1:]) % 2
        h = made.header
        array = np.zeros((h.tokens, 2) if odd else h.tokens, np.float32)
        return delivery_of(
            claim, epoch=h.epoch, version=h.min_version, reward=h.reward, arrays={"x": array}
        )

    def program(fleet: rollfleet.RankFleet) -> Any:
        fleet.feed(prompts(10))
        seen = [
            (r.header.group, r.samples[0].arrays["x"].ndim)
            for batch in fleet.batches()
            for r in batch.rollouts
        ]
        settled(fleet)
        if fleet.leader is not None:
            assert fleet.leader.books().dropped == {"form": 20}
            assert fleet.leader.aio.gather.payloads.forms.dumps() == ""  # it loads nothing itself
        return seen

    with ThreadWorker(redis_url, RUN, spoil):
        outcomes, _ = run_ranks(redis_url, 2, program, run=RUN, whole_groups=whole_groups)
        seen = [each for rank in values(outcomes) for each in rank]
        assert len(seen) == 20
        assert len({ndim for _, ndim in seen}) == 1

        # Who comes next holds the run against the same form.
        def known(fleet: rollfleet.RankFleet) -> str:
            assert fleet.leader is not None
            return fleet.leader.aio.gather.payloads.forms.dumps()

        assert '"token"' in values(run_ranks(redis_url, 1, known, run=RUN)[0])[0]


def test_a_feed_of_which_nothing_is_of_use_fails_on_all_ranks(redis_url: str) -> None:
    """And no record is left of the batch that was withdrawn: the fixture looks."""

    def program(fleet: rollfleet.RankFleet) -> int:
        fleet.feed(prompts(4))
        with pytest.raises(rollfleet.FailingError, match=r"without one batch.*corrupt"):
            next(fleet.batches())
        settled(fleet)
        return 0

    def spoil(_: Claim, made: Delivery) -> Delivery:
        return replace(made, payload=encode_samples([]))

    with ThreadWorker(redis_url, RUN, spoil):
        outcomes, _ = run_ranks(redis_url, 2, program, run=RUN)
    assert values(outcomes) == [0, 0]


def test_an_error_on_one_rank_is_raised_on_all_and_costs_nothing(redis_url: str) -> None:
    broken = [True]

    def accept(rollouts: Any) -> bool:
        if broken[0] and rollouts[0].header.group == "p3":
            raise ZeroDivisionError("no such reward")
        return True

    def program(fleet: rollfleet.RankFleet) -> Any:
        fleet.feed(prompts(4))
        with pytest.raises(RankError, match=r"rank \d of 2: ZeroDivisionError: no such") as caught:
            fleet.next_batch()
        fleet.collective.all_gather(b"", 10)  # both have seen it
        broken[0] = False
        (batch,) = fleet.batches()
        settled(fleet)
        return str(caught.value), batch.number, members(batch)

    with ThreadWorker(redis_url, RUN):
        outcomes, _ = run_ranks(redis_url, 2, program, run=RUN, should_accept=accept)
    said, numbers, seen = zip(*values(outcomes), strict=True)
    assert said[0] == said[1]
    assert numbers == (1, 1)
    once(list(seen), 4)


def test_all_ranks_starve_together_and_lose_nothing(redis_url: str) -> None:
    def program(fleet: rollfleet.RankFleet) -> Any:
        fleet.feed(prompts(4))
        with pytest.raises(
            StarvedError, match=r"rank 0 of 2: 16 samples did not come within 0\.2 s"
        ):
            fleet.next_batch(timeout_s=0.2)
        with ThreadWorker(redis_url, RUN) if fleet.rank == 0 else ThreadWorker(redis_url, "none"):
            (batch,) = fleet.batches()
        return members(batch)

    outcomes, _ = run_ranks(redis_url, 2, program, run=RUN)
    once(values(outcomes), 4)


@pytest.mark.leaves_keys("the younger trainer holds the run", "*")
def test_all_ranks_learn_that_the_run_was_taken_over(redis_url: str) -> None:
    def program(fleet: rollfleet.RankFleet) -> None:
        fleet.feed(prompts(8))
        batches = fleet.batches()
        next(batches)
        if fleet.rank == 0:
            rollfleet.connect(
                redis_url, run=RUN, take_over=True, samples_per_version=16, group_size=4
            ).close()
        next(batches)

    with ThreadWorker(redis_url, RUN):
        outcomes, _ = run_ranks(redis_url, 2, program, run=RUN)
    errors(outcomes, SupersededError, "rank 0 of 2")


@pytest.mark.leaves_keys("a batch is owed to the next trainer", "*")
def test_what_rank_0_fails_with_alone_is_raised_on_all(redis_url: str) -> None:
    def program(fleet: rollfleet.RankFleet) -> None:
        fleet.feed(prompts(8))
        batch = fleet.next_batch()
        fleet.publish(5)
        fleet.publish(3)
        fleet.commit(batch)
        fleet.next_batch()

    with ThreadWorker(redis_url, RUN):
        outcomes, _ = run_ranks(redis_url, 2, program, run=RUN)
    errors(outcomes, SettingsError, "rank 0 of 2: version 3 is below version 5")


@pytest.mark.leaves_keys("a batch is owed to the next trainer", "*")
def test_a_rank_whose_program_fails_does_not_leave_the_others_waiting(redis_url: str) -> None:
    def program(fleet: rollfleet.RankFleet) -> None:
        fleet.feed(prompts(8))
        for _ in fleet.batches():
            if fleet.rank == 1:
                raise MemoryError("device full")

    with ThreadWorker(redis_url, RUN):
        outcomes, _ = run_ranks(redis_url, 2, program, run=RUN)
    assert type(outcomes[1].error) is MemoryError
    errors(outcomes[:1], CollectiveError, "device full")


# ---- opening and resuming ----------------------------------------------------------------------


def test_a_batch_too_small_for_the_ranks_is_refused_on_all(redis_url: str) -> None:
    outcomes, _ = run_ranks(redis_url, 5, lambda _: None, run=RUN)
    errors(outcomes, SettingsError, "is 4 groups for 5 ranks")
    outcomes, _ = run_ranks(
        redis_url, 2, lambda _: None, run=RUN, whole_groups=False, should_accept=len
    )
    errors(outcomes, SettingsError, "should_accept is told whole groups")


def test_more_ranks_resume_from_the_checkpoint_of_fewer(redis_url: str) -> None:
    """What was trained since the checkpoint is served again, in order; nothing before it is."""

    def first(fleet: rollfleet.RankFleet) -> Any:
        fleet.feed(prompts(20))
        state, seen = None, []
        for batch in fleet.batches(3, commit="checkpoint"):
            seen.append(members(batch))
            if batch.number == 1:
                fleet.trained(batch)
                state = fleet.state_dict()
        return state, seen

    def second(fleet: rollfleet.RankFleet) -> Any:
        fleet.feed(prompts(20))
        seen = [members(batch) for batch in fleet.batches(commit="checkpoint")]
        fleet.commit()
        settled(fleet)
        return seen

    with ThreadWorker(redis_url, RUN):
        before = values(run_ranks(redis_url, 2, first, run=RUN)[0])
        state = before[0][0]
        assert state is not None
        assert state["batch"] == 1
        assert before[1][0] == {}
        after = values(run_ranks(redis_url, 4, second, run=RUN, state=state)[0])
    kept = [rank[1][0] for rank in before]
    once([*kept, *([m for batch in rank for m in batch] for rank in after)], 20)
    for at in (0, 1):
        again = {m for rank in after for m in rank[at]}
        assert again == {m for rank in before for m in rank[1][at + 1]}


# ---- with the collective of Redis --------------------------------------------------------------


def test_the_trainers_user_may_do_all_that_ranks_do(
    make_server: MakeServer, tmp_path: Path
) -> None:
    """With the ACL file that is shipped; and what the ranks leave in Redis runs out by itself."""
    shipped = Path(__file__).parents[3] / "deploy" / "acl" / "trainer.acl"
    line = shipped.read_text(encoding="utf-8").replace("RUN", RUN).replace("CHANGE-ME", "secret")
    users = tmp_path / "users.acl"
    users.write_text(f"user default on nopass ~* &* +@all\n{line}", encoding="utf-8")
    server = make_server(tcp=True, extra=["--aclfile", str(users)])
    url = server.url.replace("://", "://rollfleet-trainer:secret@", 1)

    def program(fleet: rollfleet.RankFleet) -> Any:
        fleet.feed(prompts(8))
        seen = [each for batch in fleet.batches() for each in members(batch)]
        settled(fleet)
        return seen

    def collective(hub: Hub, rank: int) -> RedisCollective:
        return RedisCollective(url, RUN, rank=rank, size=hub.size)

    with ThreadWorker(server.url, RUN):
        outcomes, _ = run_ranks(url, 2, program, run=RUN, collective=collective)
    once(values(outcomes), 8)
    with connect_sync(server.url, role="test") as client:
        for pattern in ("rank:*", "ranks:*", "share:*"):
            assert all(client.ttl(key) > 0 for key in client.scan_iter(f"rf:{{{RUN}}}:{pattern}"))


def test_a_redis_that_lost_the_run_between_two_batches_loses_no_group(
    make_server: MakeServer,
) -> None:
    """What was planned ahead is gone with it: it is sent again, and cut anew on all ranks."""
    server = make_server(appendonly="no")

    def program(fleet: rollfleet.RankFleet) -> Any:
        fleet.feed(prompts(12))
        if fleet.leader is not None:
            wait_until(lambda: ready(fleet) == 48, "all rollouts are here")
        batches = fleet.batches()
        seen = members(next(batches))
        fleet.collective.all_gather(b"", 10)
        if fleet.rank == 0:
            with connect_sync(server.url, role="test") as client:
                client.flushall()
        fleet.collective.all_gather(b"", 10)
        seen += [each for batch in batches for each in members(batch)]
        if fleet.leader is not None:
            assert fleet.leader.books().balance == 0
        return seen

    with ThreadWorker(server.url, RUN):
        outcomes, _ = run_ranks(server.url, 2, program, run=RUN)
    once(values(outcomes), 12)


@pytest.mark.parametrize("agreed", [True, False])
def test_a_redis_that_lost_the_run_while_the_ranks_agreed_loses_no_group(
    make_server: MakeServer, agreed: bool
) -> None:
    """What they agreed to is trained on, and not sent again; what they did not is sent again."""
    server = make_server(appendonly="no")

    def lose(client: Any) -> None:
        board = RunKeys(RUN).board
        wait_until(lambda: client.hexists(RunKeys(RUN).batches, "2"), "the record is written")
        client.flushall()
        wait_until(lambda: client.hget(board, "token"), "the run is revived")

    def program(fleet: rollfleet.RankFleet) -> Any:
        fleet.feed(prompts(12))
        if fleet.leader is not None:
            wait_until(lambda: ready(fleet) == 48, "all rollouts are here")
        batches = fleet.batches()
        seen = members(next(batches))
        if fleet.rank == 1:
            with connect_sync(server.url, role="test") as client:
                lose(client)
            fleet.version += 0 if agreed else 1
        seen += [each for batch in batches for each in members(batch)]
        if fleet.leader is not None:
            assert fleet.leader.books().balance == 0
        return seen

    with ThreadWorker(server.url, RUN):
        outcomes, _ = run_ranks(server.url, 2, program, run=RUN)
    once(values(outcomes), 12)


@pytest.mark.leaves_keys("the first batch, and what was fed, is owed to the next trainer", "*")
def test_a_plan_that_a_failed_round_kept_from_the_ranks_is_said_again(redis_url: str) -> None:
    """One rank cannot use the old plan; in the same round rank 0 has a new one."""
    failing = [True]

    def refuse(rollouts: Any) -> bool:
        if failing[0] and rollouts[0].header.group in ("p4", "p5", "p6", "p7"):
            raise ZeroDivisionError
        return True

    def program(fleet: rollfleet.RankFleet) -> Any:
        if fleet.rank == 1:  # rank 0 must get as far as to make the new one
            fleet._loader._reader.payloads.accept = refuse
        fleet.feed(prompts(40))
        if fleet.leader is not None:
            wait_until(lambda: ready(fleet) == 48, "all rollouts are here")
        batches = fleet.batches(2)
        next(batches)
        fleet.publish(9)  # all that is here is stale
        with pytest.raises(RankError, match="ZeroDivisionError"):
            next(batches)
        fleet.collective.all_gather(b"", 10)
        failing[0] = False
        batch = fleet.next_batch()
        assert batch is not None
        fleet.commit(batch)
        return batch.version, set(batch.staleness)

    with ThreadWorker(redis_url, RUN):
        outcomes, _ = run_ranks(redis_url, 2, program, run=RUN)
    assert values(outcomes) == [(9, {0})] * 2


@pytest.mark.leaves_keys("the feed is longer than the test")
@pytest.mark.parametrize(("policy", "bound"), [("drop", 0), ("mask", 1)])
def test_a_version_published_while_the_plan_is_written_is_the_one_that_counts(
    redis_url: str, policy: str, bound: int
) -> None:
    def program(fleet: rollfleet.RankFleet) -> Any:
        if fleet.leader is not None:
            aio = fleet.leader.aio
            plan, done = aio.board.plan, []

            async def meddled(token: str, number: int, packed: bytes | None, **more: Any) -> None:
                await plan(token, number, packed, **more)
                if len(done) < 3:
                    done.append(await aio.publish())

            aio.board.plan = meddled  # type: ignore[method-assign]
        fleet.feed(prompts(40))
        seen = []
        for batch in fleet.batches(3):
            if fleet.leader is not None:
                assert batch.version == fleet.leader.version
            seen.append((batch.number, batch.version, batch.stats["rollfleet/staleness_max"]))
            fleet.publish()
        return seen

    with ThreadWorker(redis_url, RUN):
        outcomes, _ = run_ranks(
            redis_url, 2, program, run=RUN, policy=policy, max_staleness=bound, fresh=True
        )
    one, other = values(outcomes)
    assert one == other
    assert [number for number, _, _ in one] == [1, 2, 3]
    assert all(age <= bound for _, _, age in one)
