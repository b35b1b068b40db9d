"""A policy that is checked: what it raises or answers wrongly becomes a PolicyError with its name.

- Nothing is trained on by guess: a policy that fails stops the trainer, with the group and the
  call named; it neither waves a group through nor drops it.
- A policy may change rollouts, and may not lose, add or reorder them: the batch's plan names them.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

from rollfleet.policy.orders import FreshestFirst, OldestFirst, Order, Windowed
from rollfleet.policy.policies import (
    BasePolicy,
    DropStale,
    Mask,
    Policy,
    SegmentWise,
    StandardPPO,
    Wait,
)
from rollfleet.records import Group
from rollfleet_common.errors import PolicyError, RollfleetError, SettingsError
from rollfleet_common.messages import NO_VERSION, Kind, Rollout, Sample

__all__ = ["REASON", "CheckedPolicy", "policy_named"]

#: What a reason looks like: it becomes a counter's name.
REASON = re.compile(r"[a-z][a-z0-9_-]{0,31}")

T = TypeVar("T")


class CheckedPolicy:
    """`policy`, checked; itself a policy.

    Raises:
        PolicyError: Here, if it lacks a method; later, if a method raises or answers nonsense.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.name = type(policy).__name__
        missing = [
            method
            for method in ("judge", "refine", "horizon", "order")
            if not callable(getattr(policy, method, None))
        ]
        if missing:
            raise PolicyError(
                f"policy {self.name} has no {' and no '.join(missing)}; derive it from "
                "rollfleet.policy.policies.BasePolicy, which has them all"
            )

    def judge(self, group: Group, current: int) -> str | None:
        """The policy's verdict; evaluations are not shown to it."""
        if group.kind is Kind.EVAL:
            return None
        what = f"judge(group {group.name!r}, {current})"
        reason = self._call(what, lambda: self.policy.judge(group, current))
        if reason is not None:
            self._check_reason(what, reason)
        return reason

    def refine(self, rollouts: Sequence[Rollout], current: int) -> Sequence[Rollout] | str:
        """The policy's rollouts, the same ones in the same order, or its reason to drop them."""
        name = rollouts[0].header.group if rollouts else ""
        what = f"refine({len(rollouts)} rollouts of group {name!r}, {current})"
        refined = self._call(what, lambda: self.policy.refine(rollouts, current))
        if isinstance(refined, str):
            self._check_reason(what, refined)
            return refined
        if refined is rollouts:
            return rollouts
        seen: Any = refined
        if not isinstance(seen, Sequence) or not all(isinstance(r, Rollout) for r in seen):
            raise self._nonsense(what, refined, "rollouts or a reason")
        same = [(r.header.group, r.header.index) for r in rollouts]
        if [(r.header.group, r.header.index) for r in refined] != same:
            raise self._nonsense(
                what,
                [r.header.index for r in refined],
                f"the same rollouts in the same order, {[index for _, index in same]}",
            )
        for before, after in zip(rollouts, refined, strict=True):
            if after is not before and (fault := _fault(after)):
                raise self._nonsense(what, f"#{after.header.index} with {fault}", "whole samples")
        return refined

    def horizon(self, current: int) -> int:
        """The policy's horizon: a whole number from -1 to `current`."""
        what = f"horizon({current})"
        least: Any = self._call(what, lambda: self.policy.horizon(current))
        if not _whole(least) or not NO_VERSION <= least <= max(current, 0):
            raise self._nonsense(what, least, f"a whole number from -1 to {max(current, 0)}")
        return int(least)

    def order(self, group: Group, current: int) -> tuple[float, ...]:
        """The policy's sort key: a tuple of numbers."""
        # Asked of every ready group whenever a batch is chosen: nothing is formatted unless it fails.
        try:
            key: Any = self.policy.order(group, current)
        except RollfleetError:
            raise
        except Exception as exc:
            raise self._raised(f"order(group {group.name!r}, {current})", exc) from exc
        if not isinstance(key, tuple) or not all(map(_comparable, key)):
            what = f"order(group {group.name!r}, {current})"
            raise self._nonsense(what, key, "a tuple of numbers, none of them NaN")
        return key

    def least(self, group: Group) -> int:
        """Members without which a group is torn: a policy that does not say wants it whole."""
        least = getattr(self.policy, "least", None)
        return group.need if least is None else self._call("least", lambda: int(least(group)))

    def must_wait(
        self,
        submitted: Iterable[int],
        current: int,
        *,
        left: Iterable[int] = (),
        per_version: int,
        spare: int = 0,
    ) -> bool:
        """What the policy says if it waits for samples (:meth:`rollfleet.policy.policies.Wait.must_wait`)."""
        ask = getattr(self.policy, "must_wait", None)
        if ask is None:
            return False
        what = f"must_wait(..., {current})"
        rest = {"left": left, "per_version": per_version, "spare": spare}
        wait: Any = self._call(what, lambda: ask(submitted, current, **rest))
        if not isinstance(wait, bool):
            raise self._nonsense(what, wait, "True or False")
        return wait

    @property
    def waits(self) -> bool:
        """Whether the policy ever asks for samples to be waited for."""
        return callable(getattr(self.policy, "must_wait", None))

    @property
    def by_version(self) -> bool:
        """Whether what `refine` answers may depend on the version.

        A policy that does not refine does not; of any other it is assumed, unless it says
        otherwise with ``refines_by_version = False``.
        """
        said = getattr(self.policy, "refines_by_version", None)
        if said is not None:
            return bool(said)
        refine = getattr(self.policy.refine, "__func__", None)
        return refine is not BasePolicy.refine

    def _call(self, what: str, call: Callable[[], T]) -> T:
        try:
            return call()
        except RollfleetError:
            raise
        except Exception as exc:
            raise self._raised(what, exc) from exc

    def _raised(self, what: str, exc: Exception) -> PolicyError:
        return PolicyError(f"policy {self.name}: {what} raised {type(exc).__name__}: {exc}")

    def _check_reason(self, what: str, reason: object) -> None:
        if not isinstance(reason, str) or not REASON.fullmatch(reason):
            raise self._nonsense(
                what, reason, "None, or a reason to drop: one lower-case word of 32 letters at most"
            )

    def _nonsense(self, what: str, answer: object, wanted: str) -> PolicyError:
        return PolicyError(f"policy {self.name}: {what} answered {answer!r:.200}, not {wanted}")


