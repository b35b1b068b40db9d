"""Servers that come and go while a pool runs, and what the trainer's rows let them do."""

import asyncio
import time
from dataclasses import replace

import pytest
from fixtures.fake_control import ControlledSglang, ControlledVllm
from fixtures.scripted_engine import Gate, Server, request_of
from support import wait_until_async

from rollfleet_common import servers as registry
from rollfleet_common.errors import (
    EngineRefusedError,
    EngineUnavailableError,
    SettingsError,
    StaleServerError,
)
from rollfleet_common.messages import NO_VERSION, PolicyVersion
from rollfleet_common.servers import ServerWeights, WeightState
from rollfleet_engines.interface import Sampling, TextAnswer
from rollfleet_engines.signals import Monitor
from rollfleet_worker.pool.breaker import BreakerSettings
from rollfleet_worker.pool.pool import EnginePool, ServerState

BOARD = PolicyVersion(version=3, epoch=1)
QUICK = BreakerSettings(backoff_s=1e-6, max_backoff_s=1e-6)


class Rig:
    """A pool whose registered servers are scripted, too; rows and registry are told in one line."""

    def __init__(self, *names, **settings):
        self.made = {name: Server(name) for name in names}
        self.kinds = {}
        self.disagreements = 0
        self.pool = EnginePool(
            list(self.made.values()),
            settings.pop("cap", 8),
            make=self.make,
            patience=settings.pop("patience", QUICK),
            disagreed=self.disagreed,
            **{"wait_s": 5.0, **settings},
        )

    def disagreed(self):
        self.disagreements += 1

    def make(self, url, kind):
        if "refuse" in url:
            raise SettingsError("no such thing")
        self.kinds[url] = kind
        self.made[url] = Server(url)
        return self.made[url]

    def apply(self, *registered, draining=(), rows=(), board=BOARD, engine="auto"):
        known = {
            u: registry.RegisteredServer(u, engine, u in draining) for u in (*registered, *draining)
        }
        self.pool.apply(known, {row.url: row for row in rows}, board)

    @property
    def states(self):
        return {one.name: one.state.value for one in self.pool.states()}

    async def until(self, **states):
        await wait_until_async(lambda: self.states == states, f"{states}")

    async def served_by(self, affinity="a"):
        (made,) = await self.pool.generate(request_of(affinity))
        return made.server


@pytest.fixture
async def rig_of():
    rigs = []

    def make(*names, **settings):
        rigs.append(Rig(*names, **settings))
        return rigs[-1]

    yield make
    for rig in rigs:
        await rig.pool.close()


def row(url, version=3, state=WeightState.SERVING, **fields):
    return ServerWeights(url, state, version, **{"epoch": 1, "at_ms": 1, **fields})


def refitting(url, until_ms):
    return row(url, state=WeightState.REFITTING, until_ms=int(until_ms))


# ---- membership --------------------------------------------------------------------------------


async def test_a_pool_without_servers_waits_and_the_first_one_starts_it(rig_of):
    rig = rig_of()
    rig.apply()
    assert rig.pool.out
    call = asyncio.create_task(rig.served_by())
    await wait_until_async(lambda: rig.pool.asked, "the call to wait")
    rig.apply("s1", engine="sglang")
    assert await call == "s1"
    assert rig.kinds == {"s1": "sglang"}
    assert not rig.pool.out


async def test_a_call_for_which_no_server_ever_comes_says_what_to_do(rig_of):
    with pytest.raises(EngineUnavailableError, match="rollfleet server add URL"):
        await rig_of(wait_s=0.01).served_by()


