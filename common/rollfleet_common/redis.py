"""The one place where Redis clients are made, their errors named, and their servers checked.

- A client never retries by itself. redis-py 8 does by default, and one `xadd` whose reply was lost
  then appends twice; :func:`retry` is ours, and wraps idempotent calls only.
- Every call has a timeout. A blocking read has one that outlives its block.
- Replies are bytes in RESP2, whatever redis-py (5 to 8) and server (Redis 7+, Valkey) are used.
- A password is in no message, log line or repr: what we print passes :func:`safe_url`.
"""

import asyncio
import random
import re
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

import redis
import redis.asyncio
import redis.asyncio.retry
import redis.backoff
import redis.credentials
import redis.exceptions
import redis.retry

from rollfleet_common.errors import (
    BrokerError,
    BrokerSetupError,
    BrokerUnavailableError,
    RollfleetError,
    SettingsError,
)
from rollfleet_common.redis_errors import (
    TRANSIENT,
    error_code,
    is_transient,
    safe_url,
    translate,
)

__all__ = [
    "TRANSIENT",
    "ServerReport",
    "check_server",
    "connect",
    "connect_sync",
    "is_transient",
    "retry",
    "safe_url",
    "translate",
]

T = TypeVar("T")

SCHEMES = ("redis", "rediss", "unix")
#: What a URL may set besides TLS files (`ssl_*`); all else is this factory's to decide.
QUERY_KEYS = frozenset({"db", "username", "password"})
#: Oldest server that has every command we send (the third element of XAUTOCLAIM, lag, WAITAOF).
OLDEST_SERVER = (7, 0)
#: How much longer than its block a blocking read may take before the connection counts as dead.
BLOCK_MARGIN_S = 5.0
#: An idle connection is pinged before it is used again, so that a command is not lost on it.
HEALTH_CHECK_S = 30
_CONFIG = ("maxmemory", "maxmemory-policy", "appendonly", "appendfsync")
FIRST_WAIT_S = 0.05
LONGEST_WAIT_S = 2.0


def connect(
    url: str,
    *,
    role: str,
    blocking: bool = False,
    block_s: float | None = 1.0,
    timeout_s: float = 5.0,
    max_connections: int = 16,
) -> redis.asyncio.Redis:
    """An asyncio client for `url`; it connects at its first command and is closed by `aclose()`.

    Args:
        url: ``redis://``, ``rediss://`` or ``unix://``. The query may set ``db``, ``username``,
            ``password`` and ``ssl_*``. ``embedded://`` has to pass `embedded.resolve` before.
        role: Who connects; CLIENT LIST shows ``rollfleet-<role>``.
        blocking: For XREAD and XREADGROUP with BLOCK: a client of its own, whose replies may take
            `block_s` and a margin. Never cancel such a read; wait out its block.
        block_s: Longest BLOCK that will be asked for, in seconds; None for a read without end.
        timeout_s: Longest wait for a reply, for a connection, and for a free one in the pool.
        max_connections: Size of the pool. A call beyond it waits `timeout_s` for a free one.

    Raises:
        SettingsError: The URL is malformed, of another scheme, or sets what it may not.
    """
    url, options = _options(url, role, timeout_s, _reply_timeout_s(blocking, block_s, timeout_s))
    options["retry"] = redis.asyncio.retry.Retry(redis.backoff.NoBackoff(), 0)
    options["health_check_interval"] = 0 if blocking else HEALTH_CHECK_S
    try:
        pool = redis.asyncio.BlockingConnectionPool.from_url(
            url, max_connections=max_connections, timeout=timeout_s, **options
        )
        # Made to be checked; it connects to nothing. An option of TLS may be unknown, or not allowed.
        pool.connection_class(**pool.connection_kwargs)
    except (TypeError, ValueError, redis.exceptions.RedisError):
        raise _malformed(url) from None
    return redis.asyncio.Redis.from_pool(pool)


def connect_sync(
    url: str,
    *,
    role: str,
    blocking: bool = False,
    block_s: float | None = 1.0,
    timeout_s: float = 5.0,
    max_connections: int = 16,
) -> redis.Redis:
    """The same as :func:`connect` for code without an event loop; closed by `close()`."""
    url, options = _options(url, role, timeout_s, _reply_timeout_s(blocking, block_s, timeout_s))
    options["retry"] = redis.retry.Retry(redis.backoff.NoBackoff(), 0)
    options["health_check_interval"] = 0 if blocking else HEALTH_CHECK_S
    try:
        pool = redis.BlockingConnectionPool.from_url(
            url, max_connections=max_connections, timeout=timeout_s, **options
        )
        # Made to be checked; it connects to nothing. An option of TLS may be unknown, or not allowed.
        pool.connection_class(**pool.connection_kwargs)
    except (TypeError, ValueError, redis.exceptions.RedisError):
        raise _malformed(url) from None
    return redis.Redis.from_pool(pool)


def _reply_timeout_s(blocking: bool, block_s: float | None, timeout_s: float) -> float | None:
    if not blocking:
        return timeout_s
    return None if block_s is None else block_s + BLOCK_MARGIN_S


