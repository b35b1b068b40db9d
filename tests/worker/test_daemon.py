"""The worker daemon as a process: bad input, bad workflows, absent servers, pages, exit codes."""

import json
import socket
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.fake_vllm import FakeVllm
from fixtures.fleet_processes import Process, Processes, lines
from fixtures.servers import MakeServer
from support import wait_until, wait_until_async

import rollfleet
from rollfleet_common.redis import connect_sync
from rollfleet_worker.workflows.base import load_workflow

SHAPE: dict[str, Any] = {
    "samples_per_version": 32,
    "group_size": 4,
    "max_staleness": 4,
    "lease_s": 1.0,
    "starve_s": 40.0,
}


def with_shape(**changes: Any) -> dict[str, Any]:
    return {**SHAPE, **changes}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def refused(process: Process) -> str:
    """What a worker said that refused to start: one line, and exit code 2."""
    assert process.wait() == 2, process.text
    assert "Traceback" not in process.text
    said = [line for line in process.text.splitlines() if line.startswith("rollfleet: ")]
    assert len(said) == 1, process.text
    return said[0]


# ---- refused at start --------------------------------------------------------------------------


def test_what_is_refused_at_start(redis_url: str, processes: Processes) -> None:
    def start(*workflows: str, **settings: Any) -> Process:
        return processes.worker(redis_url, "refused", *workflows, **settings)

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        cases = [
            (
                start("nowhere.at_all:Echo"),
                "workflow 'nowhere.at_all:Echo' does not import: No mod",
            ),
            (start("fixtures.workflows:Eco"), "has no attribute 'Eco'"),
            (start("NoRun"), "has no method `async def run(prompt, context)`"),
            (start("NeedsArguments"), "making one without arguments raised TypeError"),
            (start(slot=3), "flag --slot is no setting of rollfleet worker; did you mean --slots?"),
            (start(slots=0), "slots = '0' (from flag --slots): should be greater than or equal"),
            (start(health_port=port), f"health_host:health_port 127.0.0.1:{port} cannot be had"),
            (start(run="a b"), "the name 'a b' cannot be part of a Redis key"),
        ]
        for process, said in cases:
            assert said in refused(process)


def test_a_wrong_password_is_refused(make_server: MakeServer, processes: Processes) -> None:
    server = make_server(tcp=True, extra=["--requirepass", "sesame"])
    hidden = server.url.replace("redis://", "redis://:wr0ng@")
    cases = [processes.worker(server.url, "auth"), processes.worker(hidden, "auth")]
    for process in cases:
        said = refused(process)
        assert "refused us" in said
        assert "check the user and the password" in said
        assert "wr0ng" not in process.text
    right = processes.worker(server.url.replace("redis://", "redis://:sesame@"), "auth")
    right.event("worker started")
    assert "sesame" not in right.text
    assert right.stop() == 0


def test_a_right_that_is_missing_ends_it_with_a_clear_error(
    make_server: MakeServer, processes: Processes
) -> None:
    server = make_server(tcp=True)
    with connect_sync(server.url, role="test") as client:
        client.execute_command(
            "ACL", "SETUSER", "half", "on", ">pw", "~*", "&*", "+@all", "-xreadgroup"
        )
        client.execute_command("ACL", "SETUSER", "less", "on", ">pw", "~*", "&*", "+@all", "-hmget")
    with rollfleet.connect(server.url, run="acl", **SHAPE):
        for user in ("half", "less"):
            url = server.url.replace("redis://", f"redis://{user}:pw@")
            worker = processes.worker(url, "acl")
            assert worker.wait() == 2, worker.text
            assert "this user lacks rights" in worker.text


def test_an_evicting_server_is_a_warning_and_with_strict_a_refusal(
    make_server: MakeServer, processes: Processes
) -> None:
    server = make_server(extra=["--maxmemory-policy", "allkeys-lru"])
    strict = processes.start(
        *("-m", "rollfleet_console", "worker", "--workflow", "fixtures.workflows:Echo"),
        *("--redis-url", server.url, "--strict"),
        name="strict",
    )
    assert "maxmemory-policy is allkeys-lru" in refused(strict)
    lax = processes.worker(server.url, "evict")
    lax.event("worker started")
    assert "run CONFIG SET maxmemory-policy noeviction" in lax.text
    assert lax.stop() == 0