async def test_a_server_that_does_not_answer_yet_is_sent_nothing(rig_of):
    rig = rig_of("s0")
    rig.apply("s1")
    await rig.until(s0="serving", s1="serving")
    late = rig.made["s2"] = Server("s2")
    late.is_ready = False
    rig.make = lambda *_: late
    rig.pool._make = rig.make
    rig.apply("s1", "s2")
    await wait_until_async(lambda: late.probes > 2, "probes in vain")
    for key in map(str, range(20)):
        assert await rig.served_by(key) != "s2"
    assert rig.states["s2"] == "starting"
    late.is_ready = True
    await rig.until(s0="serving", s1="serving", s2="serving")


async def test_the_first_registered_server_waits_for_its_weights_where_the_trainer_gives_them(
    rig_of,
):
    rig = rig_of("s0")
    refits = replace(BOARD, refits=True)
    rig.apply("s1", board=refits)
    # Whoever started this worker with a server sees to its weights, as long as there are no rows.
    await rig.until(s0="serving", s1="starting")
    assert {await rig.served_by(key) for key in map(str, range(20))} == {"s0"}
    rig.apply("s1", board=refits, rows=[row("s0"), row("s1")])
    await rig.until(s0="serving", s1="serving")


async def test_a_draining_server_ends_what_runs_and_takes_nothing_new(rig_of):
    rig = rig_of("s0")
    rig.apply("s1")
    await rig.until(s0="serving", s1="serving")
    home = await rig.served_by()
    other = {"s0": "s1", "s1": "s0"}[home]
    rig.made[home].gate = Gate()
    running = asyncio.create_task(rig.served_by())
    await wait_until_async(lambda: rig.made[home].in_flight == 1, "a call to run there")
    rig.apply(*({"s1"} - {home}), draining=[home])
    assert rig.states[home] == "draining"
    assert await rig.served_by() == other
    rig.made[home].gate.set()
    assert await running == home
    # A static one is drained by a row, and is back without it; both are asked first.
    rig.apply("s1")
    await rig.until(s0="serving", s1="serving")
    assert await rig.served_by() == home


async def test_a_removed_server_is_closed_when_it_is_idle(rig_of):
    rig = rig_of("s0")
    rig.apply("s1")
    await rig.until(s0="serving", s1="serving")
    gone = rig.made["s1"]
    gone.gate = Gate()
    keys = [str(i) for i in range(12)]
    calls = [asyncio.create_task(rig.served_by(key)) for key in keys]
    await wait_until_async(lambda: gone.in_flight > 0, "calls to run there")
    rig.apply()
    assert set(rig.states) == {"s0"}
    assert not gone.closed
    gone.gate.set()
    assert set(await asyncio.gather(*calls)) == {"s0", "s1"}
    await wait_until_async(lambda: gone.closed == 1, "it to be closed")
    # The static one stays, whatever the registry says.
    assert await rig.served_by() == "s0"


async def test_a_server_that_is_registered_again_is_a_new_one(rig_of):
    rig = rig_of()
    rig.apply("s1")
    await rig.until(s1="serving")
    first = rig.made["s1"]
    rig.apply("s1", engine="openai")
    assert rig.made["s1"] is not first
    await wait_until_async(lambda: first.closed == 1, "the first to be closed")
    assert await rig.served_by() == "s1"


async def test_a_registered_server_that_cannot_be_used_hides_no_other(rig_of):
    rig = rig_of()
    rig.apply("refuse", "s1")
    await rig.until(s1="serving")


# ---- rows --------------------------------------------------------------------------------------


async def test_a_request_carries_what_its_server_was_refitted_to(rig_of):
    rig = rig_of("s0")
    rig.apply()
    await rig.served_by()
    rig.apply(rows=[row("s0", 7, model="policy")], board=PolicyVersion(7, 1))
    await rig.served_by()
    assert rig.made["s0"].serves == [NO_VERSION, 7]
    assert rig.made["s0"].models == ["", "policy"]


async def test_a_row_is_of_the_server_whatever_key_it_was_reached_with(rig_of):
    rig = rig_of("http://s0")
    rig.apply(rows=[row("http://user:pw@s0", 7)])
    await rig.until(**{"http://s0": "serving"})


