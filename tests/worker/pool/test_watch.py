"""What servers say of their load is read, and a server that hangs is told from one that is slow."""

import asyncio
from dataclasses import dataclass

import numpy as np
import pytest
from aiohttp import web
from fixtures import fake_vllm
from fixtures.fake_control import ControlledVllm
from support import wait_until_async

from rollfleet_common.errors import EngineUnavailableError
from rollfleet_common.servers import RegisteredServer
from rollfleet_engines.interface import Request, Sampling
from rollfleet_engines.signals import Monitor, read_load
from rollfleet_engines.vllm import VllmEngine
from rollfleet_worker.pool.breaker import BreakerSettings
from rollfleet_worker.pool.pool import EnginePool, ServerState

#: As vLLM 0.32.0 writes it, shortened; two engines behind one port.
VLLM = b"""# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="tiny"} 3.0
vllm:num_requests_running{engine="1",model_name="tiny"} 4.0
vllm:num_requests_waiting{engine="0",model_name="tiny"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="tiny",reason="capacity"} 99.0
vllm:kv_cache_usage_perc{engine="0",model_name="tiny"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="tiny"} 0.75
vllm:num_preemptions_total{engine="0",model_name="tiny"} 5.0
vllm:num_preemptions_created{engine="0",model_name="tiny"} 1.7e+09
vllm:prompt_tokens_total{engine="0",model_name="tiny"} 100.0
vllm:generation_tokens_total{engine="0",model_name="tiny"} 1234.0
vllm:request_generation_tokens_bucket{engine="0",le="1.0",model_name="tiny"} 7.0
python_gc_objects_collected_total{generation="0"} 8.0
"""

#: As the collector of SGLang 0.5 names them.
SGLANG = b"""# TYPE sglang:num_running_reqs gauge
sglang:num_running_reqs{model_name="m",tp_rank="0"} 6.0
sglang:num_queue_reqs{model_name="m",tp_rank="0"} 1.0
sglang:token_usage{model_name="m",tp_rank="0"} 0.5
sglang:num_used_tokens{model_name="m",tp_rank="0"} 512.0
sglang:num_retracted_requests_total{model_name="m",tp_rank="0"} 2.0
sglang:realtime_tokens_total{mode="decode",model_name="m"} 40.0
sglang:generation_tokens_total{model_name="m"} 30.0
"""


def test_a_vllm_tells_its_load():
    load = read_load(VLLM)
    assert load is not None
    assert (load.running, load.waiting, load.kv_usage, load.preemptions) == (7, 2, 0.75, 5)


def test_an_sglang_tells_its_load():
    load = read_load(SGLANG)
    assert load is not None
    assert (load.running, load.waiting, load.kv_usage, load.preemptions) == (6, 1, 0.5, 2)


@pytest.mark.parametrize(
    ("page", "line"),
    [
        (VLLM, b"vllm:generation_tokens_total"),
        (VLLM, b"vllm:prompt_tokens_total"),
        # SGLang counts the tokens of a request when it has ended.
        (SGLANG, b"sglang:realtime_tokens_total"),
        (SGLANG, b"sglang:num_used_tokens"),
    ],
)
def test_progress_is_whatever_moves_while_a_server_works(page, line):
    before = read_load(page)
    moved = [a + (b"1" if a.startswith(line) else b"") for a in page.splitlines()]
    after = read_load(b"\n".join(moved))
    assert before is not None
    assert after is not None
    assert before.progress != after.progress
    # Requests that merely arrive are no progress.
    arrived = read_load(page.replace(b"waiting{engine", b"waiting{x").replace(b" 3.0", b" 9.0"))
    assert arrived is not None
    assert arrived.progress == before.progress


@pytest.mark.parametrize(
    "page", [b"", b"\xff\xfe", b"<html>", b"up 1\n", b"vllm:num_requests_running 3\n", VLLM[:500]]
)
def test_a_page_of_something_else_tells_nothing(page):
    assert read_load(page) is None


# ---- over sockets ------------------------------------------------------------------------------


@dataclass
class Told(ControlledVllm):
    """A vLLM whose /metrics say what the test says."""

    tokens: float = 0.0
    #: Moves by itself with every look.
    works: bool = False
    waiting: float = 0.0
    has_metrics: bool = True
    looks: int = 0

    def add_routes(self, router):
        super().add_routes(router)
        router.add_get("/metrics", self._metrics)

    async def _metrics(self, _):
        if not self.has_metrics:
            return web.json_response({"detail": "Not Found"}, status=404)
        self.looks += 1
        self.tokens += self.works
        text = f"vllm:generation_tokens_total {self.tokens}\nvllm:num_requests_waiting {self.waiting}\n"
        return web.Response(text=text)


def request_of(affinity):
    return Request(np.array([1, 2], np.int32), Sampling(max_tokens=3), affinity, 0)


@pytest.fixture
async def watched():
    """A pool that looks often, and its servers; those that hang are let go at the end."""
    pools = []

    def make(*fakes, stall_s=0.3, **settings):
        engines = [VllmEngine(fake.url) for fake in fakes]
        patience = BreakerSettings(backoff_s=0.01, max_backoff_s=0.01, probe_s=1.0)
        pools.append(
            EnginePool(
                engines,
                settings.pop("cap", 64),
                monitor=Monitor,
                stall_s=stall_s,
                poll_s=0.02,
                patience=patience,
                **settings,
            )
        )
        pools[-1].apply({}, {}, pools[-1]._policy)
        return pools[-1]

    yield make
    for pool in pools:
        await pool.close()


