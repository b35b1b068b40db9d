"""The inference servers of a run: which there are, and which weights each of them holds.

- Two hashes with one kind of writer each: operators say which servers there are (`servers`), the
  trainer says what it refitted them to (`weights`). Workers and status read both.
- Rows of the trainer are fenced by its token, like everything that steers.
- A row is written *before* a server is touched, with the time by which the refit must be over: who
  reads it later knows that a trainer died half-way, and need not wait for it.
- A trainer that moves weights itself writes no rows; then nothing is known here, and nothing is
  asked of any server.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

from yarl import URL

from rollfleet_common.errors import SettingsError, SupersededError
from rollfleet_common.keys import RunKeys
from rollfleet_common.messages import NO_VERSION
from rollfleet_common.scripts import run as scripts
from rollfleet_common.text import I31, json_int, parse_json

__all__ = [
    "RegisteredServer",
    "ServerWeights",
    "Servers",
    "WeightState",
    "server_name",
    "server_url",
]

_URL = re.compile(r"https?://(?:[^/\s?#@]*@)?[^/\s?#@]+(/[^\s?#]*)?", re.IGNORECASE)
_END = re.compile(r"(/|/v1)+$")
#: What a server may run.
ENGINES = ("auto", "vllm", "sglang", "openai")


def server_url(url: str) -> str:
    """`url` as all parts of a run write it, and as the client of a worker names its server.

    Scheme and host in lower case (an international one as ``xn--``), an IPv6 address at its shortest,
    no default port, nothing escaped that need not be, no dots in the path, no slash and no ``/v1`` at
    its end.

    Raises:
        SettingsError: It is no http(s) URL.
    """
    bare, before = url.strip(), ""
    try:
        # Again: without its dots and escapes, a path may end in /v1.
        while bare != before:
            before = bare
            bare = _END.sub("", str(URL(bare))) if _URL.fullmatch(bare) else ""
    except ValueError as exc:
        raise _no_url(url) from exc
    if not bare or not URL(bare).host:
        raise _no_url(url)
    return bare


def _no_url(url: str) -> SettingsError:
    return SettingsError(
        f"server {server_name(url)!r} should be a URL such as http://10.0.0.7:8000"
    )


def server_name(url: str) -> str:
    """`url` without user and password: what everybody may read."""
    return re.sub(r"^([a-zA-Z]+://)?[^/?#]*@", r"\1", url)


@dataclass(frozen=True, slots=True)
class RegisteredServer:
    """A server as an operator registered it."""

    url: str
    #: "auto", "vllm", "sglang" or "openai".
    engine: str = "auto"
    #: Takes nothing new; what runs there ends.
    draining: bool = False
    added_ms: int = 0
    #: A router: URLs of the servers behind it, which the trainer refits in its place.
    behind: tuple[str, ...] = ()


class WeightState(StrEnum):
    """What a trainer last did to a server's weights."""

    #: It serves `version`.
    SERVING = "serving"
    #: It is being refitted until `until_ms` at the latest; afterwards it counts as stale.
    REFITTING = "refitting"
    #: It did not take the last version: out until it is refitted.
    STALE = "stale"


@dataclass(frozen=True, slots=True)
class ServerWeights:
    """Which weights a server holds, as the trainer knows."""

    url: str
    state: WeightState
    #: Version that it was last known to serve; NO_VERSION before the first.
    version: int = NO_VERSION
    #: Epoch in which that was written: a later one may have gone back to older versions.
    epoch: int = 0
    #: Why it is stale; "" otherwise.
    why: str = ""
    #: Unix times in milliseconds, by Redis's clock: end of the refit, and when this was written.
    until_ms: int = 0
    at_ms: int = 0
    #: Name under which it serves them, a LoRA adapter; "": they are the server's model itself.
    model: str = ""


