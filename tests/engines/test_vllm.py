"""What the vLLM client makes of good answers, and what it calls bad ones."""

import asyncio

import numpy as np
import pytest
from fixtures import fake_vllm
from fixtures.engines import request_of
from fixtures.fake_vllm import COMPLETIONS, GENERATE, FakeVllm, choice

from rollfleet_common.errors import (
    EngineProtocolError,
    EngineUnavailableError,
    SettingsError,
)
from rollfleet_common.messages import NO_VERSION
from rollfleet_engines.vllm import VllmEngine
from rollfleet_worker.pool.coalesce import CoalescingEngine
from rollfleet_worker.pool.resuming import Resumer

ROUTES = ["generate", "completions"]


@pytest.fixture
async def fake():
    async with FakeVllm() as server:
        yield server


@pytest.fixture
async def connect(fake):
    """Engines of the fake server, closed at the end."""
    engines = []

    def make(**settings):
        engines.append(VllmEngine(fake.url, **{"timeout_s": 20.0, **settings}))
        return engines[-1]

    yield make
    for engine in engines:
        await engine.close()


# Good answers.


@pytest.mark.parametrize("route", ROUTES)
async def test_ids_logprobs_and_order_come_through_on_both_routes(fake, connect, route):
    fake.version = "3"
    made = await connect(route=route, model="tiny").generate(request_of(), n=3)
    for index, one in enumerate(made):
        assert one.token_ids.dtype == np.int32
        assert one.logprobs.dtype == np.float32
        assert one.token_ids.tolist() == [10 * index + t for t in range(4)]
        assert one.logprobs.tolist() == [-0.125, -0.25, -0.375, -0.5]
        assert one.versions.expand(4).tolist() == [3] * 4
        assert one.finish_reason == "length"
        assert one.server == fake.url


async def test_the_request_says_all_that_matters_and_nothing_else(fake, connect):
    sampling = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "stop_token_ids": (1,)}
    request = request_of(seed=11, extra={"min_tokens": 2}, **sampling)
    await connect(model="tiny", api_key="sesame").generate(request, n=2)
    (seen,) = fake.seen
    assert seen.path == GENERATE
    assert seen.headers["Authorization"] == "Bearer sesame"
    assert seen.headers["X-Session-ID"] == "group%201"
    assert seen.body == {
        "model": "tiny",
        "token_ids": [5, 6, 7, 8],
        "cache_salt": "3",
        "stream": False,
        "sampling_params": {
            "n": 2,
            "max_tokens": 4,
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": 5,
            "min_p": 0.1,
            "stop_token_ids": [1],
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "repetition_penalty": 1.0,
            "logprobs": 0,
            "seed": 11,
            "output_kind": 2,
            "detokenize": False,
            "min_tokens": 2,
        },
    }


async def test_the_completions_route_leaves_nothing_to_the_servers_defaults(fake, connect):
    await connect(route="completions").generate(request_of())
    (seen,) = fake.seen
    assert seen.body["return_token_ids"] is True
    assert seen.body["add_special_tokens"] is False
    assert seen.body["repetition_penalty"] == 1.0
    assert seen.body["top_k"] == -1
    assert "model" not in seen.body


async def test_stop_strings_need_the_servers_detokenizer(fake, connect):
    await connect().generate(request_of(extra={"stop": ["x"]}))
    assert "detokenize" not in fake.seen[0].body["sampling_params"]


async def test_spans_across_a_refit_are_kept_token_by_token(fake, connect):
    fake.script.append(fake_vllm.made(tokens=4, versions=[("7", 1), ("8", 2), ("9", 1)]))
    engine = connect()
    (made,) = await engine.generate(request_of(version=7))
    assert made.versions.expand(4).tolist() == [7, 8, 8, 9]
    assert engine.version == 9


