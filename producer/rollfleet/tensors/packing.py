"""Which rows go to which rank and into which micro-batch: integers only, before any payload is read.

- Every unit is in one micro-batch of one rank, or in `carry`; none is lost, none is there twice.
- Every rank has the same number of micro-batches. Where a rank has fewer units than that, the
  missing ones are *fillers*, empty micro-batches, last: trainers that meet in every forward pass
  run one on nothing.
- No micro-batch is over the budget, but for a unit that is so by itself (``over="alone"``).
- The same input gives the same plan everywhere, so ranks that know all lengths need not be told.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rollfleet.tensors.balance import Cost, partition
from rollfleet_common.messages import Header

__all__ = ["Form", "MicroPlan", "Over", "StepTotals", "plan_headers", "plan_micro"]

#: How a micro-batch is laid out, which decides what its budget is spent on.
Form = Literal["packed", "padded"]
#: What becomes of a sequence that is longer than the budget.
Over = Literal["alone", "truncate", "refuse"]

_TOKENS = Cost()


@dataclass(frozen=True, slots=True)
class MicroPlan:
    """Units are named by their position in the lengths that were planned."""

    #: Units of micro-batch k of rank r: `ranks[r][k]`, ascending; () is a filler. The costliest
    #: micro-batch of a rank comes first, so that the k-th ones, which may have to wait for each
    #: other, are about alike.
    ranks: tuple[tuple[tuple[int, ...], ...], ...]
    #: Cost of micro-batch k of rank r, with the padding it has.
    costs: tuple[tuple[float, ...], ...]
    #: Units that are cut, and the tokens that are left of each, its first ones.
    cut: Mapping[int, int]
    #: Units over the budget, each in a micro-batch by itself.
    alone: tuple[int, ...]
    #: Units in no micro-batch, for the next plan (``even=True``).
    carry: tuple[int, ...]

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a rank, the same on all."""
        return len(self.ranks[0])

    @property
    def fillers(self) -> int:
        """Empty micro-batches over all ranks."""
        return sum(not micro for rank in self.ranks for micro in rank)

    @property
    def imbalance(self) -> float:
        """Cost of the costliest rank over the mean: 1.0 if nobody waits."""
        costs = [sum(rank) for rank in self.costs]
        return max(costs) * len(costs) / sum(costs)

    def share(self, rank: int) -> tuple[int, ...]:
        """All units of a rank, ascending."""
        return tuple(sorted(unit for micro in self.ranks[rank] for unit in micro))


@dataclass(frozen=True, slots=True)
class StepTotals:
    """What a step's loss is divided by, of one rank, or added up over all."""

    #: Tokens that are trained on, and rows and rollouts that have any.
    trained_tokens: int = 0
    trained_rows: int = 0
    trained_rollouts: int = 0
    #: Of the rank that has most.
    micro_batches: int = 0

    def __add__(self, other: "StepTotals") -> "StepTotals":
        """Of two ranks together: ``sum(gathered, StepTotals())`` is the step's."""
        return StepTotals(
            self.trained_tokens + other.trained_tokens,
            self.trained_rows + other.trained_rows,
            self.trained_rollouts + other.trained_rollouts,
            max(self.micro_batches, other.micro_batches),
        )


@dataclass(frozen=True, slots=True)
class _Unit:
    """What is placed whole."""

    index: int
    tokens: int
    sequences: int
    cost: float


