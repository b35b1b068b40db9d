"""How long rollouts take: lognormal, or drawn from a recorded run.

- The k-th group submitted has the same lengths in every scenario of one seed: scenarios are
  compared on the same data set.
- A retry has the length of the attempt that failed: hard prompts stay hard.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from rollfleet_common.errors import SettingsError

__all__ = ["Lengths", "Lognormal", "Recorded"]

Float64 = npt.NDArray[np.float64]

#: Groups drawn in one call.
BLOCK = 256


class Lengths(Protocol):
    """A source of groups."""

    def groups(self, n: int, seed: int) -> Iterator[list[tuple[float, float]]]:
        """Endless groups of n: (duration in seconds, tokens) of every sample."""
        ...


class Lognormal:
    """Durations ``median_s * exp(sigma * z)``, cut at a budget of tokens.

    Args:
        median_s: In seconds.
        sigma: Of the logarithm.
        tokens_per_s: Speed of a slot.
        correlation: Of z within a group.
        max_tokens: Budget of a rollout.
    """

    def __init__(
        self,
        median_s: float,
        sigma: float,
        tokens_per_s: float,
        correlation: float = 0.0,
        max_tokens: int | None = None,
    ) -> None:
        self.median_s = median_s
        self.sigma = sigma
        self.tokens_per_s = tokens_per_s
        self.correlation = correlation
        self.cap_s = math.inf if max_tokens is None else max_tokens / tokens_per_s

    def groups(self, n: int, seed: int) -> Iterator[list[tuple[float, float]]]:
        """Endless groups of n: (duration in seconds, tokens) of every sample."""
        rng = np.random.default_rng([seed, 1])
        shared, own = math.sqrt(self.correlation), math.sqrt(1 - self.correlation)
        while True:
            # Drawn even where it weighs nothing, so that scenarios share their random numbers.
            z = shared * rng.standard_normal((BLOCK, 1)) + own * rng.standard_normal((BLOCK, n))
            durations = np.minimum(self.median_s * np.exp(self.sigma * z), self.cap_s)
            for row in durations.tolist():
                yield [(d, d * self.tokens_per_s) for d in row]


class Recorded:
    """Durations of a recorded run, drawn with replacement.

    Each line of the file is an object with `duration_s`, and may have `tokens` and `group`. Where
    all lines have a group, a group is drawn first and its samples from among that group's.

    Raises:
        SettingsError: The message names the line.
    """

    def __init__(self, path: Path, tokens_per_s: float) -> None:
        by_group: dict[str, list[tuple[float, float]]] = {}
        everything: list[tuple[float, float]] = []
        named = True
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as exc:
            raise SettingsError(f"the lengths cannot be read: {exc}") from exc
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                duration_s = float(row["duration_s"])
                one = (duration_s, float(row.get("tokens", duration_s * tokens_per_s)))
            except (ValueError, TypeError, KeyError, AttributeError) as exc:
                raise SettingsError(
                    f'{path}, line {number}: want {{"duration_s": seconds}}, with "tokens" and '
                    f'"group" if known, not {line:.80}'
                ) from exc
            if not (0 < one[0] < math.inf and 0 <= one[1] < math.inf):
                raise SettingsError(f"{path}, line {number}: duration_s must be above 0 and finite")
            everything.append(one)
            named = named and "group" in row
            by_group.setdefault(str(row.get("group")), []).append(one)
        if not everything:
            raise SettingsError(f"{path} holds no lengths")
        pools = list(by_group.values()) if named else [everything]
        self._pools: list[Float64] = [np.array(pool, np.float64) for pool in pools]

    def groups(self, n: int, seed: int) -> Iterator[list[tuple[float, float]]]:
        """Endless groups of n: (duration in seconds, tokens) of every sample."""
        rng = np.random.default_rng([seed, 1])
        while True:
            pool = self._pools[int(rng.integers(len(self._pools)))]
            yield [(row[0], row[1]) for row in pool[rng.integers(len(pool), size=n)].tolist()]
