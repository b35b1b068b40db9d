"""The seam as TRL has it: what of TRL is used, and the settings of both sides, checked before it is.

- TRL calls this part experimental and changes it between releases: whatever differs from what the
  adapter was proven with is an error that names it, before any training.
"""

from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module, metadata
from typing import Any

from rollfleet.settings import TrainerSettings
from rollfleet_common.errors import SettingsError

__all__ = ["PROVEN", "agree", "by_count", "fleet_settings", "row_class", "seam_of"]

#: The release that the adapter's tests were run with.
PROVEN = "1.16.0"
PROTOCOLS = ("RolloutWorkerProtocol", "WeightTransferProtocol")
#: What is filled in of TRL's RolloutSample.
ROW = frozenset(
    [
        "prompt",
        "completion",
        "input_ids",
        "completion_mask",
        "old_log_probs",
        "advantage",
        "model_version",
        "group_id",
        "metrics",
        "enqueued_at",
    ]
)


def seam_of(bridge: Any, module: Any) -> list[str]:
    """What TRL's module wants of a rollout worker and a weight transfer, and `bridge` has not.

    A protocol that is not there at all counts as missing, too.
    """
    lacks: list[str] = []
    for name in PROTOCOLS:
        protocol = getattr(module, name, None)
        if protocol is None:
            lacks.append(f"no {name}")
            continue
        wanted = {
            *(key for key, value in vars(protocol).items() if callable(value)),
            *protocol.__annotations__,
        }
        lacks += [
            f"{name}.{key}, which this adapter does not have"
            for key in sorted(wanted)
            if not key.startswith("_") and not hasattr(bridge, key)
        ]
    return lacks


def _row_lacks(row: Any) -> list[str]:
    if row is None or not is_dataclass(row):
        return ["no RolloutSample"]
    here = {each.name: each for each in fields(row)}
    needed = {
        name
        for name, each in here.items()
        if each.default is MISSING and each.default_factory is MISSING
    }
    return [
        *(f"no RolloutSample.{name}" for name in sorted(ROW - here.keys())),
        *(f"RolloutSample.{name}, which it must be given" for name in sorted(needed - ROW)),
    ]


def row_class(bridge: Any) -> Any:
    """TRL's RolloutSample, if its seam is the one that `bridge` was written for.

    Raises:
        SettingsError: TRL cannot be imported, or has another seam: the message says what differs.
    """
    try:
        version = metadata.version("trl")
        trainer = import_module("trl.experimental.async_grpo.async_grpo_trainer")
        worker = import_module("trl.experimental.async_grpo.async_rollout_worker")
    except (ImportError, metadata.PackageNotFoundError) as exc:
        raise SettingsError(
            "the TRL adapter needs a TRL with trl.experimental.async_grpo; install "
            f"'rollfleet[trl]' (proven with trl {PROVEN}): {type(exc).__name__}: {exc}"
        ) from exc
    row: Any = getattr(worker, "RolloutSample", None)
    lacks = [*seam_of(bridge, trainer), *_row_lacks(row)]
    if lacks:
        raise SettingsError(
            f"trl {version} has another seam than trl {PROVEN}, which this adapter was proven "
            f"with: {'; '.join(lacks)}"
        )
    return row


def by_count(args: Any) -> bool:
    """Whether a micro-batch of TRL's is a number of samples, and not a number of tokens."""
    return args.token_budget is not None and args.token_budget <= 0


def fleet_settings(args: Any, processes: int = 1) -> dict[str, Any]:
    """Settings of the fleet that agree with TRL's.

    TRL drops single rows over its `max_staleness` by itself, which would tear groups: so the fleet
    keeps one version below it, which is what a row may age between two takes.

    Args:
        args: An AsyncGRPOConfig.
        processes: Of the training.
    """
    group, micro = args.num_generations, args.per_device_train_batch_size * processes
    step = micro * args.gradient_accumulation_steps
    staleness = max(args.max_staleness - 1, 0)
    # TRL holds a step, the micro-batch after it and the rest of a group before it trains.
    held = step + micro + 2 * group
    return {
        "group_size": group,
        "batch_size": group,
        "samples_per_version": max(step * args.weight_sync_steps, -(-held // (staleness + 1))),
        "max_staleness": staleness,
    }


def agree(settings: TrainerSettings, args: Any) -> None:
    """Refuse settings of TRL's with which the fleet's could not work.

    Args:
        settings: Of the fleet.
        args: An AsyncGRPOConfig.

    Raises:
        SettingsError: It says which, and what to set.
    """
    if args.num_generations != settings.group_size:
        raise SettingsError(
            f"num_generations = {args.num_generations} of AsyncGRPOConfig is not the fleet's "
            f"group_size = {settings.group_size}: connect with **fleet_settings(args)"
        )
    if args.max_staleness < settings.max_staleness:
        raise SettingsError(
            f"max_staleness = {args.max_staleness} of AsyncGRPOConfig is below the fleet's "
            f"{settings.max_staleness}: TRL would tear groups that the fleet holds for fresh; "
            "connect with **fleet_settings(args)"
        )
    if not by_count(args) and (str(args.logging_strategy) != "steps" or args.logging_steps != 1):
        raise SettingsError(
            "with a token_budget, only TRL's log says how many samples a step has trained: set "
            "logging_steps=1, or token_budget=0"
        )
