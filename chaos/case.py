"""What the judge is given: the logs, a last look at Redis, and what was seen from outside.

- The truth of what was trained is the trainer's last checkpoint line and those before it; what a
  superseded trainer wrote after its time does not count.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chaos.observe import Evidence
from chaos.snapshot import Member, Snapshot

__all__ = ["Case"]


@dataclass(slots=True)
class Case:
    """What the judge is given."""

    log: list[dict[str, Any]]
    #: Groups that the trainer said it dropped, and why.
    dropped: dict[str, str]
    snapshot: Snapshot
    evidence: Evidence
    lease_s: float
    max_staleness: int
    #: Samples that may be outstanding.
    limit: int
    #: Whether the run was brought to its end: fed out, trained, drained.
    ended: bool

    @classmethod
    def read(cls, directory: Path, snapshot: Snapshot, evidence: Evidence, **known: Any) -> "Case":
        """With the logs of `directory`."""
        log = list(_lines(directory / "trainer.jsonl"))
        dropped = {
            line["group"]: line["reason"]
            for line in _lines(directory / "trainer.out")
            if line.get("event") == "group dropped"
        }
        ended = any(line["ev"] == "ended" for line in log)
        return cls(log, dropped, snapshot, evidence, ended=ended, **known)

    def acked(self) -> dict[Member, float]:
        """Every sample whose submission was acknowledged, and when (Unix seconds)."""
        found: dict[Member, float] = {}
        upto = -1
        for line in self.log:
            if line["ev"] == "acked":
                for position in range(upto + 1, line["upto"] + 1):
                    found.update({(f"p{position}", i): line["t"] for i in range(line["n"])})
                upto = max(upto, line["upto"])
        return found

    def handed(self) -> Iterable[tuple[dict[str, Any], int]]:
        """Every batch that was handed over, with the trainer's version at that moment."""
        version = -1
        for line in self.log:
            if line["ev"] in ("opened", "published"):
                version = line["version"]  # also a zombie's, whose batches are then refused
            elif line["ev"] == "handed":
                yield line, version

    def trained(self) -> list[tuple[int, dict[str, Any]]]:
        """(batch, sample) of all that the checkpoints hold: what cannot be taken back."""
        rows: dict[int, list[dict[str, Any]]] = {}
        kept: list[tuple[int, dict[str, Any]]] = []
        life = 0  # what a superseded trainer writes after its time does not count
        for line in self.log:
            if line["ev"] == "opened":
                life = line["life"]
            elif line["ev"] == "handed" and line["life"] == life:
                rows[line["batch"]] = line["samples"]
            elif line["ev"] == "checkpoint" and line["life"] == life:
                kept += [(b, sample) for b in line["batches"] for sample in rows[b]]
        return kept

    def owed_again(self) -> int:
        """The most samples that one death of the trainer took back: handed over, never saved."""
        most = unsaved = 0
        for line in self.log:
            if line["ev"] == "handed":
                unsaved += len(line["samples"])
            elif line["ev"] == "checkpoint":
                unsaved = 0
            elif line["ev"] == "opening":
                most, unsaved = max(most, unsaved), 0
        return most

    def excused(self, t: float) -> bool:
        """Whether what was acknowledged at `t` may have been lost by Redis's own contract."""
        return any(began <= t <= ended for began, ended in self.evidence.excused)

    def away_s(self, began: float, ended: float) -> float:
        """How long Redis was away between two moments."""
        spans = ((max(o.began, began), min(o.ended, ended)) for o in self.evidence.outages)
        return sum(max(e - b, 0.0) for b, e in spans)


def _lines(path: Path) -> Iterable[dict[str, Any]]:
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue  # torn by a kill
