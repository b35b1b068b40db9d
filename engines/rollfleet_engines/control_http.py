"""Control routes of one inference server: each call is bounded, each refusal says what to do.

- Redirects are not followed: who controls a server knows where it is.
- The API key, if there is one, is sent to servers only. Neither it nor a password of a URL is quoted
  anywhere, also not where a server repeats it: messages end in rows that many may read.
"""

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import aiohttp
from yarl import URL

from rollfleet_common.errors import RefitError
from rollfleet_common.redact import Redactor
from rollfleet_common.servers import server_name

__all__ = ["CONTROL_S", "ControlClient", "UnreachableError"]

#: For routes that only switch something.
CONTROL_S = 10.0
_QUOTED_CHARS = 300


class UnreachableError(RefitError):
    """Nothing was sent: the server refused or did not take the connection."""


class ControlClient:
    """The control routes of the server at `url`.

    Args:
        session: Of the trainer; kept open by its owner.
        url: As :func:`rollfleet_common.servers.server_url` writes it; a user and password in it are
            for the server alone.
        api_key: Sent as a bearer token; None: nothing is sent.
        advice: What to do about a status, by status.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        *,
        api_key: str | None = None,
        advice: Mapping[int, str] | None = None,
    ) -> None:
        #: Without user and password: for rows and messages.
        self.name = server_name(url)
        self.advice = dict(advice or {})
        self._session = session
        # One of the two can be sent.
        self._url = self.name if api_key else url
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._safe = Redactor(URL(url), api_key)

    async def post(
        self,
        route: str,
        body: Any = None,
        *,
        timeout_s: float | None = CONTROL_S,
        advice: str = "",
    ) -> dict[str, Any]:
        """What `route` answered; {} if that was no JSON object.

        Args:
            route: With its query.
            body: Sent as JSON; None: nothing.
            timeout_s: For the answer; None: the caller has a limit of its own.
            advice: What to do about a refusal whose status says nothing.

        Raises:
            RefitError: It refused, did not answer in time, or cannot be reached.
        """
        status, text = await self._call("POST", route, body, timeout_s)
        if not 200 <= status < 300:
            raise self._refused(route, status, text, advice)
        return _object(text)

    async def get(self, route: str) -> dict[str, Any] | None:
        """What `route` answered; None if the server does not offer it.

        Raises:
            RefitError: It failed, did not answer in time, or cannot be reached.
        """
        status, text = await self._call("GET", route, None, CONTROL_S)
        if status in (403, 404, 405):
            return None
        if not 200 <= status < 300:
            raise self._refused(route, status, text)
        return _object(text)

    async def _call(
        self, method: str, route: str, body: Any, timeout_s: float | None
    ) -> tuple[int, str]:
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._session.request(
                    method,
                    f"{self._url}{route}",
                    json=body,
                    headers=self._headers,
                    allow_redirects=False,
                ) as reply,
            ):
                return reply.status, (await reply.read()).decode("utf-8", "replace")
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as exc:
            raise UnreachableError(f"it cannot be reached ({self._safe(exc)})") from exc
        except TimeoutError as exc:
            limit = "in time" if timeout_s is None else f"within {timeout_s:g} s"
            raise RefitError(f"{_bare(route)} was not answered {limit}") from exc
        except (aiohttp.ClientError, OSError) as exc:
            said = f"{type(exc).__name__}: {self._safe(exc)}"
            raise RefitError(f"{_bare(route)} failed: {said}") from exc

    def _refused(self, route: str, status: int, text: str, advice: str = "") -> RefitError:
        said = f"{_bare(route)} answered {status}: {self._safe(text)[:_QUOTED_CHARS]}"
        advice = self.advice.get(status, advice)
        return RefitError(f"{said} ({advice})" if advice else said)


def _bare(route: str) -> str:
    return route.partition("?")[0]


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
