"""What is parked of generations: gone on with where it is the same call, made anew where it is not."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import msgpack
import numpy as np
import pytest
from fixtures.cut_off_model import Model, request_for, token
from fixtures.rig import prompt_of
from fixtures.servers import MakeServer
from hypothesis import given
from hypothesis import strategies as st

from rollfleet_common.errors import EngineUnavailableError, FailureKind, WireError
from rollfleet_common.keys import RunKeys
from rollfleet_common.leases import AttemptFailure
from rollfleet_common.messages import Claim, Kind, PolicyVersion, VersionSpans
from rollfleet_common.redis import connect
from rollfleet_engines.interface import Generation
from rollfleet_engines.resume import ABORTED
from rollfleet_worker.metrics import Metrics
from rollfleet_worker.partials.codec import Partial, decode_partial, encode_partial, request_digest
from rollfleet_worker.partials.progress import TTL_MS, PartialStore, Progress
from rollfleet_worker.pool.coalesce import CoalescingEngine
from rollfleet_worker.pool.resuming import Resumer

POLICY = PolicyVersion(version=3, epoch=1, min_useful=1)
CLAIM = Claim(prompt_of("g"), index=1, attempt=1, entry="1-1", partition=0, queued_ms=0)
KEY = "rf:{run/0}:progress:g:1:0"


class Worker:
    """A worker's share in parking: another one has a model and metrics of its own."""

    def __init__(self, client: Any, *mishaps: tuple[str, int], **settings: Any) -> None:
        self.model = Model(list(mishaps))
        self.metrics = Metrics()
        engine = CoalescingEngine(self.model) if settings.pop("merge", False) else self.model
        resumer = Resumer(engine, segment_tokens=4)
        max_bytes = settings.pop("max_bytes", 1 << 20)
        self.parking = PartialStore(client, RunKeys("run"), resumer, self.metrics, max_bytes)

    def episode(self, policy: PolicyVersion = POLICY, **claim: Any) -> Progress:
        return self.parking.episode(replace(CLAIM, **claim), policy)

    async def make(self, budget: int = 10, policy: PolicyVersion = POLICY, **claim: Any) -> int:
        """One generation, whole whatever was parked; how many tokens were made for it."""
        (made,) = await self.episode(policy, **claim).generate(request_for(budget))
        await self.parking.flush(5.0)
        assert made.token_ids.tolist() == [token(at) for at in range(budget)]
        assert len(made.versions.expand(budget)) == budget
        return sum(min(one.sampling.max_tokens, 4) for one in self.model.asked)

    def count(self, outcome: str) -> float:
        found = self.metrics.registry.get_sample_value(
            "rollfleet_parked_total", {"outcome": outcome}
        )
        return found or 0.0


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[Any]:
    made = connect(redis_url, role="test")
    yield made
    await made.aclose()


async def half(client: Any, **claim: Any) -> None:
    """A worker makes 8 of 10 tokens, and dies."""
    worker = Worker(client)
    serve = worker.model.generate
    stuck = asyncio.Event()

    async def twice(request: Any, n: int = 1) -> Any:
        if len(worker.model.asked) == 2:
            stuck.set()
            await asyncio.Event().wait()
        return await serve(request, n)

    worker.model.generate = twice  # type: ignore[method-assign]
    task = asyncio.create_task(worker.episode(**claim).generate(request_for(10)))
    await asyncio.wait_for(stuck.wait(), 5)
    task.cancel()
    await worker.parking.flush(5.0)


# ---- going on ----------------------------------------------------------------------------------


async def test_the_next_worker_makes_only_what_is_left(client):
    await half(client)
    assert 0 < await client.pttl(KEY) <= TTL_MS
    worker = Worker(client)
    assert await worker.make() == 2
    assert worker.count("used") == 1
    said = worker.metrics.registry.get_sample_value
    assert said("rollfleet_resumed_tokens_total", {"after": "parked"}) == 8


async def test_a_call_that_was_whole_is_not_asked_for_again(client):
    first = Worker(client)
    assert await first.make() == 10
    second = Worker(client)
    assert await second.make() == 0
    assert second.model.asked == []


async def test_a_call_that_stopped_by_itself_is_not_gone_on_with(client):
    first, second = Worker(client), Worker(client)
    first.model.stop_at = 5
    for worker in (first, second):
        (made,) = await worker.episode().generate(request_for(10))
        assert (len(made.token_ids), made.finish_reason) == (6, "stop")
        await worker.parking.flush(5.0)
    assert second.model.asked == []


async def test_calls_are_told_apart_by_their_number_and_by_what_they_ask(client):
    await half(client)
    worker = Worker(client)
    progress = worker.episode()
    await asyncio.gather(*(progress.generate(request_for(10)) for _ in range(3)))
    await worker.parking.flush(5.0)
    # The first goes on at 8 tokens; the others are calls of their own, and begin.
    assert sorted(len(one.token_ids) - 3 for one in worker.model.asked) == [0, 0, 4, 4, 8, 8, 8]
    assert sorted(await client.keys("*")) == [f"{KEY[:-1]}{call}".encode() for call in range(3)]
    # Another budget is another call, though it is the first one of its episode, too.
    assert await Worker(client).make(9) == 9


