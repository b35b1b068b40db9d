"""Schema versions of what travels: what this release speaks, and whether two releases agree.

- The trainer writes its ranges on the board when it opens a run, every worker on its card. A worker
  that cannot read the prompts, or whose rollouts the trainer cannot read, claims nothing.
- Release 0.1.0 knows no ranges and speaks version 1 of everything; so does a board, or a card, that
  does not say. It would bury prompts that it cannot read, so prompts of a later schema live under
  keys that it does not look at (:meth:`PartitionKeys.prompts`).

Imports nothing of ours.
"""

import json
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

__all__ = ["HEADER", "KINDS", "PAYLOAD", "PROMPT", "RELEASE", "Schemas", "clash", "spoken"]

#: Versions that this release writes, and the only ones that it reads. Raise one with any change of
#: fields, order or meaning; raising PROMPT moves the prompts to keys of their own.
PROMPT = 1
HEADER = 1
PAYLOAD = 1

#: This release.
RELEASE = version("rollfleet")
#: The kinds of messages that have a schema.
KINDS = ("prompt", "header", "payload")


@dataclass(frozen=True, slots=True)
class Schemas:
    """What one side of a run speaks: oldest and newest schema of each kind of message."""

    #: Of prompts: what a trainer writes and a worker reads.
    prompt: tuple[int, int] = (1, 1)
    #: Of headers and payloads: what a worker writes and a trainer reads.
    header: tuple[int, int] = (1, 1)
    payload: tuple[int, int] = (1, 1)
    #: Release that speaks so; "" if it does not say.
    release: str = ""

    def __str__(self) -> str:
        """One number if all kinds have it, else those of prompts, headers and payloads."""
        each = [_text(getattr(self, kind)) for kind in KINDS]
        return each[0] if len(set(each)) == 1 else "/".join(each)

    def as_dict(self) -> dict[str, Any]:
        """As it stands in JSON."""
        return {kind: list(getattr(self, kind)) for kind in KINDS} | {"release": self.release}

    def dumps(self) -> str:
        """As it stands on the board."""
        return json.dumps(self.as_dict())

    @classmethod
    def of(cls, raw: Any, release: str = "") -> "Schemas":
        """The inverse of :meth:`as_dict`; a kind that is not said, or makes no sense, is (1, 1)."""
        table = raw if isinstance(raw, dict) else {}
        said = table.get("release")
        return cls(
            **{kind: _range(table.get(kind)) for kind in KINDS},
            release=said if isinstance(said, str) and said else release,
        )

    @classmethod
    def loads(cls, text: str | bytes | None) -> "Schemas":
        """The inverse of :meth:`dumps`; text that is missing or makes no sense is release 0.1.0's."""
        try:
            return cls.of(json.loads(text or b"{}"))
        except (ValueError, RecursionError):
            return cls()


def _range(raw: Any) -> tuple[int, int]:
    if not isinstance(raw, list) or len(raw) != 2 or any(type(n) is not int for n in raw):
        return (1, 1)
    return (raw[0], raw[1])


def spoken() -> Schemas:
    """What this release speaks."""
    return Schemas((PROMPT, PROMPT), (HEADER, HEADER), (PAYLOAD, PAYLOAD), RELEASE)


def clash(trainer: Schemas, worker: Schemas) -> str:
    """What trainer and worker do not both speak, and which side to upgrade, in words; "" if nothing.

    Args:
        trainer: What the board says.
        worker: What the worker's release, or its card, says.
    """
    wrong: list[str] = []
    older: set[str] = set()
    for kind in KINDS:
        theirs, ours = getattr(trainer, kind), getattr(worker, kind)
        if max(theirs[0], ours[0]) <= min(theirs[1], ours[1]):
            continue
        wrong.append(f"the trainer has {kind} schema {_text(theirs)}, the worker {_text(ours)}")
        older.add("worker" if ours[1] < theirs[0] else "trainer")
    if not wrong:
        return ""
    names = {"trainer": trainer.release, "worker": worker.release}
    newest = {side: f" (release {name})" if name else "" for side, name in names.items()}
    if len(older) == 1:
        (side,) = older
        other = "trainer" if side == "worker" else "worker"
        what = f"upgrade the {side}{newest[side]} to the release of the {other}{newest[other]}"
    else:
        what = (
            f"run one release on both sides: trainer{newest['trainer']}, worker{newest['worker']}"
        )
    return f"{'; '.join(wrong)}: {what}"


def _text(versions: tuple[int, int]) -> str:
    low, high = versions
    return str(low) if low == high else f"{low} to {high}"
