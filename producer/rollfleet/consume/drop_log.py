"""The log of dropped groups: one line a second for each reason, however many there are."""

from dataclasses import dataclass

from rollfleet.records import Group
from rollfleet_common.logs import get_logger

__all__ = ["DropLog"]

log = get_logger("rollfleet.trainer")


@dataclass(slots=True)
class _Tally:
    groups: int = 0
    samples: int = 0
    #: Of the last group.
    example: str = ""


class DropLog:
    """Counts dropped groups by reason until :meth:`tell` logs them.

    Every group is a line of its own at level DEBUG.
    """

    def __init__(self) -> None:
        self._untold: dict[str, _Tally] = {}

    def note(self, group: Group, reason: str, version: int) -> None:
        """`group` was dropped for `reason`, at `version` of the policy."""
        tally = self._untold.setdefault(reason, _Tally())
        tally.groups += 1
        tally.samples += len(group.members)
        tally.example = group.name
        log.debug(
            "group dropped",
            group=group.name,
            reason=reason,
            samples=len(group.members),
            missing=group.reasons,
            oldest=group.oldest if group.members else None,
            version=version,
        )

    def tell(self) -> None:
        """Log what was dropped since the last call, a line for each reason."""
        untold, self._untold = self._untold, {}
        for reason, tally in untold.items():
            log.info(
                "groups dropped",
                reason=reason,
                groups=tally.groups,
                samples=tally.samples,
                example=tally.example,
            )
