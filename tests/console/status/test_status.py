"""The snapshot: read from a real run, and every wait told in words."""

import asyncio
import dataclasses
import json
import time
from typing import Any

import pytest
from fixtures.staged import TOKEN, StagedRun
from rich.console import Console
from typer.testing import CliRunner

from rollfleet_common.board import Shape
from rollfleet_common.errors import BrokerSetupError
from rollfleet_common.ledger import Books
from rollfleet_common.messages import PolicyVersion
from rollfleet_console.cli import app
from rollfleet_console.status import watch
from rollfleet_console.status.explain import ago, explain
from rollfleet_console.status.render import SHOWN_WORKERS, render
from rollfleet_console.status.snapshot import take
from rollfleet_console.status.views import Route, Snapshot, WorkerCard, WorkerServer

NOW_MS = 1_755_000_000_000


def drawn(snapshot: Snapshot, width: int = 100) -> str:
    console = Console(width=width, highlight=False)
    with console.capture() as captured:
        console.print(render(snapshot))
    return captured.get()


def card(**fields: Any) -> WorkerCard:
    default = WorkerCard(
        id="w0",
        host="box",
        pid=7,
        version="0.1.0",
        routes=("default",),
        slots=64,
        busy=0,
        servers=(),
        state="claiming",
        policy_version=7,
        delivered=0,
        failed=0,
        seen_s=1.0,
        up_s=60.0,
        pending=0,
    )
    return dataclasses.replace(default, **fields)


def route(**fields: Any) -> Route:
    return dataclasses.replace(Route("default", 0, 0, 0, 1, None, None, None), **fields)


def fleet(*workers: WorkerCard, **fields: Any) -> Snapshot:
    """A run in which nothing waits, but for what is given."""
    default = Snapshot(
        run="r",
        taken_ms=NOW_MS,
        policy=PolicyVersion(7, 1),
        shape=Shape(1, 256, 2, 2),
        trainer="gpu-box",
        last_trainer="gpu-box",
        trainer_left_s=9.0,
        books=Books(submitted=64, in_flight=64, outstanding=64),
        workers=workers or (card(busy=64),),
        routes=(),
        strangers={},
    )
    return dataclasses.replace(default, **fields)


LOST = card(id="w1", state="lost", seen_s=45.0, pending=12)
FULL = Books(submitted=768, handed_out=768, outstanding=768)
DONE = Books(submitted=768, committed=768)


@pytest.mark.parametrize(
    ("snapshot", "said"),
    [
        (fleet(), []),
        (
            fleet(policy=None, shape=None, trainer=""),
            ["no trainer has ever opened run 'r': nothing is submitted"],
        ),
        (
            fleet(trainer="", books=Books(submitted=70, in_flight=64, ready=6)),
            [
                (
                    "no trainer holds the run (the last was gpu-box): nothing is submitted or trained; "
                    "6 rollouts wait for one"
                )
            ],
        ),
        (
            fleet(policy=PolicyVersion(7, 1, "", NOW_MS + 12_000)),
            ["the trainer has paused claiming for another 12 s"],
        ),
        (fleet(workers=()), ["no worker is registered: start one with `rollfleet worker`"]),
        (fleet(LOST), ["the only worker lost contact 45 s ago: w1"]),
        (
            fleet(LOST, dataclasses.replace(LOST, id="w2", seen_s=300.0)),
            ["all 2 workers lost contact 45 s ago: w1, w2"],
        ),
        (
            fleet(card(busy=64), LOST),
            ["worker w1 lost contact 45 s ago; its 12 prompts will be taken over"],
        ),
        (
            fleet(routes=(route(name="math", waiting=64, served_by=0, oldest_waiting_s=130.0),)),
            ["no worker serves route 'math': 64 prompts wait, the oldest for 2 min"],
        ),
        (
            fleet(routes=(route(delayed=1, next_due_s=3.0),)),
            ["1 prompt waits for the next attempt on route 'default', the first is due in 3.0 s"],
        ),
        (
            fleet(books=FULL, workers=(card(),)),
            [
                "workers idle: nothing waiting, outstanding 768 of 768: the trainer is the bottleneck"
            ],
        ),
        (
            fleet(books=DONE, workers=(card(),)),
            [
                (
                    "workers idle: nothing waiting, outstanding 0 of 768: the trainer feeds too few "
                    "prompts, or its data set has ended"
                )
            ],
        ),
        (
            fleet(books=Books(submitted=100, in_flight=64, waiting=36, outstanding=100)),
            [
                "all 64 slots busy, 36 prompts wait: the workers are the bottleneck; add some, or slots"
            ],
        ),
        (
            fleet(card(slots=1000, busy=64)),
            [
                (
                    "1,000 slots, but at most 768 samples may be outstanding: the rest stay idle; raise "
                    "pipeline_depth, or use fewer slots"
                )
            ],
        ),
        (
            fleet(
                card(
                    state="no-server",
                    busy=1,
                    servers=(WorkerServer("http://s0", "suspect", 0, None, "refused"),),
                )
            ),
            [
                "1 worker (w0): no inference server answers",
                "inference server http://s0 is suspect, says w0: refused",
            ],
        ),
        (
            fleet(*(card(id=f"w{i}", busy=1, state="draining") for i in range(5))),
            ["5 workers (w0, w1, w2 and 2 more): draining: nothing new is claimed"],
        ),
        (
            fleet(card(busy=64, state="outbox-full")),
            ["1 worker (w0): finished rollouts fill the buffer, and Redis does not take them"],
        ),
        (
            fleet(
                card(busy=1, servers=tuple(WorkerServer(f"s{i}", "trial", 0, 1) for i in range(5)))
            ),
            [
                "inference server s0 is on trial, says w0",
                "inference server s1 is on trial, says w0",
                "inference server s2 is on trial, says w0",
                "2 more inference servers are not serving",
            ],
        ),
        (
            fleet(strangers={"old-1": 3}),
            [
                (
                    "3 prompts leased to workers that are not registered: old-1 (3); taken over when the "
                    "lease ends"
                )
            ],
        ),
        (
            fleet(books=Books(submitted=65, in_flight=64)),
            [
                (
                    "the books do not balance: 1 prompt submitted, and nowhere to be found; Redis may "
                    "have lost its last writes"
                )
            ],
        ),
        (
            fleet(books=Books(submitted=62, in_flight=64)),
            ["the books do not balance: 2 prompts too many"],
        ),
        (
            fleet(books=Books(submitted=64, in_flight=64, dead_letters=2)),
            ["2 dead letters: see `rollfleet dead list`"],
        ),
    ],
)
def test_every_wait_has_a_reason_in_words(snapshot: Snapshot, said: list[str]) -> None:
    assert explain(snapshot) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.44, "0.4 s"), (45, "45 s"), (119, "119 s"), (125, "2 min"), (7300, "2 h"), (2e5, "2 d")],
)
def test_spans_of_time_are_short(seconds: float, said: str) -> None:
    assert ago(seconds) == said


