"""How a pool chooses, caps, ejects, retries and readmits servers."""

import asyncio
import itertools
from collections import Counter
from dataclasses import fields

import pytest
from fixtures import fake_vllm
from fixtures.fake_vllm import FakeVllm
from fixtures.scripted_engine import Gate, Server, request_of
from support import wait_until_async

from rollfleet_common.errors import (
    EngineProtocolError,
    EngineRefusedError,
    EngineUnavailableError,
    SettingsError,
)
from rollfleet_common.messages import PolicyVersion
from rollfleet_engines.http import OverloadedError
from rollfleet_engines.vllm import VllmEngine
from rollfleet_worker.pool.breaker import BreakerSettings
from rollfleet_worker.pool.pool import EnginePool, ServerState

TIMES = {field.name for field in fields(BreakerSettings)}


@pytest.fixture
async def pool_of():
    pools = []

    def make(*servers, cap=256, **settings):
        # No pause by default, so that nothing here waits for a clock.
        times = {"backoff_s": 1e-6, "max_backoff_s": 1e-6}
        times |= {name: settings.pop(name) for name in TIMES & settings.keys()}
        settings = {"wait_s": 5.0, "patience": BreakerSettings(**times), **settings}
        pools.append(EnginePool(servers, cap, **settings))
        return pools[-1]

    yield make
    for pool in pools:
        await pool.close()


def servers(count):
    return [Server(f"s{i}") for i in range(count)]


def down(said="down"):
    return EngineUnavailableError(said)


async def up(pool):
    """Until every server has answered once."""
    pool.apply({}, {}, PolicyVersion(0, 0))
    await wait_until_async(
        lambda: all(one.state is ServerState.SERVING for one in pool.states()), "all to answer"
    )
    return pool


async def favourite(pool, affinity="a"):
    (one,) = await pool.generate(request_of(affinity))
    return one.server


# Choosing.


async def test_one_key_stays_on_one_server_and_keys_spread(pool_of):
    pool = await up(pool_of(*servers(4)))
    homes = {}
    for key in map(str, range(200)):
        homes[key] = await favourite(pool, key)
        assert await favourite(pool, key) == homes[key]
    spread = Counter(homes.values())
    assert len(spread) == 4
    assert min(spread.values()) > 20


async def test_when_a_server_goes_only_its_own_keys_move(pool_of):
    before, after = await up(pool_of(*servers(4))), await up(pool_of(*servers(3)))
    for key in map(str, range(100)):
        home = await favourite(before, key)
        if home != "s3":
            assert await favourite(after, key) == home


async def test_when_the_favourite_is_full_the_least_loaded_takes_over(pool_of):
    crew = servers(3)
    gate = Gate()
    for server in crew:
        server.gate = gate
    pool = pool_of(*crew, cap=2)
    tasks = [asyncio.create_task(pool.generate(request_of())) for _ in range(6)]
    await wait_until_async(lambda: sum(s.in_flight for s in crew) == 6, "all six in flight")
    assert [s.in_flight for s in crew] == [2, 2, 2]
    gate.set()
    await asyncio.gather(*tasks)


async def test_the_cap_is_never_exceeded_and_counts_completions(pool_of):
    crew = servers(2)
    pool = pool_of(*crew, cap=8)
    sizes = [1, 3, 8, 2, 5] * 20
    made = await asyncio.gather(
        *(pool.generate(request_of(str(i)), n) for i, n in enumerate(sizes))
    )
    assert [len(one) for one in made] == sizes
    assert max(server.most for server in crew) <= 8
    assert [status.in_flight for status in pool.states()] == [0, 0]


async def test_a_call_larger_than_the_cap_goes_alone(pool_of):
    (server,) = crew = servers(1)
    pool = pool_of(*crew, cap=2)
    assert len(await pool.generate(request_of(), 5)) == 5
    assert server.calls == 1


async def test_waiting_is_first_come_first_served(pool_of):
    (server,) = crew = servers(1)
    server.gate = Gate()
    pool = pool_of(*crew, cap=1)
    order = []

    async def call(i):
        await pool.generate(request_of())
        order.append(i)

    tasks = [asyncio.create_task(call(i)) for i in range(5)]
    await wait_until_async(lambda: server.calls == 1, "the first to be in")
    server.gate.set()
    await asyncio.gather(*tasks)
    assert order == [0, 1, 2, 3, 4]