async def test_a_server_serves_by_its_row_only(rig_of):
    rig = rig_of("s0", "s1", "s2", "s3")
    rig.apply()
    await rig.until(s0="serving", s1="serving", s2="serving", s3="serving")
    later = (time.time() + 60) * 1000
    rows = [
        row("s0"),
        row("s1", state=WeightState.STALE, why="HTTP 500"),
        refitting("s2", until_ms=later),
    ]
    rig.apply(rows=rows)
    assert rig.states == {"s0": "serving", "s1": "stale", "s2": "refitting", "s3": "stale"}
    why = {one.name: one.why.partition(" (")[0] for one in rig.pool.states()}
    assert why == {
        "s0": "",
        "s1": "HTTP 500",
        "s2": "being refitted",
        "s3": "the trainer has not refitted it",
    }
    assert {await rig.served_by(str(i)) for i in range(30)} == {"s0"}
    # Refitted: in at once. Healed after it was out: on trial first.
    rig.apply(rows=[row("s0", 4), row("s1", 4), row("s2", 4), row("s3", 4)])
    assert rig.states == {"s0": "serving", "s1": "trial", "s2": "serving", "s3": "trial"}
    # The trainer lets go of all servers: who was out comes back.
    rig.apply(rows=[row("s0", state=WeightState.STALE)])
    rig.apply()
    assert set(rig.states.values()) == {"trial"}


def routed(rig, *behind, rows):
    """Tell that s0 is a router."""
    known = {"s0": registry.RegisteredServer("s0", behind=behind)}
    rig.pool.apply(known, {row.url: row for row in rows}, BOARD)
    (one,) = rig.pool.states()
    return one.state.value, one.why


async def test_a_router_serves_while_all_behind_it_do_and_as_old_as_the_oldest(rig_of):
    rig = rig_of("s0")
    await rig.served_by()
    both = [row("e1", 3), row("e2", 2)]
    rig.apply(rows=both)
    assert rig.states == {"s0": "stale"}  # nobody has said what it is
    assert routed(rig, "e1", "e2", rows=both) == ("trial", "")
    assert await rig.served_by() == "s0"
    assert rig.made["s0"].serves[-1] == 2
    later = (time.time() + 60) * 1000
    halfway = [row("e1", 3), refitting("e2", later)]
    assert routed(rig, "e1", "e2", rows=halfway) == ("refitting", "e2 behind it: being refitted")
    assert routed(rig, "e1", "e2", rows=[row("e1", 4), row("e2", 4)]) == ("serving", "")
    broken = [row("e1", 4), row("e2", 3, state=WeightState.STALE, why="HTTP 500")]
    assert routed(rig, "e1", "e2", rows=broken) == ("stale", "e2 behind it: HTTP 500")
    missing = routed(rig, "e1", "e2", rows=broken[:1])
    assert missing[0] == "stale"
    assert missing[1].startswith("e2 behind it: the trainer has not refitted it")
    ahead = [row("e1", 9, epoch=0), row("e2", 3)]
    assert routed(rig, "e1", "e2", rows=ahead)[0] == "stale"
    assert routed(rig, "e1", "e2", rows=[row("e1", 4), row("e2", 4)]) == ("trial", "")


async def test_a_router_that_answers_with_older_weights_is_suspect_until_it_does_not(rig_of):
    rig = rig_of("s0", patience=BreakerSettings(backoff_s=60.0, max_backoff_s=60.0), tries=1)
    await rig.served_by()
    routed(rig, "e1", "e2", rows=[row("e1"), row("e2")])
    rig.made["s0"].script.append(StaleServerError("older", 3, 1))
    with pytest.raises(StaleServerError):
        await rig.served_by()
    assert (rig.states, rig.disagreements) == ({"s0": "suspect"}, 1)


