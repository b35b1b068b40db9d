"""What a user writes: a class with one method, `run`, and what that method may use.

- A workflow is loaded by import path from the worker's own settings, never from a message.
- It raises plain errors; the episode names them. What it returns is validated before it travels.
- It may be cancelled at any await: when the lease was lost, nobody wants its result any more.
"""

import importlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from rollfleet_common.errors import EngineUnavailableError, SettingsError
from rollfleet_common.messages import Claim, Prompt, Sample, VersionSpans
from rollfleet_engines.interface import (
    Completes,
    Generation,
    Request,
    Sampling,
    TextAnswer,
    TextEngine,
)
from rollfleet_engines.sampling import sampled
from rollfleet_worker.rewards.base import Reward, RewardPool

__all__ = ["Context", "Workflow", "load_workflow"]

_NO_SERVERS = (
    "this worker has no inference servers: set --server URL, or `rollfleet server add URL`"
)


@runtime_checkable
class Workflow(Protocol):
    """An episode's script. One instance serves all episodes of its route, many at a time."""

    async def run(self, prompt: Prompt, context: "Context") -> Sample | Sequence[Sample]:
        """Turn one prompt into one training sequence, or several if the conversation forks.

        Raises:
            Exception: Anything; it becomes a typed failure of this one sample.
        """
        ...


class Context:
    """What one episode may use: generation, rewards, and how to build a sample from them."""

    def __init__(
        self,
        claim: Claim,
        version: int,
        engine: Completes | None,
        sampling: Sampling,
        rewards: RewardPool,
        text: TextEngine | None = None,
    ) -> None:
        self.claim = claim
        #: The board's version when the episode began.
        self.version = version
        self.server = ""
        self.generate_s = 0.0
        self.reward_s = 0.0
        self._engine = engine
        self._sampling = sampling
        self._rewards = rewards
        self._text = text

    async def generate(self, token_ids: Sequence[int] | Any, **overrides: Any) -> Generation:
        """Sample one completion of `token_ids`; `overrides` are fields of Sampling.

        A seed is the group's: member k draws from `seed` + k, in every attempt. Siblings of one group that ask for the same at the same time may share one request.

        Raises:
            EngineUnavailableError, EngineProtocolError: After the pool has tried other servers.
            EngineRefusedError: The server refuses this very request.
            DataError: There is no such field of Sampling, or it is of another type.
        """
        if self._engine is None:
            raise EngineUnavailableError(_NO_SERVERS)
        sampling = sampled(self._sampling, {**self.claim.prompt.sampling, **overrides})
        if sampling.seed is not None:
            sampling = replace(sampling, seed=sampling.seed + self.claim.index)
        began = time.perf_counter()
        try:
            (generation,) = await self._engine.generate(
                Request(
                    token_ids=np.asarray(token_ids, np.int32),
                    sampling=sampling,
                    affinity=self.claim.prompt.group,
                    version=self.version,
                )
            )
        finally:
            self.generate_s += time.perf_counter() - began
        self.server = generation.server
        return generation

    async def chat(self, messages: Sequence[Mapping[str, Any]], **overrides: Any) -> TextAnswer:
        """What the servers' model says next in a conversation; text only, never trained on.

        For judges and simulated users on the fleet's own servers; `overrides` are fields of Sampling
        on top of the worker's, the prompt's not among them.

        Raises:
            EngineUnavailableError, EngineProtocolError: After the pool has tried other servers.
            EngineRefusedError: The server refuses this very request, or has no chat.
            DataError: There is no such field of Sampling, or it is of another type.
        """
        if self._text is None:
            raise EngineUnavailableError(_NO_SERVERS)
        return await self._text.chat(messages, sampled(self._sampling, overrides))

    async def score(
        self, fn: Callable[..., Any], *args: Any, timeout_s: float | None = None, **kwargs: Any
    ) -> Reward:
        """Run a reward function outside the event loop, with a deadline from when it starts.

        Raises:
            RewardError: It raised, died, or returned no finite number.
            EpisodeTimeoutError: It outlived its deadline: a failure, never a zero.
        """
        began = time.perf_counter()
        try:
            return await self._rewards.score(fn, *args, timeout_s=timeout_s, **kwargs)
        finally:
            self.reward_s += time.perf_counter() - began

    def sample(
        self,
        prompt_ids: Sequence[int] | Any,
        generation: Generation,
        reward: Reward | float,
        metrics: Mapping[str, float] | None = None,
    ) -> Sample:
        """The training sequence of a single turn: the prompt untrained, the completion trained."""
        prompt = np.asarray(prompt_ids, np.int32)
        p, c = len(prompt), len(generation.token_ids)
        spans = generation.versions
        return Sample(
            token_ids=np.concatenate([prompt, generation.token_ids]),
            loss_mask=np.arange(p + c) >= p,
            logprobs=np.concatenate([np.zeros(p, np.float32), generation.logprobs]),
            versions=VersionSpans(
                np.concatenate([np.zeros(1, np.int32), spans.starts + np.int32(p)]),
                np.concatenate([np.full(1, -1, np.int32), spans.versions]),
            )
            if p
            else spans,
            reward=reward.value if isinstance(reward, Reward) else float(reward),
            components=reward.components if isinstance(reward, Reward) else {},
            metrics=metrics or {},
            finish_reason=generation.finish_reason,
            logprobs_kind=generation.logprobs_kind,
            temperature=generation.temperature,
            context_full=generation.context_full,
        )


def load_workflow(path: str) -> Workflow:
    """Import ``package.module:Class`` and make one of it (an instance or a factory will do too).

    Raises:
        SettingsError: It does not import, is not there, or has no ``async def run``.
    """
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise SettingsError(f"workflow {path!r}: write package.module:Class")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # as `python -m` would; behind what is installed
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as exc:
        raise SettingsError(
            f"workflow {path!r} does not import: {exc}; it must be installed where the worker runs, or "
            "be on PYTHONPATH or in the working directory"
        ) from exc
    except Exception as exc:
        raise SettingsError(
            f"workflow {path!r}: importing it raised {type(exc).__name__}: {exc}"
        ) from exc
    try:
        for part in name.split("."):
            found = getattr(found, part)
    except AttributeError as exc:
        raise SettingsError(f"workflow {path!r} is not there: {exc}") from exc
    if isinstance(found, type) or not hasattr(found, "run"):
        try:
            found = found()
        except Exception as exc:
            raise SettingsError(
                f"workflow {path!r}: making one without arguments raised {type(exc).__name__}: {exc}"
            ) from exc
    if not isinstance(found, Workflow):
        raise SettingsError(f"workflow {path!r} has no method `async def run(prompt, context)`")
    return found