async def test_a_cancelled_waiter_costs_no_place(pool_of):
    (server,) = crew = servers(1)
    server.gate = Gate()
    pool = pool_of(*crew, cap=1)
    first, second, third = (asyncio.create_task(pool.generate(request_of())) for _ in range(3))
    await wait_until_async(lambda: server.calls == 1, "the first to be in")
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    # Cancelled in the very moment in which it would have been its turn.
    fourth = asyncio.create_task(pool.generate(request_of()))
    server.gate.set()
    await first
    third.cancel()
    await asyncio.gather(third, return_exceptions=True)
    await asyncio.wait_for(fourth, 5)
    assert pool.states()[0].in_flight == 0


async def test_a_waiter_cancelled_at_its_turn_gives_its_place_back(pool_of):
    (server,) = crew = servers(1)
    server.gate = Gate()
    pool = pool_of(*crew, cap=1)
    first = asyncio.create_task(pool.generate(request_of()))
    await wait_until_async(lambda: server.calls == 1, "the first to be in")
    second = asyncio.create_task(pool.generate(request_of()))
    await wait_until_async(lambda: len(pool._router._waiters) == 1, "the second to wait")
    pool._router.release(pool._members["s0"], 1)  # its turn came ...
    second.cancel()  # ... before it could run
    await asyncio.gather(second, return_exceptions=True)
    assert pool.states()[0].in_flight == 0
    pool._members["s0"].in_flight += 1
    server.gate.set()
    await first


# Failing.


async def test_a_failed_call_is_made_again_on_another_server(pool_of):
    crew = servers(2)
    pool = pool_of(*crew, backoff_s=60.0, max_backoff_s=60.0)
    home = await favourite(pool)
    crew[int(home[1])].script.append(down("HTTP 500"))
    (made,) = await pool.generate(request_of())
    assert made.server != home
    status = {one.name: one for one in pool.states()}[home]
    assert (status.state, status.last_error, status.version) == (
        ServerState.SUSPECT,
        "HTTP 500",
        7,
    )
    # Out is out: nobody else is sent there meanwhile.
    assert await favourite(pool) != home


async def test_after_all_tries_the_last_error_is_raised(pool_of):
    crew = servers(3)
    for server in crew:
        server.script.extend(down(server.name) for _ in range(9))
    with pytest.raises(EngineUnavailableError, match=r"^s[012]$"):
        await pool_of(*crew, tries=2).generate(request_of())
    assert sum(server.calls for server in crew) == 2


async def test_one_server_that_blinks_is_waited_for(pool_of):
    (server,) = crew = servers(1)
    server.script.append(down())
    await pool_of(*crew).generate(request_of())
    assert server.calls == 2
    assert server.probes == 2  # before the first call, and after it failed


@pytest.mark.parametrize("error", [EngineRefusedError("no"), EngineProtocolError("odd")])
async def test_other_errors_are_not_tried_again(pool_of, error):
    crew = servers(2)
    for server in crew:
        server.script.append(error)
    pool = pool_of(*crew)
    with pytest.raises(type(error)):
        await pool.generate(request_of())
    assert sum(server.calls for server in crew) == 1
    assert all(status.state is ServerState.SERVING for status in pool.states())


async def test_a_refusal_says_which_server_it_was(pool_of):
    crew = servers(2)
    pool = pool_of(*crew)
    home = await favourite(pool)
    crew[int(home[1])].script.append(EngineRefusedError("no"))
    with pytest.raises(EngineRefusedError) as caught:
        await pool.generate(request_of())
    assert caught.value.server == home


async def test_a_server_that_only_answers_nonsense_is_put_out(pool_of):
    crew = servers(2)
    pool = pool_of(*crew, unusable_limit=2, backoff_s=60.0, max_backoff_s=60.0)
    home = await favourite(pool)
    bad = crew[int(home[1])]
    for script in ([EngineProtocolError("odd")], [EngineProtocolError("odd")] * 2):
        bad.script.extend(script)
        for _ in script:
            with pytest.raises(EngineProtocolError):
                await pool.generate(request_of())
        # Once, and then a good answer in between: still in. Twice in a row: out.
        assert (await favourite(pool) == home) is (len(script) == 1)