def policy_named(
    name: str, max_staleness: int, min_group_size: int | None = None, order: str = "oldest"
) -> "CheckedPolicy":
    """A policy, checked, by the names of settings and flags.

    Args:
        name: ``drop``, ``mask``, ``wait``, ``standard``, ``segment`` (tail rule) or
            ``segment-recomputed`` (head rule).
        max_staleness: Versions that a trained token may be behind.
        min_group_size: As in :class:`BasePolicy`.
        order: ``oldest``, ``freshest`` or ``windowed`` (by `max_staleness`).

    Raises:
        SettingsError: There is no such policy or order.
    """
    orders: dict[str, Callable[[], Order]] = {
        "oldest": OldestFirst,
        "freshest": FreshestFirst,
        "windowed": lambda: Windowed(max_staleness),
    }
    if order not in orders:
        raise SettingsError(f"order is {order!r}; it must be one of {', '.join(orders)}")
    rest = min_group_size, orders[order]()
    policies: dict[str, Callable[[], Policy]] = {
        "drop": lambda: DropStale(max_staleness, *rest),
        "mask": lambda: Mask(max_staleness, *rest),
        "wait": lambda: Wait(max_staleness, min_group_size),
        "standard": lambda: StandardPPO(*rest),
        "segment": lambda: SegmentWise(max_staleness, *rest),
        "segment-recomputed": lambda: SegmentWise(max_staleness, *rest, recomputed=True),
    }
    if name not in policies:
        raise SettingsError(f"policy is {name!r}; it must be one of {', '.join(policies)}")
    if name == "wait" and order != "oldest":
        raise SettingsError(
            f'policy "wait" with order {order!r} could wait for ever for what it does not take: '
            'use order "oldest"'
        )
    return CheckedPolicy(policies[name]())


def _whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _comparable(value: object) -> bool:
    return (
        type(value) is int
        or _whole(value)
        or (isinstance(value, float | np.floating) and not math.isnan(value))
    )


def _fault(rollout: Rollout) -> str:
    """What a policy broke in a rollout, or ""."""
    if not rollout.samples:
        return "no samples"
    for sample in rollout.samples:
        tokens = len(sample.token_ids)
        for name, array, dtype in (
            ("loss_mask", sample.loss_mask, np.bool_),
            ("logprobs", sample.logprobs, np.float32),
        ):
            found = np.asarray(array)
            if found.dtype != dtype or found.shape != (tokens,):
                return f"{name} {found.dtype}{list(found.shape)} for {tokens} tokens"
        if _untraced(sample):
            return "trained tokens that no policy made"
    return ""


def _untraced(sample: Sample) -> bool:
    versions = sample.versions.expand(len(sample.token_ids))
    return bool((sample.loss_mask & (versions == NO_VERSION)).any())
