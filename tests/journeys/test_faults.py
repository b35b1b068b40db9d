"""Workers, trainers and Redis are killed, frozen and cut off: nothing is lost, nothing comes twice."""

import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fixtures.fleet_processes import Process, Processes, lines
from fixtures.servers import MakeServer
from fixtures.tcp_proxy import TcpProxy
from support import wait_until

import rollfleet
from rollfleet_common.redis import connect_sync

SHAPE: dict[str, Any] = {
    "samples_per_version": 8,
    "group_size": 4,
    "max_staleness": 8,
    "lease_s": 1.0,
    "starve_s": 40.0,
}
#: A worker's lease in these tests.
LEASE_S = 2.0


def with_shape(**changes: Any) -> dict[str, Any]:
    return {**SHAPE, **changes}


def wanted(groups: int, n: int = 4) -> Counter[tuple[str, int]]:
    return Counter({(f"p{g}", i): 1 for g in range(groups) for i in range(n)})


def members(batch: rollfleet.Batch) -> list[tuple[str, int]]:
    return [(r.header.group, r.header.index) for r in batch.rollouts]


def train(fleet: rollfleet.Fleet, at: Callable[[int], Any] | None = None) -> Counter[Any]:
    """Train on everything that is fed; `at(step)` is called in the body of the loop."""
    seen: Counter[tuple[str, int]] = Counter()
    for step, batch in enumerate(fleet.batches(), 1):
        seen.update(members(batch))
        if at is not None:
            at(step)
    return seen


def assert_empty(fleet: rollfleet.Fleet) -> None:
    books = fleet.books()
    assert books.balance == 0, books
    ended = books.committed + sum(books.dropped.values()) + books.dead
    assert (ended, books.outstanding) == (books.submitted, 0), books


def prompts(count: int, **data: Any) -> list[dict[str, Any]]:
    return [{"token_ids": [1, 2, 3], **data} for _ in range(count)]


def started(trace: Path, pid: int | None = None) -> list[tuple[str, int]]:
    """Episodes that began (in one process)."""
    return [
        (line["group"], line["index"]) for line in lines(trace) if pid is None or line["pid"] == pid
    ]


# ---- workers -----------------------------------------------------------------------------------


def test_a_killed_workers_prompts_are_run_by_another(
    redis_url: str, processes: Processes, tmp_path: Path
) -> None:
    gate, trace = tmp_path / "gate", tmp_path / "trace"
    with rollfleet.connect(redis_url, run="kill", **SHAPE) as fleet:
        fleet.feed(prompts(8, gate=str(gate), trace=str(trace)))
        victim = processes.worker(redis_url, "kill", "Gated", slots=8)
        wait_until(lambda: len(started(trace)) == 8, "the victim to be busy", 30.0)
        heir = processes.worker(redis_url, "kill", "Gated", slots=64)
        wait_until(lambda: len(started(trace)) == 32, "all episodes to run", 30.0)
        victim.kill()
        killed = time.monotonic()
        wait_until(lambda: len(started(trace, heir.pid)) == 32, "the heir to have them all", 30.0)
        # The lease, and a look for lapsed ones (twice a lease at most), on a busy machine.
        assert time.monotonic() - killed < LEASE_S * 1.5 + 2
        gate.touch()
        assert train(fleet) == wanted(8)
        assert_empty(fleet)
        assert len(heir.events("lease taken over")) == 8
        assert {e["owner"].split("-")[-2] for e in heir.events("lease taken over")} == {
            str(victim.pid)
        }


