"""Which weights a server as a whole has now, by its own word.

- Read at most once a second, by however many requests ask at once; again at once for whoever
  knows that the server was refitted since.
- Not offering the route (vLLM's needs VLLM_SERVER_DEV_MODE=1) is an answer, and remembered until
  the server was down.
"""

import asyncio
import time

from rollfleet_common.messages import NO_VERSION
from rollfleet_engines.answers import parse_version
from rollfleet_engines.http import HttpClient

__all__ = ["NOT_OFFERED", "WeightInfo"]

#: Statuses by which a server says that it does not offer a route: 403 is what vLLM answers where
#: a flag such as --enable-scale-out is missing.
NOT_OFFERED = frozenset({403, 404, 405})
_PROBE_S = 5.0
_FRESH_S = 1.0


class WeightInfo:
    """What one server says of its weights.

    Args:
        http: The server's client.
        path: The route whose answer holds ``weight_version``; "": this engine has none.
    """

    def __init__(self, http: HttpClient, path: str) -> None:
        self._http = http
        self._path = path
        self._lock = asyncio.Lock()
        self.forget()

    def forget(self) -> None:
        """Ask again, whether or not the route was offered before."""
        self._offered = bool(self._path)
        self._read_s = float("-inf")
        self._version: int | None = None

    async def read(self, at_least: int = NO_VERSION) -> tuple[bool, int | None]:
        """Whether the server tells, and its version; None if it never was refitted.

        Args:
            at_least: What was read earlier does for this caller only if it is no older than this.

        Raises:
            EngineUnavailableError: The server is unreachable or failing.
            EngineProtocolError: The answer is no weight info, or no version of ours.
        """
        async with self._lock:
            had = NO_VERSION if self._version is None else self._version
            fresh = time.monotonic() - self._read_s < _FRESH_S and had >= at_least
            if self._offered and not fresh:
                reply = await self._http.get(self._path, timeout_s=_PROBE_S)
                self._offered = reply.status not in NOT_OFFERED
                if self._offered:
                    said = reply.checked().json().get("weight_version")
                    self._version = parse_version(said, reply.where)
                self._read_s = time.monotonic()
            return self._offered, self._version
