"""One keep-alive HTTP session to one inference server, whose every failure has a name of ours.

- Connections are kept and capped; no request opens one of its own.
- A reply is read whole, up to a cap, before anybody looks at it; redirects are never followed.
- Whose fault a status is decides which retry budget burns: 400, 413 and 422 are the prompt's
  (`EngineRefusedError`); 401, 403 and 404 are the set-up of that server, and 429 and 5xx its
  state (`EngineUnavailableError`: try another); what cannot be read is an `EngineProtocolError`.
- Messages quote the server shortly, and never hold the API key or a password from the URL.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp
import orjson
from yarl import URL

from rollfleet_common.errors import (
    EngineProtocolError,
    EngineRefusedError,
    EngineUnavailableError,
    OverloadedError,
    SettingsError,
)
from rollfleet_common.redact import Redactor
from rollfleet_common.servers import server_name

__all__ = ["HttpClient", "OverloadedError", "Reply"]

_MIB = 1 << 20
_QUOTED_CHARS = 200
_REFUSED = frozenset({400, 413, 422})
_PASSING = frozenset({408, 409, 421, 425, 429})
_ADVICE = {
    401: "the server wants another API key: check this server's api_key",
    403: "the server forbids this: check this server's api_key and what its routes allow",
    404: "no such route or model: check this server's url and model name",
}


#: orjson writes null for NaN; a request that holds one must not leave.
_encoder = json.JSONEncoder(allow_nan=False, separators=(",", ":"))


@dataclass(frozen=True, slots=True)
class Reply:
    """What a server answered, whatever its status."""

    status: int
    body: bytes
    #: Media type without parameters, in lower case; "" if the server named none.
    content_type: str
    #: Seconds from the Retry-After header; 0.0 if there is none.
    retry_after_s: float
    #: Where a redirect wanted us; "" if this is none.
    location: str
    #: Method, server and path, for messages.
    where: str
    #: What of the body may be quoted, shortened and without secrets.
    quoted: str

    def checked(self) -> "Reply":
        """This reply if its status is 2xx.

        Raises:
            EngineUnavailableError: 5xx, 429, 401, 403, 404: another server may do.
            EngineRefusedError: 400, 413, 422: the request itself is at fault.
            EngineProtocolError: A redirect or a status that makes no sense here.
        """
        if 200 <= self.status < 300:
            return self
        said = f"{self.where} answered {self.status}: {self.quoted}"
        if self.status == 429 or (self.status >= 500 and self.retry_after_s):
            raise OverloadedError(said, self.retry_after_s)
        if self.status >= 500 or self.status in _PASSING:
            raise EngineUnavailableError(said)
        if self.status in _REFUSED:
            raise EngineRefusedError(said)
        if self.status in _ADVICE:
            raise EngineUnavailableError(f"{said} ({_ADVICE[self.status]})")
        if 300 <= self.status < 400:
            raise EngineProtocolError(
                f"{said} (a redirect to {self.location!r}, which is not followed: "
                f"set this server's url to where it really is)"
            )
        raise EngineProtocolError(said)

    def parsed(self) -> Any:
        """The JSON value in the body.

        Raises:
            EngineProtocolError: The body is no JSON: HTML, cut short, ...
        """
        try:
            return orjson.loads(self.body)
        except (ValueError, RecursionError) as exc:
            raise EngineProtocolError(
                f"{self.where} answered {self.status} with {self.content_type or 'no type'} that is "
                f"no JSON ({type(exc).__name__}, {len(self.body)} bytes): {self.quoted}"
            ) from exc

    def object_or_none(self) -> dict[str, Any] | None:
        """The JSON object in the body; None if it is none: a proxy may answer any path with a page."""
        try:
            return self.json()
        except EngineProtocolError:
            return None

    def json(self) -> dict[str, Any]:
        """The JSON object in the body.

        Raises:
            EngineProtocolError: The body is no JSON object: HTML, cut short, a list, ...
        """
        value = self.parsed()
        if not isinstance(value, dict):
            raise EngineProtocolError(
                f"{self.where}: expected a JSON object, got {type(value).__name__}: {self.quoted}"
            )
        return value


class HttpClient:
    """A session to one server, opened at the first request and bound to that event loop.

    Args:
        url: ``http://host:port``, with a path prefix if a proxy wants one.
        api_key: Sent as a bearer token; None: nothing is sent.
        timeout_s: For a whole exchange, waiting for a free connection included.
        connect_timeout_s: For opening one connection.
        max_connections: Further requests wait for a free connection.
        max_response_bytes: A longer body, after decompression, is an error.

    Raises:
        SettingsError: `url` is no http(s) URL, or `api_key` cannot be a header.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 1800.0,
        connect_timeout_s: float = 10.0,
        max_connections: int = 1024,
        max_response_bytes: int = 256 * _MIB,
    ) -> None:
        shown = server_name(str(url))
        try:
            parsed = URL(url)
        except (TypeError, ValueError) as exc:
            # What was wrong with it may quote it, password and all.
            why = type(exc).__name__
            raise SettingsError(f"server url {shown!r} cannot be read ({why})") from None
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise SettingsError(f"server url {shown!r} must look like http://host:port")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise SettingsError(
                f"api_key of server {parsed.host} cannot be an HTTP header: only printable ASCII can"
            )
        if api_key is not None and parsed.user is not None:
            raise SettingsError(f"server {parsed.host} has both an api_key and a user in its url")
        self._base = parsed
        #: The server's URL without user and password: its name in messages and metrics.
        self.name = str(parsed.with_user(None)).rstrip("/")
        self._safe = Redactor(parsed, api_key)
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key is not None else {}
        self._timeout_s = timeout_s
        self._connect_timeout_s = connect_timeout_s
        self._max_connections = max_connections
        self._max_response_bytes = max_response_bytes
        self._session: aiohttp.ClientSession | None = None
        self._closed = False

    async def get(self, path: str, *, timeout_s: float | None = None) -> Reply:
        """The reply to GET `path`; raises as :meth:`post` does."""
        return await self._exchange("GET", path, None, {}, timeout_s)

    async def post(
        self,
        path: str,
        payload: Mapping[str, Any],
        *,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Reply:
        """The reply to `payload` sent as JSON; any status, see :meth:`Reply.checked`.

        Raises:
            EngineUnavailableError: No connection, a connection lost, or no reply in time.
            EngineProtocolError: What came back is no HTTP, or over the size cap.
            EngineRefusedError: `payload` cannot be JSON.
        """
        try:
            body = _encoder.encode(payload).encode()
        except (TypeError, ValueError, RecursionError) as exc:
            raise EngineRefusedError(f"a request for {self.name} cannot be JSON: {exc}") from exc
        return await self._exchange("POST", path, body, headers or {}, timeout_s)

    async def close(self) -> None:
        """Release connections. Idempotent; later requests raise `EngineUnavailableError`."""
        self._closed = True
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _open(self) -> aiohttp.ClientSession:
        if self._closed:
            raise EngineUnavailableError(f"the client of {self.name} is closed")
        if self._session is None:
            self._session = aiohttp.ClientSession(
                headers=self._headers,
                # uvicorn drops a connection that was idle for 5 s; dropping it first spares us
                # the race of sending a request into a connection that is being closed.
                connector=aiohttp.TCPConnector(limit=self._max_connections, keepalive_timeout=4.0),
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session

    async def _exchange(
        self,
        method: str,
        path: str,
        body: bytes | None,
        headers: Mapping[str, str],
        timeout_s: float | None,
    ) -> Reply:
        where = f"{method} {self.name}{path}"
        session = self._open()
        total_s = self._timeout_s if timeout_s is None else timeout_s
        began_s = time.monotonic()
        if body is not None:
            headers = {"Content-Type": "application/json", **headers}
        try:
            async with session.request(
                method,
                self._base.with_path(self._base.path.rstrip("/") + path),
                data=body,
                headers=headers,
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=total_s, sock_connect=self._connect_timeout_s),
            ) as response:
                content = await self._read(response, where)
                return Reply(
                    status=response.status,
                    body=content,
                    content_type=response.headers.get("Content-Type", "").split(";")[0].lower(),
                    retry_after_s=_retry_after_s(response.headers.get("Retry-After", "")),
                    location=response.headers.get("Location", ""),
                    where=where,
                    quoted=self._quote(content),
                )
        except TimeoutError as exc:
            raise EngineUnavailableError(
                f"{where}: no whole answer after {time.monotonic() - began_s:.1f} s "
                f"({type(exc).__name__})"
            ) from exc
        except aiohttp.ClientResponseError as exc:
            raise EngineProtocolError(
                f"{where}: the answer is no HTTP ({self._safe(exc)})"
            ) from exc
        except (aiohttp.ClientSSLError, aiohttp.ServerFingerprintMismatch) as exc:
            raise EngineUnavailableError(
                f"{where}: TLS failed ({self._safe(exc)}): check http or https, and certificates"
            ) from exc
        except (aiohttp.ClientError, OSError, RuntimeError) as exc:
            # aiohttp says RuntimeError where the session was closed under a request.
            raise EngineUnavailableError(
                f"{where}: {type(exc).__name__}: {self._safe(exc)}"
            ) from exc

    async def _read(self, response: aiohttp.ClientResponse, where: str) -> bytes:
        pieces: list[bytes] = []
        left_bytes = self._max_response_bytes - (response.content_length or 0)
        if left_bytes >= 0:
            left_bytes = self._max_response_bytes
            async for piece in response.content.iter_any():
                left_bytes -= len(piece)
                if left_bytes < 0:
                    break
                pieces.append(piece)
        if left_bytes < 0:
            response.close()
            raise EngineProtocolError(
                f"{where}: the answer is longer than {self._max_response_bytes} bytes"
            )
        return b"".join(pieces)

    def _quote(self, content: bytes) -> str:
        text = " ".join(content[: 8 * _QUOTED_CHARS].decode(errors="replace").split())
        text = self._safe(text)
        return text if len(text) <= _QUOTED_CHARS else text[:_QUOTED_CHARS] + "..."


def _retry_after_s(header: str) -> float:
    """Seconds from a Retry-After header, which holds seconds or a date; 0.0 if unreadable."""
    if not header:
        return 0.0
    if header.strip().isdecimal():
        return float(header)
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0
