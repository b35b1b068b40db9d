"""Workflows for fault runs: random lengths, and failures of every kind, decided by the prompt.

- What happens to a sample depends on its group, index and attempt only, so a run can be repeated.
- Every sample says whose it is and when it was begun, so that a mix-up or a lie is seen.
"""

import asyncio
import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np

from rollfleet_common.errors import InfraError
from rollfleet_common.messages import Prompt, Sample, VersionSpans
from rollfleet_worker.workflows.base import Context

__all__ = ["Hog", "Poison", "Random", "Served"]

MEAN_S = float(os.environ.get("CHAOS_MEAN_S", "0.15"))
#: One in so many attempts fails by the infrastructure, by a bug, and one in so many samples always.
INFRA, DATA, HOPELESS = 40, 60, 400
TOKENS = 8


def make_sample(prompt: Prompt, index: int, version: int, began: float) -> Sample:
    """A sample that says which prompt and member it is of, and when it was begun."""
    p = len(prompt.token_ids)
    own = np.array([index] * TOKENS, np.int32)
    return Sample(
        token_ids=np.concatenate([prompt.token_ids, own]),
        loss_mask=np.arange(p + TOKENS) >= p,
        logprobs=np.zeros(p + TOKENS, np.float32),
        versions=VersionSpans.of([(p, -1), (TOKENS, version)]),
        reward=float(index),
        metrics={"position": float(prompt.data["position"]), "own": float(index), "born": began},
    )


class Random:
    """Sleeps for a long-tailed time; sometimes fails."""

    async def run(self, prompt: Prompt, context: Context) -> Sample:
        """One sample of 8 tokens, made by the version at its beginning."""
        claim = context.claim
        dice = random.Random(f"{prompt.group}/{claim.index}")
        hopeless = dice.randrange(HOPELESS) == 0 and "hopeless" in prompt.data
        mood = random.Random(f"{prompt.group}/{claim.index}/{claim.attempt}")
        began = time.clock_gettime(time.CLOCK_REALTIME)  # not the clock that a test may bend
        await asyncio.sleep(min(mood.lognormvariate(0.0, 1.0), 20.0) * MEAN_S * 0.6)
        if hopeless or mood.randrange(DATA) == 0:
            raise ValueError("the reward function has a bug")
        if mood.randrange(INFRA) == 0:
            raise InfraError("the inference server went away")
        return make_sample(prompt, claim.index, context.version, began)


class Hog(Random):
    """Blocks the event loop of one worker once, for CHAOS_HOG_S seconds."""

    async def run(self, prompt: Prompt, context: Context) -> Sample:
        """As Random, after the block."""
        flag = Path(os.environ["CHAOS_DIR"]) / "hog"
        try:
            flag.touch(exist_ok=False)
        except FileExistsError:
            return await super().run(prompt, context)
        time.sleep(float(os.environ["CHAOS_HOG_S"]))  # noqa: ASYNC251 - blocking is the point
        return await super().run(prompt, context)


class Poison(Random):
    """Kills its worker whenever it meets member 0 of the prompt at CHAOS_POISON_POSITION."""

    async def run(self, prompt: Prompt, context: Context) -> Sample:
        """As Random, unless it is the poison."""
        poison = int(os.environ["CHAOS_POISON_POSITION"])
        if prompt.data["position"] == poison and context.claim.index == 0:
            os.abort()
        return await super().run(prompt, context)


class Served:
    """Asks the inference server, and trains on what it said."""

    async def run(self, prompt: Prompt, context: Context) -> Sample:
        """One generation of 8 tokens."""
        began = time.clock_gettime(time.CLOCK_REALTIME)  # not the clock that a test may bend
        generation = await context.generate(prompt.token_ids, max_tokens=TOKENS)
        metrics: dict[str, Any] = {
            "position": float(prompt.data["position"]),
            "own": float(context.claim.index),
            "born": began,
        }
        return context.sample(prompt.token_ids, generation, 1.0, metrics)