async def test_a_run_is_read_over_its_partitions(redis_url: str) -> None:
    async with StagedRun(redis_url, partitions=2) as run:
        await run.open(version=7)
        for i in range(8):
            await run.submit(f"g{i}", 4)
        await run.submit("m0", 3, route="math")
        claims = await run.claim("w0", 4)
        assert len(claims) == 8
        assert {claim.partition for claim in claims} == {0, 1}
        await run.fail(claims[0], "w0", delay_ms=60_000)
        await run.fail(claims[1], "w0")
        await run.claim("stranger", 1)
        await run.card("w0", busy=6)
        await run.card("w1", seen_s=100)
        await run.client.hset(run.keys.workers, "w2", "{")

        s = await take(run.client, "staged")

        assert s.policy is not None
        assert (s.policy.version, s.policy.epoch) == (7, 1)
        assert s.trainer == "gpu-box:41"
        assert 15 < s.trainer_left_s <= 20
        assert s.limit == 768
        assert s.books.balance == 0
        assert (s.books.submitted, s.books.delayed, s.books.in_flight, s.books.dead) == (
            35,
            1,
            8,
            1,
        )
        default, math = s.routes
        assert (default.waiting, default.in_flight, default.delayed) == (22, 8, 1)
        assert default.served_by == 1
        assert default.next_due_s is not None
        assert 50 < default.next_due_s <= 60
        assert default.oldest_waiting_s is not None
        assert default.oldest_pending_s is not None
        assert 0 <= default.oldest_waiting_s < 60
        assert (math.name, math.waiting, math.served_by, math.in_flight) == ("math", 3, 0, 0)
        assert math.oldest_pending_s is None
        w0, w1 = s.workers
        assert (w0.state, w0.pending, w0.busy, w0.lost) == ("claiming", 6, 6, False)
        assert (w1.state, w1.lost) == ("lost", True)
        assert w1.seen_s == pytest.approx(100, abs=10)
        assert s.strangers == {"stranger": 2}
        assert s.unreadable == ("w2",)
        assert any("no worker serves route 'math': 3 prompts wait" in r for r in s.reasons)
        assert any("worker w1 lost contact" in r for r in s.reasons)
        assert json.loads(json.dumps(s.to_json()))["books"]["balance"] == 0
        lines = drawn(s).splitlines()
        (line,) = (x.split() for x in lines if x.startswith("math"))
        assert line[:3] == ["math", "0", "3"]
        (line,) = (x.split() for x in lines if x.startswith("w0"))
        assert line[:5] == ["w0", "claiming", "6/64", "6", "7"]
        assert line[-2:] == ["1/1", "up"]