class Servers:
    """The registry of one run."""

    def __init__(self, client: Any, keys: RunKeys) -> None:
        self.client = client
        self.keys = keys

    # ---- operators ---------------------------------------------------------------------------

    async def add(self, server: RegisteredServer) -> bool:
        """Register `server`, or register it anew; returns whether it is a new one.

        Raises:
            SettingsError: Its URL is none, or holds a password.
        """
        for url in (server.url, *server.behind):
            if server_url(url) != server_name(url):
                raise SettingsError(
                    f"server {server_name(url)!r} cannot be registered as it is written: all who "
                    "may look at the run read it, so a key belongs into the workers' api_key; and "
                    "URLs are written in one way (server_url)"
                )
        if server.url in server.behind:
            raise SettingsError(f"server {server.url!r} cannot stand behind itself")
        return await self._change(server.url, lambda _: server) is None

    async def drain(self, url: str, *, draining: bool = True) -> bool:
        """Have `url` take nothing new (or again something); False if it is not registered."""

        def drained(old: RegisteredServer | None) -> RegisteredServer | None:
            return None if old is None else replace(old, draining=draining)

        return await self._change(url, drained) is not None

    async def remove(self, url: str) -> bool:
        """Forget `url`; False if it was not registered."""
        while raw := await self.client.hget(self.keys.servers, url):
            if await self._replace(url, raw, b""):
                return True
        return False

    async def _change(self, url: str, change: Any) -> RegisteredServer | None:
        """Replace the row of `url` by what `change` makes of it; returns what it was."""
        while True:
            raw = await self.client.hget(self.keys.servers, url)
            old = _rows({url.encode(): raw or b""}, _server).get(url)
            new = change(old)
            if new is None:
                return old
            row: dict[str, Any] = {"engine": new.engine, "draining": new.draining}
            row |= {"added_ms": new.added_ms}
            if new.behind:
                row["behind"] = list(new.behind)
            if await self._replace(url, raw or b"", json.dumps(row).encode()):
                return old
            # Another operator was faster: look again.

    async def _replace(self, url: str, seen: bytes, row: bytes) -> bool:
        """Write `row` if the one of `url` is still what was `seen`; an empty one is none."""
        return await scripts.register(self.client, self.keys, url=url, seen=seen, row=row)

    # ---- the trainer -------------------------------------------------------------------------

    async def tell(self, token: str, rows: Iterable[ServerWeights]) -> None:
        """Write what servers hold, and wake the followers.

        Raises:
            SupersededError: Another trainer has opened the run.
        """
        written: list[tuple[str, str]] = []
        for row in rows:
            fields = asdict(row)
            written.append((fields.pop("url"), json.dumps(fields)))
        await scripts.refit(self.client, self.keys, token=token, rows=written)

    async def forget(self, token: str, urls: Iterable[str]) -> None:
        """Drop what is known of `urls`, which this run refits no longer.

        Raises:
            SupersededError: Another trainer has opened the run.
        """
        forgotten = [(url, "") for url in urls]
        await scripts.refit(self.client, self.keys, token=token, rows=forgotten)

    async def check(self, token: str) -> None:
        """Return if no other trainer has the run: to be asked right before a server is touched.

        A run that Redis lost is nobody's.

        Raises:
            SupersededError: Another trainer has opened the run.
        """
        holder = await self.client.hget(self.keys.board, "token")
        if holder not in (None, token.encode()):
            raise SupersededError.of(self.keys.run)

    # ---- everyone ----------------------------------------------------------------------------

    async def read(self) -> tuple[dict[str, RegisteredServer], dict[str, ServerWeights]]:
        """The servers that are registered and what is known of weights, by URL."""
        pipe = self.client.pipeline(transaction=False)
        pipe.hgetall(self.keys.servers)
        pipe.hgetall(self.keys.weights)
        servers, weights = await pipe.execute()
        return _rows(servers, _server), _rows(weights, _weights)


def _rows(raw: Mapping[bytes, bytes], read: Any) -> dict[str, Any]:
    """Rows by URL; one that makes no sense must not hide the others."""
    rows: dict[str, Any] = {}
    for name, text in sorted(raw.items()):
        url = name.decode("utf-8", "replace")
        try:
            rows[url] = read(url, text)
        except (ValueError, TypeError, AttributeError, KeyError, OverflowError):
            continue
    return rows


def _server(url: str, text: bytes) -> RegisteredServer:
    raw = parse_json(text)
    if server_url(url) != url:
        raise ValueError(f"{url!r} is no URL as it is registered")
    engine = str(raw.get("engine", "auto"))
    if engine not in ENGINES:
        raise ValueError(f"{engine!r} is no engine")
    behind = raw.get("behind") or []
    if not isinstance(behind, list):
        why = f"behind is a {type(behind).__name__}, not a list of URLs"
        raise ValueError(why)  # noqa: TRY004 - what a row holds, not what a caller passed
    return RegisteredServer(
        url,
        engine,
        bool(raw.get("draining")),
        json_int(raw.get("added_ms", 0)),
        tuple(server_url(str(one)) for one in behind),
    )


def _weights(url: str, text: bytes) -> ServerWeights:
    raw = parse_json(text)
    return ServerWeights(
        url,
        WeightState(raw["state"]),
        json_int(raw.get("version", NO_VERSION), NO_VERSION, I31),
        json_int(raw.get("epoch", 0), -I31, I31),
        str(raw.get("why", "")),
        json_int(raw.get("until_ms", 0)),
        json_int(raw.get("at_ms", 0)),
        str(raw.get("model", "")),
    )
