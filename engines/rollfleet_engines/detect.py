"""Which engine a server is, found out by asking it, and one factory for the clients of all.

- What a server says of itself decides: the owner of its models, else a route that only one engine
  has. A server that says nothing of the kind, and lists models, is taken for OpenAI's routes.
- Found out at the first use, and again after anything went wrong: the server that comes back at
  an address may be another one.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Unpack, get_args

from rollfleet_common.errors import (
    EngineProtocolError,
    EngineUnavailableError,
    InfraError,
    OverloadedError,
    SettingsError,
)
from rollfleet_common.messages import NO_VERSION
from rollfleet_engines.client import ClientOptions, ServerClient
from rollfleet_engines.http import HttpClient, Reply
from rollfleet_engines.interface import (
    Generation,
    Request,
    Sampling,
    ServerEngine,
    TextAnswer,
)
from rollfleet_engines.openai import OpenAIEngine
from rollfleet_engines.sglang import SglangEngine
from rollfleet_engines.vllm import VllmEngine

__all__ = ["AutoEngine", "EngineKind", "KnownKind", "detect", "make_engine"]

KnownKind = Literal["vllm", "sglang", "openai"]
EngineKind = Literal["auto", "vllm", "sglang", "openai"]

_CLIENTS: Mapping[KnownKind, type[ServerClient]] = {
    "vllm": VllmEngine,
    "sglang": SglangEngine,
    "openai": OpenAIEngine,
}
_PROBE_S = 5.0
_NO_ROUTE = frozenset({404, 405})
#: Routes that only one engine has, and what its answer holds.
_MARKS: tuple[tuple[KnownKind, str, str], ...] = (
    ("sglang", "/model_info", "model_path"),
    ("sglang", "/get_model_info", "model_path"),
    ("vllm", "/version", "version"),
)


def make_engine(
    url: str, *, engine: EngineKind = "auto", **options: Unpack[ClientOptions]
) -> ServerEngine:
    """A client of the server at `url`.

    Args:
        url: ``http://host:port``; a trailing ``/v1`` is ignored.
        engine: Which engine it is; ``auto`` asks the server.
        options: As :class:`~rollfleet_engines.client.ServerClient` takes them: `model`,
            `api_key`, `timeout_s`, `connect_timeout_s`, `max_connections`, `base_version`,
            `logprobs`.

    Raises:
        SettingsError: A setting makes no sense.
    """
    if engine == "auto":
        return AutoEngine(url, **options)
    if engine not in _CLIENTS:
        raise SettingsError(f"engine {engine!r} is none of {', '.join(get_args(EngineKind))}")
    return _CLIENTS[engine](url, **options)


async def detect(http: HttpClient) -> KnownKind:
    """Which engine the server is.

    Raises:
        EngineUnavailableError: It is unreachable, failing, wants another key, or has none of the
            routes of an inference server.
        EngineProtocolError: What it says cannot be read.
    """
    models = await http.get("/v1/models", timeout_s=_PROBE_S)
    lists_models = models.status not in _NO_ROUTE
    if lists_models:
        listed = models.checked().json().get("data")
        cards = listed if isinstance(listed, list) else []
        owners = {str(card.get("owned_by")) for card in cards if isinstance(card, dict)}
        if "vllm" in owners:
            return "vllm"
        if "sglang" in owners:
            return "sglang"
    for kind, path, mark in _MARKS:
        reply = await http.get(path, timeout_s=_PROBE_S)
        if _holds(reply, mark):
            return kind
    if lists_models:
        return "openai"
    raise EngineUnavailableError(
        f"{http.name} has none of the routes of an inference server (/v1/models, "
        f"{', '.join(path for _, path, _ in _MARKS)}): check this server's url, or say which "
        f"engine it is"
    )


def _holds(reply: Reply, mark: str) -> bool:
    """Whether `reply` is a JSON object with this key; a proxy may answer any path with a page."""
    try:
        return reply.status == 200 and mark in reply.json()
    except EngineProtocolError:
        return False


class AutoEngine:
    """The client of a server that says itself which engine it is.

    Args:
        url: ``http://host:port``; a trailing ``/v1`` is ignored.
        options: As :class:`~rollfleet_engines.client.ServerClient` takes them.

    Raises:
        SettingsError: A setting makes no sense.
    """

    def __init__(self, url: str, **options: Unpack[ClientOptions]) -> None:
        self._url = url
        self._options = options
        #: Why it was not ready when it was last asked; "" if it was.
        self.not_ready = ""
        self._http = HttpClient(
            url.rstrip("/").removesuffix("/v1"),
            api_key=options.get("api_key"),
            connect_timeout_s=options.get("connect_timeout_s", 10.0),
            max_connections=1,
        )
        self._client: ServerClient | None = None
        self._kind: KnownKind | None = None
        #: Whether nothing has gone wrong since the server said what it is.
        self._sure = False
        self._closed = False
        self._asking = asyncio.Lock()

    @property
    def name(self) -> str:
        """The server's URL, without credentials."""
        return self._http.name

    @property
    def kind(self) -> EngineKind:
        """Which engine it was when it last said so; "auto" if it never did."""
        return self._kind or "auto"

    @property
    def merges(self) -> bool:
        """Whether several completions travel as one request; not before the server is known."""
        return self._client is not None and self._client.merges

    @property
    def version(self) -> int:
        """Version of the newest token that the server made; NO_VERSION if it made none."""
        return NO_VERSION if self._client is None else self._client.version

    async def generate(self, request: Request, n: int = 1) -> Sequence[Generation]:
        """Make `n` independent completions; raises as the engine's own client and `detect` do."""
        client = await self._found()
        try:
            return await client.generate(request, n)
        except InfraError as exc:
            self._doubt(exc)
            raise

    async def chat(self, messages: Sequence[Mapping[str, Any]], sampling: Sampling) -> TextAnswer:
        """What the server's model says next; raises as the engine's own client and `detect` do."""
        client = await self._found()
        try:
            return await client.chat(messages, sampling)
        except InfraError as exc:
            self._doubt(exc)
            raise

    async def ready(self) -> bool:
        """Whether the server answers, is healthy and knows our model and our key."""
        try:
            client = await self._found()
        except InfraError as exc:
            self.not_ready = str(exc)
            return False
        ready = await client.ready()
        self.not_ready = client.not_ready
        return ready

    async def close(self) -> None:
        """Release connections. Idempotent."""
        self._closed = True
        await self._http.close()
        if self._client is not None:
            await self._client.close()

    def _doubt(self, error: InfraError) -> None:
        # A server that is busy is still the one that it was.
        if not isinstance(error, OverloadedError):
            self._sure = False

    async def _found(self) -> ServerClient:
        """The client for what the server is now."""
        if self._sure and self._client is not None:
            return self._client
        async with self._asking:
            if self._sure and self._client is not None:
                return self._client
            kind = await detect(self._http)
            if self._closed:
                raise EngineUnavailableError(f"the client of {self.name} is closed")
            client = before = self._client
            if client is None or kind != self._kind:
                client = self._client = _CLIENTS[kind](self._url, **self._options)
                self._kind = kind
            self._sure = True
        if before is not None and before is not client:
            await before.close()
        return client