async def test_a_pause_and_a_trainer_that_left_are_seen(redis_url: str) -> None:
    async with StagedRun(redis_url) as run:
        await run.open()
        until_ms = int(time.time() * 1000) + 30_000
        await run.board.publish(TOKEN, {"paused_until_ms": until_ms})
        s = await take(run.client, "staged")
        assert 20 < s.paused_s <= 31
        await run.board.release(TOKEN)
        s = await take(run.client, "staged")
        assert (s.trainer, s.last_trainer, s.trainer_left_s) == ("", "gpu-box:41", 0)
        assert "nobody holds the run, the last was gpu-box:41" in drawn(s)


async def test_a_run_that_nobody_opened(redis_url: str) -> None:
    async with StagedRun(redis_url) as run:
        s = await take(run.client, "staged")
        assert (s.policy, s.shape, s.limit, s.paused_s) == (None, None, None, 0)
        text = drawn(s)
        assert "no trainer has opened this run" in text
        assert "start one with `rollfleet worker`" in text


def test_the_screen_of_80_columns_cuts_nothing_off() -> None:
    counters = {"dead:data": 3, "retried:infra": 11}
    books = Books(submitted=1_000_000, committed=999_000, dropped={"stale": 997}, dead=3)
    books.counters.update(counters)
    text = drawn(fleet(card(id="worker-with-a-long-name-4711", busy=64), books=books), 80)
    assert "…" not in text
    assert "dropped: 997 stale" in text
    assert "dead: 3 data" in text
    assert "retried: 11 infra" in text
    assert "1,000,000" in text
    assert max(map(len, text.splitlines())) <= 80


def test_nothing_that_workers_say_is_markup() -> None:
    text = drawn(fleet(card(id="[red]w0", busy=64), run="[bold]r"))
    assert "[red]w0" in text
    assert "[bold]r" in text


def test_a_large_fleet_is_summed_up_with_the_lost_shown() -> None:
    workers = [card(id=f"w{i:03}", busy=32) for i in range(100)]
    workers[99] = dataclasses.replace(LOST, id="w099")
    text = drawn(fleet(*workers))
    assert f"{100 - SHOWN_WORKERS} more not shown; 100 in all: 99 claiming, 1 lost" in text
    assert "3,168 of 6,336 slots busy" in text
    assert "w099" in text.partition("w000")[0]


def test_the_reasons_may_come_first() -> None:
    console = Console(width=100)
    with console.capture() as captured:
        console.print(render(fleet(LOST, reasons=["it snows"]), why_first=True))
    text = captured.get()
    assert text.index("it snows") < text.index("1 in all")


def test_a_fleet_in_which_all_moves_says_so() -> None:
    assert "Nothing waits longer than it must." in drawn(fleet())


async def test_the_command(redis_url: str) -> None:
    async with StagedRun(redis_url) as run:
        await run.open()
        args = ["status", "--redis-url", redis_url, "--run", "staged"]
        result = await asyncio.to_thread(CliRunner().invoke, app, args)
        assert result.exit_code == 0, result.output
        assert "version 7, epoch 1" in result.stdout
        result = await asyncio.to_thread(CliRunner().invoke, app, [*args, "--json"])
        tree = json.loads(result.stdout)
        assert tree["policy"]["version"] == 7
        assert tree["reasons"] == ["no worker is registered: start one with `rollfleet worker`"]
        result = await asyncio.to_thread(CliRunner().invoke, app, [*args, "--json", "--watch"])
        assert result.exit_code == 2
        assert "--watch draws on a terminal: it does not go with --json" in result.stderr


async def test_watch_waits_for_a_redis_that_went_away(
    redis_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async with StagedRun(redis_url) as run:
        await run.open()
        seen: list[str] = []
        troubles: list[Exception | None] = [
            None,
            ConnectionError("gone"),
            None,
            BrokerSetupError("no rights"),
        ]

        async def looked(client: Any, name: str) -> Snapshot:
            seen.append(name)
            if (trouble := troubles[len(seen) - 1]) is not None:
                raise trouble
            return await take(client, name)

        monkeypatch.setattr(watch, "take", looked)
        with pytest.raises(BrokerSetupError, match="no rights"):
            await watch.watch_run(run.client, "staged", 0.01)
        assert seen == ["staged"] * 4


def test_workers_without_a_server_are_not_called_the_bottleneck() -> None:
    waiting = Books(submitted=100, in_flight=64, waiting=36, outstanding=100)
    cut_off = card(busy=64, state="no-server")
    said = " ".join(explain(fleet(cut_off, books=waiting)))
    assert "no inference server answers" in said
    assert "bottleneck" not in said
    both = explain(fleet(cut_off, card(id="w1", busy=64), books=waiting))
    assert any("all 64 slots busy" in sentence for sentence in both)
