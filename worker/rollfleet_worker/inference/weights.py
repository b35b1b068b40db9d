"""Which weights a vLLM server as a whole has now, by its own word.

- Read at most once a second, by however many requests ask at once.
- Not offering the route (it needs VLLM_SERVER_DEV_MODE=1) is an answer, and remembered until the
  server was down.
"""

import asyncio
import time

from rollfleet_worker.inference.answers import parse_version
from rollfleet_worker.inference.http import HttpClient

__all__ = ["NOT_OFFERED", "WeightInfo"]

#: Statuses by which a server says that it does not offer a route: 403 is what vLLM answers where
#: a flag such as --enable-scale-out is missing.
NOT_OFFERED = frozenset({403, 404, 405})
_PROBE_S = 5.0
_FRESH_S = 1.0


class WeightInfo:
    """What ``GET /weight_info`` of one server says."""

    def __init__(self, http: HttpClient) -> None:
        self._http = http
        self._lock = asyncio.Lock()
        self.forget()

    def forget(self) -> None:
        """Ask again, whether or not the route was offered before."""
        self._offered = True
        self._read_s = float("-inf")
        self._version: int | None = None

    async def read(self) -> tuple[bool, int | None]:
        """Whether the server tells, and its version; None if it never was refitted.

        Raises:
            EngineUnavailableError: The server is unreachable or failing.
            EngineProtocolError: The answer is no weight info, or no version of ours.
        """
        async with self._lock:
            if self._offered and time.monotonic() - self._read_s >= _FRESH_S:
                reply = await self._http.get("/weight_info", timeout_s=_PROBE_S)
                self._offered = reply.status not in NOT_OFFERED
                if self._offered:
                    said = reply.checked().json().get("weight_version")
                    self._version = parse_version(said, reply.where)
                self._read_s = time.monotonic()
            return self._offered, self._version
