"""What the ranks of a trainer say to each other in a round, and what follows from all of it.

- Every rank draws the same conclusion from the same votes; nobody decides alone.
- A vote is a few hundred bytes: verdicts, counts and names. It is msgpack, never a pickle.
- An error keeps its type on its way to the other ranks if it is one of ours.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from typing import Any, cast

import msgpack

from rollfleet.tensors.forms import merged
from rollfleet_common import errors
from rollfleet_common.errors import CodecError, RankError, RollfleetError
from rollfleet_common.messages import NO_VERSION

__all__ = [
    "SHARE",
    "Conclusion",
    "Hello",
    "RankFailure",
    "Revised",
    "ShareTotals",
    "Vote",
    "Word",
    "conclude",
    "raise_first",
]


#: In place of a group's name, among what is no use: a rank did not find its share at all.
SHARE = ""


@dataclass(frozen=True, slots=True)
class RankFailure:
    """Something that went wrong on one rank, for all of them to raise."""

    #: Name of the class, in rollfleet_common.errors; of anything else only for the message.
    name: str
    text: str

    @classmethod
    def of(cls, exc: BaseException) -> "RankFailure":
        """An error as it travels."""
        return cls(type(exc).__name__, str(exc))

    def error(self, rank: int, size: int) -> RollfleetError:
        """The error as every rank raises it: of the same type if it is one of ours."""
        kind = getattr(errors, self.name, None)
        if isinstance(kind, type) and issubclass(kind, RollfleetError):
            return kind(f"rank {rank} of {size}: {self.text}")
        return RankError(f"rank {rank} of {size}: {self.name}: {self.text}")


@dataclass(frozen=True, slots=True)
class Hello:
    """What a rank says when it opens; the leader says what it opened."""

    failure: RankFailure | None = None
    url: str = field(default="", repr=False)
    version: int = NO_VERSION
    #: (epoch, version it began at) of every epoch.
    rollbacks: tuple[tuple[int, int], ...] = ()
    #: Of the run's named arrays, as the leader found it.
    form: str = ""

    def dumps(self) -> bytes:
        """As it travels."""
        failure = None if self.failure is None else astuple(self.failure)
        said = failure, self.url, self.version, self.rollbacks, self.form
        return cast(bytes, msgpack.packb(said))

    @classmethod
    def loads(cls, packed: bytes) -> "Hello":
        """The inverse of :meth:`dumps`.

        Raises:
            CodecError: It is none of ours.
        """
        try:
            failure, url, version, rollbacks, form = cast("list[Any]", msgpack.unpackb(packed))
            said = None if failure is None else RankFailure(*failure)
            return cls(said, url, version, tuple((epoch, at) for epoch, at in rollbacks), form)
        except (ValueError, TypeError) as exc:
            raise _no_word(exc) from exc


@dataclass(frozen=True, slots=True)
class Word:
    """What the leader says besides its vote."""

    #: The version of this moment, at which every rank must have refined its share.
    version: int
    #: Number of the batch of the plan that is voted on, if it may be trained on now; else 0.
    number: int = 0
    #: The plan to fetch next, "" if there is none yet.
    plan: str = ""
    #: The feed has ended, and nothing is left.
    ended: bool = False
    #: Why it ended without one batch, if it did.
    nothing: str = ""


@dataclass(frozen=True, slots=True)
class ShareTotals:
    """A share in numbers, after the policy refined it; sums over ranks are the batch's."""

    samples: int = 0
    tokens: int = 0
    #: Tokens that are trained on, and sequences and samples that have any.
    trained_tokens: int = 0
    trained_rows: int = 0
    trained_samples: int = 0
    rewards: float = 0.0
    #: Sum, and maximum, of versions behind over samples.
    behind: int = 0
    most_behind: int = 0

    def __add__(self, other: "ShareTotals") -> "ShareTotals":
        return ShareTotals(
            self.samples + other.samples,
            self.tokens + other.tokens,
            self.trained_tokens + other.trained_tokens,
            self.trained_rows + other.trained_rows,
            self.trained_samples + other.trained_samples,
            self.rewards + other.rewards,
            self.behind + other.behind,
            max(self.most_behind, other.most_behind),
        )