@pytest.mark.parametrize(
    ("pinned", "base_version", "spans", "expected"),
    [
        (3, None, [("default", 4)], [3, 3, 3, 3]),
        (3, 0, [("default", 4)], [0, 0, 0, 0]),
        (3, None, [("default", 1), ("8", 3)], [3, 8, 8, 8]),
        # The first publish came before its weights did: those before it were older.
        (8, None, [("default", 1), ("8", 3)], [7, 8, 8, 8]),
    ],
)
async def test_default_is_the_weights_before_any_refit(
    fake, connect, pinned, base_version, spans, expected
):
    fake.script.append(fake_vllm.made(tokens=4, versions=spans))
    (made,) = await connect(base_version=base_version).generate(request_of(version=pinned))
    assert made.versions.expand(4).tolist() == expected


async def test_old_logprob_entries_with_token_strings_are_read_too(fake, connect):
    def older(whole):
        for entry in whole["choices"][0]["logprobs"]["content"]:
            entry["token"] = f"token_id:{entry.pop('token_id')}"

    fake.script.append(fake_vllm.spoilt(older))
    (made,) = await connect().generate(request_of())
    assert made.logprobs.tolist() == [-0.125, -0.25, -0.375, -0.5]


async def test_greedy_completions_are_asked_for_once(fake, connect):
    made = await connect().generate(request_of(temperature=0.0), n=3)
    assert len(made) == 3
    assert fake.seen[0].body["sampling_params"]["n"] == 1


async def test_connections_are_kept(fake, connect):
    engine = connect()
    for _ in range(5):
        await engine.generate(request_of())
    assert len(fake.peers) == 1


async def test_the_cap_on_connections_holds(fake, connect):
    engine = connect(max_connections=2)
    await asyncio.gather(*(engine.generate(request_of()) for _ in range(20)))
    assert len(fake.peers) <= 2


async def test_a_trailing_v1_is_no_mistake(fake):
    engine = VllmEngine(fake.url + "/v1/")
    assert engine.name == fake.url
    await engine.generate(request_of())
    await engine.close()


# Which route, and the versions of an answer without spans.


async def test_without_scale_out_it_falls_back_once(fake, connect):
    fake.scale_out = False
    engine = connect()
    await engine.generate(request_of())
    await engine.generate(request_of())
    assert [seen.path for seen in fake.seen] == [GENERATE, COMPLETIONS, COMPLETIONS]
    assert engine.route == "completions"


async def test_the_route_is_found_out_again_after_the_server_was_down(fake, connect):
    fake.scale_out = False
    engine = connect()
    await engine.generate(request_of())
    await fake.stop()
    with pytest.raises(EngineUnavailableError):
        await engine.generate(request_of())
    fake.scale_out = True
    await fake.start()
    await engine.generate(request_of())
    assert engine.route == "generate"


async def test_a_chosen_route_is_not_left(fake, connect):
    fake.scale_out = False
    with pytest.raises(EngineUnavailableError, match="--enable-scale-out"):
        await connect(route="generate").generate(request_of())


async def test_completions_are_tagged_by_weight_info(fake, connect):
    fake.version = "5"
    (made,) = await connect(route="completions").generate(request_of(version=6))
    assert made.versions.expand(4).tolist() == [5] * 4


async def test_completions_across_a_refit_get_the_older_version(fake, connect, monkeypatch):
    monkeypatch.setattr("rollfleet_engines.weights._FRESH_S", 0.0)

    async def refit(fake, request, body):
        fake.version = "6"
        return await fake_vllm.good(fake, request, body)

    async def roll_back(fake, request, body):
        fake.version = "4"
        return await fake_vllm.good(fake, request, body)

    fake.version = "5"
    fake.script.extend([refit, roll_back])
    engine = connect(route="completions")
    assert (await engine.generate(request_of(version=6)))[0].versions.newest() == 5
    assert (await engine.generate(request_of(version=6)))[0].versions.newest() == 4


@pytest.mark.parametrize("base", [None, 0])
async def test_completions_without_weight_info_are_tagged_as_pinned(fake, connect, base):
    fake.dev_mode = False
    engine = connect(route="completions", base_version=base)
    (made,) = await engine.generate(request_of(version=6))
    assert made.versions.expand(4).tolist() == [6] * 4