def test_a_frozen_workers_results_are_refused(
    redis_url: str, processes: Processes, tmp_path: Path
) -> None:
    gate, trace = tmp_path / "gate", tmp_path / "trace"
    with rollfleet.connect(redis_url, run="freeze", **SHAPE) as fleet:
        fleet.feed(prompts(2, gate=str(gate), trace=str(trace)))
        zombie = processes.worker(redis_url, "freeze", "Gated")
        wait_until(lambda: len(started(trace)) == 8, "the zombie to be busy", 30.0)
        zombie.signal(signal.SIGSTOP)
        heir = processes.worker(redis_url, "freeze", "Gated")
        wait_until(lambda: len(started(trace, heir.pid)) == 8, "the heir to take over", 30.0)
        # Now the zombie finishes first, if it may.
        zombie.signal(signal.SIGCONT)
        wait_until(
            lambda: (
                zombie.metric("rollfleet_leases_lost_total")
                + zombie.metric('rollfleet_deliveries_total{outcome="stolen"}')
                >= 8
            ),
            "the zombie to be told",
            30.0,
        )
        gate.touch()
        assert train(fleet) == wanted(2)
        assert_empty(fleet)
        assert zombie.metric('rollfleet_deliveries_total{outcome="yes"}') == 0
        # The trainer may have a rollout before the worker has the reply that it counts by.
        wait_until(
            lambda: heir.metric('rollfleet_deliveries_total{outcome="yes"}') == 8,
            "the heir to have counted what it delivered",
        )
        # And it is as good a worker as any other.
        assert heir.stop() == 0
        gate.touch()
        fleet.feed(prompts(4, gate=str(gate)))
        assert sum(train(fleet).values()) == 8
        assert zombie.stop() == 0


def test_a_blocked_event_loop_loses_its_lease_and_no_more(
    redis_url: str, processes: Processes, tmp_path: Path
) -> None:
    trace, gate = tmp_path / "trace", tmp_path / "gate"
    with rollfleet.connect(redis_url, run="block", **SHAPE) as fleet:
        blocked = processes.worker(redis_url, "block", "Actor", slots=4, lease_s=1)
        blocked.event("claiming")
        fleet.feed(prompts(1, act="block", index=0, gate=str(gate), fails=1, trace=str(trace)))
        wait_until(lambda: started(trace), "it to block", 30.0)
        heir = processes.worker(redis_url, "block", "Echo", lease_s=1)
        seen = train(fleet)
        assert seen == wanted(1)
        assert_empty(fleet)
        heir.event("lease taken over")
        gate.touch()
        # The blocked one goes on, and its late result changed nothing.
        wait_until(lambda: blocked.page("/livez")[0] == 200, "it to come back", 30.0)
        assert fleet.books().committed == 4
        assert [heir.stop(), blocked.stop()] == [0, 0]


def test_sigterm_finishes_what_runs(redis_url: str, processes: Processes, tmp_path: Path) -> None:
    gate, trace = tmp_path / "gate", tmp_path / "trace"
    with rollfleet.connect(redis_url, run="drain", **SHAPE) as fleet:
        fleet.feed(prompts(2, gate=str(gate), trace=str(trace)))
        worker = processes.worker(redis_url, "drain", "Gated", slots=4, lease_s=1)
        wait_until(lambda: len(started(trace)) == 4, "it to be busy", 30.0)
        worker.signal(signal.SIGTERM)
        worker.event("draining", episodes=4)
        assert worker.page("/readyz") == (503, "draining\n")
        assert worker.page("/livez")[0] == 200
        # Longer than its lease, which is renewed all the while.
        other = processes.worker(redis_url, "drain", "Gated", slots=4, lease_s=1)
        wait_until(lambda: len(started(trace, other.pid)) == 4, "the other one to be busy", 30.0)
        time.sleep(1.5)
        assert not other.events("lease taken over")
        gate.touch()
        assert worker.wait() == 0
        assert train(fleet) == wanted(2)
        assert len(started(trace)) == 8
        assert_empty(fleet)


