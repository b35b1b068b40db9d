"""What travels: prompts out, rollouts and tombstones back. Imports nothing of ours.

- Everything here is frozen: a message is made once, encoded once, decoded once.
- Work is one *sample* of a group; a group is n samples of one prompt (GRPO).
- A version is a policy's number in its trainer's history; :data:`NO_VERSION` marks tokens that
  no policy made (prompts, tool output, padding), so that nothing looks like version 0 by accident.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "NO_VERSION",
    "SAMPLING_FIELDS",
    "Claim",
    "Float32",
    "Header",
    "Int32",
    "Kind",
    "LogprobsKind",
    "PolicyVersion",
    "Prompt",
    "Rollout",
    "Sample",
    "Tombstone",
    "VersionSpans",
]

#: The version of a token that no policy made.
NO_VERSION = -1
#: What `Prompt.sampling` may say; what else a server takes goes into `extra`.
SAMPLING_FIELDS = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "stop_token_ids",
    "seed",
    "extra",
)

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]


class Kind(StrEnum):
    """What a prompt is for: training, or evaluation (outside pacing, never dropped as stale)."""

    TRAIN = "train"
    EVAL = "eval"


class LogprobsKind(StrEnum):
    """Which distribution the log-probabilities of a generation are of.

    All three are the same one at temperature 1 without top-k, top-p, min-p and penalties.
    """

    #: The model's own: the softmax of the logits, before temperature and truncation.
    RAW = "raw"
    #: After temperature, before top-k, top-p and min-p.
    TEMPERED = "tempered"
    #: The one that the token was sampled from: after temperature and truncation.
    PROCESSED = "processed"
    #: The server does not say, or parts of the sample differ.
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class PolicyVersion:
    """What the board says of the policy."""

    #: Number of the policy in its epoch; -1 before the first publish.
    version: int
    #: One incarnation of a trainer's history; a resumed trainer opens a new one.
    epoch: int
    #: Where the weights are (a path or any reference the servers understand); "" if none.
    weights: str = ""
    #: Unix time in milliseconds, by Redis's clock, until which workers claim nothing new; 0 if not
    #: paused.
    paused_until_ms: int = 0
    #: The oldest version of a trained token that may still be of use; -1 if any may.
    min_useful: int = -1
    #: Whether the trainer gives weights to the servers that are registered.
    refits: bool = False


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of the data set, to be run `n` times: what all members of a group share."""

    #: Name of the group, unique in the run.
    group: str
    #: Samples in the group.
    n: int
    #: int32[P]: the prompt's token ids; may be empty when a workflow makes its own from `data`.
    token_ids: Int32
    #: The user's own fields (an answer, a seed, a question), by text: msgpack types only.
    data: Mapping[str, Any] = field(default_factory=dict)
    kind: Kind = Kind.TRAIN
    #: Which workflow runs it; workers read only the routes they serve.
    route: str = "default"
    #: A label for mixing and metrics.
    task: str = "default"
    #: Position in the data set, for resuming; -1 if it has none.
    position: int = -1
    #: Sampling parameters that override the worker's: :data:`SAMPLING_FIELDS`.
    sampling: Mapping[str, Any] = field(default_factory=dict)
    #: Unix time in milliseconds after which the group is given up; 0 if never. By Redis's clock once
    #: it is on the wire; a trainer gives it by its host's, and `submit` and `feed` convert it.
    deadline_ms: int = 0


@dataclass(frozen=True, slots=True)
class Claim:
    """One sample of a prompt, leased to this worker."""

    prompt: Prompt
    #: Which member of the group, 0 .. n-1.
    index: int
    #: 1 for the first try; grows with every failure that is retried.
    attempt: int
    #: Stream entry that holds the lease.
    entry: str
    partition: int
    #: Unix time in milliseconds of the entry's birth on the stream.
    queued_ms: int
    #: One line of JSON for each attempt that failed before.
    history: bytes = b""
    #: Epoch and version of the policy when it was put on the stream; (-1, -1) if unknown.
    since: tuple[int, int] = (-1, NO_VERSION)


