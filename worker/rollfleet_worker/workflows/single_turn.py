"""One prompt, one completion, one verifiable reward: the workflow that most runs need."""

from collections.abc import Mapping
from typing import Any, ClassVar

from rollfleet_common.errors import DataError
from rollfleet_common.messages import Int32, Prompt, Sample
from rollfleet_worker.workflows.base import Context

__all__ = ["SingleTurn"]


class SingleTurn:
    """Subclass it and say what a completion is worth.

    For example::

        class Sort(SingleTurn):
            @staticmethod
            def reward(completion, prompt, data):
                return float(decode(completion) == data["answer"])

    `reward` runs in a process of its own, so it must be importable, and may be killed when it
    outlives `reward_timeout_s` (None: the worker's setting).
    """

    reward_timeout_s: ClassVar[float | None] = None
    #: A worker that knows no inference server claims no prompts for it.
    needs_server: ClassVar[bool] = True

    @staticmethod
    def reward(
        completion: Int32, prompt: Int32, data: Mapping[str, Any]
    ) -> float | tuple[float, Mapping[str, float]]:
        """The worth of `completion` (int32[C]); a number, or a number and its parts by name."""
        raise NotImplementedError("a SingleTurn workflow must define `reward`")

    async def run(self, prompt: Prompt, context: Context) -> Sample:
        """Generate once, score once."""
        if not len(prompt.token_ids):
            raise DataError("the prompt has no token_ids; a single-turn workflow needs them")
        generation = await context.generate(prompt.token_ids)
        reward = await context.score(
            type(self).reward,
            generation.token_ids,
            prompt.token_ids,
            prompt.data,
            timeout_s=self.reward_timeout_s,
        )
        return context.sample(prompt.token_ids, generation, reward)