def test_sigterm_twice_hands_back_at_once(
    redis_url: str, processes: Processes, tmp_path: Path
) -> None:
    gate, trace = tmp_path / "gate", tmp_path / "trace"
    with rollfleet.connect(redis_url, run="twice", **SHAPE) as fleet:
        fleet.feed(prompts(2, gate=str(gate), trace=str(trace)))
        # All slots are busy: its claimer waits for one.
        worker = processes.worker(redis_url, "twice", "Gated", slots=8, lease_s=30)
        wait_until(lambda: len(started(trace)) == 8, "it to be busy", 30.0)
        other = processes.worker(redis_url, "twice", "Gated", lease_s=30)
        other.event("claiming")
        for _ in range(2):
            worker.signal(signal.SIGTERM)
            worker.event("stopping")
        told = time.monotonic()
        wait_until(lambda: len(started(trace, other.pid)) == 8, "the other one to have them", 30.0)
        assert time.monotonic() - told < 2
        assert worker.wait() == 0
        assert time.monotonic() - told < 4
        gate.touch()
        assert train(fleet) == wanted(2)
        assert_empty(fleet)
        # Handed back, it is the same attempt.
        assert {line["attempt"] for line in lines(trace)} == {1}


def test_the_drain_deadline_hands_back(
    redis_url: str, processes: Processes, tmp_path: Path
) -> None:
    gate, trace = tmp_path / "gate", tmp_path / "trace"
    with rollfleet.connect(redis_url, run="late", **SHAPE) as fleet:
        fleet.feed(prompts(1, gate=str(gate), trace=str(trace)))
        worker = processes.worker(redis_url, "late", "Gated", drain_s=0.5, lease_s=30)
        wait_until(lambda: len(started(trace)) == 4, "it to be busy", 30.0)
        worker.signal(signal.SIGTERM)
        told = time.monotonic()
        assert worker.wait() == 0
        assert time.monotonic() - told < 4
        wait_until(lambda: fleet.books().waiting == 4, "the prompts to be back")
        processes.worker(redis_url, "late", "Echo")
        assert train(fleet) == wanted(1)
        assert_empty(fleet)


# ---- Redis -------------------------------------------------------------------------------------


def test_redis_killed_and_restarted_mid_run(
    make_server: MakeServer, processes: Processes, tmp_path: Path
) -> None:
    server = make_server(tmp_path / "redis", appendonly="everysec")
    workers = [processes.worker(server.url, "restart", "Slow") for _ in range(2)]
    with rollfleet.connect(server.url, run="restart", **SHAPE) as fleet:
        for worker in workers:
            worker.event("claiming")
        fleet.feed(prompts(30, seconds=0.1))

        def at(step: int) -> None:
            if step == 3:
                server.kill()
                threading.Timer(2.0, server.restart).start()
            if step == 8:
                server.kill()
                server.restart()

        assert train(fleet, at) == wanted(30)
        assert_empty(fleet)
        assert [worker.stop() for worker in workers] == [0, 0]


def test_while_redis_is_away_a_worker_is_live_and_not_ready(
    make_server: MakeServer, processes: Processes, tmp_path: Path
) -> None:
    gate, trace = tmp_path / "gate", tmp_path / "trace"
    server = make_server(tmp_path / "redis", appendonly="everysec")
    with rollfleet.connect(server.url, run="away", **SHAPE) as fleet:
        fleet.feed(prompts(1, gate=str(gate), trace=str(trace)))
        worker = processes.worker(server.url, "away", "Gated", lease_s=30)
        wait_until(lambda: len(started(trace)) == 4, "it to be busy", 30.0)
        assert worker.page("/readyz") == (200, "ok\n")
        server.kill()
        wait_until(lambda: worker.page("/readyz") == (503, "no-redis\n"), "it to notice", 30.0)
        assert worker.page("/livez")[0] == 200
        # What runs goes on, and what is finished waits.
        gate.touch()
        wait_until(lambda: worker.metric("rollfleet_outbox_bytes") > 0, "the results to wait", 30.0)
        for _ in range(30):
            assert worker.page("/readyz") == (503, "no-redis\n")
            time.sleep(0.1)
        server.restart()
        wait_until(lambda: worker.page("/readyz") == (200, "ok\n"), "it to be back", 30.0)
        assert train(fleet) == wanted(1)
        assert_empty(fleet)
        assert len(started(trace)) == 4
        assert worker.metric("rollfleet_outbox_bytes") == 0
        # An idle worker has nothing to hand back, with or without Redis.
        server.kill()
        assert worker.stop() == 0
        server.restart()


