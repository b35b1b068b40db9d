"""Releases of rollfleet in one run: which workers cannot work for this trainer, and what is left over.

- Workers of this release check the trainer's schemas themselves (`rollfleet_worker.follow`); those of
  0.1.0 do not, and are told of here.
"""

import json
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from rollfleet_common import schemas
from rollfleet_common.errors import SettingsError
from rollfleet_common.keys import RunKeys
from rollfleet_common.schemas import Schemas, clash, spoken

__all__ = ["refuse_leftovers", "strangers"]

#: Workers that a warning names.
NAMED = 3


def strangers(cards: Mapping[Any, Any]) -> list[str]:
    """Which workers cannot work for this trainer, by their cards: a sentence for each reason."""
    found: dict[str, list[str]] = defaultdict(list)
    for name, text in sorted(cards.items()):
        if why := clash(spoken(), _speaks(text)):
            found[why].append(ascii(name.decode("utf-8", "replace"))[1:-1])
    return [
        f"{len(names)} worker{'s' * (len(names) > 1)} cannot work for this trainer "
        f"({', '.join(names[:NAMED])}{', ...' * (len(names) > NAMED)}): {why}"
        for why, names in found.items()
    ]


def _speaks(card: bytes) -> Schemas:
    """What a worker says that it speaks; one of 0.1.0 says nothing of it."""
    try:
        raw: Any = json.loads(card)
        release = str(raw.get("version", ""))[:40]
        return Schemas.of(raw.get("schemas"), ascii(release)[1:-1])
    except (ValueError, AttributeError, RecursionError):
        return spoken()  # status shows cards that cannot be read


async def refuse_leftovers(client: Any, keys: RunKeys, partitions: int) -> None:
    """Refuse a run that holds prompts of an earlier schema: nobody would run, or count, them.

    Raises:
        SettingsError: There are some.
    """
    left: dict[int, int] = defaultdict(int)
    for old in range(1, schemas.PROMPT):
        for partition in map(keys.partition, range(partitions)):
            for raw in await client.smembers(partition.routes):
                route = raw.decode("utf-8", "replace")
                left[old] += int(await client.xlen(partition.prompts(route, old)))
                left[old] += int(await client.zcard(partition.delayed(route, old)))
    if any(left.values()):
        what = ", ".join(f"{n:,} of schema {old}" for old, n in left.items() if n)
        raise SettingsError(
            f"run {keys.run!r} holds prompts that an earlier release submitted ({what}; this release "
            f"writes schema {schemas.PROMPT}): let trainer and workers of that release finish them, "
            "choose another run name, or open it with fresh=True, which deletes them"
        )
