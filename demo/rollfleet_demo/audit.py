"""What was trained on, held against what the inference server says that it made.

- Two witnesses, and nothing of the fleet between them: the server's token log (which weights made
  each token, read off the weights themselves) and the trainer's own log of its optimiser's rows.
- Every trained row must use up a log line of its own, with the same prompt and the same completion.
  A row whose lines are used up was trained on twice; a row without any was made by nobody.
- A row's age is the trainer's version less the oldest weights that made one of its tokens. The
  label that came through the fleet is compared with those weights, token by token.
- Equal completions of one prompt are told apart by their log-probabilities. Should even those be
  equal, by their labels, where lines with those very weights are left; else they are given the
  oldest. Rows that a line too many could also be meant for are counted as `ambiguous`, and
  `worst_staleness` says how old they would be if it was.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rollfleet_demo.task import answer_to, decode, exact

__all__ = ["Audit", "GeneratedSample", "Trained", "audit", "read_made", "read_trained"]

_Truth = tuple[int, ...]
#: Prompt, completion and its log-probabilities, which tell equal completions apart.
_Key = tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...]]


@dataclass(frozen=True, slots=True)
class GeneratedSample:
    """A line of the server's log: one finished completion."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    #: Which weights made each token of the completion.
    truth: tuple[int, ...]
    #: In float32, as they travel.
    logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Trained:
    """A row of the trainer's log."""

    step: int
    #: Of the weights that the step began with.
    version: int
    group: str
    index: int
    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    #: What the batch said made each token of the completion.
    versions: tuple[int, ...]
    reward: float
    logprobs: tuple[float, ...] = ()
    #: Which tokens of the completion were trained on; all if it does not say.
    trained: tuple[bool, ...] = ()

    def oldest(self, truth: tuple[int, ...]) -> int | None:
        """The oldest weights of a token that was trained on; None if none was."""
        mask = self.trained or (True,) * len(truth)
        return min((made for made, on in zip(truth, mask, strict=True) if on), default=None)


@dataclass(slots=True)
class _Claim:
    """A trained row in search of the line that it came from."""

    row: Trained
    #: Its (group, index) was trained before, and is counted for that already.
    repeated: bool
    #: Of the line that it was given; empty until then.
    truth: _Truth = ()


@dataclass(slots=True)
class Audit:
    """What came out. All counts are in rows unless they say otherwise."""

    rows: int = 0
    #: Trained on before: the same (group, index) again, or no log line left to have come from.
    duplicates: int = 0
    #: The server's log knows no such completion of this prompt.
    fabricated: int = 0
    #: Tokens whose label is not the weights that made them.
    mislabelled_tokens: int = 0
    #: The reward is not what the task gives for this completion.
    wrong_rewards: int = 0
    #: Versions behind, of the oldest token that was trained; -1 if nothing was.
    max_staleness: int = -1
    #: Rows that a line too many could be meant for, and the greatest age if it was.
    ambiguous: int = 0
    worst_staleness: int = -1
    #: Made by more than one version: the weights changed while they were in flight.
    mixed: int = 0
    #: Rows by age, of every step.
    by_step: dict[int, Counter[int]] = field(default_factory=dict)
    #: Tokens in the server's log.
    tokens_made: int = 0
    #: Whom the labels were held against.
    witness: str = "the servers' log of the weights that made each token"
    #: Where log-probabilities are the evidence: the largest difference found under a label's
    #: weights, and the share of tokens that the weights next to them would not give as well.
    largest_gap: float = 0.0
    told_apart: float = 1.0

    @property
    def staleness(self) -> Counter[int]:
        """Rows by age."""
        return sum(self.by_step.values(), Counter[int]())


def read_made(path: Path) -> Iterator[GeneratedSample]:
    """The server's log. Completions that were cut off are no rollouts, and left out."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            one = json.loads(line)
            if one["finish_reason"] != "abort":
                yield GeneratedSample(
                    tuple(one["prompt"]),
                    tuple(one["token_ids"]),
                    tuple(one["truth"]),
                    tuple(np.array(one["logprobs"], np.float32).tolist()),
                )


def read_trained(path: Path) -> Iterator[Trained]:
    """The trainer's log."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            step = json.loads(line)
            for row in step["rows"]:
                yield Trained(
                    step=step["step"],
                    version=step["version"],
                    group=row["group"],
                    index=row["index"],
                    prompt=tuple(row["prompt"]),
                    completion=tuple(row["completion"]),
                    versions=tuple(row["versions"]),
                    reward=row["reward"],
                    logprobs=tuple(row["logprobs"]),
                    trained=tuple(row["trained"]),
                )


def audit(trained: Iterable[Trained], made: Iterable[GeneratedSample]) -> Audit:
    """Hold the two logs against each other."""
    found = Audit()
    lines: dict[_Key, list[tuple[int, ...]]] = defaultdict(list)
    for line in made:
        lines[line.prompt, line.completion, line.logprobs].append(line.truth)
        found.tokens_made += len(line.completion)
    claims: dict[_Key, list[_Claim]] = defaultdict(list)
    seen: set[tuple[str, int]] = set()
    for row in trained:
        found.rows += 1
        found.by_step.setdefault(row.step, Counter())
        found.wrong_rewards += row.reward != exact(row.completion, answer_to(decode(row.prompt)))
        repeated = (row.group, row.index) in seen
        found.duplicates += repeated
        seen.add((row.group, row.index))
        claims[row.prompt, row.completion, row.logprobs].append(_Claim(row, repeated))
    for key, rows in claims.items():
        if key in lines:
            _match(found, rows, lines[key])
        else:
            found.fabricated += len(rows)
    return found


def _match(found: Audit, claims: Sequence[_Claim], lines: Sequence[_Truth]) -> None:
    """Give every claim a line of its own; all have the same prompt and completion."""
    left = Counter(lines)
    for claim in claims:
        # All true labels first: a wrong one must not take the line of a right one.
        if left[claim.row.versions]:
            claim.truth = claim.row.versions
            left[claim.truth] -= 1
    for claim in claims:
        if claim.truth:
            continue
        if rest := +left:
            claim.truth = min(rest, key=min)
            left[claim.truth] -= 1
            pairs = zip(claim.row.versions, claim.truth, strict=True)
            found.mislabelled_tokens += sum(label != real for label, real in pairs)
        else:
            found.duplicates += not claim.repeated
            claim.truth = min(lines, key=min)
    unused = [min(truth) for truth in +left]
    for claim in claims:
        found.mixed += max(claim.truth) > min(claim.truth)
        oldest = claim.row.oldest(claim.truth)
        if oldest is None:
            continue  # kept for its reward only
        behind = claim.row.version - oldest
        found.by_step[claim.row.step][behind] += 1
        found.max_staleness = max(found.max_staleness, behind)
        worst = min([oldest, *unused])
        found.ambiguous += worst < oldest
        found.worst_staleness = max(found.worst_staleness, claim.row.version - worst)
