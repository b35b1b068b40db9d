"""Every error of rollfleet, one tree, each named by the boundary that was crossed.

    RollfleetError
    ├── SettingsError (ValueError)          a setting is unknown, malformed or must deadlock
    ├── WireError
    │   ├── CodecError                      bytes that are no message of ours
    │   ├── SchemaError                     a message of a schema version we do not speak
    │   └── OversizeError                   a message or a batch over a cap on its size
    ├── InvalidPromptError (ValueError)     a prompt that cannot travel, refused at submit
    ├── InvalidSampleError (ValueError)     a training sample whose parts disagree
    ├── RunnerError
    │   ├── TaskQueueFullError              the task runner's input queue is full
    │   ├── RunnerStoppedError              the task runner is not running
    │   └── RunnerTimeoutError (TimeoutError)   fewer results than asked for, all of them kept
    ├── BrokerError
    │   ├── BrokerUnavailableError          Redis cannot be reached (transient: retried)
    │   └── BrokerSetupError                Redis refuses us or is set up so that it may lose data
    ├── ForkedError (RuntimeError)          used in a forked child of the process that made it
    ├── SupersededError                     another trainer has opened this run
    ├── LostBatchesError                    the checkpoint is older than what the run has committed
    ├── StarvedError (TimeoutError)         no batch came in the time allowed, with the reason
    ├── FailingError                        what is fed can only fail: the feed was stopped
    ├── PolicyError                         a freshness policy raised, or answered nonsense
    ├── RankError                           something of no name here failed on a rank; all raise it
    │   └── CollectiveError                 the ranks do not hear each other: one left, died or froze
    ├── EpisodeError                        an episode failed; `kind` says whose fault it was
    │   ├── InfraError                      server, network or worker: try elsewhere
    │   │   ├── EngineUnavailableError      an inference server cannot be reached or is failing
    │   │   │   ├── OverloadedError         it asks to be left alone for a while
    │   │   │   └── StaleServerError        it serves older weights than it was refitted to
    │   │   └── EngineProtocolError         an inference server answered something unusable
    │   ├── DataError                       the prompt or the user's code
    │   │   ├── EngineRefusedError          an inference server refused the request itself
    │   │   │   └── ContextFullError        its prompt leaves no room in the server's context
    │   │   └── RewardError                 the reward function raised or returned no number
    │   ├── EpisodeTimeoutError (TimeoutError)  the episode or its reward outlived its deadline
    │   └── EpisodeCancelledError           cancelled by the fleet: surplus, stale, or stolen lease
    └── RefitError                          an inference server did not take new weights

User code raises plain errors; :func:`boundary` is the one place that names them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Self

__all__ = [
    "BrokerError",
    "BrokerSetupError",
    "BrokerUnavailableError",
    "CodecError",
    "CollectiveError",
    "ContextFullError",
    "DataError",
    "EngineProtocolError",
    "EngineRefusedError",
    "EngineUnavailableError",
    "EpisodeCancelledError",
    "EpisodeError",
    "EpisodeTimeoutError",
    "FailingError",
    "FailureKind",
    "ForkedError",
    "InfraError",
    "InvalidPromptError",
    "InvalidSampleError",
    "LostBatchesError",
    "OverloadedError",
    "OversizeError",
    "PolicyError",
    "RankError",
    "RefitError",
    "RewardError",
    "RollfleetError",
    "RunnerError",
    "RunnerStoppedError",
    "RunnerTimeoutError",
    "SchemaError",
    "SettingsError",
    "StaleServerError",
    "StarvedError",
    "SupersededError",
    "TaskQueueFullError",
    "WireError",
    "boundary",
]


class FailureKind(StrEnum):
    """Whose fault a failed episode was: each kind has a retry budget of its own."""

    INFRA = "infra"
    DATA = "data"
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"
    POISON = "poison"


class RollfleetError(Exception):
    """The root of every error that rollfleet raises on purpose."""


class SettingsError(RollfleetError, ValueError):
    """A setting is unknown, malformed, or would make the run wait for itself."""


class WireError(RollfleetError):
    """Bytes that cannot travel, or that travelled and cannot be read."""


class CodecError(WireError):
    """Bytes that are no message of ours."""


class SchemaError(WireError):
    """A message of a schema version that this release does not speak."""


class OversizeError(WireError):
    """A message, or a batch of tensors, over a cap on its size."""


class InvalidPromptError(RollfleetError, ValueError):
    """A prompt that cannot be sent: the message names the field."""


class InvalidSampleError(RollfleetError, ValueError):
    """A training sample whose parts disagree: lengths, versions, mask or logprobs."""


class RunnerError(RollfleetError, RuntimeError):
    """The task runner cannot do what was asked."""


class TaskQueueFullError(RunnerError):
    """The runner's input queue is full; nothing of the call was taken."""


class RunnerStoppedError(RunnerError):
    """The runner is not running: never started, stopped, or its loop ended."""


class RunnerTimeoutError(RunnerError, TimeoutError):
    """Fewer results than asked for came in time; those that came are kept for the next wait."""


