"""rollfleet: feed prompts, train on fresh whole batches, publish versions.

    import rollfleet

    with rollfleet.connect("redis://...", run="math", group_size=8) as fleet:
        fleet.feed(prompts)
        for batch in fleet.batches(steps=1000):
            train_on(batch.tensors)
            fleet.publish(weights=save(model))

Torch is needed for ``batch.tensors`` and ``collate`` only, and imported when they are used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rollfleet.aio import AsyncFleet
from rollfleet.batch import Batch
from rollfleet.bias import BiasMeter, effective_sample_size
from rollfleet.fleet import Fleet, connect
from rollfleet.freshness import (
    BasePolicy,
    DropStale,
    Mask,
    Policy,
    SegmentWise,
    StandardPPO,
    Wait,
)
from rollfleet.groups import Group, Member
from rollfleet.orders import FreshestFirst, OldestFirst, Windowed
from rollfleet.replay import Replay, replay
from rollfleet.settings import TrainerSettings
from rollfleet_common.errors import (
    BrokerSetupError,
    BrokerUnavailableError,
    InvalidPromptError,
    OversizeError,
    PolicyError,
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
    from rollfleet.proximal import (
        proximal_logprobs,
        segment_mask,
        token_logprobs,
        token_staleness,
    )

__all__ = [
    "AsyncFleet",
    "BasePolicy",
    "Batch",
    "BiasMeter",
    "Books",
    "BrokerSetupError",
    "BrokerUnavailableError",
    "DropStale",
    "Fleet",
    "FreshestFirst",
    "Group",
    "GroupStats",
    "Header",
    "InvalidPromptError",
    "Kind",
    "Mask",
    "Member",
    "OldestFirst",
    "OversizeError",
    "Policy",
    "PolicyError",
    "Prompt",
    "RefitError",
    "Replay",
    "RollfleetError",
    "Rollout",
    "Sample",
    "SegmentWise",
    "SettingsError",
    "StandardPPO",
    "StarvedError",
    "SupersededError",
    "TensorBatch",
    "TrainerSettings",
    "Wait",
    "Windowed",
    "collate",
    "connect",
    "effective_sample_size",
    "group_stats",
    "proximal_logprobs",
    "replay",
    "segment_mask",
    "token_logprobs",
    "token_staleness",
]

#: Where what needs torch is.
_WITH_TORCH = {
    "GroupStats": "collate",
    "TensorBatch": "collate",
    "collate": "collate",
    "group_stats": "collate",
    "proximal_logprobs": "proximal",
    "segment_mask": "proximal",
    "token_logprobs": "proximal",
    "token_staleness": "proximal",
}


def __getattr__(name: str) -> Any:
    if name in _WITH_TORCH:
        return getattr(import_module(f"rollfleet.{_WITH_TORCH[name]}"), name)
    raise AttributeError(f"module 'rollfleet' has no attribute {name!r}")
