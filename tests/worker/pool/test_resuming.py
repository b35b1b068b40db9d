"""Whatever cuts a generation off, and however often: the result is that of an undisturbed one."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest
from fixtures.cut_off_model import PROMPT, Model, request_for, token
from hypothesis import given, settings
from hypothesis import strategies as st

from rollfleet_common.errors import EngineRefusedError, EngineUnavailableError, SettingsError
from rollfleet_engines.interface import Generation, Request
from rollfleet_engines.resume import ABORTED
from rollfleet_worker.pool import resuming as module
from rollfleet_worker.pool.resuming import Resumer


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PAUSE_S", 0.0)


def whole(budget: int, stop_at: int, context: int) -> tuple[int, str]:
    """Tokens of an undisturbed completion, and why it ended."""
    if stop_at < min(budget, context):
        return stop_at + 1, "stop"
    return min(budget, context), "length"


@settings(max_examples=200, deadline=None)
@given(
    budget=st.integers(1, 60),
    segment=st.integers(0, 20),
    stop_at=st.integers(0, 80),
    context=st.integers(1, 80),
    mishaps=st.lists(
        st.tuples(st.sampled_from(["abort", "die", ""]), st.integers(0, 12)), max_size=9
    ),
    had=st.integers(0, 10),
)
def test_a_disturbed_generation_is_the_undisturbed_one(
    budget: int,
    segment: int,
    stop_at: int,
    context: int,
    mishaps: list[tuple[str, int]],
    had: int,
):
    tokens, reason = whole(budget, stop_at, context)
    had = min(had, tokens - 1)
    if not had:  # with nothing to lose, a death is the caller's to know of
        mishaps = [m for m in mishaps if m[0] != "die"]
    model = Model(list(mishaps), stop_at, context)
    told: list[Generation] = []
    resumer = Resumer(model, segment_tokens=segment)
    so_far = model.piece(0, had, ABORTED) if had else None
    made = asyncio.run(resumer.go_on(request_for(budget), so_far, told.append))
    assert made.token_ids.tolist() == [token(at) for at in range(tokens)]
    assert made.logprobs.tolist() == pytest.approx([-0.01 * at for at in range(tokens)])
    assert made.finish_reason == reason
    versions = made.versions.expand(tokens).tolist()
    assert versions == sorted(versions)
    asked = [r.sampling.max_tokens for r in model.asked]
    done = [len(r.token_ids) - len(PROMPT) for r in model.asked]
    assert all(d + a <= budget for d, a in zip(done, asked, strict=True))
    assert not segment or max(asked) <= segment
    # Nothing is made twice, and every step is told: the last one is the whole.
    lengths = [len(piece.token_ids) for piece in told]
    assert lengths == sorted(lengths)
    assert lengths[:-1] == sorted(set(lengths[:-1]))
    assert not told or told[-1].token_ids.tolist() == made.token_ids.tolist()
    assert all(piece.finish_reason == ABORTED for piece in told[:-1])


async def test_a_death_before_the_first_token_is_the_callers_and_after_it_is_outlived():
    with pytest.raises(EngineUnavailableError, match="died"):
        await Resumer(Model([("die", 0)])).go_on(request_for(10))
    saved: list[int] = []
    model = Model([("", 0), ("die", 0), ("die", 0)])
    made = await Resumer(model, segment_tokens=4, saved=saved.append).go_on(request_for(10))
    assert len(made.token_ids) == 10
    assert saved == [4, 4]


async def test_who_gets_no_further_gives_up_and_says_how_far_it_got():
    model = Model([("abort", 3), *[("abort", 0)] * 99])
    with pytest.raises(EngineUnavailableError, match="5 times in a row, with 3 of at most 10"):
        await Resumer(model, max_resumes=4).go_on(request_for(10))
    assert len(model.asked) == 1 + 5


async def test_progress_is_never_given_up():
    model = Model([("abort", 1)] * 40)
    made = await Resumer(model, max_resumes=1).go_on(request_for(40))
    assert len(made.token_ids) == 40


async def test_sampling_that_looks_back_is_asked_for_whole_and_starts_over():
    model = Model([("abort", 3), ("abort", 4)])
    request = request_for(10, extra={"stop": ["x"]})
    so_far = model.piece(0, 2, ABORTED)
    made = await Resumer(model, segment_tokens=2).go_on(request, so_far)
    assert [len(r.token_ids) for r in model.asked] == [3, 3, 3]
    assert [r.sampling.max_tokens for r in model.asked] == [10, 10, 10]
    assert len(made.token_ids) == 10


async def test_the_budget_the_least_and_the_seed_are_those_of_the_whole():
    model = Model([])
    request = request_for(10, seed=5, extra={"min_tokens": 6})
    await Resumer(model, segment_tokens=4).go_on(request)
    assert [r.sampling.max_tokens for r in model.asked] == [4, 4, 2]
    assert [r.sampling.extra["min_tokens"] for r in model.asked] == [4, 2, 0]
    assert len({r.sampling.seed for r in model.asked}) == 3


async def test_what_goes_on_after_a_cut_is_pinned_to_the_version_of_then():
    model = Model([("abort", 2), ("", 0), ("", 0)])
    await Resumer(model, segment_tokens=4, version=lambda: 9).go_on(request_for(8))
    # A segment that ended by itself keeps its pin, and with it the prefix that the server cached.
    assert [r.version for r in model.asked] == [3, 9, 9]
    assert [len(r.token_ids) for r in model.asked] == [3, 5, 9]


async def test_a_refusal_is_the_end_of_the_context_only_where_it_can_be_nothing_else():
    model = Model([], context=8)
    made = await Resumer(model, segment_tokens=4).go_on(request_for(20))
    assert (len(made.token_ids), made.finish_reason) == (8, "length")
    with pytest.raises(EngineRefusedError):
        await Resumer(Model([], context=0)).go_on(request_for(20))
    # What another worker had made is too long for this server: it starts over, and is refused.
    with pytest.raises(EngineRefusedError):
        await Resumer(Model([], context=0)).go_on(request_for(20), model.piece(0, 5, ABORTED))


async def test_a_refusal_by_another_server_than_the_last_one_ends_nothing():
    class Mixed(Model):
        """The second request meets a server that takes less."""

        def __init__(self, refusals: int) -> None:
            super().__init__([])
            self.refusals = refusals

        async def generate(self, request: Request, n: int = 1) -> Sequence[Generation]:
            if self.asked and self.refusals:
                self.refusals -= 1
                refused = EngineRefusedError("400: too long for me")
                refused.server = "http://other"
                raise refused
            return await super().generate(request, n)

    made = await Resumer(Mixed(2), segment_tokens=4).go_on(request_for(20))
    assert (len(made.token_ids), made.finish_reason) == (20, "length")
    # No fault of the prompt: the next attempt may meet another server.
    with pytest.raises(EngineUnavailableError, match=r"3 times in a row.*400: too long for me"):
        await Resumer(Mixed(99), segment_tokens=4, max_resumes=2).go_on(request_for(20))


async def test_n_completions_are_whole_each_and_errors_pass():
    model = Model([("abort", 1), ("abort", 2)])
    made = await Resumer(model, segment_tokens=3).generate(request_for(7), n=3)
    assert [len(one.token_ids) for one in made] == [7, 7, 7]

    class Refusing(Model):
        async def generate(self, request: Request, n: int = 1) -> Sequence[Generation]:
            raise EngineRefusedError("no")

    with pytest.raises(EngineRefusedError):
        await Resumer(Refusing([])).generate(request_for(7), n=2)


async def test_what_was_made_in_full_already_is_not_asked_for():
    model = Model([])
    made = await Resumer(model).go_on(request_for(4), model.piece(0, 4, ABORTED))
    assert (len(made.token_ids), made.finish_reason, model.asked) == (4, "length", [])


async def test_it_is_an_engine():
    model = Model([])
    resumer = Resumer(model)
    assert await resumer.ready()
    await resumer.close()
    assert model.closed
    for wrong in ({"segment_tokens": -1}, {"max_resumes": -1}):
        with pytest.raises(SettingsError):
            Resumer(model, **wrong)
    assert replace(request_for(3)) is not None
