"""rollfleet: feed prompts, train on fresh whole batches, publish versions.

    import rollfleet

    with rollfleet.connect("redis://...", run="math", group_size=8) as fleet:
        fleet.feed(prompts)
        for batch in fleet.batches(steps=1000):
            train_on(batch.tensors)
            fleet.publish(weights=save(model))

Torch is needed for ``batch.tensors`` and ``collate`` only, and imported when they are used.
"""

from typing import TYPE_CHECKING, Any

from rollfleet.aio import AsyncFleet
from rollfleet.batch import Batch
from rollfleet.fleet import Fleet, connect
from rollfleet.freshness import DropStale, Policy
from rollfleet.groups import Group, Member
from rollfleet.settings import TrainerSettings
from rollfleet_common.errors import (
    BrokerSetupError,
    BrokerUnavailableError,
    InvalidPromptError,
    OversizeError,
    RefitError,
    RollfleetError,
    SettingsError,
    StarvedError,
    SupersededError,
)
from rollfleet_common.ledger import Books
from rollfleet_common.messages import Header, Kind, Prompt, Rollout, Sample

if TYPE_CHECKING:
    from rollfleet.collate import GroupStats, TensorBatch, collate, group_stats

__all__ = [
    "AsyncFleet",
    "Batch",
    "Books",
    "BrokerSetupError",
    "BrokerUnavailableError",
    "DropStale",
    "Fleet",
    "Group",
    "GroupStats",
    "Header",
    "InvalidPromptError",
    "Kind",
    "Member",
    "OversizeError",
    "Policy",
    "Prompt",
    "RefitError",
    "RollfleetError",
    "Rollout",
    "Sample",
    "SettingsError",
    "StarvedError",
    "SupersededError",
    "TensorBatch",
    "TrainerSettings",
    "collate",
    "connect",
    "group_stats",
]

_WITH_TORCH = ("GroupStats", "TensorBatch", "collate", "group_stats")


def __getattr__(name: str) -> Any:
    if name in _WITH_TORCH:
        import rollfleet.collate as found  # noqa: PLC0415 - torch is optional

        return getattr(found, name)
    raise AttributeError(f"module 'rollfleet' has no attribute {name!r}")