@dataclass(frozen=True, slots=True)
class _Shape:
    """What a micro-batch may hold."""

    budget_tokens: int
    multiple: int
    form: Form
    cost: Cost

    def width(self, tokens: int) -> int:
        """Tokens with what rounding adds."""
        return -(-tokens // self.multiple) * self.multiple

    def fits(self, micro: "_Micro", unit: _Unit) -> bool:
        """Whether the unit may join, longer ones having come first."""
        if self.form == "packed":
            return self.width(micro.tokens + unit.tokens) <= self.budget_tokens
        widest = max(micro.longest, unit.tokens)
        return (micro.sequences + unit.sequences) * self.width(widest) <= self.budget_tokens

    def cost_of(self, micro: "_Micro") -> float:
        if self.form == "packed":
            return sum(unit.cost for unit in micro.units)
        return micro.sequences * self.cost.of(self.width(micro.longest))


class _Micro:
    """A micro-batch that is being filled."""

    def __init__(self, units: Sequence[_Unit] = ()) -> None:
        self.units: list[_Unit] = []
        self.tokens = self.sequences = self.longest = 0
        self.cost = 0.0
        for unit in units:
            self.add(unit)

    def add(self, unit: _Unit) -> None:
        self.units.append(unit)
        self.tokens += unit.tokens
        self.sequences += unit.sequences
        self.longest = max(self.longest, unit.tokens)
        self.cost += unit.cost


def plan_micro(
    lengths: Sequence[int],
    groups: Sequence[Hashable] | None = None,
    *,
    budget_tokens: int,
    ranks: int = 1,
    whole_groups: bool = False,
    cost: Cost = _TOKENS,
    over: Over = "alone",
    form: Form = "packed",
    pad_multiple: int = 1,
    at_least: int = 1,
    even: bool = False,
    sequences: Sequence[int] | None = None,
) -> MicroPlan:
    """Divide units over ranks by cost, and each rank's into micro-batches within a budget.

    Args:
        lengths: Tokens of each unit, at least 1. A unit is a row, or whatever must not be torn.
        groups: The group of each unit.
        budget_tokens: What one micro-batch may hold, padding included: tokens, if it is packed;
            rows times the longest, if it is padded.
        ranks: How many share the units.
        whole_groups: Keep a group on one rank (not in one micro-batch).
        cost: What is balanced.
        over: A sequence longer than the budget gets a micro-batch "alone", is cut to it
            ("truncate"), or is a ValueError ("refuse").
        form: Of the micro-batches.
        pad_multiple: What their length is rounded up to.
        at_least: Micro-batches of a rank: for a rank that plans for itself and was told how many
            the others have.
        even: As many units (groups, if they are kept whole) on every rank. What does not divide,
            the last ones, is in `carry`.
        sequences: Rows of each unit, for units of several; 1 each if not given. Such a unit is
            never cut: over the budget it is alone. In padded form its rows count as if each had
            all of its tokens, for the longest is not known.

    Raises:
        ValueError: Nothing to plan, a length under 1, a setting that cannot be, a sequence that is
            refused, or fewer units than ranks with `even`.
    """
    _check(lengths, groups, budget_tokens, ranks, whole_groups, pad_multiple, at_least)
    room = budget_tokens // pad_multiple * pad_multiple
    counts = [1] * len(lengths) if sequences is None else list(sequences)
    if len(counts) != len(lengths):
        raise ValueError(f"{len(counts)} sequences for {len(lengths)} lengths")
    shape = _Shape(budget_tokens, pad_multiple, form, cost)
    cut: dict[int, int] = {}
    if over == "truncate":
        cut = {i: room for i, n in enumerate(lengths) if n > room and counts[i] == 1}
    units = [
        _Unit(i, cut.get(i, n), counts[i], cost.of(cut.get(i, n), counts[i]))
        for i, n in enumerate(lengths)
    ]
    alone = tuple(unit.index for unit in units if not shape.fits(_Micro(), unit))
    if alone and over == "refuse":
        raise ValueError(
            f"{len(alone)} of {len(lengths)} sequences are longer than the budget of "
            f"{budget_tokens:,} tokens, number {alone[0]} with {lengths[alone[0]]:,}: raise the "
            'budget, or plan with over="truncate" or over="alone"'
        )
    atoms = _atoms(units, groups if whole_groups else None)
    carried = len(atoms) % ranks if even else 0
    if even and len(atoms) < ranks:
        raise ValueError(f"{len(atoms)} cannot be spread evenly over {ranks} ranks")
    carry = tuple(sorted(u.index for atom in atoms[len(atoms) - carried :] for u in atom))
    shares = _shares(atoms[: len(atoms) - carried], ranks, even, shape)
    packed = [_first_fit(share, shape) for share in shares]
    count = max(at_least, *(len(micros) for micros in packed))
    done = [_spread(micros, count, shape) for micros in packed]
    return MicroPlan(
        ranks=tuple(tuple(tuple(sorted(u.index for u in m.units)) for m in r) for r in done),
        costs=tuple(tuple(shape.cost_of(micro) for micro in rank) for rank in done),
        cut={i: n for i, n in cut.items() if i not in carry},
        alone=tuple(i for i in alone if i not in carry),
        carry=carry,
    )


def plan_headers(
    headers: Sequence[Header],
    *,
    budget_tokens: int,
    ranks: int = 1,
    whole_groups: bool = True,
    cost: Cost = _TOKENS,
    over: Over = "alone",
    form: Form = "packed",
    pad_multiple: int = 1,
    even: bool = False,
) -> MicroPlan:
    """:func:`plan_micro` of rollouts that nobody has fetched; a unit is a rollout, forks and all.

    Raises:
        ValueError: As :func:`plan_micro`.
    """
    return plan_micro(
        [header.tokens for header in headers],
        [header.group for header in headers],
        budget_tokens=budget_tokens,
        ranks=ranks,
        whole_groups=whole_groups,
        cost=cost,
        over=over,
        form=form,
        pad_multiple=pad_multiple,
        even=even,
        sequences=[header.samples for header in headers],
    )


def _check(
    lengths: Sequence[int],
    groups: Sequence[Hashable] | None,
    budget_tokens: int,
    ranks: int,
    whole_groups: bool,
    pad_multiple: int,
    at_least: int,
) -> None:
    if not lengths:
        raise ValueError("there is nothing to plan: no lengths")
    if min(lengths) < 1:
        raise ValueError(f"a sequence of {min(lengths)} tokens cannot be")
    if min(ranks, at_least, pad_multiple) < 1 or budget_tokens < pad_multiple:
        raise ValueError(
            f"ranks {ranks}, at_least {at_least} and pad_multiple {pad_multiple} must be at least "
            f"1, budget_tokens {budget_tokens} at least pad_multiple"
        )
    if whole_groups and groups is None:
        raise ValueError("whole_groups needs the group of every unit")
    if groups is not None and len(groups) != len(lengths):
        raise ValueError(f"{len(groups)} groups for {len(lengths)} lengths")


def _atoms(units: Sequence[_Unit], groups: Sequence[Hashable] | None) -> list[list[_Unit]]:
    """What stays on one rank, in order of first appearance."""
    if groups is None:
        return [[unit] for unit in units]
    together: dict[Hashable, list[_Unit]] = {}
    for unit, group in zip(units, groups, strict=True):
        together.setdefault(group, []).append(unit)
    return list(together.values())


def _shares(
    atoms: Sequence[list[_Unit]], ranks: int, even: bool, shape: _Shape
) -> list[list[_Unit]]:
    """Units of each rank: equal by cost, unless equal by tokens takes fewer micro-batches."""
    best: list[list[_Unit]] = []
    fewest = 0
    for cost in dict.fromkeys((shape.cost, _TOKENS)):
        costs = [sum(cost.of(u.tokens, u.sequences) for u in atom) for atom in atoms]
        parts = partition(costs, ranks, even=even)
        shares = [[unit for i in part for unit in atoms[i]] for part in parts]
        most = max(len(_first_fit(share, shape)) for share in shares)
        if not best or most < fewest:
            best, fewest = shares, most
    return best


def _first_fit(units: Sequence[_Unit], shape: _Shape) -> list[_Micro]:
    """First-fit decreasing: the longest that is left goes where there first is room."""
    micros: list[_Micro] = []
    for unit in sorted(units, key=lambda unit: -unit.tokens):
        micro = next((m for m in micros if shape.fits(m, unit)), None)
        if micro is None:
            micros.append(_Micro([unit]))
        else:
            micro.add(unit)
    return micros


def _spread(micros: list[_Micro], count: int, shape: _Shape) -> list[_Micro]:
    """The same units in `count` micro-batches, costliest first; some empty if they are too few."""
    even = _evenly(micros, count, shape) if shape.form == "packed" else None
    spread = _split(micros, count, shape) if even is None else even
    return sorted(spread, key=lambda micro: -shape.cost_of(micro))


def _evenly(micros: list[_Micro], count: int, shape: _Shape) -> list[_Micro] | None:
    """Of about the same cost, or None if that does not come out within the budget."""
    over = [m for m in micros if len(m.units) == 1 and not shape.fits(_Micro(), m.units[0])]
    left = [unit for micro in micros if micro not in over for unit in micro.units]
    spread = [_Micro() for _ in range(count - len(over))]
    for unit in sorted(left, key=lambda unit: -unit.cost):
        fitting = (micro for micro in spread if shape.fits(micro, unit))
        micro = min(fitting, key=lambda micro: micro.cost, default=None)
        if micro is None:
            return None
        micro.add(unit)
    return over + spread


def _split(micros: list[_Micro], count: int, shape: _Shape) -> list[_Micro]:
    """Halve the costliest, neighbours in length staying together, until there are enough."""
    micros = list(micros)
    while len(micros) < count:
        several = [micro for micro in micros if len(micro.units) > 1]
        if not several:
            break
        most = max(several, key=shape.cost_of)
        micros.remove(most)
        half, at = most.cost / 2, 1
        while at < len(most.units) - 1 and sum(u.cost for u in most.units[: at + 1]) <= half:
            at += 1
        micros += [_Micro(most.units[:at]), _Micro(most.units[at:])]
    return micros + [_Micro() for _ in range(count - len(micros))]
