"""What the SGLang client makes of the shapes of releases 0.5.23 and 0.5.9."""

import asyncio

import numpy as np
import pytest
from aiohttp import web
from fixtures import fake_vllm
from fixtures.engines import request_of
from fixtures.fake_sglang import GENERATE, FakeSglang, aborted, completion

from rollfleet_common.errors import (
    EngineProtocolError,
    EngineRefusedError,
    EngineUnavailableError,
)
from rollfleet_engines.sglang import SglangEngine
from rollfleet_worker.pool.resuming import Resumer


@pytest.fixture
async def fake():
    async with FakeSglang(version="3") as server:
        yield server


@pytest.fixture
async def connect(fake):
    clients = []

    def make(**options):
        clients.append(SglangEngine(fake.url, **{"timeout_s": 20.0, **options}))
        return clients[-1]

    yield make
    for client in clients:
        await client.close()


def made(**fields):
    """An answer made as :func:`fixtures.fake_sglang.completion` says."""

    async def behave(fake, request, body):
        return web.json_response(completion(fake, body, **fields))

    return behave


async def test_ids_logprobs_versions_and_order_come_through(fake, connect):
    three = await connect(model="tiny").generate(request_of(), n=3)
    for index, one in enumerate(three):
        assert one.token_ids.dtype == np.int32
        assert one.logprobs.dtype == np.float32
        assert one.token_ids.tolist() == [10 * index + t for t in range(4)]
        assert one.logprobs.tolist() == [-0.125, -0.25, -0.375, -0.5]
        assert one.versions.expand(4).tolist() == [3] * 4
        assert one.finish_reason == "length"
        assert one.server == fake.url
        assert one.timings.server_s == 0.25
        assert one.timings.total_s > 0.0


async def test_the_request_says_all_that_matters_and_nothing_else(fake, connect):
    sampling = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "stop_token_ids": (1,)}
    request = request_of(seed=11, extra={"min_tokens": 2, "ignore_eos": True}, **sampling)
    await connect(api_key="sesame").generate(request)
    (seen,) = fake.seen
    assert seen.path == GENERATE
    assert seen.headers["Authorization"] == "Bearer sesame"
    assert seen.headers["X-SMG-Routing-Key"] == "group%201"
    assert seen.body == {
        "input_ids": [5, 6, 7, 8],
        "return_logprob": True,
        "return_text_in_logprobs": False,
        "extra_key": "3",
        "stream": False,
        "sampling_params": {
            "max_new_tokens": 4,
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": 5,
            "min_p": 0.1,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "repetition_penalty": 1.0,
            "ignore_eos": True,
            "min_new_tokens": 2,
            "stop_token_ids": [1],
            "sampling_seed": 11,
        },
    }


async def test_fields_that_the_release_does_not_know_are_refused_here(fake, connect):
    with pytest.raises(EngineRefusedError, match=r"'best_of', 'min_new_tokens'.*min_tokens"):
        await connect().generate(request_of(extra={"min_new_tokens": 1, "best_of": 2}))
    assert not fake.seen


async def test_seeded_siblings_are_asked_for_one_by_one(fake, connect):
    four = await connect().generate(request_of(seed=7), n=4)
    assert len(four) == 4
    assert sorted(seen.body["sampling_params"]["sampling_seed"] for seen in fake.seen) == [
        7,
        8,
        9,
        10,
    ]
    assert all("n" not in seen.body["sampling_params"] for seen in fake.seen)


async def test_a_failing_seeded_sibling_stops_the_others(fake, connect):
    fake.script.extend([fake_vllm.hang, fake_vllm.status(500)])
    with pytest.raises(EngineUnavailableError, match="500"):
        await connect().generate(request_of(seed=7), n=2)
    await asyncio.wait_for(fake.left.wait(), 5)


async def test_spans_across_a_refit_are_kept_token_by_token(fake, connect):
    fake.script.append(made(versions=[("7", 1), ("8", 2), ("9", 1)]))
    client = connect()
    (one,) = await client.generate(request_of(version=7))
    assert one.versions.expand(4).tolist() == [7, 8, 8, 9]
    assert client.version == 9


@pytest.mark.parametrize(
    ("before", "after", "expected"), [("5", "5", 5), ("5", "6", 5), ("6", "5", 5), ("6", "6", 6)]
)
async def test_without_spans_the_older_of_before_and_after_counts(
    fake, connect, before, after, expected
):
    fake.spans, fake.version, fake.version_after = False, before, after
    (one,) = await connect().generate(request_of(version=6))
    assert one.versions.expand(4).tolist() == [expected] * 4


async def test_the_first_answer_without_spans_is_tagged_as_truly_as_later_ones(fake, connect):
    # The board is ahead of the server, which is refitted while it generates.
    fake.spans, fake.version, fake.version_after = False, "5", "6"
    client = connect()
    (first,) = await client.generate(request_of(version=6))
    (second,) = await client.generate(request_of(version=6))
    assert first.versions.newest() == second.versions.newest() == 5


@pytest.mark.parametrize(("base", "expected"), [(None, 3), (0, 0)])
@pytest.mark.parametrize("spans", [True, False])
async def test_default_is_the_weights_before_any_refit(fake, connect, spans, base, expected):
    fake.spans, fake.version = spans, "default"
    (one,) = await connect(base_version=base).generate(request_of(version=3))
    assert one.versions.expand(4).tolist() == [expected] * 4