async def test_a_generate_route_without_spans_is_tagged_by_weight_info(fake, connect):
    fake.spans = False
    fake.version = "2"
    (made,) = await connect().generate(request_of(version=6))
    assert made.versions.expand(4).tolist() == [2] * 4


async def test_nothing_published_yet_stays_no_version(fake, connect):
    (made,) = await connect().generate(request_of(version=NO_VERSION))
    assert made.versions.newest() == NO_VERSION


# Cut off, and resumed.


@pytest.mark.parametrize("route", ROUTES)
async def test_an_aborted_generation_goes_on_with_what_is_left(fake, connect, route, monkeypatch):
    monkeypatch.setattr("rollfleet_engines.weights._FRESH_S", 0.0)

    async def refit(fake, request, body):
        fake.version = "4"
        return await fake_vllm.good(fake, request, body)

    fake.version = "3"
    fake.script.extend([fake_vllm.made(tokens=7, finish_reason="abort"), refit])
    request = request_of(max_tokens=10, seed=5, extra={"min_tokens": 8})
    resumer = Resumer(connect(route=route), version=lambda: 4)
    (made,) = await resumer.generate(request)
    # More than half was done: a budget counted down twice would end here.
    assert made.token_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2]
    assert len(made.logprobs) == 10
    assert made.finish_reason == "length"
    second = fake.seen[1].body
    params = second["sampling_params"] if route == "generate" else second
    assert second["token_ids" if route == "generate" else "prompt"] == [5, 6, 7, 8, *range(7)]
    assert (params["max_tokens"], params["min_tokens"], params["seed"]) == (3, 1, 12)
    assert second["cache_salt"] != fake.seen[0].body["cache_salt"]
    if route == "generate":
        assert made.versions.expand(10).tolist() == [3] * 7 + [4] * 3
    else:
        # Before: 3, after: 4. The older one counts.
        assert made.versions.newest() == 3


async def test_only_the_completions_that_were_cut_off_go_on(fake, connect):
    async def half(fake, request, body):
        return fake_vllm.web.json_response(
            fake_vllm.answer(
                [
                    choice(fake, request.path, body, index=0, tokens=2, finish_reason="abort"),
                    choice(fake, request.path, body, index=1, tokens=3, finish_reason="stop"),
                ]
            )
        )

    fake.script.append(half)
    made = await Resumer(CoalescingEngine(connect())).generate(request_of(), n=2)
    assert [len(one.token_ids) for one in made] == [4, 3]
    assert [one.finish_reason for one in made] == ["length", "stop"]
    assert [seen.body["sampling_params"]["n"] for seen in fake.seen] == [2, 1]


async def test_an_abort_before_the_first_token_is_asked_again(fake, connect):
    fake.script.append(fake_vllm.made(tokens=0, finish_reason="abort"))
    (made,) = await Resumer(connect()).generate(request_of())
    assert len(made.token_ids) == 4


async def test_aborts_without_progress_are_not_asked_again_in_a_hot_loop(
    fake, connect, monkeypatch
):
    pauses = []

    async def noting(pause_s):
        pauses.append(pause_s)

    monkeypatch.setattr("rollfleet_worker.pool.resuming.asyncio.sleep", noting)
    fake.script.extend([fake_vllm.made(tokens=0, finish_reason="abort")] * 10)
    (made,) = await Resumer(connect()).generate(request_of())
    assert len(made.token_ids) == 4
    assert len(pauses) == 10
    assert pauses == sorted(pauses)
    assert pauses[-1] <= 2.0


async def test_an_abort_with_the_budget_spent_is_a_length(fake, connect):
    fake.script.append(fake_vllm.made(tokens=4, finish_reason="abort"))
    (made,) = await Resumer(connect()).generate(request_of())
    assert (len(made.token_ids), made.finish_reason) == (4, "length")
    assert len(fake.seen) == 1


async def test_endless_aborts_are_an_unavailable_server(fake, connect):
    fake.script.extend([fake_vllm.made(tokens=0, finish_reason="abort")] * 3)
    with pytest.raises(EngineUnavailableError, match=f"3 times in a row, .*: {fake.url} cut it"):
        await Resumer(connect(), max_resumes=2).generate(request_of(max_tokens=10))


