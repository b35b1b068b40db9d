"""Opening a run: :func:`connect` for a plain training loop."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

from rollfleet.aio import AsyncFleet
from rollfleet.consume.payloads import Accept
from rollfleet.fleet import Fleet
from rollfleet.options import TrainerOptions, with_options
from rollfleet.policy.policies import Policy
from rollfleet.run.open_run import State
from rollfleet.settings import TrainerSettings
from rollfleet_common.embedded import resolve

__all__ = ["connect", "load_settings"]


@with_options
def connect(
    redis_url: str | None = None,
    *,
    policy: Policy | str | None = None,
    should_accept: Accept | None = None,
    state: State = None,
    version: int | None = None,
    collate: Mapping[str, Any] | None = None,
    config: Path | str | None = None,
    **settings: Unpack[TrainerOptions],
) -> Fleet:
    """Open a run and hold it until :meth:`Fleet.close`.

    Args:
        redis_url: ``redis://``, ``rediss://``, ``unix://`` or ``embedded://`` (a server started by
            this process). Default: ``embedded://``.
        policy: Which groups may be trained on: a :class:`Policy`, or the name of one (``drop``, the
            default, ``mask``, ``wait``, ``standard``, ``segment``, ``segment-recomputed``).
        should_accept: Called with the rollouts of a group; False drops the group as ``rejected``, and
            another one takes its place.
        state: What :meth:`Fleet.state_dict` returned, to resume from a checkpoint; or a function
            that returns it, called once this trainer holds the run (see :class:`AsyncFleet`).
        version: Current version of the policy. Default: where the run is, 0 for a new run.
        collate: Options of :func:`rollfleet.collate` for ``batch.tensors``, and `device`.
        config: TOML file with further settings. Default: the file named by ``ROLLFLEET_CONFIG``.
        settings: Options of the run; :class:`TrainerOptions` documents each. One that is not given
            comes from its ``ROLLFLEET_*`` variable, the TOML file or its default, in this order.

    Raises:
        SettingsError: A setting is unknown, malformed or would deadlock, or another trainer holds the
            run.
        LostBatchesError: Batches were committed after `state` was saved; ``lost_batches="accept"``
            opens the run all the same.
        BrokerUnavailableError: Redis cannot be reached.
        BrokerSetupError: Redis refuses us, or is set up so that it may lose data (`strict`).
    """
    loaded, own = load_settings(redis_url, policy, config, settings)
    url, server = resolve(loaded.redis_url)
    loaded = loaded.model_copy(update={"redis_url": url})

    def make() -> AsyncFleet:
        return AsyncFleet(
            loaded,
            policy=own,
            should_accept=should_accept,
            state=state,
            version=version,
            collate=collate,
        )

    try:
        return Fleet(make, server)
    except BaseException:
        if server is not None:
            server.stop()
        raise


def load_settings(
    redis_url: str | None,
    policy: Policy | str | None,
    config: Path | str | None,
    options: Mapping[str, Any],
) -> tuple[TrainerSettings, Policy | None]:
    """The settings that these arguments make, and the policy if it is an object.

    Raises:
        SettingsError: A setting is unknown, malformed or would deadlock.
    """
    given = dict(options)
    if redis_url is not None:
        given["redis_url"] = redis_url
    if isinstance(policy, str):
        given["policy"], policy = policy, None
    return TrainerSettings.load(config=None if config is None else Path(config), **given), policy