async def test_a_release_that_tells_no_version_at_all_is_tagged_as_pinned(fake, connect):
    fake.spans = fake.dev_mode = False
    fake.script.append(fake_vllm.spoilt(lambda answer: answer["meta_info"].pop("weight_version")))
    (one,) = await connect().generate(request_of(version=6))
    assert one.versions.expand(4).tolist() == [6] * 4


@pytest.mark.parametrize("spans", [True, False])
async def test_an_aborted_generation_goes_on_with_what_is_left(fake, connect, spans):
    fake.spans = spans

    async def refitted(fake, request, body):
        fake.version = "4"
        return await fake_vllm.good(fake, request, body)

    fake.script.extend([made(tokens=7, finish=aborted()), refitted])
    request = request_of(max_tokens=10, seed=5, extra={"min_tokens": 8})
    (one,) = await Resumer(connect(), version=lambda: 4).generate(request)
    assert one.token_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2]
    assert len(one.logprobs) == 10
    assert one.finish_reason == "length"
    second = fake.seen[1].body
    params = second["sampling_params"]
    assert second["input_ids"] == [5, 6, 7, 8, *range(7)]
    assert (params["max_new_tokens"], params["min_new_tokens"], params["sampling_seed"]) == (
        3,
        1,
        12,
    )
    assert second["extra_key"] != fake.seen[0].body["extra_key"]
    # Without spans the second segment may have begun before the refit: 3 before, 4 after.
    assert one.versions.expand(10).tolist() == [3] * 7 + ([4] * 3 if spans else [3] * 3)


@pytest.mark.parametrize("logprobs", [[], [[-0.5, 1, None]]])
async def test_an_abort_before_the_first_token_is_asked_again(fake, connect, logprobs):
    def queued(answer):
        answer["output_ids"] = []
        answer["meta_info"].update(
            finish_reason={"type": "abort", "message": "Abort in waiting queue"},
            output_token_logprobs=logprobs,
            # As the release writes it: one span that covers nothing.
            weight_versions=[{"version": "3", "start": 0, "end": 0}],
        )

    fake.script.append(fake_vllm.spoilt(queued))
    (one,) = await Resumer(connect()).generate(request_of())
    assert one.token_ids.tolist() == [0, 1, 2, 3]


async def test_grammars_and_penalties_start_over(fake, connect):
    for extra in ({"regex": "a+"}, {"repetition_penalty": 1.2}, {"stop_regex": "x"}):
        fake.script.append(made(tokens=2, finish=aborted()))
        (one,) = await Resumer(connect()).generate(request_of(extra=extra))
        assert one.token_ids.tolist() == [0, 1, 2, 3]
        assert fake.seen[-1].body["input_ids"] == [5, 6, 7, 8]


def meta(**fields):
    return lambda answer: answer["meta_info"].update(fields)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (meta(finish_reason={"type": "stop", "matched": "NaN happened"}), "outside of its vocab"),
        (meta(finish_reason="stop"), "not a whole generation"),
        (meta(output_token_logprobs=[[], [], [], []]), "no logprobs"),
        (meta(output_token_logprobs=[[-0.5, t + 1, None] for t in range(4)]), "of other tokens"),
        (meta(prompt_tokens=3), "a prompt of 3 tokens, not ours of 4"),
        (meta(weight_versions=[{"version": "3", "start": 0, "end": 3}]), "cover 3 of 4"),
        (meta(weight_versions=[{"version": "v3", "start": 0, "end": 4}]), "no version number"),
        (lambda answer: answer.pop("meta_info"), "no meta_info"),
    ],
)
async def test_an_unusable_answer_is_never_patched_up(fake, connect, spoil, said):
    fake.script.append(fake_vllm.spoilt(spoil))
    with pytest.raises(EngineProtocolError, match=said):
        await connect().generate(request_of())


async def test_one_answer_twice_is_refused(fake, connect):
    async def twice(fake, request, body):
        return web.json_response([completion(fake, body)] * 2)

    fake.script.append(twice)
    with pytest.raises(EngineProtocolError, match="a second time"):
        await connect().generate(request_of(), n=2)


async def test_ids_are_read_beside_the_logprobs_where_there_is_no_list_of_them(fake, connect):
    fake.script.append(fake_vllm.spoilt(lambda answer: answer.pop("output_ids")))
    (one,) = await connect().generate(request_of())
    assert one.token_ids.tolist() == [0, 1, 2, 3]


async def test_a_stop_keeps_its_token(fake, connect):
    fake.script.append(made(tokens=2, finish={"type": "stop", "matched": 1}))
    (one,) = await connect().generate(request_of())
    assert (one.token_ids.tolist(), one.finish_reason) == ([0, 1], "stop")


async def test_an_adapter_is_not_taken_for_the_model(fake, connect, monkeypatch):
    card = {"id": "adapter", "object": "model", "owned_by": "sglang", "parent": "tiny"}
    monkeypatch.setattr(fake, "cards", lambda: [card])
    with pytest.raises(EngineUnavailableError, match="a LoRA adapter cannot be named here"):
        await connect(model="adapter").generate(request_of())


async def test_the_model_is_asked_for_again_after_the_server_was_down(fake, connect):
    client = connect(model="tiny")
    await client.generate(request_of())
    await fake.stop()
    with pytest.raises(EngineUnavailableError):
        await client.generate(request_of())
    fake.model = "other"
    await fake.start()
    with pytest.raises(EngineUnavailableError, match=r"serves \['other'\], not 'tiny'"):
        await client.generate(request_of())
