"""Versions go out here: servers are refitted first, then the board says so.

- A server is refitted between pause and resume, so that no token is tagged with a version that did
  not make it; requests in flight are kept and go on under the new weights.
- A server that did not take the weights is named in a RefitError; the board is not advanced.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

import aiohttp

from rollfleet_common.errors import RefitError

__all__ = ["refit"]

#: Reading a checkpoint may take minutes.
RELOAD_S = 600.0
CONTROL_S = 30.0


async def refit(servers: Sequence[str], version: int, weights: str) -> None:
    """Make every server load `weights` (a path that it can read) and call it `version`.

    Speaks vLLM's control routes: pause, collective_rpc reload_weights, update_weight_version,
    resume, and weight_info to verify.

    Raises:
        RefitError: One or more servers did not take the weights; the others did.
    """
    timeout = aiohttp.ClientTimeout(total=RELOAD_S, sock_connect=CONTROL_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        results = await asyncio.gather(
            *(_refit(session, server.rstrip("/"), version, weights) for server in servers),
            return_exceptions=True,
        )
    failed = [
        f"{server}: {type(result).__name__}: {result}"
        for server, result in zip(servers, results, strict=True)
        if isinstance(result, BaseException)
    ]
    if failed:
        raise RefitError(
            f"version {version} from {weights}: {len(failed)} of {len(servers)} inference servers "
            f"did not take it: {'; '.join(failed)}"
        )


async def _refit(session: aiohttp.ClientSession, url: str, version: int, weights: str) -> None:
    await _post(session, f"{url}/pause?mode=keep")
    try:
        body = {"method": "reload_weights", "kwargs": {"weights_path": weights}}
        await _post(session, f"{url}/collective_rpc", body)
        await _post(session, f"{url}/update_weight_version", {"new_version": str(version)})
    finally:
        # Even if the reload failed: a server left paused would stop the whole fleet in silence.
        await _post(session, f"{url}/resume")
    async with session.get(f"{url}/weight_info") as reply:
        said = await reply.json() if reply.ok else {}
    if isinstance(said, dict) and str(said.get("weight_version", version)) != str(version):
        raise RefitError(
            f"it reports version {said['weight_version']!r} after it was given {version}"
        )


async def _post(session: aiohttp.ClientSession, url: str, body: Any = None) -> None:
    async with session.post(url, json=body) as reply:
        if not reply.ok:
            text = (await reply.text())[:300]
            raise RefitError(f"{url.rpartition('/')[2]} answered {reply.status}: {text}")