async def test_when_all_are_out_it_waits_then_says_which_and_why(pool_of):
    crew = servers(2)
    pool = await up(pool_of(*crew, wait_s=0.05))
    for server in crew:
        server.is_ready = False
        server.script.append(down(f"{server.name} burnt down"))
    with pytest.raises(EngineUnavailableError) as caught:
        await pool.generate(request_of())
    said = str(caught.value)
    assert "available for 0.05 s" in said
    assert "s0: s0 burnt down" in said
    assert "s1: s1 burnt down" in said


async def test_a_full_pool_is_waited_for_as_long_as_it_takes(pool_of):
    (server,) = crew = servers(1)
    server.gate = Gate()
    pool = pool_of(*crew, cap=1, wait_s=0.01)
    first, second = (asyncio.create_task(pool.generate(request_of())) for _ in range(2))
    await asyncio.wait({second}, timeout=0.1)  # many times wait_s
    assert not second.done()
    server.gate.set()
    await asyncio.gather(first, second)


async def test_those_who_wait_are_served_when_a_server_comes_back(pool_of):
    (server,) = crew = servers(1)
    server.script.extend(down() for _ in range(5))
    server.is_ready = False
    pool = pool_of(*crew)
    tasks = [asyncio.create_task(pool.generate(request_of())) for _ in range(5)]
    await wait_until_async(lambda: server.probes >= 2, "some probes in vain")
    assert not any(task.done() for task in tasks)
    server.is_ready = True
    assert len(await asyncio.gather(*tasks)) == 5


# Coming back.


async def test_a_recovered_server_is_on_trial_until_a_call_succeeds(pool_of):
    (server,) = crew = servers(1)
    server.script.append(down())
    pool = pool_of(*crew, cap=16, trial_s=60.0, tries=1)
    with pytest.raises(EngineUnavailableError):
        await pool.generate(request_of())
    server.gate = Gate()
    tasks = [asyncio.create_task(pool.generate(request_of())) for _ in range(16)]
    await wait_until_async(lambda: server.in_flight == 2, "an eighth of the cap to be in flight")
    assert pool.states()[0].state is ServerState.TRIAL
    server.gate.set()
    await asyncio.gather(*tasks)
    assert server.most > 2
    assert pool.states()[0].state is ServerState.SERVING


async def test_a_trial_without_complaints_ends_by_itself(pool_of):
    (server,) = crew = servers(1)
    server.script.append(down())
    pool = pool_of(*crew, trial_s=0.01, tries=1)
    with pytest.raises(EngineUnavailableError):
        await pool.generate(request_of())
    await wait_until_async(
        lambda: pool.states()[0].state is ServerState.SERVING, "the trial to end"
    )


async def test_the_backoff_grows_until_a_call_succeeds(pool_of):
    (server,) = crew = servers(1)
    # Ready, and yet every generation fails: this must not become a hot loop.
    server.script.extend(down() for _ in range(4))
    pool = pool_of(*crew, tries=5)
    failures = []
    eject = pool._breaker.eject

    def noting(member, life, error):
        eject(member, life, error)
        failures.append(member.failures)

    pool._breaker.eject = noting
    await pool.generate(request_of())
    assert failures == [1, 2, 3, 4]
    assert pool._members["s0"].failures == 0


async def test_the_pause_is_jittered_bounded_and_no_shorter_than_asked(pool_of, monkeypatch):
    (server,) = crew = servers(1)
    pauses = []
    sleep = asyncio.sleep

    async def noting(pause_s):
        if pause_s:
            pauses.append(pause_s)
        await sleep(0)

    monkeypatch.setattr("rollfleet_worker.pool.breaker.asyncio.sleep", noting)
    server.script.append(OverloadedError("busy", 9.0))
    server.script.extend(down() for _ in range(12))
    pool = pool_of(*crew, tries=20, backoff_s=1.0, max_backoff_s=10.0, seed=1)
    await pool.generate(request_of())
    assert len(pauses) == 13
    assert pauses[0] >= 9.0
    assert max(pauses) <= 10.0
    assert len(set(pauses)) == 13
    assert any(pause < 5.0 for pause in pauses[4:])