def test_a_frozen_redis_is_away(
    make_server: MakeServer, processes: Processes, tmp_path: Path
) -> None:
    server = make_server()
    with (
        TcpProxy(server.url) as proxy,
        rollfleet.connect(server.url, run="frozen", **SHAPE) as fleet,
    ):
        worker = processes.worker(proxy.url, "frozen")
        worker.event("claiming")
        wait_until(lambda: worker.page("/readyz") == (200, "ok\n"), "it to be ready")
        proxy.pause()
        wait_until(lambda: worker.page("/readyz")[0] == 503, "it to notice", 30.0)
        # It stays so, although every call takes its whole timeout to fail.
        deadline = time.monotonic() + 7
        while time.monotonic() < deadline:
            assert worker.page("/readyz") == (503, "no-redis\n")
            time.sleep(0.1)
        proxy.resume()
        wait_until(lambda: worker.page("/readyz") == (200, "ok\n"), "it to be back", 30.0)
        fleet.feed(prompts(1))
        assert train(fleet) == wanted(1)
        assert_empty(fleet)
        assert worker.stop() == 0


@pytest.mark.parametrize(
    ("who", "command"),
    [
        ("worker", b"EVALSHA"),
        ("worker", b"XREADGROUP"),
        ("worker", b"HMGET"),
        ("worker", b""),
        ("trainer", b"EVALSHA"),
        ("trainer", b"XREADGROUP"),
        ("trainer", b"MGET"),
        ("trainer", b""),
    ],
)
def test_lost_replies(
    make_server: MakeServer, processes: Processes, who: str, command: bytes
) -> None:
    server = make_server()
    with TcpProxy(server.url) as proxy:
        worker = processes.worker(
            proxy.url if who == "worker" else server.url, "lost", "Slow", lease_s=1, slots=8
        )
        url = proxy.url if who == "trainer" else server.url
        with rollfleet.connect(url, run="lost", **SHAPE) as fleet:
            worker.event("claiming")
            fleet.feed(prompts(16))

            ends: list[threading.Thread] = []

            def at(step: int) -> None:
                if step in (2, 4):
                    # A few, in a row: repeats are lost as well. The trainer goes on meanwhile.
                    proxy.drop_replies(command)
                    ends.append(threading.Thread(target=end, args=(proxy.replies_lost + 2,)))
                    ends[-1].start()

            def end(enough: int) -> None:
                deadline = time.monotonic() + 3.0
                while proxy.replies_lost < enough and time.monotonic() < deadline:
                    time.sleep(0.01)
                proxy.resume()

            assert train(fleet, at) == wanted(16)
            for thread in ends:
                thread.join(10)
            assert_empty(fleet)
            assert worker.stop() == 0
        assert proxy.replies_lost > 0


def test_flushed_scripts_are_loaded_again(redis_url: str, processes: Processes) -> None:
    worker = processes.worker(redis_url, "scripts", "Slow")
    with (
        connect_sync(redis_url, role="test") as client,
        rollfleet.connect(redis_url, run="scripts", **SHAPE) as fleet,
    ):
        fleet.feed(prompts(10))
        assert train(fleet, lambda _: client.script_flush()) == wanted(10)
        assert_empty(fleet)
        assert worker.stop() == 0


def test_killed_connections_are_made_anew(redis_url: str, processes: Processes) -> None:
    worker = processes.worker(redis_url, "clients", "Slow", lease_s=1)
    with (
        connect_sync(redis_url, role="test") as client,
        rollfleet.connect(redis_url, run="clients", **SHAPE) as fleet,
    ):
        fleet.feed(prompts(16))

        def at(step: int) -> None:
            if step in (2, 5):
                client.client_kill_filter(_type="normal", skipme=True)

        assert train(fleet, at) == wanted(16)
        assert_empty(fleet)
        assert worker.stop() == 0


