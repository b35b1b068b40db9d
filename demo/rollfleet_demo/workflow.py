"""The demo's workflow, as a user would write it: one completion, and whether it is right.

- Loaded by workers from their own settings (``--workflow rollfleet_demo.workflow:Sort``).
- Imports no torch: the demo's workers are ordinary workers.
"""

from collections.abc import Mapping
from typing import Any

from rollfleet_common.messages import Int32
from rollfleet_demo.task import exact
from rollfleet_worker.workflows.single_turn import SingleTurn

__all__ = ["Sort"]


class Sort(SingleTurn):
    """Eight digits in, the same digits in order out."""

    @staticmethod
    def reward(completion: Int32, prompt: Int32, data: Mapping[str, Any]) -> float:  # noqa: ARG004  # what SingleTurn calls
        """1.0 for the answer that the prompt brought along, else 0.0."""
        return exact(completion.tolist(), str(data["answer"]))
