"""What a row of the fault matrix is, and how one is played and judged."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from chaos import oracle
from chaos.harness import Stage

__all__ = ["Result", "Row", "back_s", "play"]

#: How long a fleet may take to come to its end after a fault.
CALM_S = 40.0

#: What a scene does; returns the seconds until the fleet was itself again, if that was measured.
Scene = Callable[[Stage], float | None]


@dataclass(frozen=True, slots=True)
class Row:
    """One fault."""

    name: str
    #: What is done, in words for the table.
    did: str
    scene: Scene
    #: Options of the stage.
    shape: Mapping[str, Any] = field(default_factory=dict)
    #: Promises that the fault suspends, and why: shown, not judged.
    waived: Mapping[str, str] = field(default_factory=dict)
    #: What a reader has to know about the result.
    note: str = ""


@dataclass(slots=True)
class Result:
    """How a row went."""

    row: Row
    #: "pass", "fail" or "not possible".
    result: str
    verdicts: list[oracle.Verdict] = field(default_factory=list)
    #: Seconds, and what was measured.
    recovery_s: float | None = None
    why: str = ""
    wall_s: float = 0.0

    @property
    def judged(self) -> list[str]:
        """Promises that were judged."""
        return [v.promise for v in self.verdicts if v.ok is not None]

    def as_json(self) -> dict[str, Any]:
        """For a report."""
        return {
            "name": self.row.name,
            "did": self.row.did,
            "result": self.result,
            "judged": self.judged,
            "recovery_s": self.recovery_s,
            "why": self.why,
            "wall_s": round(self.wall_s, 1),
            "verdicts": oracle.as_json(self.verdicts),
        }


def play(row: Row) -> Result:
    """Play one row on a stage of its own."""
    began = time.monotonic()
    result = Result(row, "fail", why=row.note)
    try:
        with Stage(**{"workers": 2, **row.shape}) as stage:
            stage.warm()
            result.recovery_s = row.scene(stage)
            result.verdicts = stage.settle(CALM_S)
    except (TimeoutError, AssertionError) as exc:
        result.why = f"{type(exc).__name__}: {exc}"
        return result
    for verdict in result.verdicts:
        if verdict.ok is False and verdict.promise in row.waived:
            verdict.ok = None
            verdict.said = f"waived ({row.waived[verdict.promise]}): {verdict.said}"
    broken = [v for v in result.verdicts if v.ok is False]
    result.result = "fail" if broken else "pass"
    if broken:
        result.why = "; ".join(f"{v.promise}: {(v.witnesses or [v.said])[0]}" for v in broken)
    if result.recovery_s is None:
        kills = [k.recovered_s for k in stage.seen.kills if k.leases and k.recovered_s is not None]
        result.recovery_s = max(kills, default=None)
    result.wall_s = time.monotonic() - began
    return result


def back_s(stage: Stage, since: float | None = None) -> float:
    """Seconds from `since` (Unix; now if None) until the trainer has had one batch more."""
    began = time.time() if since is None else since
    stage.warm(stage.o.spv, timeout_s=60.0)
    return time.time() - began