def test_a_flushed_redis_is_no_silent_hang(make_server: MakeServer, processes: Processes) -> None:
    """A documented loss: what matters is that it is said, or mended, and not waited for."""
    server = make_server()
    worker = processes.worker(server.url, "flush", "Slow")
    with (
        connect_sync(server.url, role="test") as client,
        rollfleet.connect(server.url, run="flush", **with_shape(starve_s=20.0)) as fleet,
    ):
        fleet.feed(prompts(20))
        steps = fleet.batches()
        next(steps)
        client.flushall()
        began = time.monotonic()
        said = ""
        try:
            assert sum(len(batch) for batch in steps) > 0
        except rollfleet.RollfleetError as exc:
            said = str(exc)
        assert "was opened by another trainer" not in said
        assert time.monotonic() - began < 15
    # The worker outlives it, and serves who comes next.
    with rollfleet.connect(server.url, run="flush", fresh=True, **SHAPE) as fleet:
        fleet.feed(prompts(2))
        assert train(fleet) == wanted(2)
        assert_empty(fleet)
    assert worker.stop() == 0


# ---- trainers ----------------------------------------------------------------------------------


def batches(trainer: Process) -> list[list[tuple[str, int]]]:
    """Members of each batch that it was handed, in order."""
    return [[(g, i) for g, i in line["members"]] for line in trainer.events("batch")]


def all_of(*parts: list[list[tuple[str, int]]]) -> Counter[tuple[str, int]]:
    return Counter(member for part in parts for batch in part for member in batch)


def test_a_batch_that_was_handed_over_is_served_again(redis_url: str, processes: Processes) -> None:
    processes.worker(redis_url, "handed")
    first = processes.trainer(
        redis_url, "handed", feed=12, die={"at": "handed", "step": 3}, settings={"max_staleness": 8}
    )
    assert first.wait() == -signal.SIGKILL
    second = processes.trainer(redis_url, "handed", feed=12, settings={"max_staleness": 8})
    assert second.wait() == 0, second.text
    assert batches(second)[0] == batches(first)[2]
    assert all_of(batches(first)[:2], batches(second)) == wanted(12)
    done = second.event("done")
    assert (done["balance"], done["committed"], done["dropped"]) == (0, 48, {})


def test_a_batch_whose_commit_was_planned_is_rolled_forward(
    redis_url: str, processes: Processes
) -> None:
    processes.worker(redis_url, "planned")
    first = processes.trainer(
        redis_url,
        "planned",
        feed=12,
        die={"at": "planned", "step": 3},
        settings={"max_staleness": 8},
    )
    assert first.wait() == -signal.SIGKILL
    with connect_sync(redis_url, role="test") as client:
        assert client.hlen("rf:{planned}:batches") == 1
    second = processes.trainer(redis_url, "planned", feed=12, settings={"max_staleness": 8})
    assert second.wait() == 0, second.text
    assert all_of(batches(first), batches(second)) == wanted(12)
    done = second.event("done")
    assert (done["balance"], done["committed"], done["dropped"]) == (0, 48, {})


@pytest.mark.parametrize("with_state", [True, False])
def test_what_was_trained_since_the_checkpoint_is_served_again_in_order(
    redis_url: str, processes: Processes, with_state: bool
) -> None:
    processes.worker(redis_url, "check")
    first = processes.trainer(
        redis_url,
        "check",
        feed=14,
        commit="checkpoint",
        checkpoint=2,
        die={"at": "handed", "step": 5},
        settings={"max_staleness": 16},
    )
    assert first.wait() == -signal.SIGKILL
    state = first.event("state")["state"]
    assert state["batch"] == 2
    second = processes.trainer(
        redis_url,
        "check",
        feed=14,
        state=state if with_state else None,
        settings={"max_staleness": 16},
    )
    assert second.wait() == 0, second.text
    # With its checkpoint, a trainer has the first two; without, it owns none of what was trained.
    after = 2 if with_state else 0
    assert batches(second)[: 5 - after] == batches(first)[after:]
    assert all_of(batches(first)[:after], batches(second)) == wanted(14)
    done = second.event("done")
    assert (done["balance"], done["committed"], done["dropped"]) == (0, 56, {})