@dataclass(frozen=True, slots=True)
class VersionSpans:
    """Which policy version made each token, run-length encoded.

    Token t belongs to the last span whose start is <= t. The first start is 0 (unless there are
    no tokens), starts increase strictly, and neighbouring versions differ.
    """

    #: int32[k]: first token of each span.
    starts: Int32
    #: int32[k]: version of each span, NO_VERSION where no policy made the tokens.
    versions: Int32

    @classmethod
    def constant(cls, version: int) -> "VersionSpans":
        """One version for all tokens."""
        return cls(np.zeros(1, np.int32), np.array([version], np.int32))

    @classmethod
    def of(cls, runs: Sequence[tuple[int, int]]) -> "VersionSpans":
        """Spans of consecutive runs ``(number of tokens, version)``; empty and equal runs melt."""
        starts: list[int] = []
        versions: list[int] = []
        at = 0
        for length, version in runs:
            if length < 0:
                raise ValueError(f"a run of {length} tokens (version {version}) cannot be")
            if length and (not versions or versions[-1] != version):
                starts.append(at)
                versions.append(version)
            at += length
        return cls(np.array(starts, np.int32), np.array(versions, np.int32))

    def expand(self, length: int) -> Int32:
        """int32[length]: the version of every token."""
        return np.repeat(self.versions, np.diff(np.append(self.starts, length)))

    def oldest(self, mask: Bool) -> int:
        """The oldest version among tokens where `mask` (bool[T]) is set; NO_VERSION if none is."""
        if not len(self.starts) or not len(mask):
            return NO_VERSION
        first = int(mask.argmax())
        if not mask[first]:
            return NO_VERSION
        starts: list[int] = self.starts.tolist()
        versions: list[int] = self.versions.tolist()
        span = bisect_right(starts, first) - 1
        # Versions seldom go backwards, and then the first trained token has the oldest.
        if versions[span] == min((v for v in versions[span:] if v != NO_VERSION), default=None):
            return versions[span]
        trained: list[bool] = np.logical_or.reduceat(mask, self.starts).tolist()
        spans = zip(versions, trained, strict=True)
        return min((v for v, any_ in spans if any_ and v != NO_VERSION), default=NO_VERSION)

    def newest(self) -> int:
        """The newest version of any token; NO_VERSION if no policy made any."""
        return max(self.versions.tolist(), default=NO_VERSION)


@dataclass(frozen=True, slots=True)
class Sample:
    """One training sequence. An episode makes one, or several when a conversation forks."""

    #: int32[T]: prompt and completion.
    token_ids: Int32
    #: bool[T]: True on the tokens that are trained on.
    loss_mask: Bool
    #: float32[T]: log-probability under the policy that sampled the token; 0.0 elsewhere.
    logprobs: Float32
    #: Which version made each token.
    versions: VersionSpans
    reward: float
    #: Parts of the reward, by name.
    components: Mapping[str, float] = field(default_factory=dict)
    #: Further arrays of the user, by name; the first axis need not be T.
    arrays: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    #: Further numbers of the user, by name.
    metrics: Mapping[str, float] = field(default_factory=dict)
    #: Why generation ended: "stop", "length", ...
    finish_reason: str = "stop"
    #: What `logprobs` are log-probabilities of, a value of :class:`LogprobsKind`.
    logprobs_kind: str = LogprobsKind.UNKNOWN
    #: Temperature that the tokens were sampled with; None if unknown, or if parts differ.
    temperature: float | None = None
    #: Whether "length" means that the server's context was full, before `max_tokens`.
    context_full: bool = False


@dataclass(frozen=True, slots=True)
class Header:
    """What the trainer's side needs to choose a rollout without touching its payload."""

    group: str
    index: int
    n: int
    attempt: int
    kind: Kind
    route: str
    task: str
    #: Position in the data set; -1 if it has none.
    position: int
    #: The prompt's stream entry, for tracing.
    entry: str
    #: Key suffix of the payload: ``<entry>:<nonce>``, so that a zombie cannot overwrite a winner.
    payload: str
    payload_bytes: int
    epoch: int
    #: Oldest version of any trained token: what staleness is judged by.
    min_version: int
    #: Newest version of any token.
    max_version: int
    #: Number of training sequences in the payload.
    samples: int
    #: Tokens over all sequences, and how many of them are trained on.
    tokens: int
    trained_tokens: int
    #: Reward of the first sequence.
    reward: float
    worker: str
    server: str
    #: Milliseconds the prompt waited on the stream, was generated, and was rewarded.
    queue_ms: int
    generate_ms: int
    reward_ms: int


@dataclass(frozen=True, slots=True)
class Rollout:
    """A finished episode: its header and its training sequences."""

    header: Header
    samples: tuple[Sample, ...]


@dataclass(frozen=True, slots=True)
class Tombstone:
    """A sample of a group that will never come, and why: so that its group closes."""

    group: str
    index: int
    n: int
    kind: Kind
    task: str
    #: One of "dead", "stale", "cancelled", "deadline".
    reason: str
    #: For people: the last failure in one line.
    detail: str
    position: int = -1
