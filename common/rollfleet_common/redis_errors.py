"""What redis-py raises, named as errors of ours, and URLs that can be printed.

- What may pass by itself is transient; a wrong password or a missing right never is, although
  redis-py derives the former from its ConnectionError.
- No message holds a password.
"""

import re
import ssl
from collections.abc import Iterator

import redis.exceptions

from rollfleet_common.errors import (
    BrokerError,
    BrokerSetupError,
    BrokerUnavailableError,
    RollfleetError,
)

__all__ = ["TRANSIENT", "error_code", "is_transient", "safe_url", "translate"]

#: What may pass by itself. AuthenticationError is a ConnectionError too, so an `except TRANSIENT`
#: has to ask :func:`is_transient` before it tries again.
TRANSIENT: tuple[type[BaseException], ...] = (
    redis.exceptions.ConnectionError,
    redis.exceptions.TimeoutError,
    redis.exceptions.BusyLoadingError,
    redis.exceptions.ReadOnlyError,
    redis.exceptions.OutOfMemoryError,
    redis.exceptions.TryAgainError,
    redis.exceptions.ClusterDownError,
    redis.exceptions.MasterDownError,
    OSError,
)
#: The same, as error codes that redis-py has no class for, or that it leaves in the text.
_TRANSIENT_CODES = frozenset(
    {"LOADING", "READONLY", "OOM", "MISCONF", "TRYAGAIN", "CLUSTERDOWN", "MASTERDOWN"}
    | {"NOREPLICAS", "BUSY"}
)
_REFUSED: tuple[type[BaseException], ...] = (
    redis.exceptions.AuthenticationError,
    redis.exceptions.AuthenticationWrongNumberOfArgsError,
    redis.exceptions.AuthorizationError,
    redis.exceptions.NoPermissionError,
)
_REFUSED_CODES = frozenset({"NOAUTH", "WRONGPASS", "NOPERM"})


def safe_url(url: str) -> str:
    """`url` with its password replaced by ``***``, also where the URL itself is malformed."""
    masked = re.sub(r"([?&](?:ssl_)?password=)[^&#]*", r"\1***", url)
    # Up to the last @: a password that was not percent-encoded may hold any character.
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*://)(.*)@(.*)\Z", masked, re.DOTALL)
    if found is None:
        return masked
    scheme, userinfo, rest = found.groups()
    user, colon, _ = userinfo.partition(":")
    return f"{scheme}{user + ':' if colon else ''}***@{rest}"


def error_code(exc: BaseException) -> str:
    """The error code that Redis put first in its message, or an empty string."""
    found = re.match(r"[A-Z]+\b", str(exc))
    return found.group() if found else ""


def _behind(exc: BaseException) -> Iterator[BaseException]:
    """`exc`, and what redis-py wrapped in it while it was connecting.

    redis-py 8 raises a wrong password as a plain ConnectionError whose cause tells the truth, and
    an OSError only as the context of its own.
    """
    yield exc
    if isinstance(exc, redis.exceptions.ConnectionError):
        inner = exc.__cause__ or exc.__context__
        if isinstance(inner, OSError) or (inner is not None and inner is exc.__cause__):
            yield from _behind(inner)


def _remedy(exc: BaseException) -> str | None:
    """What to do about an error that no retry can mend; None for every other error."""
    for each in _behind(exc):
        if isinstance(each, redis.exceptions.NoPermissionError) or error_code(each) == "NOPERM":
            return "this user lacks rights; compare `ACL GETUSER` with the ACL file of its role"
        if isinstance(each, _REFUSED) or error_code(each) in _REFUSED_CODES:
            return "check the user and the password in the URL (percent-encoded), and ACL LIST"
        if isinstance(each, ssl.SSLCertVerificationError):
            return "the server's certificate is not trusted; set ?ssl_ca_certs=/path/to/ca.pem"
        if isinstance(each, PermissionError):
            return "this process may not open the socket; check its owner and mode"
    return None


def is_transient(exc: BaseException) -> bool:
    """Whether `exc` may pass by itself: unreachable, loading, failing over, out of memory."""
    if isinstance(exc, RollfleetError):
        return isinstance(exc, BrokerUnavailableError)
    if _remedy(exc) is not None:
        return False
    if isinstance(exc, TRANSIENT):
        return True
    return isinstance(exc, redis.exceptions.ResponseError) and error_code(exc) in _TRANSIENT_CODES


def translate(exc: BaseException, url: str = "") -> RollfleetError:
    """`exc` of redis-py as one of ours, caused by `exc`; the URL in the message is masked.

    Returns:
        BrokerSetupError for wrong passwords, missing rights and untrusted certificates;
        BrokerUnavailableError for what :func:`is_transient` calls transient; BrokerError for all
        else; an error of ours as it is.
    """
    if isinstance(exc, RollfleetError):
        return exc
    where = f"Redis at {safe_url(url)}" if url else "Redis"
    said = f"{type(exc).__name__}: {exc}"
    error: BrokerError
    if (remedy := _remedy(exc)) is not None:
        error = BrokerSetupError(f"{where} refused us ({said}): {remedy}")
    elif is_transient(exc):
        error = BrokerUnavailableError(f"{where} is not available ({said})")
    else:
        error = BrokerError(f"{where} answered with an error ({said})")
    error.__cause__ = exc
    return error