def _options(
    url: str, role: str, timeout_s: float, reply_timeout_s: float | None
) -> tuple[str, dict[str, Any]]:
    """The URL without its credentials, and the options, in the names that redis-py 5 to 8 share."""
    try:
        parts = urlsplit(url)
        query = parse_qsl(parts.query, keep_blank_values=True)
        username, password = parts.username, parts.password
        _ = parts.port  # parsed when asked for
        (parts.hostname or "").encode("idna")  # as the resolver will
    except ValueError:
        raise _malformed(url) from None
    if parts.scheme not in SCHEMES:
        hint = " (start it with rollfleet_common.embedded.resolve)" if "embedded" in url else ""
        raise SettingsError(
            f"Redis URL {safe_url(url)!r}: unknown scheme{hint}; write redis://host:port/db, "
            "rediss:// for TLS, unix:///path/to/socket, or embedded:// for a server of our own"
        )
    if parts.fragment or "\0" in url:  # the rest, a host perhaps, would be ignored
        raise _malformed(url)
    # redis-py lets the query win over keyword arguments, also for retries and timeouts.
    if wrong := sorted({k for k, _ in query if k not in QUERY_KEYS and not k.startswith("ssl_")}):
        raise SettingsError(
            f"Redis URL {safe_url(url)!r}: {', '.join(wrong)} cannot be set in the URL; "
            f"it may set {', '.join(sorted(QUERY_KEYS))} and ssl_*"
        )
    options: dict[str, Any] = {
        "socket_timeout": reply_timeout_s,
        "socket_connect_timeout": timeout_s,
        "retry_on_timeout": False,
        "retry_on_error": [],
        "protocol": 2,
        "decode_responses": False,
        "client_name": f"rollfleet-{re.sub(r'[^A-Za-z0-9_.-]', '-', role)}",
    }
    if parts.scheme != "unix":
        # A peer that vanished without a word is noticed after 30 + 3 * 5 seconds.
        options["socket_keepalive"] = True
        options["socket_keepalive_options"] = {
            getattr(socket, name): value
            for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))
            if hasattr(socket, name)
        }
    given = dict(query)
    if parts.scheme == "rediss" and given.get("ssl_cert_reqs") != "none":
        # Before 6.0 redis-py takes a trusted certificate of any host, unless it is told.
        options["ssl_check_hostname"] = True
    credentials = {
        "username": unquote(username) if username else None,
        "password": unquote(password) if password else None,
    } | {k: v for k, v in query if k in ("username", "password")}
    if any(credentials.values()):
        # A provider instead of two options: redis-py's reprs show options as they are.
        options["credential_provider"] = redis.credentials.UsernamePasswordCredentialProvider(
            credentials["username"], credentials["password"]
        )
    bare = parts._replace(
        netloc=parts.netloc.rpartition("@")[2],
        query=urlencode([(k, v) for k, v in query if k not in ("username", "password")]),
    )
    # Not geturl(), which drops the empty host of unix:///path.
    query_text = f"?{bare.query}" if bare.query else ""
    return f"{bare.scheme}://{bare.netloc}{bare.path}{query_text}", options


def _malformed(url: str) -> SettingsError:
    # The parser's own message is left out: it quotes pieces of the URL, passwords included.
    return SettingsError(
        f"Redis URL {safe_url(url)!r} cannot be parsed; percent-encode special characters in "
        "the password (# is %23), and check the host, the port and the query"
    )


async def retry(
    call: Callable[[], Awaitable[T]],
    *,
    what: str,
    deadline_s: float | None,
    on_wait: Callable[[BrokerUnavailableError, float], None] | None = None,
    url: str = "",
) -> T:
    """Await `call()` until it succeeds, waiting out transient errors; for idempotent calls ONLY.

    A call whose reply was lost has happened, and happens again here. The waits are drawn uniformly
    from 0 to a bound that doubles from 50 ms to 2 s ("full jitter", AWS Architecture Blog 2015),
    so that a fleet does not come back to a restarted server in step.

    Args:
        call: Makes a fresh awaitable at each attempt.
        what: What is being done, for the message: ``"renew 12 leases"``.
        deadline_s: Seconds after which no further attempt starts; None to go on for ever. The last
            attempt may take its own timeout on top.
        on_wait: Told the error and the seconds until the next attempt, before each wait.
        url: Named, masked, in messages.

    Raises:
        BrokerUnavailableError: The deadline passed; caused by the last error.
        BrokerSetupError: At once, for a wrong password or missing rights.
        BrokerError: At once, for any other error of Redis. What is no error of Redis passes as is.
    """
    began = time.monotonic()
    attempt = 0
    while True:
        try:
            return await call()
        except (redis.exceptions.RedisError, OSError) as exc:
            error = translate(exc, url)
            cause: BaseException = exc
        except BrokerError as exc:
            error, cause = exc, exc.__cause__ or exc
        waited_s = time.monotonic() - began
        if not isinstance(error, BrokerUnavailableError):
            raise _about(what, error) from cause
        if deadline_s is not None and waited_s >= deadline_s:
            message = f"{what}: gave up after {waited_s:.1f} s and {attempt + 1} attempts: {error}"
            raise BrokerUnavailableError(message) from cause
        wait_s = random.uniform(0.0, min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** min(attempt, 16)))
        if deadline_s is not None:
            wait_s = min(wait_s, max(0.0, deadline_s - waited_s))
        if on_wait is not None:
            on_wait(error, wait_s)
        attempt += 1
        await asyncio.sleep(wait_s)