async def test_a_new_server_of_a_run_that_refits_is_refitted_before_it_serves(rig_of):
    rig = rig_of("s0")
    rig.apply("s1", rows=[row("s0")])
    new = rig.made["s1"]
    await rig.until(s0="serving", s1="starting")
    assert {await rig.served_by(str(i)) for i in range(10)} == {"s0"}
    why = {one.name: one.why for one in rig.pool.states()}["s1"]
    assert why.startswith(
        "the trainer has not refitted it (if it is a router: rollfleet server add"
    )
    rig.apply("s1", rows=[row("s0"), row("s1")])
    await rig.until(s0="serving", s1="serving")
    assert new.probes == 1


async def test_while_all_are_refitted_calls_wait_as_long_as_that_takes(rig_of):
    rig = rig_of("s0", wait_s=0.01)
    rig.apply()
    await rig.until(s0="serving")
    until_ms = (time.time() + 60) * 1000
    rig.apply(rows=[refitting("s0", until_ms)])
    assert not rig.pool.out
    call = asyncio.create_task(rig.served_by())
    await asyncio.wait({call}, timeout=0.1)  # many times wait_s
    assert not call.done()
    rig.apply(rows=[row("s0", 4)])
    assert await call == "s0"
    assert rig.made["s0"].serves == [4]


async def test_a_server_that_fails_while_its_row_is_good_comes_back_by_a_probe(rig_of):
    rig = rig_of("s0", tries=1, patience=replace(QUICK, trial_s=60.0))
    rig.apply(rows=[row("s0")])
    rig.made["s0"].script.append(EngineUnavailableError("down"))
    await rig.until(s0="serving")
    rig.made["s0"].is_ready = False
    with pytest.raises(EngineUnavailableError):
        await rig.served_by()
    rig.apply(rows=[row("s0", at_ms=2)])
    assert rig.states == {"s0": "suspect"}
    rig.made["s0"].is_ready = True
    await rig.until(s0="trial")


async def test_a_failing_server_that_is_refitted_meanwhile_is_not_let_in_by_a_probe(rig_of):
    rig = rig_of("s0", tries=1)
    rig.apply(rows=[row("s0")])
    rig.made["s0"].script.append(EngineUnavailableError("down"))
    await rig.until(s0="serving")
    rig.made["s0"].is_ready = False
    with pytest.raises(EngineUnavailableError):
        await rig.served_by()
    rig.apply(rows=[row("s0", state=WeightState.STALE, why="it did not answer")])
    assert rig.states == {"s0": "suspect"}
    rig.made["s0"].is_ready = True
    await rig.until(s0="stale")


@pytest.mark.parametrize("failed", [False, True])
@pytest.mark.parametrize("state", ["stale", "refitting"])
async def test_a_probe_gives_no_waiter_a_server_that_may_not_serve(rig_of, failed, state):
    rig = rig_of("s0", tries=1)
    server = rig.made["s0"]
    server.is_ready = failed
    if failed:
        rig.apply(rows=[row("s0")])
        await rig.until(s0="serving")
        server.script.append(EngineUnavailableError("down"))
        server.is_ready = False
        with pytest.raises(EngineUnavailableError):
            await rig.served_by()
    until_ms = int((time.time() + 60) * 1000)
    rig.apply(rows=[row("s0", state=WeightState(state), until_ms=until_ms)])
    calls = server.calls
    waiting = asyncio.create_task(rig.served_by())
    await wait_until_async(lambda: rig.pool._router._waiters, "the call to wait")
    server.is_ready = True
    await rig.until(s0=state)
    await asyncio.wait({waiting}, timeout=0.05)
    assert server.calls == calls
    rig.apply(rows=[row("s0", 4)])
    assert await waiting == "s0"
    assert server.serves[-1] == 4


