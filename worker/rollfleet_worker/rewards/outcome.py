"""What reward functions may return and raise, read in one place for processes and the loop alike.

- Only a finite number is a reward; all else is a failure with the function's name in it.
- Both travel as text and plain numbers, so that they always can be pickled.
"""

import math
import traceback
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, SupportsFloat, TypeAlias

from rollfleet_common import errors
from rollfleet_common.errors import EpisodeTimeoutError, RewardError, RollfleetError

__all__ = ["Reward", "RewardFailure", "RewardValue", "read"]

#: What a reward function may return: a number, a number with named components, or a mapping with
#: the key "reward" whose other entries are the components.
RewardValue: TypeAlias = (
    SupportsFloat | tuple[SupportsFloat, Mapping[str, SupportsFloat]] | Mapping[str, SupportsFloat]
)


@dataclass(frozen=True, slots=True)
class Reward:
    """What a reward function returned."""

    value: float
    #: Parts of the reward, by name.
    components: Mapping[str, float] = field(default_factory=dict)
    #: Seconds that the function ran; queueing is not in it.
    seconds: float = 0.0


class _UnusableError(Exception):
    """A reward function returned what is no reward."""


class _RemoteError(Exception):
    """Shown as the cause of a failure in a process: the traceback there, as text."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


@dataclass(frozen=True, slots=True)
class RewardFailure:
    """Why there is no reward."""

    #: Name of a class in rollfleet_common.errors.
    error: str
    text: str
    #: The traceback where it happened.
    details: str

    @classmethod
    def of(cls, exc: BaseException) -> "RewardFailure":
        """Name what a reward function raised, or what made its result unusable.

        A TimeoutError is a timeout also when the function raised it itself, and an error of ours
        (a judge that cannot be reached: InfraError) stays what it is.
        """
        details = "".join(traceback.format_exception(exc))
        if isinstance(exc, _UnusableError):
            return cls(RewardError.__name__, str(exc), details)
        name = RewardError.__name__
        if isinstance(exc, RollfleetError):
            # A subclass of the user's own has no name that another process would know.
            name = next(c.__name__ for c in type(exc).__mro__ if vars(errors).get(c.__name__) is c)
        elif isinstance(exc, TimeoutError):
            name = EpisodeTimeoutError.__name__
        raised = traceback.format_exception_only(exc)[-1].strip()
        return cls(name, f"raised {raised}", details)

    def named(self, what: str, cause: BaseException | None = None) -> RollfleetError:
        """The error to raise; `what` is the function, `cause` the exception if it is at hand."""
        made: RollfleetError = getattr(errors, self.error)(f"{what} {self.text}")
        made.__cause__ = cause or _RemoteError(self.details)
        return made


def read(result: Any) -> tuple[float, dict[str, float]]:
    """The value and components of what a reward function returned.

    Raises:
        Exception: It is no reward; :meth:`RewardFailure.of` knows how to put that.
    """
    value, parts = result, {}
    if isinstance(result, Mapping):
        if "reward" not in result:
            raise _UnusableError(f'returned a mapping without "reward": {_short(result)}')
        parts = {name: part for name, part in result.items() if name != "reward"}
        value = result["reward"]
    elif isinstance(result, tuple):
        if len(result) != 2 or not isinstance(result[1], Mapping):  # a number and its parts
            raise _UnusableError(
                f"returned a tuple that is not (number, components): {_short(result)}"
            )
        value, parts = result
    return _number(value, ""), {str(name): _number(parts[name], str(name)) for name in parts}


def _number(value: Any, component: str) -> float:
    number = None
    try:
        if isinstance(value, Coroutine):
            value.close()  # or Python warns that it was never awaited
        elif isinstance(value, SupportsFloat):  # a str is none; a tensor of one element is
            number = float(value)
    except (TypeError, ValueError, OverflowError):
        pass
    if number is None or not math.isfinite(number):
        of = f" for component {component!r}" if component else ""
        raise _UnusableError(f"returned {_short(value)}{of}, which is no finite number")
    return number


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