def state_of(pool, fake):
    return {one.name: one.state for one in pool.states()}[fake.url]


async def held(pool, fake):
    """A call that `fake` holds and never answers."""
    await wait_until_async(lambda: state_of(pool, fake) is ServerState.SERVING, "it to serve")
    fake.script.append(fake_vllm.hang)
    for key in map(str, range(100)):
        call = asyncio.create_task(pool.generate(request_of(key)))
        hanging = asyncio.create_task(fake.hanging.wait())
        await asyncio.wait({call, hanging}, return_when=asyncio.FIRST_COMPLETED)
        hanging.cancel()
        if not call.done():
            return call
    raise AssertionError("no key of a hundred lives there")


async def test_a_server_that_holds_requests_and_does_nothing_is_out_and_they_go_elsewhere(watched):
    async with Told() as hung, Told(works=True) as well:
        pool = watched(hung, well)
        call = await held(pool, hung)
        (made,) = await call
        assert made.server == well.url
        # Its client went away, so that a server that comes to itself does not work for nobody.
        await asyncio.wait_for(hung.left.wait(), 5.0)
        # It answers probes, which proves nothing: a share only, until a call succeeds.
        await wait_until_async(lambda: state_of(pool, hung) is ServerState.TRIAL, "a trial")
        assert pool._members[hung.url].promotion is None
        assert "hangs: nothing that it counts has moved" in pool._members[hung.url].last_error


async def test_a_server_that_hangs_is_found_out_after_it_was_removed(watched):
    async with Told() as hung, Told(works=True) as well:
        pool = watched(well, make=lambda url, _: VllmEngine(url))
        pool.apply({hung.url: RegisteredServer(hung.url)}, {}, pool._policy)
        call = await held(pool, hung)
        member = pool._members[hung.url]
        pool.apply({}, {}, pool._policy)
        assert hung.url not in pool._members
        (made,) = await asyncio.wait_for(call, 10.0)
        assert made.server == well.url
        # And nobody looks at it any more.
        await wait_until_async(lambda: member.watcher is None or member.watcher.done(), "the end")
        assert not pool._leaving


async def test_a_server_that_is_slow_and_works_is_left_in_peace(watched):
    async with Told(works=True) as slow, Told(works=True) as other:
        pool = watched(slow, other)
        call = await held(pool, slow)
        looks = slow.looks
        await wait_until_async(lambda: slow.looks > looks + 25, "many looks, over stall_s and more")
        await asyncio.wait({call}, timeout=0.3)
        assert not call.done()
        assert state_of(pool, slow) is ServerState.SERVING
        slow.go_on.set()
        (made,) = await call
        assert made.server == slow.url


async def test_a_paused_server_stands_still_on_purpose(watched):
    async with Told(paused=True) as paused, Told(works=True) as other:
        pool = watched(paused, other)
        call = await held(pool, paused)
        looks = paused.looks
        await wait_until_async(lambda: paused.looks > looks + 25, "many looks")
        await asyncio.wait({call}, timeout=0.3)
        assert not call.done()
        assert state_of(pool, paused) is ServerState.SERVING
        paused.paused = False  # and now it hangs
        (made,) = await call
        assert made.server == other.url


@pytest.mark.parametrize("healthy", [True, False])
async def test_a_server_that_counts_nothing_hangs_only_if_its_health_is_silent(watched, healthy):
    async with Told(has_metrics=False) as mute, Told(works=True) as other:
        pool = watched(mute, other, stall_s=0.1)
        call = await held(pool, mute)
        mute.healthy = healthy
        done, _ = await asyncio.wait({call}, timeout=0.6 if healthy else 5.0)
        assert bool(done) is not healthy
        assert (state_of(pool, mute) is ServerState.SERVING) is healthy
        mute.go_on.set()
        (made,) = await call
        assert made.server == (mute.url if healthy else other.url)


async def test_the_only_server_hangs_and_the_call_ends_with_the_reason(watched):
    async with Told() as hung:
        pool = watched(hung, tries=1)
        call = await held(pool, hung)
        with pytest.raises(
            EngineUnavailableError, match=r"hangs: nothing .* with 1 requests of ours"
        ):
            await call


async def test_what_a_server_says_lowers_its_limit(watched):
    async with Told(works=True, waiting=50) as busy:
        pool = watched(busy)
        call = await held(pool, busy)
        await wait_until_async(lambda: pool.states()[0].limit == 32, "half of the cap")
        busy.go_on.set()
        await call
        # Nobody looks at a server that has nothing of ours to do.
        await wait_until_async(lambda: pool._members[busy.url].watcher is None, "the end of looks")


async def test_a_server_without_the_page_keeps_the_cap_and_is_not_asked_again():
    async with Told(has_metrics=False) as mute:
        monitor = Monitor(mute.url)
        assert await monitor.load() is None
        mute.has_metrics = True
        assert await monitor.load() is None
        monitor.forget()
        assert await monitor.load() is not None
        await monitor.close()
