"""The keyword arguments of :func:`rollfleet.connect`, by name, type and meaning.

- :class:`TrainerOptions` names every field of :class:`TrainerSettings` but `redis_url` and `policy`,
  which are parameters of their own. Editors complete them and type checkers check them.
- An option that is not given comes from its ``ROLLFLEET_*`` variable, the TOML file or its default,
  in this order. That is why none of them has a default here.
- :func:`with_options` shows the same names, with their defaults, to ``help()`` and ``inspect``.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypedDict, TypeVar, get_type_hints

from pydantic import SecretStr

from rollfleet.settings import TrainerSettings

__all__ = ["Duration", "Size", "TrainerOptions", "with_options"]

#: Seconds, or text with a unit: ``30``, ``"30s"``, ``"5m"``, ``"250ms"``.
Duration = float | str
#: Bytes, or text with a unit: ``65536``, ``"64KiB"``, ``"16MiB"``.
Size = int | str

_Function = TypeVar("_Function", bound=Callable[..., Any])


class TrainerOptions(TypedDict, total=False):
    """Options of a run. Counts are in samples unless stated otherwise."""

    # ---- the run and its batches -------------------------------------------------------------

    run: str
    """Name of the run: a namespace of its own in one Redis. Default: ``"default"``."""
    samples_per_version: int
    """Samples that one version of the policy is trained on. Default: 256."""
    batch_size: int | None
    """Samples of one batch. Default: None, which is `samples_per_version`."""
    group_size: int
    """Samples of one prompt (GRPO). Default: 8."""
    oversample: int
    """Samples launched for a prompt beyond `group_size`. The first `group_size` that arrive are
    taken and the rest cancelled, which favours short rollouts. Default: 0."""
    min_group_size: int | None
    """Train on a group that lacks samples if at least this many arrived. Default: None, whole groups
    only."""
    prefetch: int
    """Batches that are fetched and collated ahead of the trainer, 0 to 16. Default: 1."""

    # ---- staleness ---------------------------------------------------------------------------

    max_staleness: int
    """Versions that the oldest trained token of a sample may be behind when its batch is handed
    over. Default: 2."""
    pipeline_depth: int | None
    """Versions that rollouts may be started ahead of. Default: None, which is `max_staleness`."""
    order: Literal["oldest", "freshest", "windowed"]
    """Which ready groups go into a batch first. Default: ``"oldest"``."""
    on_rollback: Literal["replay", "drop"]
    """What to do with rollouts of weights that a resume from a checkpoint lost: ``"replay"`` trains
    on them at their true age, ``"drop"`` drops them. Default: ``"replay"``."""

    # ---- inference servers and weights -------------------------------------------------------

    servers: Sequence[str]
    """URLs of the inference servers that ``publish(weights=...)`` updates, besides those registered
    with ``rollfleet server add``. Default: none."""
    api_key: SecretStr | str | None
    """Bearer token for the control routes of the servers. Default: None."""
    refit_mode: Literal["keep", "abort", "wait"]
    """What happens to requests in flight while a server takes new weights: ``"keep"`` continues them
    under the new weights, ``"abort"`` lets workers continue them elsewhere, ``"wait"`` waits for
    them. Default: ``"keep"``."""
    refit_at_once: int
    """Servers that take new weights at the same time; 0 means all. Default: 0."""
    refit_s: Duration
    """Timeout of one server's weight update, in seconds. Default: 600."""
    refit_quorum: float
    """Share of the servers, 0 to 1, that must take a version, or `publish` raises; 0 means one
    server. Default: 0."""
    heal_s: Duration
    """Interval at which servers are checked for the current weights, in seconds. Default: 5."""
    adapter: str
    """Name under which servers serve what is published, which then is a LoRA adapter; empty for full
    weights. Default: ``""``."""

    # ---- waiting and failing -----------------------------------------------------------------

    lease_s: Duration
    """Silence, in seconds, after which another trainer may open the run. Default: 10."""
    starve_s: Duration
    """Longest wait for a batch, in seconds, before :class:`StarvedError`. Default: 1800."""
    breaker_deaths: int
    """Samples that die in a row, or groups that are torn or unusable in a row, after which the feed is stopped
    with a :class:`FailingError`; 0 means never. Default: 200."""
    breaker_prompts: int
    """Distinct prompts over which these deaths must be spread. Default: 20."""
    dead_letters: int
    """Dead letters kept per partition, approximately; 0 keeps all. Default: 10000."""
    dead_letters_s: Duration
    """Age, in seconds, after which a dead letter may be removed; 0 means never. Default: 604800."""

    # ---- limits ------------------------------------------------------------------------------

    max_prompt_bytes: Size
    """Largest encoded prompt, in bytes. Default: 1048576."""
    max_rollout_samples: int
    """Sequences of one rollout at most; a group with a larger one is dropped as ``oversize``.
    Default: 4096."""
    max_sample_tokens: int
    """Tokens of one sequence at most; a group with a longer one is dropped as ``oversize``.
    Default: 1048576."""
    max_rollout_spans: int
    """Version spans and loss-mask runs over all sequences of one rollout at most; a group with more
    is dropped as ``oversize``. Default: 65536."""
    max_names: int
    """Names of components, metrics and arrays, in one sequence and over one batch, at most.
    Default: 1024."""
    max_batch_bytes: Size
    """Memory that the tensors of one batch or micro-batch may take, padding included, in bytes.
    Default: 34359738368."""
    reserve_bytes: Size
    """Memory to reserve in Redis per rollout when Redis has a memory limit, in bytes.
    Default: 1048576."""

    # ---- opening -----------------------------------------------------------------------------

    partitions: int
    """Hash tags that the run is spread over, for a Redis Cluster, 1 to 1024. Default: 1."""
    strict: bool
    """Refuse a Redis that may lose data instead of warning. Default: False."""
    take_over: bool
    """Open the run even if another trainer holds it. Default: False."""
    lost_batches: Literal["refuse", "accept"]
    """What to do if batches were committed after the checkpoint that is resumed from: refuse to open
    the run, or accept that no model has seen them. Default: ``"refuse"``."""
    fresh: bool
    """Delete the run and start a new one under its name. Default: False."""


def with_options(function: _Function) -> _Function:
    """Show the options by name in the signature of a function that takes ``**settings``."""
    signature = inspect.signature(function)
    hints = get_type_hints(TrainerOptions)
    named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    options = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=TrainerSettings.model_fields[name].get_default(
                call_default_factory=True, validated_data={}
            ),
            annotation=hint,
        )
        for name, hint in hints.items()
    ]
    function.__signature__ = signature.replace(parameters=[*named, *options])  # type: ignore[attr-defined]
    return function
