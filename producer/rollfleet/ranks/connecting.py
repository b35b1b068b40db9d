"""Opening a run on many ranks: rank 0 takes it, and tells the others what they need to know.

Nobody goes on alone: what fails on one rank while it opens is raised on all of them.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

from rollfleet.connecting import connect, load_settings
from rollfleet.consume.payloads import Accept
from rollfleet.fleet import Fleet
from rollfleet.options import TrainerOptions, with_options
from rollfleet.policy.checked import CheckedPolicy, policy_named
from rollfleet.policy.policies import Policy
from rollfleet.policy.version_history import VersionHistory
from rollfleet.ranks.collective import Collective, Name, collective_named
from rollfleet.ranks.leader import Division
from rollfleet.ranks.protocol import Hello, RankFailure, raise_first
from rollfleet.ranks.rank_fleet import RankFleet
from rollfleet.ranks.share import Reader
from rollfleet.run.open_run import State
from rollfleet.settings import TrainerSettings
from rollfleet.tensors.balance import Cost
from rollfleet.tensors.forms import Forms
from rollfleet.tensors.packing import Form
from rollfleet_common.errors import SettingsError
from rollfleet_common.keys import RunKeys

__all__ = ["connect_ranks"]


@with_options
def connect_ranks(
    redis_url: str | None = None,
    *,
    collective: Collective | Name = "auto",
    whole_groups: bool = True,
    budget_tokens: int | None = None,
    form: Form | None = None,
    cost: Cost | None = None,
    tensors: bool | None = None,
    timeout_s: float = 1800.0,
    policy: Policy | str | None = None,
    should_accept: Accept | None = None,
    state: State = None,
    version: int | None = None,
    collate: Mapping[str, Any] | None = None,
    config: Path | str | None = None,
    **settings: Unpack[TrainerOptions],
) -> RankFleet:
    """Open a run on every rank of a trainer, all with the same arguments.

    All counts are of the whole trainer: `samples_per_version` and `batch_size` are neither divided
    nor multiplied by the number of ranks.

    Args:
        redis_url: As of :func:`rollfleet.connect`; every rank must reach it.
        collective: How the ranks hear each other: ``torch`` (a gloo group of our own, beside any
            other), ``redis`` (the run's own; asks ``RANK`` and ``WORLD_SIZE``), ``solo``, ``auto``
            (torch if there are several by ``WORLD_SIZE``), or one of your own.
        whole_groups: Members of a group stay on one rank, so that a group's statistics can be made
            there. If not, ranks are more even.
        budget_tokens: Tokens of one micro-batch; None: a rank's share is one.
        form: Of micro-batches: ``packed`` or ``padded``; by default what `collate` says, else packed.
        cost: What ranks are balanced by; by default tokens.
        tensors: Collate each share ahead, in the background; by default if torch is installed.
        timeout_s: Longest wait of a rank for the others: longer than the slowest of what they do
            between two batches (a checkpoint, a publish).
        policy: As of :func:`rollfleet.connect`. `refine` is asked on the rank that has the rollouts,
            in a thread of its own; `judge`, on rank 0. With whole_groups=False, `refine` is told
            the members of a group that are on its rank.
        should_accept: As of :func:`rollfleet.connect`; asked on the rank that has the group.
        state: Of :meth:`RankFleet.state_dict`, or a function that returns it; rank 0's counts, and
            only there a function is called. The number of ranks may have changed.
        version: The policy's version now; by default wherever the run is. Rank 0's counts.
        collate: Options of :func:`rollfleet.collate` for ``batch.tensors``; and `device`.
        config: TOML file with further settings, as of :func:`rollfleet.connect`.
        settings: Options of the run, as of :func:`rollfleet.connect`; :class:`TrainerOptions`
            documents each.

    Raises:
        SettingsError: A setting is unknown, must deadlock, or leaves a rank without rollouts.
        CollectiveError: The ranks did not meet.
        BrokerUnavailableError, BrokerSetupError: As of :func:`rollfleet.connect`.
    """
    loaded, own = load_settings(redis_url, policy, config, settings)
    if isinstance(collective, str):
        collective = collective_named(collective, loaded.redis_url, loaded.run, timeout_s)
    leader: Fleet | None = None
    cause: Exception | None = None
    try:
        check_division(loaded, collective.size, whole_groups, should_accept, own)
        if collective.rank == 0:
            leader = connect(
                redis_url,
                policy=policy,
                should_accept=should_accept,
                state=state,
                version=version,
                collate=collate,
                config=config,
                **settings,
            )
        hello = _hello(leader)
    except Exception as exc:  # noqa: BLE001 - every rank is to raise it
        hello, cause = Hello(failure=RankFailure.of(exc)), exc
    try:
        first = _meet(collective, hello, timeout_s, cause)
        if loaded.redis_url.startswith("embedded:"):
            loaded = loaded.model_copy(update={"redis_url": first.url})
    except BaseException as exc:
        if leader is not None:
            leader.close()
        collective.close(str(exc))
        raise
    options = {"max_bytes": loaded.max_batch_bytes, **(collate or {})}
    guarded = _policy(loaded, own) if leader is None else leader.aio.policy
    ahead = importlib.util.find_spec("torch") is not None if tensors is None else tensors
    rank = collective.rank

    def reader(client: Any) -> Reader:
        return Reader(
            client,
            RunKeys(loaded.run),
            loaded.partitions,
            rank=rank,
            policy=guarded,
            accept=should_accept,
            history=VersionHistory(first.rollbacks),
            # Of a share in micro-batches, each is made when it is its turn.
            collate=options if ahead and budget_tokens is None else None,
            limits=loaded.limits,
            forms=Forms(options.get("missing") == "error", first.form),
        )

    return RankFleet(
        collective,
        loaded,
        reader,
        leader,
        Division(
            collective.size,
            whole_groups,
            budget_tokens,
            form or options.get("form") or "packed",
            int(options.get("pad_multiple", 1)),
            cost or Cost(),
        ),
        version=first.version,
        collate=options,
        timeout_s=timeout_s,
    )


def check_division(
    settings: TrainerSettings,
    ranks: int,
    whole_groups: bool,
    accept: Accept | None,
    policy: Policy | None,
) -> None:
    """Whether a batch can be divided over so many ranks.

    Raises:
        SettingsError: A rank would be left without rollouts, or `accept` or the policy, be it the
            settings' or `policy`, be told parts of groups as if they were whole.
    """
    groups = settings.batch // settings.group_size
    parts, what = (groups, "groups") if whole_groups else (settings.batch, "samples")
    if parts < ranks:
        hint = ", or pass whole_groups=False" if settings.batch >= ranks else ""
        raise SettingsError(
            f"a batch of {settings.batch} samples in groups of {settings.group_size} is {parts} "
            f"{what} for {ranks} ranks: one of them would have nothing to train on. Raise "
            f"batch_size{hint}, or use fewer ranks"
        )
    if accept is not None and not whole_groups:
        raise SettingsError(
            "should_accept is told whole groups, and whole_groups=False divides them over ranks: "
            "leave one of the two out"
        )
    least = settings.min_group_size if policy is None else getattr(policy, "min_group_size", None)
    if least is not None and not whole_groups:
        raise SettingsError(
            f"min_group_size counts the members of a group that may be trained on, here {least}, "
            "and whole_groups=False divides them over ranks: leave one of the two out"
        )


def _policy(settings: TrainerSettings, policy: Policy | None) -> CheckedPolicy:
    if policy is not None:
        return CheckedPolicy(policy)
    s = settings
    return policy_named(s.policy, s.max_staleness, s.min_group_size, s.order)


def _hello(leader: Fleet | None) -> Hello:
    if leader is None:
        return Hello()
    rollbacks = leader.aio.consumer.history.rollbacks
    return Hello(
        url=leader.redis_url,
        version=leader.version,
        rollbacks=rollbacks,
        form=leader.aio.gather.payloads.forms.dumps(),
    )


def _meet(collective: Collective, hello: Hello, timeout_s: float, cause: Exception | None) -> Hello:
    """What the leader opened, once every rank is there."""
    heard = [Hello.loads(part) for part in collective.all_gather(hello.dumps(), timeout_s)]
    try:
        raise_first([each.failure for each in heard])
    except SettingsError as exc:
        raise exc from cause
    return heard[0]
