"""In which order ready groups go into batches: a sort key, smallest first, for any policy.

- An order never drops anything; what waits too long is for the policy to judge.
- Keys end with the order of arrival, so that they are total and runs can be repeated.
"""

from dataclasses import dataclass
from typing import Protocol

from rollfleet.records import Group
from rollfleet_common.errors import SettingsError
from rollfleet_common.staleness import staleness

__all__ = ["FreshestFirst", "OldestFirst", "Order", "Windowed"]


class Order(Protocol):
    """A sort key: numbers only, smallest first."""

    def __call__(self, group: Group, current: int) -> tuple[float, ...]:
        """Of a closed group that has members, for a trainer at `current`."""
        ...


@dataclass(frozen=True, slots=True)
class OldestFirst:
    """By the version of the oldest trained token: fewest drops, and slow prompts do not starve."""

    def __call__(self, group: Group, current: int) -> tuple[float, ...]:
        """(oldest version, arrival)."""
        return group.oldest, group.seq


@dataclass(frozen=True, slots=True)
class FreshestFirst:
    """Newest first: the lowest mean staleness; what is slow waits longest, and may age out."""

    def __call__(self, group: Group, current: int) -> tuple[float, ...]:
        """(oldest version, negated; arrival)."""
        return -group.oldest, group.seq


@dataclass(frozen=True, slots=True)
class Windowed:
    """First come, first served among the last `window` versions; what is older goes before it.

    A middle way: quick and slow prompts mix as they finish, yet nothing waits in the window until
    it is lost. With `window` 0 it is :class:`OldestFirst`; with one of `max_staleness` or more it
    is the plain order of arrival until the last moment.
    """

    #: Versions behind from which a group goes first.
    window: int

    def __post_init__(self) -> None:
        if self.window < 0:
            raise SettingsError(f"window is {self.window} versions; it must be at least 0")

    def __call__(self, group: Group, current: int) -> tuple[float, ...]:
        """(0, oldest version, arrival) past the window, (1, arrival) in it."""
        if staleness(current, group.oldest) >= self.window:
            return 0, group.oldest, group.seq
        return 1, group.seq