async def test_a_call_begun_before_the_ejection_ejects_nobody_twice(pool_of):
    (server,) = crew = servers(1)
    server.gate = Gate()
    pool = pool_of(*crew, tries=1, trial_s=60.0)
    late = asyncio.create_task(pool.generate(request_of()))
    await wait_until_async(lambda: server.calls == 1, "the late one to be in")
    late_gate, server.gate = server.gate, Gate(is_open=True)
    server.script.append(down("first"))
    with pytest.raises(EngineUnavailableError, match="first"):
        await pool.generate(request_of())
    await pool.generate(request_of())
    server.script.append(down("late"))
    late_gate.set()
    with pytest.raises(EngineUnavailableError, match="late"):
        await late
    assert pool.states()[0].state is ServerState.SERVING
    assert pool.states()[0].last_error == "late"


async def test_a_probe_that_raises_is_a_no(pool_of):
    (server,) = crew = servers(1)
    server.script.append(down())
    server.is_ready = RuntimeError("odd")
    pool = pool_of(*crew)
    task = asyncio.create_task(pool.generate(request_of()))
    await wait_until_async(lambda: server.probes >= 2, "some probes in vain")
    assert not await pool.ready()
    server.is_ready = True
    await task
    assert await pool.ready()


async def test_ready_needs_one_server_only(pool_of):
    crew = servers(3)
    pool = pool_of(*crew)
    for server, is_ready in zip(crew, (False, True, False), strict=True):
        server.is_ready = is_ready
    assert await pool.ready()
    crew[1].is_ready = False
    assert not await pool.ready()


# The end.


async def test_closing_fails_those_who_wait_and_closes_every_engine(pool_of):
    (server,) = crew = servers(1)
    server.is_ready = False
    server.script.append(down())
    pool = pool_of(*crew)
    task = asyncio.create_task(pool.generate(request_of()))
    await wait_until_async(lambda: server.probes >= 1, "a probe in vain")
    await pool.close()
    with pytest.raises(EngineUnavailableError, match="closed"):
        await task
    with pytest.raises(EngineUnavailableError, match="closed"):
        await pool.generate(request_of())
    assert server.closed == 1


@pytest.mark.parametrize(
    ("names", "settings"),
    [
        ([], {}),
        (["a", "a"], {}),
        (["a"], {"cap": 0}),
        (["a"], {"tries": 0}),
        (["a"], {"backoff_s": 2.0, "max_backoff_s": 1.0}),
    ],
)
def test_settings_that_make_no_sense(names, settings):
    cap = settings.pop("cap", 1)
    patience = BreakerSettings(**{name: settings.pop(name) for name in TIMES & settings.keys()})
    engines = [Server(name) for name in names]
    with pytest.raises(SettingsError):
        EnginePool(engines, cap, patience=patience, **settings)


# With real sockets.


async def test_a_server_killed_with_requests_in_flight_loses_none(pool_of):
    async with FakeVllm() as one, FakeVllm() as two:
        pool = pool_of(VllmEngine(one.url), VllmEngine(two.url), cap=4)
        for fake in (one, two):
            fake.script.extend([fake_vllm.hang] * 2)
        keys = [str(i) for i in range(24)]
        tasks = [asyncio.create_task(pool.generate(request_of(key))) for key in keys]
        await asyncio.gather(one.hanging.wait(), two.hanging.wait())
        await one.stop()
        two.go_on.set()
        made = list(itertools.chain.from_iterable(await asyncio.gather(*tasks)))
        assert len(made) == 24
        assert pool.states()[0].state is ServerState.SUSPECT
        await one.start()
        await wait_until_async(
            lambda: pool.states()[0].state is not ServerState.SUSPECT, "the server to come back"
        )
        assert {one.server for key in keys for one in await pool.generate(request_of(key))} == {
            one.url,
            two.url,
        }