class BrokerError(RollfleetError):
    """Redis did not do its part."""


class BrokerUnavailableError(BrokerError, ConnectionError):
    """Redis cannot be reached, is loading, out of memory or read-only: worth another try."""


class BrokerSetupError(BrokerError):
    """Redis refuses us (password, rights) or is set up in a way that may lose data."""


class ForkedError(RollfleetError, RuntimeError):
    """Something with threads or connections was used in a forked child of the process that made it."""


class SupersededError(RollfleetError):
    """Another trainer has opened this run; this one can do no more harm, and no more work."""

    @classmethod
    def of(cls, run: str) -> Self:
        """The error of a trainer that has lost `run`."""
        return cls(
            f"run {run!r} was opened by another trainer: this one may not write any more. Two "
            "trainers on one run is a mistake unless the second took over on purpose; give each "
            "its own run name"
        )


class LostBatchesError(RollfleetError):
    """A trainer resumes from a checkpoint, and batches were committed after it was saved.

    They would never be served again, so the model that is resumed would lack them.
    """

    #: What a program that runs a trainer ends with, so that a supervisor can tell it from a crash.
    exit_code = 65

    #: Last batch that the checkpoint holds; -1 if unknown.
    saved: int
    #: Last batch that was committed; -1 if unknown.
    committed: int

    def __init__(self, message: str, saved: int = -1, committed: int = -1) -> None:
        super().__init__(message)
        self.saved = saved
        self.committed = committed


class StarvedError(RollfleetError, TimeoutError):
    """No batch came in the time allowed; the message says what the fleet was waiting for."""


class FailingError(RollfleetError):
    """What is fed can only fail: the feed was stopped, and the message has the newest failure."""


class PolicyError(RollfleetError):
    """A freshness policy raised, or answered nonsense: nothing is trained on by guess."""


class RankError(RollfleetError):
    """Something failed on one rank of a trainer of many; every rank raises it, and it is named."""


class CollectiveError(RankError):
    """The ranks of a trainer do not hear each other: one of them left, died or froze."""


class EpisodeError(RollfleetError):
    """An episode failed; `kind` says whose fault it was and picks the retry budget."""

    kind = FailureKind.DATA


class InfraError(EpisodeError):
    """Server, network or worker failed: the same prompt may succeed elsewhere."""

    kind = FailureKind.INFRA


class EngineUnavailableError(InfraError):
    """An inference server cannot be reached, timed out or answers 5xx / 429."""


class OverloadedError(EngineUnavailableError):
    """An inference server asks to be left alone for a while (429, or 503 with Retry-After)."""

    #: How long the server asked for, in seconds; 0.0 if it did not say.
    retry_after_s: float

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class StaleServerError(EngineUnavailableError):
    """An inference server serves older weights than the fleet gave it: it must be refitted.

    Most likely it was restarted, and came back with the weights that it was started with.
    """

    #: Version that the fleet last refitted it to.
    serves: int
    #: Version that it was found to serve; -1 if it says that it never was refitted.
    found: int

    def __init__(self, message: str, serves: int = -1, found: int = -1) -> None:
        super().__init__(message)
        self.serves = serves
        self.found = found


class EngineProtocolError(InfraError):
    """An inference server answered something that is no usable generation."""


class DataError(EpisodeError):
    """The prompt or the user's own code failed: it will most likely fail again."""

    kind = FailureKind.DATA


class EngineRefusedError(DataError):
    """An inference server refused the request itself (4xx): too long, malformed, unknown model."""

    #: Which of several servers it was; "" if that was not said.
    server: str = ""


class ContextFullError(EngineRefusedError):
    """A prompt leaves no room for a token in the context of an inference server."""


class RewardError(DataError):
    """The reward function raised, crashed its process, or returned no finite number."""


class EpisodeTimeoutError(EpisodeError, TimeoutError):
    """The episode, or its reward, outlived its deadline: a failure, never a zero reward."""

    kind = FailureKind.TIMEOUT


class EpisodeCancelledError(EpisodeError):
    """The fleet no longer wants this episode: surplus, hopelessly stale, or the lease was lost."""

    kind = FailureKind.CANCELLED


class RefitError(RollfleetError):
    """An inference server did not take new weights, or reports another version than it was given."""


@contextmanager
def boundary(error: type[EpisodeError], what: str) -> Iterator[None]:
    """Name whatever plain exception crosses here `error`, and leave our own errors as they are.

    Args:
        error: The class that says whose side of the boundary failed.
        what: What was being done, for the message: ``"workflow math.Sort on group 3f2a #4"``.

    Raises:
        EpisodeError: `error`, caused by the plain exception. Cancellation passes untouched.
    """
    try:
        yield
    except RollfleetError:
        raise
    except TimeoutError as exc:
        raise EpisodeTimeoutError(f"{what}: timed out ({exc or type(exc).__name__})") from exc
    except Exception as exc:
        raise error(f"{what}: {type(exc).__name__}: {exc}") from exc
