"""How many versions behind: one rule in pure integers, used four times.

The four guards are pacing at submit, cancelling at the lease renewal, refusing at deliver, and the
sweep when a batch is handed over. The first three only save work; **the sweep is the guarantee**.

- The staleness of a sample is the trainer's version minus the version of its OLDEST trained token
  (the "head" of AReaL's staleness, and prime-rl's `span.start`), at the moment of hand-over.
- The capacity is AReaL's ``(eta + v + 1) * B - (accepted + running)`` (arXiv 2505.24298, eq. 3)
  in terms of what is outstanding, which stays right after a resume, after drops and with any
  number of ranks: ``(depth + 1) * B - outstanding``.
"""

from collections.abc import Sequence

from rollfleet_common.errors import SettingsError
from rollfleet_common.messages import NO_VERSION

__all__ = ["capacity", "check_shape", "min_useful", "replayed", "staleness"]


def staleness(current: int, oldest: int) -> int:
    """Versions between the trainer and a sample's oldest trained token; negative: the future."""
    return current - oldest


def min_useful(current: int, max_staleness: int) -> int:
    """The oldest version that may still be handed to a trainer at `current`."""
    return max(current - max_staleness, 0)


def capacity(pipeline_depth: int, samples_per_version: int, outstanding: int) -> int:
    """Training samples that may be submitted now; negative if more are out than should be."""
    return (pipeline_depth + 1) * samples_per_version - outstanding


def replayed(version: int, epoch: int, rollbacks: Sequence[tuple[int, int]]) -> int:
    """Where a version of an older epoch stands in the history of the newest one.

    A trainer that resumed at version r lost the weights of every v > r. The policy that made such
    a token is about as far from r as v was: it counts as ``r - (v - r)``, so that it is never
    mistaken for fresh.

    Args:
        version: Of the token, in the epoch that made it.
        epoch: Of the token.
        rollbacks: (epoch, version it began at) of every epoch.
    """
    if version == NO_VERSION:
        return version
    # Of several rollbacks since, the deepest counts: there the two histories parted.
    at = min((at for began, at in rollbacks if began > epoch), default=version)
    return at - (version - at) if version > at else version


def check_shape(
    *,
    samples_per_version: int,
    batch_size: int,
    group_size: int,
    max_staleness: int,
    pipeline_depth: int,
    oversample: int = 0,
    torn: bool = False,
) -> None:
    """Refuse a configuration that must wait for itself.

    Args:
        samples_per_version: Samples that one version is trained on.
        batch_size: Samples of one batch.
        group_size: Samples of one prompt.
        max_staleness: Versions behind.
        pipeline_depth: Versions that rollouts may be started ahead of.
        oversample: Samples launched beyond group_size.
        torn: Whether groups of fewer samples are trained on.

    Raises:
        SettingsError: With the arithmetic.
    """
    for name, value, least in (
        ("samples_per_version", samples_per_version, 1),
        ("batch_size", batch_size, 1),
        ("group_size", group_size, 1),
        ("max_staleness", max_staleness, 0),
        ("pipeline_depth", pipeline_depth, 0),
    ):
        if value < least:
            raise SettingsError(f"{name} is {value}; it must be at least {least}")
    if batch_size % group_size:
        raise SettingsError(
            f"batch_size = {batch_size} is no multiple of group_size = {group_size}: whole groups "
            f"would never fill a batch exactly ({batch_size} = {batch_size // group_size} x "
            f"{group_size} + {batch_size % group_size})"
        )
    room = (pipeline_depth + 1) * samples_per_version
    if batch_size > room:
        raise SettingsError(
            f"batch_size = {batch_size} could never be reached: only (pipeline_depth + 1) x "
            f"samples_per_version = ({pipeline_depth} + 1) x {samples_per_version} = {room} samples "
            "may be outstanding, so the trainer would wait for ever; lower batch_size or raise "
            "samples_per_version"
        )
    launched = group_size + oversample
    ready = batch_size - (1 if torn else group_size)
    if ready + launched > room:
        raise SettingsError(
            f"a batch might never fill: with {ready} of its {batch_size} samples ready, the next "
            f"prompt needs room for group_size + oversample = {group_size} + {oversample} = "
            f"{launched} more, but only (pipeline_depth + 1) x samples_per_version = "
            f"({pipeline_depth} + 1) x {samples_per_version} = {room} samples may be outstanding; "
            f"raise pipeline_depth, or samples_per_version to {-(-(ready + launched) // (pipeline_depth + 1))}"
        )
    if pipeline_depth > max_staleness:
        raise SettingsError(
            f"pipeline_depth = {pipeline_depth} is more than max_staleness = {max_staleness}: "
            f"({pipeline_depth} + 1) x {samples_per_version} = {room} samples would be outstanding, "
            f"so the last of them would be {pipeline_depth} versions old when their turn comes and "
            f"be dropped; use pipeline_depth <= {max_staleness}"
        )