def test_an_unreachable_redis_is_waited_for(make_server: MakeServer, processes: Processes) -> None:
    server = make_server(tcp=True)
    server.kill()
    port = free_port()
    worker = processes.worker(server.url, "wait", health_port=port)
    wait_until(lambda: worker.page("/livez", port) == (200, "ok\n"), "it to be live", 30.0)
    wait_until(lambda: worker.page("/readyz", port) == (503, "no-redis\n"), "it to say why", 30.0)
    server.restart()
    wait_until(lambda: worker.page("/readyz", port) == (503, "no-run\n"), "Redis to be back", 30.0)
    with rollfleet.connect(server.url, run="wait", **SHAPE) as fleet:
        wait_until(lambda: worker.page("/readyz", port) == (200, "ok\n"), "the run to open", 30.0)
        fleet.submit({"token_ids": [1]})
        batch = fleet.next_batch(4)
        assert batch is not None
        fleet.commit(batch)
    # No run, no Redis, nothing to do: it ends when it is told to.
    assert worker.stop() == 0
    lonely = processes.worker(server.url, "nobody")
    lonely.event("worker started")
    assert lonely.stop() == 0
    server.kill()
    # A free port for its pages might be the one that Redis has just left.
    absent = processes.worker(server.url, "nobody")
    absent.event("redis is away")
    assert absent.stop() == 0


# ---- bad workflows -----------------------------------------------------------------------------


def letters(url: str, run: str) -> list[dict[bytes, bytes]]:
    with connect_sync(url, role="test") as client:
        entries: Any = client.xrange(f"rf:{{{run}/0}}:dead")
        return [fields for _, fields in entries]