@dataclass(frozen=True, slots=True)
class Revised:
    """A rollout whose header the policy changed: what the leader's books of bias need of it."""

    group: str
    index: int
    min_version: int
    trained_tokens: int


@dataclass(frozen=True, slots=True)
class Vote:
    """What one rank says of its share of the plan at hand."""

    #: The version at which the share was refined.
    version: int = NO_VERSION
    #: Reason by group, of what cannot be trained on: lost, corrupt, rejected, or the policy's.
    bad: tuple[tuple[str, str], ...] = ()
    failure: RankFailure | None = None
    tally: ShareTotals = ShareTotals()
    revised: tuple[Revised, ...] = ()
    #: Said by the leader alone.
    word: Word | None = None
    #: What this rank knows of the form of named arrays, its share at hand included.
    form: str = ""

    def dumps(self) -> bytes:
        """As it travels."""
        return cast(
            bytes,
            msgpack.packb(
                (
                    self.version,
                    self.bad,
                    None if self.failure is None else astuple(self.failure),
                    astuple(self.tally),
                    [astuple(each) for each in self.revised],
                    None if self.word is None else astuple(self.word),
                    self.form,
                )
            ),
        )

    @classmethod
    def loads(cls, packed: bytes) -> "Vote":
        """The inverse of :meth:`dumps`.

        Raises:
            CodecError: It is no vote of ours: the ranks run different releases, or are out of step.
        """
        try:
            version, bad, failure, tally, revised, word, form = cast(
                "list[Any]", msgpack.unpackb(packed)
            )
            return cls(
                version=version,
                bad=tuple((group, reason) for group, reason in bad),
                failure=None if failure is None else RankFailure(*failure),
                tally=ShareTotals(*tally),
                revised=tuple(Revised(*each) for each in revised),
                word=None if word is None else Word(*word),
                form=form,
            )
        except (ValueError, TypeError) as exc:
            raise _no_word(exc) from exc


@dataclass(frozen=True, slots=True)
class Conclusion:
    """What every rank does next."""

    #: The leader's.
    word: Word
    #: The plan that was voted on is the next batch.
    go: bool
    #: Reason by group, of what is to be dropped.
    bad: dict[str, str]
    #: Of the whole batch.
    tally: ShareTotals
    revised: tuple[Revised, ...]
    #: What the ranks know of the form of named arrays, all of them; the first rank that knows a
    #: name decides.
    form: str


def raise_first(failures: Sequence[RankFailure | None]) -> None:
    """Raise what the lowest rank that failed said; the others are named with it.

    Raises:
        RollfleetError: One of them failed.
    """
    failed = {rank: each for rank, each in enumerate(failures) if each is not None}
    if not failed:
        return
    first, *others = sorted(failed)
    error = failed[first].error(first, len(failures))
    for rank in others:
        error.add_note(f"also {failed[rank].error(rank, len(failures))}")
    raise error


def conclude(votes: Sequence[Vote], *, strict: bool = False) -> Conclusion:
    """What follows from the votes of all ranks, the leader's first.

    Args:
        votes: One of every rank.
        strict: As of :class:`rollfleet.tensors.forms.Forms`.

    Raises:
        RollfleetError: What the lowest rank that failed said; the others are named with it.
        CodecError: The leader said nothing: the ranks are out of step.
    """
    raise_first([vote.failure for vote in votes])
    word = votes[0].word
    if word is None:
        raise CodecError("the leader said nothing: do all ranks call the same methods in order?")
    bad = {group: reason for vote in votes for group, reason in vote.bad}
    form, same = merged(strict, [vote.form for vote in votes])
    agreed = same and all(vote.version == word.version for vote in votes)
    tally = ShareTotals()
    for vote in votes:
        tally += vote.tally
    revised = tuple(each for vote in votes for each in vote.revised)
    return Conclusion(word, word.number > 0 and agreed and not bad, bad, tally, revised, form)


def _no_word(exc: Exception) -> CodecError:
    return CodecError(f"a rank said what is no word of ours ({exc}): do all run the same program?")
