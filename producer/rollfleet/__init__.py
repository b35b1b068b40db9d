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
from rollfleet.connecting import connect
from rollfleet.fleet import Fleet
from rollfleet.options import TrainerOptions
from rollfleet.policy.metrics import BiasMeter, effective_sample_size
from rollfleet.policy.orders import FreshestFirst, OldestFirst, Windowed
from rollfleet.policy.policies import (
    BasePolicy,
    DropStale,
    Mask,
    Policy,
    SegmentWise,
    StandardPPO,
    Wait,
)
from rollfleet.ranks import RankBatch, RankFleet, connect_ranks
from rollfleet.records import Group, Member
from rollfleet.replay import Replay, replay
from rollfleet.settings import TrainerSettings
from rollfleet.submit.resumable import Epochs
from rollfleet.tensors.balance import Cost
from rollfleet.tensors.packing import MicroPlan, StepTotals, plan_headers, plan_micro
from rollfleet.weight_sync.saving import save_weights
from rollfleet_common.errors import (
    BrokerError,
    BrokerSetupError,
    BrokerUnavailableError,
    CodecError,
    CollectiveError,
    FailingError,
    ForkedError,
    InvalidPromptError,
    InvalidSampleError,
    LostBatchesError,
    OversizeError,
    PolicyError,
    RankError,
    RefitError,
    RollfleetError,
    SchemaError,
    SettingsError,
    StarvedError,
    SupersededError,
    WireError,
)
from rollfleet_common.ledger import Books
from rollfleet_common.messages import Header, Kind, LogprobsKind, Prompt, Rollout, Sample

if TYPE_CHECKING:
    from rollfleet.tensors.collate import GroupStats, PackedBatch, TensorBatch, collate, group_stats
    from rollfleet.tensors.micro_batches import (
        MicroBatch,
        MicroBatches,
        micro_batches,
        micro_batches_of,
    )
    from rollfleet.tensors.proximal import (
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
    "BrokerError",
    "BrokerSetupError",
    "BrokerUnavailableError",
    "CodecError",
    "CollectiveError",
    "Cost",
    "DropStale",
    "Epochs",
    "FailingError",
    "Fleet",
    "ForkedError",
    "FreshestFirst",
    "Group",
    "GroupStats",
    "Header",
    "InvalidPromptError",
    "InvalidSampleError",
    "Kind",
    "LogprobsKind",
    "LostBatchesError",
    "Mask",
    "Member",
    "MicroBatch",
    "MicroBatches",
    "MicroPlan",
    "OldestFirst",
    "OversizeError",
    "PackedBatch",
    "Policy",
    "PolicyError",
    "Prompt",
    "RankBatch",
    "RankError",
    "RankFleet",
    "RefitError",
    "Replay",
    "RollfleetError",
    "Rollout",
    "Sample",
    "SchemaError",
    "SegmentWise",
    "SettingsError",
    "StandardPPO",
    "StarvedError",
    "StepTotals",
    "SupersededError",
    "TensorBatch",
    "TrainerOptions",
    "TrainerSettings",
    "Wait",
    "Windowed",
    "WireError",
    "collate",
    "connect",
    "connect_ranks",
    "effective_sample_size",
    "group_stats",
    "micro_batches",
    "micro_batches_of",
    "plan_headers",
    "plan_micro",
    "proximal_logprobs",
    "replay",
    "save_weights",
    "segment_mask",
    "token_logprobs",
    "token_staleness",
]

#: Where what needs torch is.
_WITH_TORCH = {
    "GroupStats": "tensors.collate",
    "MicroBatch": "tensors.micro_batches",
    "MicroBatches": "tensors.micro_batches",
    "PackedBatch": "tensors.collate",
    "TensorBatch": "tensors.collate",
    "collate": "tensors.collate",
    "group_stats": "tensors.collate",
    "micro_batches": "tensors.micro_batches",
    "micro_batches_of": "tensors.micro_batches",
    "proximal_logprobs": "tensors.proximal",
    "segment_mask": "tensors.proximal",
    "token_logprobs": "tensors.proximal",
    "token_staleness": "tensors.proximal",
}


def __getattr__(name: str) -> Any:
    if name in _WITH_TORCH:
        return getattr(import_module(f"rollfleet.{_WITH_TORCH[name]}"), name)
    raise AttributeError(f"module 'rollfleet' has no attribute {name!r}")