async def test_a_row_that_comes_between_a_turn_and_its_call_sends_it_back_to_its_place(rig_of):
    rig = rig_of("s0", cap=3)
    rig.apply()
    await rig.until(s0="serving")
    server = rig.made["s0"]
    server.gate = Gate()
    order = []

    async def call(i):
        await rig.served_by()
        order.append(i)

    first = [asyncio.create_task(call(i)) for i in range(3)]
    await wait_until_async(lambda: server.in_flight == 3, "the server to be full")
    late = [asyncio.create_task(call(i)) for i in range(3, 8)]
    await wait_until_async(lambda: len(rig.pool._router._waiters) == 5, "the others to wait")
    member = rig.pool._members["s0"]
    rig.pool._router.release(member, 2)  # the turn of two of them came ...
    rig.apply(rows=[row("s0", state=WeightState.STALE)])  # ... before they could run
    await wait_until_async(lambda: len(rig.pool._router._waiters) == 5, "them to be back")
    assert server.calls == 3
    member.in_flight += 2
    server.gate.set()
    await asyncio.gather(*first)
    assert member.in_flight == 0
    assert server.calls == 3
    rig.pool._cap = member.limiter.cap = 1
    member.limiter._limit = 1.0
    rig.apply(rows=[row("s0", at_ms=2)])
    await asyncio.gather(*late)
    assert order[3:] == [3, 4, 5, 6, 7]


async def test_a_server_removed_between_a_turn_and_its_call_is_closed(rig_of):
    rig = rig_of("s0", cap=1)
    rig.apply("s1")
    await rig.until(s0="serving", s1="serving")
    made = rig.made
    for server in made.values():
        server.gate = Gate()
    calls = [asyncio.create_task(rig.served_by()) for _ in made]
    await wait_until_async(lambda: all(s.in_flight for s in made.values()), "both to be full")
    waiting = asyncio.create_task(rig.served_by())
    await wait_until_async(lambda: rig.pool._router._waiters, "the third to wait")
    for call in calls:
        call.add_done_callback(lambda _: rig.apply())
    made["s1"].gate.set()  # the turn of the third comes, and s1 is removed before it can run
    await wait_until_async(lambda: made["s1"].closed == 1, "it to be closed")
    assert made["s1"].calls == 1
    made["s0"].gate.set()
    assert set(await asyncio.gather(*calls)) == {"s0", "s1"}
    assert await waiting == "s0"


@pytest.mark.parametrize("state", ["stale", "refitting"])
async def test_rows_that_redis_lost_let_nobody_in_who_was_out(rig_of, state):
    rig = rig_of("s0", "s1")
    refits = replace(BOARD, refits=True)
    until_ms = int((time.time() + 60) * 1000)
    rows = [row("s0", state=WeightState(state), until_ms=until_ms), row("s1")]
    rig.apply(rows=rows, board=refits)
    await rig.until(s0=state, s1="serving")
    rig.apply(board=refits)
    assert rig.states == {"s0": state, "s1": "serving"}
    assert {await rig.served_by(str(i)) for i in range(20)} == {"s1"}
    # The healer writes them again; or the trainer lets go of all servers.
    rig.apply(rows=[row("s0", 4), row("s1")], board=refits)
    assert rig.states["s0"] in ("trial", "serving")
    rig.apply(rows=rows, board=refits)
    rig.apply(board=refits)
    assert rig.states["s0"] == state
    rig.apply()
    assert rig.states["s0"] in ("trial", "serving")


async def test_a_server_silent_for_long_is_dead_and_comes_back_all_the_same(rig_of):
    rig = rig_of("s0", patience=replace(QUICK, dead_s=1e-6))
    rig.made["s0"].is_ready = False
    rig.apply()
    await rig.until(s0="dead")
    rig.made["s0"].is_ready = True
    await wait_until_async(lambda: rig.states["s0"] in ("trial", "serving"), "it to be back")