def _about(what: str, error: RollfleetError) -> RollfleetError:
    return type(error)(f"{what}: {error}")


@dataclass(frozen=True, slots=True)
class ServerReport:
    """What a server told about itself; None where it would not say."""

    #: Redis version that it speaks; a Valkey says 7.2.4 here.
    version: str | None
    is_valkey: bool
    #: Version of the product: equals `version` except on Valkey.
    product_version: str | None
    #: 0: no limit.
    maxmemory_bytes: int | None
    maxmemory_policy: str | None
    appendonly: bool | None
    #: "always", "everysec" or "no".
    appendfsync: str | None
    is_replica: bool
    #: Sentences for an operator, each with a remedy.
    warnings: tuple[str, ...]

    @property
    def durability(self) -> str:
        """What a crash of this server may cost, in one sentence."""
        if self.appendonly is None:
            return "the server does not say whether it keeps an append-only file"
        if not self.appendonly:
            return "no append-only file: if the server dies, the run's queue dies with it"
        if self.appendfsync == "always":
            return "append-only file, fsync on every write: acknowledged writes survive power loss"
        if self.appendfsync == "everysec":
            return "append-only file, fsync every second: a power loss may cost the last second"
        return "append-only file, fsync left to the kernel: a power loss may cost about 30 seconds"


async def check_server(client: redis.asyncio.Redis, *, strict: bool) -> ServerReport:
    """Ask a server what it is and how it keeps data; a denied question is a warning.

    Args:
        client: Any client of :func:`connect` that is not `blocking`.
        strict: Refuse, instead of warn about, a server that may evict keys.

    Raises:
        BrokerSetupError: Older than 7.0, or, when strict, an eviction policy other than noeviction.
        BrokerUnavailableError: It cannot be reached.
    """
    warnings: list[str] = []
    info = await _ask(client.info, "INFO", warnings)
    answer = await _ask(lambda: client.config_get(*_CONFIG), "CONFIG GET", warnings)
    config = {_text(k): _text(v) for k, v in (answer or {}).items()}
    info = {_text(k): v for k, v in (info or {}).items()}
    version = _optional(info.get("redis_version"))
    valkey = _optional(info.get("valkey_version"))
    numbers = tuple(int(n) for n in re.findall(r"\d+", version or "")[:2])
    if numbers and numbers < OLDEST_SERVER:
        raise BrokerSetupError(
            f"Redis {version} is too old: rollfleet needs Redis 7.0 or newer, or Valkey; "
            "upgrade it, or use embedded:// to try things out"
        )
    policy = _optional(config.get("maxmemory-policy", info.get("maxmemory_policy")))
    if policy not in (None, "noeviction"):
        message = (
            f"maxmemory-policy is {policy}: a full server would silently evict prompts and "
            "rollouts; run CONFIG SET maxmemory-policy noeviction (and write it to redis.conf)"
        )
        if strict:
            raise BrokerSetupError(message)
        warnings.append(message)
    is_replica = _optional(info.get("role")) in ("slave", "replica")
    if is_replica:
        warnings.append("this server is a replica and refuses writes; point the URL at its primary")
    maxmemory = config.get("maxmemory", info.get("maxmemory"))
    aof = config.get("appendonly", info.get("aof_enabled"))
    return ServerReport(
        version=version,
        is_valkey=valkey is not None or _optional(info.get("server_name")) == "valkey",
        product_version=valkey or version,
        maxmemory_bytes=None if maxmemory is None else int(maxmemory),
        maxmemory_policy=policy,
        appendonly=None if aof is None else _text(aof) in ("yes", "1"),
        appendfsync=_optional(config.get("appendfsync")),
        is_replica=is_replica,
        warnings=tuple(warnings),
    )


async def _ask(
    question: Callable[[], Awaitable[dict[Any, Any]]], name: str, warnings: list[str]
) -> dict[Any, Any] | None:
    """The answer, or None with a warning where the server denies the question."""
    try:
        return await question()
    except redis.exceptions.ResponseError as exc:
        # A managed Redis denies CONFIG by ACL, by renaming it, or by not having it.
        if is_transient(exc) or error_code(exc) == "NOAUTH":
            raise translate(exc) from exc
        warnings.append(f"{name} is denied ({exc}): this part of the set-up cannot be checked")
        return None
    except (redis.exceptions.RedisError, OSError) as exc:
        raise translate(exc) from exc


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _optional(value: Any) -> str | None:
    return None if value is None else _text(value)
