"""What was trained on, judged by the weights that its labels name: the audit of a real vLLM.

- A real server keeps no log of which weights made a token. But it reports the log-probability of
  each, and the checkpoint of every version is on disk: a token was made by the weights of its label
  if a forward pass of these weights gives the same number, to a few millionths.
- Independent of the fleet: labels are held against checkpoints, by the trainer's own model code,
  which shares no kernel with vLLM. Not independent: what the server reports is what is judged, and
  that the model code is right is shown only by their agreement.
- A row that nobody made, or one mixed up with another, fits no weights either: it shows as mislabelled.
- Prompts never repeat, so a prompt's ids that come with more rows than a group has, or with
  another group's name, were trained on twice.
- How much the judgement is worth is counted with it: on a part of the rows, the weights next to the
  label's are tried too, and tokens that these would give as well were not told apart.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch

from rollfleet_common.messages import Float32
from rollfleet_demo.audit import Audit, Trained
from rollfleet_demo.model import CausalPolicy
from rollfleet_demo.task import VOCABULARY, answer_to, decode, exact

__all__ = ["TOLERANCE", "judge"]

#: Between two implementations in float32, in nats; a version's step is some hundred times larger.
TOLERANCE = 2e-4
#: Of so many rows, one is tried with its neighbours' weights as well.
EVERY = 8
ROWS = 1024

_Policy = TypeVar("_Policy", bound=CausalPolicy)


def judge(
    trained: Iterable[Trained], load: Callable[[int, _Policy], None], policy: _Policy
) -> Audit:
    """Hold the trainer's log against the checkpoints.

    Args:
        trained: The log.
        load: Reads a version's checkpoint into a policy.
        policy: To read them into.

    Raises:
        FileNotFoundError: A label names a version that was never written.
    """
    rows = list(trained)
    found = Audit(witness="a forward pass of the weights that each label names")
    _count(found, rows)
    asked: dict[int, list[Trained]] = defaultdict(list)
    near: dict[int, list[Trained]] = defaultdict(list)
    written = {version for row in rows for version in row.versions}
    for at, row in enumerate(rows):
        for version in set(row.versions):
            asked[version].append(row)
            if at % EVERY == 0:
                for neighbour in {version - 1, version + 1} & written:
                    near[neighbour].append(row)
    tried = apart = 0
    for version in sorted(written):
        load(version, policy)
        for row, off in _off(policy, asked[version]):
            mine = np.array(row.versions) == version
            found.mislabelled_tokens += int((off[mine] > TOLERANCE).sum())
            found.largest_gap = max(found.largest_gap, float(off[mine].max()))
        for row, off in _off(policy, near[version]):
            theirs = np.abs(np.array(row.versions) - version) == 1
            tried += int(theirs.sum())
            apart += int((off[theirs] > TOLERANCE).sum())
    found.told_apart = apart / tried if tried else 0.0
    return found


def _count(found: Audit, rows: Sequence[Trained]) -> None:
    """All that needs no weights."""
    seen: set[tuple[str, int]] = set()
    groups: dict[tuple[int, ...], set[str]] = defaultdict(set)
    for row in rows:
        found.rows += 1
        ages = found.by_step.setdefault(row.step, Counter())
        groups[row.prompt].add(row.group)
        # A prompt under another name is the same prompt.
        again = (row.group, row.index) in seen or len(groups[row.prompt]) > 1
        found.duplicates += again
        seen.add((row.group, row.index))
        # The model knows ids that the task has no character for; none of them is right.
        known = max(row.completion, default=0) < len(VOCABULARY)
        right = exact(row.completion, answer_to(decode(row.prompt))) if known else 0.0
        found.wrong_rewards += row.reward != right
        found.mixed += max(row.versions) > min(row.versions)
        found.tokens_made += len(row.completion)
        oldest = row.oldest(row.versions)
        if oldest is not None:
            ages[row.version - oldest] += 1
            found.max_staleness = max(found.max_staleness, row.version - oldest)
    found.worst_staleness = found.max_staleness


@torch.inference_mode()
def _off(policy: CausalPolicy, rows: Sequence[Trained]) -> Iterator[tuple[Trained, Float32]]:
    """How far each row's log-probabilities, float32[C], are from what `policy` gives."""
    for first in range(0, len(rows), ROWS):
        some = rows[first : first + ROWS]
        longest = max(len(row.prompt) + len(row.completion) for row in some)
        ids = torch.zeros((len(some), longest), dtype=torch.int64)
        for place, row in enumerate(some):
            whole = (*row.prompt, *row.completion)
            ids[place, : len(whole)] = torch.tensor(whole)
        said = policy.logprobs(ids).numpy()
        for place, row in enumerate(some):
            at = len(row.prompt)
            mine = said[place, at : at + len(row.completion)]
            yield row, np.abs(mine - np.array(row.logprobs, np.float32))
