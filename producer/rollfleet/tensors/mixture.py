"""Whether the rows of a batch were sampled alike: one loss cannot correct for several ways at once.

- Importance ratios compare the trainer's log-probabilities with those of the rollouts: both have to be
  of the same distribution, at the same temperature.
- Said once in a process; every batch has the facts (`logprobs_kinds`, `temperatures`).
"""

from collections.abc import Sequence

from rollfleet_common.logs import get_logger
from rollfleet_common.messages import Sample

__all__ = ["mixture", "tell_mixture"]

log = get_logger("rollfleet.trainer")

_told: set[str] = set()


def mixture(samples: Sequence[Sample]) -> str:
    """In what ways of sampling `samples` differ, in words; "" if they were sampled alike."""
    kinds = {str(sample.logprobs_kind) for sample in samples}
    heats = {sample.temperature for sample in samples}
    said = []
    if len(kinds) > 1:
        said.append(f"log-probabilities that are {', '.join(sorted(kinds))}")
    if len(heats) > 1:
        words = sorted("unknown" if heat is None else f"{heat:g}" for heat in heats)
        said.append(f"temperatures {', '.join(words)}")
    return " and ".join(said)


def tell_mixture(samples: Sequence[Sample]) -> None:
    """Log what `samples` mix, once for every such mixture in this process."""
    said = mixture(samples)
    if said and said not in _told and len(_told) < 16:
        _told.add(said)
        log.warning(
            "a batch mixes ways of sampling: importance ratios need the trainer's log-probabilities to "
            "be of the same distribution, so treat the rows apart (`logprobs_kinds`, `temperatures`)",
            mixes=said,
        )
