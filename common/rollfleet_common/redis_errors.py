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
from rollfleet_common.text import broken, printable

__all__ = ["TRANSIENT", "error_code", "is_transient", "safe_url", "server_message", "translate"]

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
#: How a script says that a field of the run's state is no number (`BADSTATE <field> of <key>`).
_BROKEN = re.compile(r"BADSTATE (?P<field>\S+) of (?P<key>\S+)")
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


#: What redis-py puts before the error of a command in a pipeline. The command may hold anything, and
#: the asyncio client writes the error as a tuple.
_PIPELINED = re.compile(r"Command # \d+ \(.*\) of pipeline caused error: (?:\(['\"])?", re.DOTALL)
#: What Redis puts before an error that a script passed on.
_SCRIPTED = re.compile(
    r"(?:ERR )?(?:Error (?:running|compiling) script[^:]*(?:: ?\d+)?: )?(?:@?user_script:\d*:? ?)*-?"
)


def server_message(exc: BaseException) -> str:
    """What the server said, without what redis-py and the script engine put around it."""
    text, pipelined = _PIPELINED.subn("", str(exc), count=1)
    if pipelined:
        text = text.removesuffix(",)").rstrip("'\"")
    found = _SCRIPTED.match(text)
    return text[found.end() :] if found else text


def error_code(exc: BaseException) -> str:
    """The error code that Redis put first in its message, or an empty string.

    Also of a command in a pipeline, or in a script, whose errors are annotated.
    """
    if isinstance(exc, redis.exceptions.ResponseError):
        # redis-py 8 keeps a code that it knows here, and takes it off the text.
        code = getattr(exc, "status_code", None)
        if isinstance(code, str) and code not in ("", "ERR"):
            return code
    found = re.match(r"[A-Z]+\b", server_message(exc))
    return found.group() if found else ""


def _exhausted(exc: BaseException) -> bool:
    """Whether a stream takes no more entries, because one has the highest id that there is.

    Somebody added it by hand or by mistake. It passes when an operator has put the stream right.
    """
    return isinstance(exc, redis.exceptions.ResponseError) and "exhausted the last possible ID" in (
        str(exc)
    )


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
    """Whether `exc` may pass by itself, or when an operator has seen to Redis.

    Unreachable, loading, failing over, out of memory, or a stream that takes no more ids: neither the
    caller nor what it wanted to write is to blame.
    """
    if isinstance(exc, RollfleetError):
        return isinstance(exc, BrokerUnavailableError)
    if _remedy(exc) is not None:
        return False
    if isinstance(exc, TRANSIENT):
        return True
    if not isinstance(exc, redis.exceptions.ResponseError):
        return False
    return error_code(exc) in _TRANSIENT_CODES or _exhausted(exc)


def translate(exc: BaseException, url: str = "") -> RollfleetError:
    """`exc` of redis-py as one of ours, caused by `exc`; the URL in the message is masked.

    Returns:
        BrokerSetupError for wrong passwords, missing rights and untrusted certificates;
        BrokerUnavailableError for what :func:`is_transient` calls transient; BrokerError for all
        else; CodecError for state of the run that a script found to be no number; an error of ours
        as it is.
    """
    if isinstance(exc, RollfleetError):
        return exc
    where = f"Redis at {safe_url(url)}" if url else "Redis"
    said = printable(f"{type(exc).__name__}: {exc}")
    error: RollfleetError
    if (state := _BROKEN.search(str(exc))) is not None:
        error = broken(state["key"], state["field"], "it is no number")
    elif (remedy := _remedy(exc)) is not None:
        error = BrokerSetupError(f"{where} refused us ({said}): {remedy}")
    elif _exhausted(exc):
        error = BrokerUnavailableError(
            f"{where} refused to add to a stream ({said}): an entry with an absurdly high id was "
            "written to it, and nothing can be added after that one. `rollfleet doctor` names the "
            "stream, `rollfleet mend` puts it right"
        )
    elif is_transient(exc):
        error = BrokerUnavailableError(f"{where} is not available ({said})")
    elif "hash value is not an integer" in str(exc) or "would overflow" in str(exc):
        error = BrokerError(
            f"{where} cannot raise a counter ({said}): a field of a ledger or a fence is no number. "
            "`rollfleet doctor` names it"
        )
    else:
        error = BrokerError(f"{where} answered with an error ({said})")
    error.__cause__ = exc
    return error