@pytest.mark.leaves_keys("dead letters stay until they are purged", "rf:*:dead")
def test_workflows_that_fail_close_their_groups_and_harm_nobody(
    redis_url: str, processes: Processes, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    acts = {
        "raise": ("data", 'KeyError: "the user\'s own mistake"'),
        "none": ("data", "it returned None; `run` must return a Sample or a list of them"),
        "list": ("data", "it returned a list of ['Sample', 'str']"),
        "empty": ("data", "a rollout without samples"),
        "shape": ("data", "logprobs has 2 values for 7 token_ids"),
        "nan": ("data", "logprobs[6] is nan"),
        "nan-reward": ("data", "reward is nan, no number that is finite in float32"),
        "enum": ("data", "finish_reason is a Why, no text that travels"),
        "surrogate": ("data", "components has the key '\\ud800', no text that travels"),
        "context": ("data", "a bytes, not a str"),
        "base": ("data", "it raised BaseException: of no kind"),
        "mute": ("data", "ValueError: no text"),
        "ours": ("data", "SettingsError: one of rollfleet's own errors"),
        "unmasked": ("data", "no token is trained on"),
        "never": ("timeout", "timed out"),
        "huge": ("data", "over the cap of 100,000 (max_rollout_bytes)"),
        "reward-hangs": ("timeout", "did not return within 0.3 s of its start; its process was"),
        "reward-raises": ("data", "ZeroDivisionError: the verifier's own mistake"),
        "exit": ("data", "SystemExit"),
        "cancel": ("data", "CancelledError"),
    }
    worker = processes.worker(
        redis_url,
        "acts",
        "Actor",
        episode_timeout_s=10,  # what waits for the one reward process stays far below this
        max_rollout_bytes=100_000,
        attempts_data=2,
        attempts_timeout=2,
        reward_processes=1,
    )
    with rollfleet.connect(redis_url, run="acts", **with_shape(samples_per_version=64)) as fleet:
        for act in acts:
            # One member of the group fails; and one group in between is well.
            fleet.submit({"token_ids": [1, 2, 3], "act": act, "index": 2, "trace": str(trace)})
        for _ in range(4):
            fleet.submit({"token_ids": [1, 2, 3], "act": "large"})
        batch = fleet.next_batch(16)
        assert batch is not None
        assert {r.samples[0].arrays["extra"].shape for r in batch.rollouts} == {(20_000,)}
        fleet.commit(batch)
        wait_until(lambda: fleet.books().dead == len(acts), "all of them to die", 60.0)
        # Torn groups are closed, and dropped.
        wait_until(lambda: fleet.books().outstanding == 0, "all groups to close", 30.0)
        books = fleet.books()
        assert books.balance == 0, books
        assert sum(books.dropped.values()) == 3 * len(acts), books
        assert books.committed == 16
        assert books.tombstones == 0
        with connect_sync(redis_url, role="test") as client:
            assert not list(client.scan_iter(match="rf:*:group:*"))
    found: dict[str, dict[str, Any]] = {}
    for letter in letters(redis_url, "acts"):
        history = [json.loads(line) for line in letter[b"e"].splitlines()]
        assert [h["attempt"] for h in history] == [1, 2]
        assert {h["kind"] for h in history} == {letter[b"why"].decode()}
        act = next(line["group"] for line in lines(trace) if line["group"] == letter[b"g"].decode())
        found[act] = history[0]
    tried = Counter((line["group"], line["index"]) for line in lines(trace))
    assert sorted(tried.values()) == [1] * 3 * len(acts) + [2] * len(acts)
    said = [(h["kind"], h["detail"]) for h in found.values()]
    for kind, detail in acts.values():
        assert any(kind == k and detail in d for k, d in said), (detail, said)
    for kind in ("data", "timeout"):
        count = sum(k == kind for k, _ in acts.values())
        for then in ("retry", "dead"):
            name = f'rollfleet_failures_total{{kind="{kind}",then="{then}"}}'
            assert worker.metric(name) == count
    # What Redis has, the worker counts a moment later: when the reply is here.
    delivered = 16 + 3 * len(acts)
    wait_until(
        lambda: worker.metric('rollfleet_deliveries_total{outcome="yes"}') == delivered,
        "the worker to have counted what it delivered",
    )
    assert worker.metric("rollfleet_slots_busy") == 0
    assert worker.stop() == 0


def test_what_fails_once_is_run_again(redis_url: str, processes: Processes, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    worker = processes.worker(redis_url, "again", "Actor")
    with rollfleet.connect(redis_url, run="again", **SHAPE) as fleet:
        fleet.submit({"token_ids": [1], "act": "raise", "fails": 1, "trace": str(trace)})
        batch = fleet.next_batch(4)
        assert batch is not None
        assert {r.header.attempt for r in batch.rollouts} == {2}
        fleet.commit(batch)
        assert fleet.books().balance == 0
    assert Counter(line["attempt"] for line in lines(trace)) == {1: 4, 2: 4}
    assert worker.stop() == 0


@pytest.mark.leaves_keys("dead letters stay until they are purged", "rf:*:dead")
@pytest.mark.parametrize("slots", [1, 8])
def test_a_prompt_that_kills_its_worker_is_poison_and_its_neighbours_are_not(
    redis_url: str, processes: Processes, tmp_path: Path, slots: int
) -> None:
    trace = tmp_path / "trace"
    crew: list[Process] = []

    def crewed() -> bool:
        """As a supervisor would: whoever died is replaced."""
        if not crew or crew[-1].popen.poll() is not None:
            crew.append(
                processes.worker(
                    redis_url, "poison", "Actor", lease_s=1, attempts_poison=2, slots=slots
                )
            )
        return fleet.books().dead > 0 and not fleet.books().outstanding

    with rollfleet.connect(redis_url, run="poison", **SHAPE) as fleet:
        fleet.submit({"token_ids": [1], "act": "die", "index": 3, "trace": str(trace)})
        wait_until(crewed, "the prompt to be given up", 60.0)
        assert fleet.books().dead == 1
        fleet.submit({"token_ids": [1]})
        batch = fleet.next_batch(4)
        assert batch is not None
        fleet.commit(batch)
        books = fleet.books()
        assert (books.balance, books.dead, books.committed) == (0, 1, 4), books
        assert books.outstanding == 0
    (letter,) = letters(redis_url, "poison")
    assert (letter[b"why"], letter[b"i"]) == (b"poison", b"3")
    assert "its worker died 2 times" in json.loads(letter[b"e"])["detail"]
    assert [process.popen.poll() for process in crew] == [-9, -9, None]
    assert sum(line["index"] == 3 for line in lines(trace)) == 2


@pytest.mark.leaves_keys("garbage is kept as dead letters", "rf:*:dead")
def test_garbage_on_the_streams_is_put_aside(redis_url: str, processes: Processes) -> None:
    worker = processes.worker(redis_url, "garbage")
    rubbish: list[dict[str, bytes]] = [
        {"x": b"y"},
        {"d": b"\xc1\xff\x00", "i": b"0", "a": b"1", "g": b"g", "n": b"1", "k": b"train"},
        {"d": b"", "i": b"no number", "a": b"1"},
    ]
    with (
        connect_sync(redis_url, role="test") as client,
        rollfleet.connect(redis_url, run="garbage", **SHAPE) as fleet,
    ):
        worker.event("claiming")
        for entry in rubbish:
            client.xadd("rf:{garbage/0}:prompts:default", entry)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
            client.xadd("rf:{garbage/0}:rollouts", {"h": entry.get("d", b"?")})
            client.xadd("rf:{garbage/0}:tombstones", entry)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        fleet.submit({"token_ids": [1]})
        batch = fleet.next_batch(4)
        assert batch is not None
        fleet.commit(batch)
        wait_until(lambda: len(letters(redis_url, "garbage")) == 9, "all of it to be put aside")
        books = fleet.books()
        assert (books.balance, books.counters["garbage"], books.dead) == (0, 9, 0), books
        assert (books.waiting, books.in_flight, books.handed_out) == (0, 0, 0)
    assert all(letter[b"why"] == b"garbage" for letter in letters(redis_url, "garbage"))
    assert worker.metric("rollfleet_garbage_total") == 3
    assert worker.stop() == 0


# ---- inference servers -------------------------------------------------------------------------


async def test_without_an_inference_server_nothing_is_claimed(
    redis_url: str, processes: Processes, tmp_path: Path
) -> None:
    fake = FakeVllm(port=free_port(), version="0")
    worker = processes.worker(
        redis_url, "server", "Served", server=fake.url, slots=4, max_tokens=5, model="tiny"
    )
    settings = rollfleet.TrainerSettings(redis_url=redis_url, run="server", **SHAPE)
    async with rollfleet.AsyncFleet(settings) as fleet:
        for _ in range(4):
            await fleet.submit({"token_ids": [1, 2]})

        async def readyz(text: str) -> bool:
            import asyncio  # noqa: PLC0415

            return (await asyncio.to_thread(worker.page, "/readyz"))[1] == text

        await wait_until_async(lambda: readyz("no-server\n"), "it to notice", 30.0)
        books = await fleet.books()
        assert books.dead == 0
        claimed = books.in_flight + books.delayed
        assert claimed <= 8  # what it took before it knew; no more from then on
        async with fake:
            batch = await fleet.next_batch(16)
            assert batch is not None
            await wait_until_async(lambda: readyz("ok\n"), "it to be ready", 30.0)
        assert {r.header.server for r in batch.rollouts} == {fake.url}
        assert {r.samples[0].reward for r in batch.rollouts} == {5.0}
        assert all(
            np.array_equal(r.samples[0].token_ids[:2], np.array([1, 2])) for r in batch.rollouts
        )
        await fleet.commit(batch)
        books = await fleet.books()
        assert (books.balance, books.committed, books.dead) == (0, 16, 0)
    assert worker.stop() == 0


def test_a_servers_password_is_in_no_log(redis_url: str, processes: Processes) -> None:
    secret = "http://me:s3same@127.0.0.1:9"
    worker = processes.worker(redis_url, "hidden", "Served", server=secret)
    assert worker.event("worker started")["servers"] == ["http://127.0.0.1:9"]
    assert worker.stop() == 0
    wrong = [
        processes.worker(redis_url, "hidden", server=url)
        for url in (
            "http://me:s3same@[::",
            "ftp://me:s3same@host",
            "http://me:s3same@host:99999",
        )
    ]
    for process in wrong:
        refused(process)
    assert all("s3same" not in process.text for process in [worker, *wrong])


# ---- pages -------------------------------------------------------------------------------------


def test_metrics_and_card_tell_the_truth(
    redis_url: str, processes: Processes, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    worker = processes.worker(redis_url, "pages", "default=Echo", "slow=Gated", slots=6, name="wk")
    with (
        connect_sync(redis_url, role="test") as client,
        rollfleet.connect(redis_url, run="pages", version=3, **SHAPE) as fleet,
    ):
        worker.event("claiming")
        fleet.submit({"token_ids": [1], "route": "slow", "gate": str(gate)})
        wait_until(lambda: worker.metric("rollfleet_slots_busy") == 4, "four to run", 30.0)
        assert worker.metric("rollfleet_slots") == 6
        assert worker.metric("rollfleet_policy_version") == 3
        assert worker.metric("rollfleet_ready") == 1
        assert worker.metric('rollfleet_claimed_total{route="slow"}') == 4
        fleet.publish(5)
        wait_until(lambda: worker.metric("rollfleet_policy_version") == 5, "the version")
        fleet.submit({"token_ids": [1]})
        wait_until(lambda: fleet.books().handed_out == 4, "the quick ones", 30.0)
        yes = 'rollfleet_deliveries_total{outcome="yes"}'
        wait_until(lambda: worker.metric(yes) == 4, "the answer to the delivery", 30.0)
        assert worker.metric("rollfleet_tokens_total") == 4 * 5
        assert worker.metric("rollfleet_payload_bytes_total") > 4 * 5 * 8
        assert worker.metric("rollfleet_slots_busy") == 4
        gate.touch()

        def card() -> dict[str, Any]:
            ((_, raw),) = client.hgetall("rf:{pages}:workers").items()
            return dict(json.loads(raw))

        wait_until(lambda: (card()["busy"], card()["policy_version"]) == (0, 5), "a new card", 30.0)
        assert card()["id"].startswith("wk-")
        assert (card()["pid"], card()["slots"]) == (worker.pid, 6)
        assert card()["routes"] == ["default", "slow"]
        wait_until(lambda: card()["delivered"] >= 4, "the count on the card", 30.0)
        batch = fleet.next_batch(8)
        assert batch is not None
        assert batch.staleness == [2] * 4 + [0] * 4
        fleet.commit(batch)
        assert worker.page("/nothing")[0] == 404
        assert worker.stop() == 0
        assert not client.hgetall("rf:{pages}:workers")


# ---- trainers ----------------------------------------------------------------------------------


def test_what_a_trainer_refuses_at_start(make_server: MakeServer) -> None:
    locked = make_server(tcp=True, extra=["--requirepass", "sesame"])
    with pytest.raises(rollfleet.BrokerSetupError, match="check the user and the password"):
        rollfleet.connect(locked.url, run="no")
    evicting = make_server(extra=["--maxmemory-policy", "allkeys-lru"])
    with pytest.raises(rollfleet.BrokerSetupError, match="maxmemory-policy is allkeys-lru"):
        rollfleet.connect(evicting.url, run="no", strict=True)
    small = make_server(maxmemory="64mb")
    arithmetic = r"\(2 \+ 1\) x 256 x 1,048,576 = 805,306,368 bytes"
    with pytest.raises(rollfleet.BrokerSetupError, match=arithmetic):
        rollfleet.connect(small.url, run="no")
    with rollfleet.connect(small.url, run="yes", samples_per_version=16):
        pass
    small.kill()
    for wrong, said in (
        ({"batch_size": 12}, "batch_size = 12 is no multiple of group_size = 8"),
        ({"batch_size": 1024}, r"\(2 \+ 1\) x 256 = 768 samples may be outstanding"),
        ({"pipeline_depth": 3}, r"pipeline_depth = 3 is more than max_staleness = 2"),
        ({"min_group_size": 9}, "min_group_size = 9 is more than group_size = 8"),
        ({"groupsize": 9}, "did you mean group_size"),
        ({"state": {"run": "other"}}, "the state is of run 'other', not of 'no'"),
    ):
        settings: dict[str, Any] = wrong
        with pytest.raises(rollfleet.SettingsError, match=said):
            rollfleet.connect(small.url, run="no", **settings)


def test_what_a_trainer_cannot_submit(redis_url: str) -> None:
    with rollfleet.connect(redis_url, run="bad", max_prompt_bytes=4096, **SHAPE) as fleet:
        with pytest.raises(rollfleet.OversizeError, match="data"):
            fleet.submit({"token_ids": [1], "text": "x" * 5000})
        with pytest.raises(rollfleet.InvalidPromptError, match=r"data\['fn'\]"):
            fleet.submit({"token_ids": [1], "fn": print})
        with pytest.raises(rollfleet.InvalidPromptError, match="field token_ids is float64"):
            fleet.submit({"token_ids": [1.5]})
        with pytest.raises(rollfleet.InvalidPromptError, match="could never be submitted"):
            fleet.submit({"token_ids": [1], "n": 1000})
        with pytest.raises(rollfleet.RollfleetError, match="route"):
            fleet.submit({"token_ids": [1], "route": "a b"})
        assert fleet.books().submitted == 0


@pytest.mark.leaves_keys("nobody ran the prompts", "rf:*:prompts:*", "rf:*:group:*")
def test_a_feed_that_fails_says_where(redis_url: str) -> None:
    def bad() -> Any:
        yield {"token_ids": [1]}
        raise ValueError("the disk is gone")

    with rollfleet.connect(redis_url, run="raise", **SHAPE) as fleet:
        fleet.feed(bad())
        with pytest.raises(rollfleet.RollfleetError, match="ValueError: the disk is gone") as info:
            fleet.next_batch()
        assert isinstance(info.value.__cause__, ValueError)
        assert fleet.books().submitted == 4
    with rollfleet.connect(redis_url, run="third", **SHAPE) as fleet:
        fleet.feed([{"token_ids": [1]}, {"token_ids": [1]}, {"token_ids": ["x"]}])
        with pytest.raises(rollfleet.InvalidPromptError, match="prompt 2: field token_ids"):
            fleet.next_batch()


@pytest.mark.leaves_keys("nobody ran the prompts", "rf:*:prompts:*", "rf:*:group:*")
def test_a_starved_trainer_is_told_why(redis_url: str) -> None:
    with rollfleet.connect(redis_url, run="starved", **SHAPE) as fleet:
        with pytest.raises(rollfleet.StarvedError, match="nothing was submitted"):
            fleet.next_batch(timeout_s=0.2)
        fleet.submit({"token_ids": [1]})
        said = "no worker has ever shown up for this run; 4 samples wait for a worker"
        with pytest.raises(rollfleet.StarvedError, match=said):
            fleet.next_batch(timeout_s=0.2)
    fleet.close()
    with pytest.raises(rollfleet.RollfleetError, match="the fleet is closed"):
        fleet.books()


def test_a_workflow_beside_the_operator_is_found(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine_alone.py").write_text(
        "class Even:\n    async def run(self, prompt, context):\n        raise ValueError\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert type(load_workflow("mine_alone:Even")).__name__ == "Even"
    with pytest.raises(rollfleet.SettingsError, match=r"is not there: .*has no attribute 'Evn'"):
        load_workflow("mine_alone:Evn")
    (tmp_path / "mine_broken.py").write_text("import os\nos.no_such\nclass Even: ...\n")
    with pytest.raises(
        rollfleet.SettingsError, match=r"importing it raised AttributeError: .*no_such"
    ):
        load_workflow("mine_broken:Even")