async def test_a_server_that_lost_its_weights_is_out_until_it_is_refitted(rig_of):
    rig = rig_of("s0", "s1")
    rows = [row("s0"), row("s1")]
    rig.apply(rows=rows)
    await rig.until(s0="serving", s1="serving")
    home = await rig.served_by()
    (other,) = {"s0", "s1"} - {home}
    rig.made[home].script.append(StaleServerError("it says default", 3, -1))
    assert await rig.served_by() == other
    assert rig.disagreements == 1
    assert rig.states[home] == "stale"
    # The same row again, as it is read every second, changes nothing; nor does a probe.
    rig.apply(rows=rows)
    assert rig.states[home] == "stale"
    assert {one.name: one.why for one in rig.pool.states()}[home] == "it says default"
    rig.apply(rows=[row(home, at_ms=2), row(other)])
    assert rig.states[home] == "trial"
    assert await rig.served_by() == home


async def test_news_of_an_older_refit_puts_nobody_out(rig_of):
    rig = rig_of("s0", tries=1)
    rig.apply(rows=[row("s0")])
    await rig.until(s0="serving")
    server = rig.made["s0"]
    server.gate = Gate()
    server.script.append(StaleServerError("it says default", 3, -1))
    call = asyncio.create_task(rig.served_by())
    await wait_until_async(lambda: server.in_flight == 1, "the call to run")
    rig.apply(rows=[row("s0", 4, at_ms=2)])  # healed since
    server.gate.set()
    with pytest.raises(StaleServerError):
        await call
    assert rig.states == {"s0": "serving"}


async def test_a_conversation_is_gated_like_a_generation(rig_of):
    rig = rig_of("s0", "s1", tries=1)
    rig.apply(rows=[row("s0", state=WeightState.STALE), row("s1")])
    await rig.until(s0="stale", s1="serving")

    async def chat(messages, sampling):
        return TextAnswer(messages[0]["content"], "stop", "s1")

    with pytest.raises(EngineRefusedError, match="has no chat"):
        await rig.pool.chat([{"content": "hi"}], Sampling(1))
    rig.made["s1"].chat = chat
    for key in map(str, range(10)):
        answer = await rig.pool.chat([{"content": "hi"}], Sampling(1), key)
        assert answer == TextAnswer("hi", "stop", "s1")


# ---- pauses ------------------------------------------------------------------------------------


SGLANG_ENDS = ("/abort_request", "/continue_generation")


@pytest.mark.parametrize("kind", [ControlledVllm, ControlledSglang])
async def test_a_server_that_a_dead_trainer_left_paused_is_resumed(kind):
    async with kind() as fake:
        fake.paused = True
        pool = EnginePool([Server(fake.url)], monitor=Monitor, patience=QUICK)
        try:
            until_ms = int((time.time() + 0.05) * 1000)
            rows = {fake.url: refitting(fake.url, until_ms)}
            pool.apply({}, rows, BOARD)

            def stale():
                return pool.states()[0].state is ServerState.STALE

            # Nobody reads Redis again: the row's time runs out by itself.
            await wait_until_async(stale, "the row to run out")
            assert pool.states()[0].why == "its refit did not end in time"
            # Who is cut off from Redis does not know that it was refitted since: what runs on a
            # server that is well must not be aborted. Nor does a late answer to an early question.
            pool.apply({}, rows, BOARD, until_ms)
            assert pool._members[fake.url].unpauser is None
            assert fake.paused
            pool.apply({}, rows, BOARD)
            await wait_until_async(lambda: not fake.paused, "the pause to end")
            assert stale()
            # Untagged weights may be loaded: what stood there must not go on under the old tag.
            paths = [path for path, _ in fake.calls]
            cut, on = ("/abort_requests", "/resume") if kind is ControlledVllm else SGLANG_ENDS
            assert paths.index(cut) < paths.index(on)
            calls = len(fake.calls)
            pool.apply({}, {fake.url: refitting(fake.url, until_ms)}, BOARD)
            await asyncio.sleep(0)
            assert pool._members[fake.url].unpauser is None
            assert len(fake.calls) == calls
        finally:
            await pool.close()
