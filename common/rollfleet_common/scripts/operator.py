"""Scripts of an operator: repairs that no role of a run has the rights for."""

from typing import Any

from rollfleet_common.keys import LAST_ID
from rollfleet_common.scripts.script import load

__all__ = ["rebuild_stream"]

_REBUILD = load("rebuild_stream")


async def rebuild_stream(client: Any, *, stream: str) -> int | None:
    """Build a stream anew that takes no more entries, because one was given the highest id there is.

    Returns:
        How many entries were kept; None if the stream needs no mending.
    """
    kept = int(await _REBUILD(client, [stream, f"{stream}:mending"], [LAST_ID]))
    return None if kept < 0 else kept