@pytest.mark.parametrize(
    ("policy", "claim", "made"),
    [
        ({}, {}, 2),
        ({"epoch": 2}, {}, 10),
        ({"min_useful": 2}, {}, 10),
        ({"min_useful": 2}, {"prompt": prompt_of("g", kind=Kind.EVAL)}, 2),
        ({}, {"index": 0}, 10),
        ({}, {"history": json.dumps({"kind": "infra", "detail": "x"}).encode()}, 2),
        ({}, {"history": json.dumps({"kind": "data", "detail": "x"}).encode()}, 10),
        ({}, {"history": json.dumps({"kind": "infra", "detail": '"kind": "data"'}).encode()}, 2),
    ],
)
async def test_what_another_past_made_is_not_gone_on_with(client, policy, claim, made):
    await half(client)  # of versions 1 and 2
    assert await Worker(client).make(10, replace(POLICY, **policy), **claim) == made


async def test_sampling_that_cannot_be_written_down_is_not_parked(client):
    worker = Worker(client)
    (made,) = await worker.episode().generate(request_for(6, extra={"processor": object()}))
    assert len(made.token_ids) == 6
    assert await client.keys("*") == []


async def test_siblings_still_travel_as_one_request(client):
    """What they read is answered in one tick, whatever the number of connections."""
    counts: list[int] = []
    worker = Worker(client, merge=True)
    serve = worker.model.generate

    async def many(request: Any, n: int = 1) -> Any:
        counts.append(n)
        return [(await serve(request))[0] for _ in range(n)]

    worker.model.generate = many  # type: ignore[method-assign]
    episodes = [worker.episode(index=index) for index in range(5)]
    await asyncio.gather(*(one.generate(request_for(4)) for one in episodes))
    assert counts == [5]
    await worker.parking.flush(5.0)


# ---- what becomes of it ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failure", "stays"),
    [
        (None, False),
        (FailureKind.DATA, False),
        (FailureKind.INFRA, True),
        (FailureKind.TIMEOUT, True),
    ],
)
async def test_it_stays_only_where_the_next_attempt_has_a_use_for_it(client, failure, stays):
    worker = Worker(client)
    progress = worker.episode()
    await asyncio.gather(*(progress.generate(request_for(10)) for _ in range(2)))
    # While the last write is still under way.
    progress.settle(failure and AttemptFailure(failure, "why", "w"))
    await worker.parking.flush(5.0)
    assert bool(await client.keys("*")) == stays


async def test_two_workers_on_one_prompt_harm_nothing(client):
    await half(client)
    workers = [Worker(client, ("abort", 1), ("abort", 0)) for _ in range(2)]
    for made in await asyncio.gather(*(worker.make() for worker in workers)):
        assert made <= 10
    # Whoever wrote last: it is whole.
    parked = decode_partial(await client.get(KEY)).generation
    assert parked.token_ids.tolist() == [token(at) for at in range(10)]


async def test_what_is_too_large_is_not_parked(client):
    worker = Worker(client, max_bytes=50)
    assert await worker.make(40) == 40
    assert worker.count("oversize") > 0
    assert await client.keys("*") == []


async def test_without_redis_generations_are_made_as_ever(make_server: MakeServer):
    server = make_server(tcp=True)
    client = connect(server.url, role="test")
    worker = Worker(client)
    assert await worker.make() == 10
    server.kill()
    # The other calls of the worker find out when it is back: this one only makes do without.
    assert await worker.make(budget=12, index=0) == 10 + 12
    assert worker.count("failed") >= 2
    server.restart()
    assert await worker.make(budget=9, index=0) == 10 + 12 + 9
    await client.aclose()


async def test_a_redis_that_hangs_holds_nobody_up_for_long(make_server: MakeServer):
    server = make_server(tcp=True)
    client = connect(server.url, role="test")
    worker = Worker(client)
    assert server.pid is not None
    os.kill(server.pid, signal.SIGSTOP)
    (made,) = await asyncio.wait_for(worker.episode().generate(request_for(10)), 20)
    assert len(made.token_ids) == 10
    assert worker.count("failed") == 1
    await worker.parking.flush(0.05)  # what is late is let go
    os.kill(server.pid, signal.SIGCONT)
    assert await client.ping()
    await client.aclose()


async def test_errors_of_the_engine_pass(client):
    worker = Worker(client, ("die", 0))
    with pytest.raises(EngineUnavailableError):
        await worker.make()


# ---- bytes -------------------------------------------------------------------------------------