def test_a_superseded_trainer_can_do_no_harm(
    redis_url: str, processes: Processes, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    processes.worker(redis_url, "super")
    old = processes.trainer(
        redis_url,
        "super",
        feed=40,
        die={"at": "wait", "step": 2, "gate": str(gate)},
        settings={"max_staleness": 8},
    )
    old.event("waiting")
    new = processes.trainer(
        redis_url, "super", feed=12, settings={"max_staleness": 8, "take_over": True}
    )
    new.event("batch", 2)
    gate.touch()
    assert old.wait() == 3, old.text
    error = old.event("error") if old.popen.poll() is None else old.events("error")[0]
    assert error["type"] == "SupersededError"
    assert "was opened by another trainer" in error["message"]
    assert new.wait() == 0, new.text
    # The old one's second batch was not its own any more: the new one was served it first.
    assert batches(new)[0] == batches(old)[1]
    twice = [m for m, n in all_of(batches(old)[:1], batches(new)).items() if n > 1]
    assert not twice
    done = new.event("done") if new.popen.poll() is None else new.events("done")[0]
    assert (done["balance"], done["dropped"]) == (0, {})
    assert done["committed"] == 4 * len({g for g, _ in all_of(batches(old)[:1], batches(new))})


def test_a_frozen_trainer_is_superseded(
    redis_url: str, processes: Processes, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    processes.worker(redis_url, "ice")
    old = processes.trainer(
        redis_url,
        "ice",
        feed=12,
        die={"at": "wait", "step": 1, "gate": str(gate)},
        settings={"max_staleness": 8},
    )
    old.event("waiting")
    old.signal(signal.SIGSTOP)
    gate.touch()
    # Its lease lapses, so nobody has to take over by force.
    new = processes.trainer(redis_url, "ice", feed=12, settings={"max_staleness": 8})
    new.event("batch", 1)
    old.signal(signal.SIGCONT)
    assert old.wait() == 3, old.text
    assert old.events("error")[0]["type"] == "SupersededError"
    assert new.wait() == 0, new.text
    assert all_of(batches(new)) == wanted(12)
    assert new.events("done")[0]["committed"] == 48


@pytest.mark.leaves_keys("its prompts are run by nobody", "rf:*")
def test_a_fresh_start_deletes_nothing_of_a_run_that_is_held(redis_url: str) -> None:
    shape: dict[str, Any] = {"samples_per_version": 8, "group_size": 4, "lease_s": 1.0}
    with rollfleet.connect(redis_url, run="held", **shape) as first:
        first.submit({"token_ids": [1]})
        with pytest.raises(rollfleet.SettingsError, match="is held by trainer"):
            rollfleet.connect(redis_url, run="held", fresh=True, **shape)
        assert first.books().waiting == 4


def test_a_trainer_that_a_fresh_one_takes_over_does_not_bring_its_run_back(redis_url: str) -> None:
    shape: dict[str, Any] = {"samples_per_version": 8, "group_size": 4}
    for _ in range(10):  # whatever the first one is at when its run is deleted
        with rollfleet.connect(redis_url, run="over", fresh=True, take_over=True, **shape) as first:
            first.submit({"token_ids": [1]})
            with rollfleet.connect(
                redis_url, run="over", fresh=True, take_over=True, **shape
            ) as second:
                with pytest.raises(rollfleet.SupersededError):
                    first.submit({"token_ids": [2]})
                assert (second.books().submitted, second.books().balance) == (0, 0)


def test_one_trainer_at_a_time(redis_url: str, processes: Processes) -> None:
    first = processes.trainer(
        redis_url, "one", feed=4, die={"at": "wait", "step": 1, "gate": "/nowhere/gate"}
    )
    processes.worker(redis_url, "one")
    first.event("waiting")
    second = processes.trainer(redis_url, "one", feed=4)
    assert second.wait() == 2
    error = second.events("error")[0]
    assert error["type"] == "SettingsError"
    assert "run 'one' is held by trainer" in error["message"]
    assert f"-{first.pid}-" in error["message"]
    assert "take_over=True" in error["message"]
    first.kill()
    third = processes.trainer(redis_url, "one", feed=4)
    assert third.wait() == 0, third.text
    assert all_of(batches(third)) == wanted(4)
