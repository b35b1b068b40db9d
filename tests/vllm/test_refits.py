"""The trainer's refits on a real vLLM: modes, weights that cannot be loaded, and what heals them."""

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fixtures.real_vllm import LONG, URL, Control, needs_model, request_of, running
from fixtures.refits import Board, Make, make, states

from rollfleet.weight_sync.repair import Repairer
from rollfleet_common.errors import RefitError
from rollfleet_common.servers import WeightState
from rollfleet_engines.control import Weights
from rollfleet_engines.resume import ABORTED
from rollfleet_engines.vllm import VllmEngine

__all__ = ["make"]

pytestmark = needs_model

SERVER: Any = SimpleNamespace(url=URL)


def weights(number: int) -> Weights:
    return Weights(number, Control.folder(number))


async def logprobs(engine: VllmEngine, salt: int) -> np.ndarray:
    """Of a greedy completion that no cache helps with."""
    (made,) = await engine.generate(request_of((9, salt, 7), temperature=0.0, seed=None))
    return made.logprobs


def spans(made: Sequence[Any]) -> list[int]:
    return made[0].versions.versions.tolist()


@pytest.mark.parametrize(("mode", "versions"), [("keep", [1, 2]), ("wait", [1])])
async def test_what_is_in_flight_is_kept_or_waited_for(
    control: Control, make: Make, mode: str, versions: list[int]
):
    control.weights = -1
    refits = make([SERVER], refit_mode=mode)
    engine = VllmEngine(URL)
    try:
        await refits.publish(weights(1), Board())
        flight = asyncio.create_task(engine.generate(request_of(max_tokens=LONG, version=1)))
        await running(flight, tokens=8)
        await refits.publish(weights(2), Board())
        assert spans(await flight) == versions
        assert spans(await engine.generate(request_of(version=2))) == [2]
    finally:
        await engine.close()


async def test_weights_that_cannot_be_loaded_end_what_runs_and_the_healer_brings_back_the_last(
    control: Control, make: Make
):
    control.weights = -1
    refits = make([SERVER])
    engine = VllmEngine(URL)
    try:
        await refits.publish(weights(1), Board())
        good = await logprobs(engine, 20)
        flight = asyncio.create_task(engine.generate(request_of(max_tokens=LONG, version=1)))
        await running(flight, tokens=8)
        board = Board()
        with pytest.raises(RefitError, match="did not take it, it was not announced"):
            await refits.publish(Weights(2, "/nowhere"), board)
        assert board.said == 0
        (cut,) = await flight
        # A token more, and the engine would have died for want of weights.
        assert (cut.finish_reason, set(cut.versions.versions.tolist())) == (ABORTED, {1})
        assert (await states(refits))[URL] == (WeightState.STALE, 1)
        assert refits.current is not None
        await Repairer(refits).look(refits.current)
        await asyncio.gather(*refits.healing.values())
        assert (await states(refits))[URL] == (WeightState.SERVING, 1)
        np.testing.assert_allclose(await logprobs(engine, 20), good, atol=1e-4)
    finally:
        await engine.close()