def made_of(runs: list[tuple[int, int]], reason: str = ABORTED) -> Generation:
    tokens = sum(length for length, _ in runs)
    ids, logprobs = np.arange(tokens, dtype=np.int32), np.full(tokens, -0.5, np.float32)
    return Generation(ids, logprobs, VersionSpans.of(runs), reason, "http://s")


@given(
    runs=st.lists(st.tuples(st.integers(1, 50), st.integers(-1, 2**31 - 1)), min_size=1),
    reason=st.sampled_from(["stop", "length", ABORTED]),
    epoch=st.integers(0, 2**40),
)
def test_what_is_parked_comes_back(runs, reason, epoch):
    made = made_of(runs, reason)
    back = decode_partial(encode_partial(Partial(b"d" * 16, epoch, made)))
    assert (back.digest, back.epoch) == (b"d" * 16, epoch)
    one = back.generation
    assert one.token_ids.tolist() == made.token_ids.tolist()
    assert one.logprobs.tolist() == made.logprobs.tolist()
    assert one.versions.starts.tolist() == made.versions.starts.tolist()
    assert one.versions.versions.tolist() == made.versions.versions.tolist()
    assert (one.finish_reason, one.server) == (reason, "http://s")
    told = replace(made, logprobs_kind="tempered", context_full=True)
    one = decode_partial(encode_partial(Partial(b"d" * 16, epoch, told))).generation
    assert (one.logprobs_kind, one.context_full) == ("tempered", True)


@given(at=st.integers(0, 400), byte=st.integers(0, 255), cut=st.integers(0, 400))
def test_spoilt_bytes_are_refused_or_make_a_generation_that_could_be(at, byte, cut):
    packed = bytearray(encode_partial(Partial(b"d" * 16, 1, made_of([(7, 2), (5, 3)]))))
    packed[at % len(packed)] = byte
    for spoilt in (bytes(packed), bytes(packed[: cut % len(packed)])):
        try:
            one = decode_partial(spoilt).generation
        except WireError:
            continue
        tokens = len(one.token_ids)
        assert tokens == len(one.logprobs) == len(one.versions.expand(tokens))
        assert np.isfinite(one.logprobs).all()
        assert one.token_ids.min() >= 0


@given(st.binary(max_size=200))
def test_foreign_bytes_are_refused(packed):
    with pytest.raises(WireError):
        decode_partial(packed)


GOOD = [2, b"d", 1, ABORTED, *([bytes(4)] * 2), bytes(4), bytes(4), "http://s", "raw", False]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (0, 1),
        (0, True),
        (1, "d"),
        (2, 1.0),
        (3, "error"),
        (4, b""),
        (4, bytes(3)),
        (4, bytes(8)),
        (4, np.array([-1], "<i4").tobytes()),
        (5, np.array([np.nan], "<f4").tobytes()),
        (5, np.array([-np.inf], "<f4").tobytes()),
        (5, np.array([-9999.0], "<f4").tobytes()),
        (5, np.array([0.5], "<f4").tobytes()),
        (6, b""),
        (6, np.array([1], "<i4").tobytes()),
        (6, np.array([0, 0], "<i4").tobytes()),
        (7, bytes(8)),
        (7, np.array([-2], "<i4").tobytes()),
        (8, None),
        (9, "cooked"),
        (10, 1),
    ],
)
def test_every_field_is_looked_at(field, value):
    assert len(decode_partial(msgpack.packb(GOOD)).generation.token_ids) == 1
    with pytest.raises(WireError):
        decode_partial(msgpack.packb([*GOOD[:field], value, *GOOD[field + 1 :]]))
    with pytest.raises(WireError):
        decode_partial(msgpack.packb([*GOOD, 1]))


async def test_bytes_of_somebody_else_are_counted_and_made_anew(client):
    for spoilt in (b"", b"\xc1", msgpack.packb(["no", "such"]), msgpack.packb(GOOD[:3])):
        await client.set(KEY, spoilt, px=TTL_MS)
        worker = Worker(client)
        assert await worker.make() == 10
        assert worker.count("unreadable") == 1
    await client.delete(KEY)
    await client.hset(KEY, "a", "b")
    assert await Worker(client).make() == 10
    await client.delete(KEY)


def test_a_digest_is_of_prompt_and_sampling_alone():
    one = request_for(5, extra={"a": 1, "b": 2})
    same = replace(one, version=9, serves=8, affinity="other", model="m")
    assert request_digest(one, 0) == request_digest(same, 0)
    assert request_digest(one, 0) == request_digest(request_for(5, extra={"b": 2, "a": 1}), 0)
    others = [
        request_digest(one, 1),
        request_digest(request_for(5), 0),
        request_digest(request_for(5, temperature=0.5), 0),
        request_digest(request_for(5, seed=1), 0),
        request_digest(replace(one, token_ids=one.token_ids[:-1]), 0),
    ]
    assert len({request_digest(one, 0), *others}) == 1 + len(others)
