"""What a server tells besides generations: its load, and whether it was left paused.

- Connections of its own, so that a full set of requests in flight does not keep a look from getting in.
- Of ``/metrics`` only the lines that are needed are parsed: a vLLM shows thousands, mostly buckets.
- A server without the route says nothing, and is not asked again until it was away.

vLLM counts tokens as they are made. SGLang's `generation_tokens_total` counts a request when it has
ended, so its scheduler's own figures (`realtime_tokens_total`, tokens in use) tell progress there. Names
are those of vLLM 0.32 and of SGLang 0.5.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from rollfleet_common.errors import EngineUnavailableError, EpisodeError
from rollfleet_engines.http import HttpClient

__all__ = ["Load", "Monitor", "read_load"]

#: SGLang has written both ``sglang:`` and ``sglang_``.
_LINE = re.compile(rb"^(?:vllm|sglang)[:_](\w+?)(?:\{[^\n]*\})? [^\n]*$", re.MULTILINE)
_KV = frozenset({"kv_cache_usage_perc", "gpu_cache_usage_perc", "token_usage"})
_RUNNING = frozenset({"num_requests_running", "num_running_reqs"})
_WAITING = frozenset({"num_requests_waiting", "num_queue_reqs"})
_PREEMPTED = frozenset({"num_preemptions_total", "num_retracted_requests_total"})
_MOVES = frozenset(
    {
        "generation_tokens_total",
        "prompt_tokens_total",
        "realtime_tokens_total",
        "num_used_tokens",
        "decode_sum_seq_lens",
    }
)
_WANTED = _KV | _RUNNING | _WAITING | _PREEMPTED | _MOVES
_ABSENT = frozenset({403, 404, 405, 501})
_LOOK_S = 5.0
_MAX_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Load:
    """What a server says of itself at one moment."""

    #: Part of the KV cache that is in use, of the fullest engine; 0.0 if it does not say.
    kv_usage: float = 0.0
    #: Requests that run, and that wait to run.
    running: float = 0.0
    waiting: float = 0.0
    #: Preemptions since the server began.
    preemptions: float = 0.0
    #: Whatever moves while the server works; equal at two moments: it did nothing between.
    progress: tuple[float, ...] = ()


def read_load(text: bytes) -> Load | None:
    """The load in a ``/metrics`` page; None if the page tells of no engine that we know."""
    lines = [m[0] for m in _LINE.finditer(text) if m[1].decode() in _WANTED]
    found: dict[str, list[float]] = {}
    try:
        families = text_string_to_metric_families(b"\n".join([*lines, b""]).decode())
        for family in families:
            for sample in family.samples:
                name = re.split("[:_]", sample.name, maxsplit=1)[1]
                found.setdefault(name, []).append(float(sample.value))
    except (ValueError, IndexError, UnicodeDecodeError):
        return None
    if not found.keys() & _MOVES:
        return None
    return Load(
        # Of several engines behind one port the fullest is the one that preempts.
        kv_usage=max((v for name in _KV for v in found.get(name, ())), default=0.0),
        running=_sum(found, _RUNNING),
        waiting=_sum(found, _WAITING),
        preemptions=_sum(found, _PREEMPTED),
        progress=tuple(sum(found.get(name, ())) for name in sorted(_MOVES | _KV | _PREEMPTED)),
    )


def _sum(found: Mapping[str, list[float]], names: frozenset[str]) -> float:
    return sum(v for name in names for v in found.get(name, ()))


class Monitor:
    """The side door of one server.

    Args:
        url: As the engine's.
        api_key: As the engine's.

    Raises:
        SettingsError: They cannot be used.
    """

    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        self._http = HttpClient(
            url,
            api_key=api_key,
            timeout_s=_LOOK_S,
            max_connections=2,
            max_response_bytes=_MAX_BYTES,
        )
        self._offered = True

    def forget(self) -> None:
        """The server may come back as another one: ask again what it offers."""
        self._offered = True

    @property
    def offered(self) -> bool:
        """Whether the server tells its load, as far as it was asked."""
        return self._offered

    async def load(self) -> Load | None:
        """Its load; None if it has no such page, or one of another kind.

        Raises:
            EngineUnavailableError: It does not answer, or fails.
        """
        if not self._offered:
            return None
        reply = await self._http.get("/metrics")
        if reply.status in _ABSENT or 300 <= reply.status < 400:
            self._offered = False
            return None
        try:
            found = read_load(reply.checked().body)
        except EpisodeError as exc:
            raise EngineUnavailableError(str(exc)) from exc
        self._offered = found is not None
        return found

    async def paused(self) -> bool:
        """Whether it says that it is paused; False if it does not tell.

        Raises:
            EpisodeError: It does not answer, or with something else.
        """
        reply = await self._http.get("/is_paused")
        return reply.status not in _ABSENT and bool(reply.checked().json().get("is_paused"))

    async def unpause(self) -> bool:
        """Have it go on if it is paused; returns whether it was, as far as it tells.

        What stands there is cut off first: whoever paused it may have loaded other weights and died
        before they were tagged, and tokens made from here on would bear the old version.

        Raises:
            EpisodeError: It does not answer, or did not take it.
        """
        reply = await self._http.get("/is_paused")
        if reply.status not in _ABSENT:
            if not reply.checked().json().get("is_paused"):
                return False
            await self._command("/abort_requests", {})
            (await self._http.post("/resume", {})).checked()
            return True
        # SGLang does not say whether it is paused; to go on does no harm to one that runs.
        await self._command("/abort_request", {"abort_all": True})
        await self._command("/continue_generation", {})
        return False

    async def _command(self, path: str, body: Mapping[str, Any]) -> None:
        """Post, to a server that may not offer it."""
        reply = await self._http.post(path, body)
        if reply.status not in _ABSENT:
            reply.checked()

    async def close(self) -> None:
        """Release connections. Idempotent."""
        await self._http.close()
