"""The form of a run's named arrays: fixed by the first group that is accepted, the same ever after.

- A batch can only be made of rows that agree, and a trainer's code expects the same fields of every
  batch. So a group that differs is dropped before it is in any batch, instead of failing in it.
- The form stands on the board: the next trainer holds what it finds, owed batches too, against it.
- Names that no group had before are added to it. Only where batches refuse missing fields
  (``missing="error"``) must every row have the names of the first.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from rollfleet_common.errors import CodecError
from rollfleet_common.messages import Rollout, Sample
from rollfleet_common.text import parse_json

__all__ = ["Form", "Forms", "merged"]

#: Kind ("components", "metrics" or "arrays") and name of a field of the user's.
Name = tuple[str, str]

_PARTS = ("components", "metrics", "arrays")


@dataclass(frozen=True, slots=True)
class Form:
    """How one named array looks in every row."""

    #: A number ([]), one value a token ([T, ...]), or neither: as it comes.
    kind: Literal["number", "token", "list"]
    #: As numpy spells it, little-endian.
    dtype: str
    #: Of one value a token, the axes after the first; of a list, as many as it has, of any length.
    shape: tuple[int, ...]

    def __str__(self) -> str:
        if self.kind == "list":
            return f"{self.dtype} with {len(self.shape)} axes"
        axes = ", ".join(["T", *map(str, self.shape)] if self.kind == "token" else [])
        return f"{self.dtype}[{axes}]"


class Forms:
    """The forms of one run, as far as they are known.

    Args:
        strict: Whether every row must have the same names.
        known: What :meth:`dumps` gave, of an earlier trainer or another rank; "" if nothing.

    Raises:
        CodecError: `known` is none of ours.
    """

    def __init__(self, strict: bool = False, known: str = "") -> None:
        self.strict = strict
        self.arrays: dict[str, Form] = {}
        #: What every row must have; None: not known, or free.
        self.names: frozenset[Name] | None = None
        #: Grows whenever something is learned.
        self.revision = 0
        self.adopt(known)

    def fit(self, rollouts: Sequence[Rollout]) -> tuple[str, frozenset[Name]]:
        """Hold a group against what is known, and learn from it if it fits.

        Returns:
            Why it does not fit, or ""; and the names that its rows have.
        """
        samples = [sample for rollout in rollouts for sample in rollout.samples]
        names = frozenset(
            (part, name) for part in _PARTS for sample in samples for name in getattr(sample, part)
        )
        found: dict[str, Form] = {}
        for part, name in names:
            if part == "arrays":
                rows = [(s.arrays[name], len(s.token_ids)) for s in samples if name in s.arrays]
                form = _form(rows, self.arrays.get(name))
                if isinstance(form, str):
                    return f"arrays[{name!r}]: {form}", names
                found[name] = form
        if self.strict and (why := self._lacks(samples, names)):
            return why, names
        if not found.keys() <= self.arrays.keys() or (self.strict and self.names is None):
            self.arrays |= found
            self.names = names if self.strict else None
            self.revision += 1
        return "", names

    def _lacks(self, samples: Iterable[Sample], names: frozenset[Name]) -> str:
        wanted = names if self.names is None else self.names
        for sample in samples:
            has = {(part, name) for part in _PARTS for name in getattr(sample, part)}
            if has != wanted:
                part, name = min(has ^ wanted)
                there = "missing" if (part, name) in wanted else "not of the run"
                return f'{part}[{name!r}] is {there}, and batches have missing="error"'
        return ""

    def adopt(self, text: str) -> None:
        """Add what :meth:`dumps` gave; what is known already stays as it is.

        Raises:
            CodecError: It is none of ours.
        """
        if not text:
            return
        try:
            raw = parse_json(text)
            arrays = {
                str(name): Form(kind, str(dtype), tuple(int(n) for n in shape))
                for name, (kind, dtype, shape) in raw["arrays"].items()
            }
            names = raw["names"]
            wanted = None if names is None else frozenset((str(p), str(n)) for p, n in names)
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise CodecError(f"the form of the run's arrays: {text!r:.200}: {exc}") from exc
        before = self.arrays, self.names
        self.arrays = {**arrays, **self.arrays}
        if self.strict and self.names is None:
            self.names = wanted
        if (self.arrays, self.names) != before:
            self.revision += 1

    def replace(self, text: str) -> None:
        """Hold `text` in place of what was known: what all ranks agreed to."""
        if text == self.dumps():
            return
        self.arrays, self.names = {}, None
        self.revision += 1
        self.adopt(text)

    def agrees(self, text: str) -> bool:
        """Whether everything that `text` knows is known here, and the same."""
        other = Forms(self.strict, text)
        same = all(self.arrays.get(name) == form for name, form in other.arrays.items())
        return same and (other.names is None or other.names == self.names)

    def dumps(self) -> str:
        """As it stands on the board; "" while nothing is known."""
        if not self.arrays and self.names is None:
            return ""
        return json.dumps(
            {
                "arrays": {n: [f.kind, f.dtype, f.shape] for n, f in sorted(self.arrays.items())},
                "names": None if self.names is None else sorted(self.names),
            }
        )


def merged(strict: bool, said: Sequence[str]) -> tuple[str, bool]:
    """What several ranks know together, the first having precedence; and whether they agree."""
    forms = Forms(strict)
    for text in said:
        forms.adopt(text)
    return forms.dumps(), all(map(forms.agrees, said))


def _form(rows: Sequence[tuple[npt.NDArray[Any], int]], known: Form | None) -> Form | str:
    """The form of one array in the rows of a group; or why it is not the known one, or none."""
    first = rows[0][0]
    dtype = _dtype(first)
    for array, _ in rows:
        if _dtype(array) != dtype or array.ndim != first.ndim:
            return f"{_shown(first)} in one row and {_shown(array)} in another"
    further = first.shape[1:]
    form = Form("list", dtype, (0,) * first.ndim)
    if not first.ndim:
        form = Form("number", dtype, ())
    elif all(len(array) == tokens and array.shape[1:] == further for array, tokens in rows):
        form = Form("token", dtype, further)
    if known is None or form == known:
        return form
    if known == Form("list", dtype, (0,) * first.ndim):
        return known  # as it comes: of as many values as there are tokens, too
    odd = next((a for a, t in rows if len(a.shape) and len(a) != t), first)
    return f"{_shown(odd)}, where the run's first group had {known}"


def _dtype(array: npt.NDArray[Any]) -> str:
    return array.dtype.newbyteorder("<").str


def _shown(array: npt.NDArray[Any]) -> str:
    return f"{np.dtype(array.dtype)}{list(array.shape)}"