async def test_sampling_that_looks_back_starts_over(fake, connect):
    fake.script.append(fake_vllm.made(tokens=2, finish_reason="abort"))
    (made,) = await Resumer(connect()).generate(request_of(extra={"stop": ["x"]}))
    assert made.token_ids.tolist() == [0, 1, 2, 3]
    assert fake.seen[1].body["token_ids"] == [5, 6, 7, 8]


async def test_a_failing_resume_stops_its_siblings(fake, connect):
    aborted = fake_vllm.made(tokens=0, finish_reason="abort")
    fake.script.extend([aborted, aborted, fake_vllm.hang, fake_vllm.status(500)])
    with pytest.raises(EngineUnavailableError, match="500"):
        await Resumer(connect()).generate(request_of(), n=2)
    await asyncio.wait_for(fake.left.wait(), 5)


# Bad answers.


def change(**fields):
    return lambda whole: whole["choices"][0].update(fields)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (change(logprobs={"content": [{}, {}, {}, {}]}), "no logprobs"),
        (change(logprobs=[]), "no logprobs"),
        (change(index=1), "index 1, twice or out of range"),
        (change(index=True), "index True"),
        (change(index=[0]), "index "),
        (change(prompt_token_ids=[5, 6]), "another prompt than ours"),
    ],
)
@pytest.mark.parametrize("route", ROUTES)
async def test_an_unusable_choice_is_never_patched_up(fake, connect, spoil, said, route):
    fake.script.append(fake_vllm.spoilt(spoil))
    with pytest.raises(EngineProtocolError, match=said):
        await connect(route=route).generate(request_of())


@pytest.mark.parametrize(
    ("spans", "said"),
    [
        ([("0", 0, 3)], "cover 3 of 4"),
        ([("0", 0, 5)], "cover 5 of 4"),
        ([], "cover 0 of 4"),
        ([("0", 1, 4)], "must cover"),
        ([("0", 0, 2), ("1", 3, 4)], "must cover"),
        ([("0", 0, 3), ("1", 2, 4)], "must cover"),
        ([("0", 0, 0), ("1", 0, 4)], "must cover"),
        ([("0", 0, 4.0)], "must cover"),
        ([("step-12", 0, 4)], "no version number"),
        ([("-1", 0, 4)], "no version number"),
        ([(None, 0, 4)], "no version number"),
        ([(True, 0, 4)], "no version number"),
        (["0"], "must cover"),
        ("0", "not a list"),
    ],
)
async def test_spans_that_do_not_fit_are_refused(fake, connect, spans, said):
    if isinstance(spans, list):
        spans = [
            dict(zip(("version", "start", "end"), span, strict=True))
            if isinstance(span, tuple)
            else span
            for span in spans
        ]
    fake.script.append(fake_vllm.spoilt(change(weight_versions=spans)))
    with pytest.raises(EngineProtocolError, match=said):
        await connect().generate(request_of())


async def test_a_version_tag_of_somebody_else_is_refused_on_completions(fake, connect):
    fake.version = "step-12"
    with pytest.raises(EngineProtocolError, match="'step-12', which is no version number"):
        await connect(route="completions").generate(request_of())


async def test_one_index_twice_is_refused(fake, connect):
    async def twice(fake, request, body):
        one = choice(fake, request.path, body)
        return fake_vllm.web.json_response(fake_vllm.answer([one, one]))

    fake.script.append(twice)
    with pytest.raises(EngineProtocolError, match="index 0, twice"):
        await connect().generate(request_of(), n=2)


async def test_a_version_may_be_a_number(fake, connect):
    spans = [{"version": 7, "start": 0, "end": 4}]
    fake.script.append(fake_vllm.spoilt(change(weight_versions=spans)))
    (made,) = await connect().generate(request_of())
    assert made.versions.newest() == 7


def test_a_route_that_vllm_does_not_have():
    with pytest.raises(SettingsError, match="chat"):
        VllmEngine("http://host", route="chat")
