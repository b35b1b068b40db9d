"""How the ranks of one trainer hear each other: every rank says a few bytes, and gets everyone's.

- One operation, all_gather, in which every rank takes part in every round; nothing else is asked of
  a collective, so that any messaging that a trainer has can be one.
- Every wait is bounded: a rank that died or froze becomes a CollectiveError on the others.
- A collective carries verdicts and names. Headers and payloads go from Redis to whom they are for.
"""

import os
from typing import Literal, Protocol

from rollfleet_common.errors import SettingsError

__all__ = ["Collective", "Solo", "collective_named"]

Name = Literal["auto", "torch", "redis", "solo"]


class Collective(Protocol):
    """What the ranks of a trainer speak through. Not thread-safe: one thread a rank uses it."""

    @property
    def rank(self) -> int:
        """Which of the ranks this one is, 0 .. size-1."""
        ...

    @property
    def size(self) -> int:
        """How many ranks there are."""
        ...

    def all_gather(self, part: bytes, timeout_s: float) -> list[bytes]:
        """What every rank said in this round, by rank.

        Args:
            part: What this one says.
            timeout_s: Longest wait for the others.

        Raises:
            CollectiveError: Not all of them were heard; the collective is of no more use.
        """
        ...

    def close(self, why: str = "") -> None:
        """Leave. Whoever waits for this rank is told `why`, if the collective can. Idempotent."""
        ...


class Solo:
    """The collective of a trainer of one rank."""

    rank = 0
    size = 1

    def all_gather(self, part: bytes, timeout_s: float) -> list[bytes]:
        """Our own part."""
        return [part]

    def close(self, why: str = "") -> None:
        """Nobody is told."""


def collective_named(name: Name, redis_url: str, run: str, timeout_s: float) -> Collective:
    """A collective by its name.

    Args:
        name: ``torch`` (torch.distributed, which is set up from the variables of torchrun if it is
            not yet), ``redis``, ``solo``; ``auto``: torch if it is set up or there are several
            ranks by ``WORLD_SIZE``, else solo.
        redis_url: Of the run, for ``redis``.
        run: Its name, for ``redis``.
        timeout_s: Longest wait of any round.

    Raises:
        SettingsError: There is no such collective, or ``RANK`` and ``WORLD_SIZE`` are not set.
    """
    if name == "auto":
        name = "torch" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "solo"
    if name == "solo":
        return Solo()
    if name == "torch":
        from rollfleet.ranks.torch_collective import TorchCollective  # noqa: PLC0415 - optional

        return TorchCollective(timeout_s=timeout_s)
    if name == "redis":
        from rollfleet.ranks.redis_collective import RedisCollective  # noqa: PLC0415 - optional

        try:
            rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        except (KeyError, ValueError) as exc:
            raise SettingsError(
                "collective 'redis' asks the variables RANK and WORLD_SIZE which rank this is, and "
                f"{exc}: set both, or pass a RedisCollective(url, run, rank=..., size=...)"
            ) from exc
        return RedisCollective(redis_url, run, rank=rank, size=size)
    raise SettingsError(f"collective is {name!r}; it must be auto, torch, redis or solo")
