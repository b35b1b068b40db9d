"""Training samples are checked always, on both ends: before they are sent and before they are used.

- A sample that passes can be encoded, collated and trained on: its parts agree, its numbers are
  finite in float32, and every trained token is known to come from a policy that existed.
- The checks are on the hot path: a good sample costs a few microseconds and four passes over its
  arrays; only a bad one is looked at closely, to say which token is wrong and why.
- :func:`coerce_sample` is the one door for loose input (lists, other dtypes): it converts only
  what loses nothing, and names the field where it would.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from rollfleet_common.codec import ARRAY_DTYPES, MAX_FLOAT, mask_runs, shape_fault
from rollfleet_common.errors import InvalidSampleError, OversizeError
from rollfleet_common.limits import Limits
from rollfleet_common.messages import Bool, Float32, Int32, LogprobsKind, Sample, VersionSpans

__all__ = ["AMBIGUOUS_LOGPROB", "LOGPROB_SLACK", "check_samples", "coerce_sample"]

#: A log-probability may exceed 0 by this much: servers compute them in half precision.
LOGPROB_SLACK = 1e-2
#: What vLLM answers when it cannot say (-inf, or a token outside its top-k): no log-probability.
AMBIGUOUS_LOGPROB = -9999.0

_I4 = np.dtype(np.int32)
_F4 = np.dtype(np.float32)
_B1 = np.dtype(np.bool_)
_KINDS = tuple(kind.value for kind in LogprobsKind)
_INT32_MAX = 2**31 - 1


def check_samples(
    samples: Sequence[Sample],
    *,
    newest: int | None = None,
    where: str,
    need_trained: bool = True,
    limits: Limits | None = None,
) -> None:
    """Refuse the samples of one rollout unless every one of them can be trained on.

    Args:
        samples: The training sequences of one rollout.
        newest: The newest version that exists; None if that is not known here.
        where: For the message: ``"group 3f2a #4 from worker w1"``.
        need_trained: Refuse samples without a single trained token; False for evaluation.
        limits: Caps on the rollout; None: there are none.

    Raises:
        InvalidSampleError: Which sample, which field, what was wrong, and where.
        OversizeError: It is over a cap.
    """
    if not samples:
        raise InvalidSampleError(f"{where}: a rollout without samples; an episode makes at least 1")
    try:
        if limits is not None:
            limits.check(samples=len(samples))
        for i, sample in enumerate(samples):
            wrong = _fault(sample, newest, need_trained)
            if wrong:
                raise InvalidSampleError(f"{where}: sample {i} of {len(samples)}: {wrong}")
        if limits is not None:
            _check_limits(samples, limits)
    except OversizeError as exc:
        raise OversizeError(f"{where}: {exc}") from None


def _check_limits(samples: Sequence[Sample], limits: Limits) -> None:
    spans = 0
    for s in samples:
        spans += len(s.versions.starts) + len(mask_runs(s.loss_mask))
        names = len(s.components) + len(s.metrics) + len(s.arrays)
        limits.check(tokens=len(s.token_ids), spans=spans, names=names)


def _fault(s: Sample, newest: int | None, need_trained: bool) -> str:
    """What is wrong with a sample, or ""."""
    return (
        _shape_fault(s)
        or _tokens_fault(s)
        or _versions_fault(s, newest, need_trained)
        or _numbers_fault(s)
        or (_arrays_fault(s.arrays) if s.arrays or type(s.arrays) is not dict else "")
    )


def _shape_fault(s: Sample) -> str:
    tokens = 0
    if not isinstance(s.versions, VersionSpans):  # pyright: ignore[reportUnnecessaryIsInstance]
        return f"versions is a {type(s.versions).__name__}, not VersionSpans (see coerce_sample)"
    for name, array, dtype in (
        ("token_ids", s.token_ids, _I4),
        ("loss_mask", s.loss_mask, _B1),
        ("logprobs", s.logprobs, _F4),
        ("versions.starts", s.versions.starts, _I4),
        ("versions.versions", s.versions.versions, _I4),
    ):
        # Samples are built by users' workflows: the annotation is a wish.
        if type(array) is not np.ndarray:
            return f"{name} is a {type(array).__name__}, not a numpy array (see coerce_sample)"
        if array.dtype != dtype:
            return f"{name} has dtype {array.dtype}, not {dtype} (see coerce_sample)"
        if array.ndim != 1:
            return f"{name} has shape {array.shape}, not one dimension"
        if name == "token_ids":
            tokens = len(array)
            if not tokens:
                return "token_ids is empty; a sample has at least 1 token"
        elif name in ("loss_mask", "logprobs") and len(array) != tokens:
            return f"{name} has {len(array)} values for {tokens} token_ids"
    return ""


def _tokens_fault(s: Sample) -> str:
    # argmin and argmax cost a third of min and max, and find NaN first.
    ids, logprobs = s.token_ids, s.logprobs
    least = int(ids.argmin())
    if ids[least] < 0:
        return f"token_ids[{least}] is {ids[least]}; ids are not negative"
    # NaN fails both comparisons.
    if (
        logprobs[logprobs.argmin()] > AMBIGUOUS_LOGPROB
        and logprobs[logprobs.argmax()] <= LOGPROB_SLACK
    ):
        return ""
    return _logprobs_fault(logprobs, s.loss_mask)


def _logprobs_fault(logprobs: Float32, mask: Bool) -> str:
    # Also where nothing is trained: the loss multiplies by the mask, and 0 x NaN is NaN.
    for bad, what in (
        (~np.isfinite(logprobs), "every token has a finite one, 0.0 where nothing is trained"),
        (mask & (logprobs > LOGPROB_SLACK), "the logarithm of a probability is at most 0"),
        (
            mask & (logprobs == AMBIGUOUS_LOGPROB),
            "that is how vLLM says that it does not know; raise the server's top logprobs",
        ),
    ):
        at = np.flatnonzero(bad)
        if len(at):
            return f"logprobs[{at[0]}] is {logprobs[at[0]]} ({len(at)} such): {what}"
    return ""


def _versions_fault(s: Sample, newest: int | None, need_trained: bool) -> str:
    starts: list[int] = s.versions.starts.tolist()
    versions: list[int] = s.versions.versions.tolist()
    mask = s.loss_mask
    if len(starts) != len(versions) or not starts:
        return f"versions has {len(starts)} starts for {len(versions)} versions, at least 1 of each"
    if starts[0] != 0:
        return f"versions.starts[0] is {starts[0]}; the first span starts at token 0"
    if len(starts) == 1:
        trains = [bool(mask[mask.argmax()])]
    else:
        if starts[-1] >= len(mask) or any(a >= b for a, b in pairwise(starts)):
            return f"versions.starts {_brief(starts)} must increase and stay under {len(mask)}"
        trains = np.logical_or.reduceat(mask, s.versions.starts).tolist()
    if need_trained and True not in trains:
        return "loss_mask: no token is trained on, so there is nothing to learn from it"
    return _span_fault(starts, versions, trains, newest)


def _span_fault(
    starts: list[int], versions: list[int], trains: list[bool], newest: int | None
) -> str:
    # Versions may go backwards: while a refit rolls over the servers, the second call of an
    # episode may meet older weights than its first. A sample is as old as its oldest token.
    for k, (version, trained) in enumerate(zip(versions, trains, strict=True)):
        if version < 0 and (trained or version < -1):
            what = "is trained on but no policy made it" if trained else "is less than -1"
            return f"versions.versions[{k}] is {version}: the span from token {starts[k]} {what}"
        if newest is not None and version > newest:
            return (
                f"versions.versions[{k}] is {version}, newer than the newest version {newest}: "
                "a rollout from the future"
            )
    return ""


def _numbers_fault(s: Sample) -> str:
    if not _finite(s.reward):
        return f"reward is {_said(s.reward)}, no number that is finite in float32"
    for name, values in (("components", s.components), ("metrics", s.metrics)):
        if type(values) is not dict and not isinstance(values, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            return f"{name} is a {type(values).__name__}, not a mapping"
        for key, value in values.items():
            if type(key) is not str or not (key.isascii() or _travels(key)):
                return f"{name} has the key {_said(key)}, no text that travels"
            if not _finite(value):
                return f"{name}[{key!r}] is {_said(value)}, no number that is finite in float32"
    reason = s.finish_reason
    if type(reason) is not str or not (reason.isascii() or _travels(reason)):
        return f"finish_reason is {_said(s.finish_reason)}, no text that travels"
    if type(s.logprobs_kind) not in (str, LogprobsKind) or s.logprobs_kind not in _KINDS:
        return f"logprobs_kind is {_said(s.logprobs_kind)}, not one of {', '.join(_KINDS)}"
    if s.temperature is not None and not (_finite(s.temperature) and s.temperature >= 0):
        return (
            f"temperature is {_said(s.temperature)}, neither None nor a finite number of at least 0"
        )
    return ""


def _finite(value: Any) -> bool:
    """Whether it is a number, and stays finite in the dtype that is trained on."""
    # Types are exact: what a subclass says of itself may differ from what is sent of it.
    kind = type(value)
    if kind is float or kind is int or kind is bool:
        return bool(-MAX_FLOAT <= value <= MAX_FLOAT)
    return isinstance(value, np.integer | np.floating) and bool(-MAX_FLOAT <= value <= MAX_FLOAT)


def _travels(text: Any) -> bool:
    """Whether it is text, and can be written as UTF-8."""
    if type(text) is not str:
        return False
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def _said(value: Any) -> str:
    """A value of the user's in a few words; its own `repr` may raise, or have no end."""
    if value is None:
        return "None"
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype}{list(value.shape)}"
    if type(value) in (str, int, float, bool) or type(value).__module__ == "numpy":
        with suppress(ValueError):  # an integer of too many digits
            return f"{value!r:.80}"
    return f"a {type(value).__name__}"


def _arrays_fault(arrays: Mapping[str, npt.NDArray[Any]]) -> str:
    if type(arrays) is not dict and not isinstance(arrays, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        return f"arrays is a {type(arrays).__name__}, not a mapping"
    for key, array in arrays.items():
        if not _travels(key):
            return f"arrays has the key {_said(key)}, no text that travels"
        # A masked array or a matrix is more, or behaves otherwise, than what is sent of it.
        if type(array) is not np.ndarray:
            return f"arrays[{key!r}] is a {type(array).__name__}, not a numpy array"
        if array.dtype.newbyteorder("<").str not in ARRAY_DTYPES:
            return (
                f"arrays[{key!r}] has dtype {array.dtype}, which does not travel; "
                f"use one of {', '.join(sorted(ARRAY_DTYPES))}"
            )
        if fault := shape_fault(array.shape):
            return f"arrays[{key!r}] {fault}"
    return ""


def _brief(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"{values[:8]}... ({len(values)})"


# ---- loose input -----------------------------------------------------------------------------


def coerce_sample(
    token_ids: Any,
    loss_mask: Any,
    logprobs: Any,
    versions: VersionSpans | int | Any,
    reward: Any,
    *,
    components: Mapping[str, Any] | None = None,
    arrays: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    finish_reason: str = "stop",
    logprobs_kind: str = LogprobsKind.UNKNOWN,
    temperature: float | None = None,
    context_full: bool = False,
) -> Sample:
    """A sample from lists, tuples or arrays of other dtypes; nothing is rounded or cut.

    Args:
        token_ids: T whole numbers, 0 to 2**31 - 1.
        loss_mask: T bools, or whole numbers that are 0 or 1.
        logprobs: T numbers; 0.0 where no policy sampled the token.
        versions: Spans, one version for all tokens, or T whole numbers, a version for each.
        reward: A number.
        components: Parts of the reward, numbers by name.
        arrays: Anything `numpy.asarray` takes, by name.
        metrics: Numbers by name.
        finish_reason: Why generation ended.
        logprobs_kind: Which distribution `logprobs` are of, a value of :class:`LogprobsKind`.
        temperature: Temperature that the tokens were sampled with.
        context_full: Whether the server's context was full before `max_tokens`.

    Raises:
        InvalidSampleError: A field does not convert, by name. Whether the parts agree is for
            :func:`check_samples` to say.
    """
    return Sample(
        token_ids=_whole("token_ids", token_ids, 0),
        loss_mask=_binary(loss_mask),
        logprobs=_real("logprobs", logprobs),
        versions=_spans(versions),
        reward=_number("reward", reward),
        components={k: _number(f"components[{k!r}]", v) for k, v in (components or {}).items()},
        arrays={k: _plain(f"arrays[{k!r}]", v) for k, v in (arrays or {}).items()},
        metrics={k: _number(f"metrics[{k!r}]", v) for k, v in (metrics or {}).items()},
        finish_reason=str(finish_reason),
        logprobs_kind=logprobs_kind,
        temperature=None if temperature is None else _number("temperature", temperature),
        context_full=bool(context_full),
    )


def _plain(field: str, value: Any) -> npt.NDArray[Any]:
    try:
        return np.asarray(value)
    except (TypeError, ValueError, OverflowError) as exc:
        raise InvalidSampleError(f"{field} is no array: {exc}") from exc


def _vector(field: str, value: Any) -> npt.NDArray[Any]:
    array = _plain(field, value)
    if array.ndim != 1:
        raise InvalidSampleError(f"{field} has shape {array.shape}, not one dimension")
    # An empty list has no dtype of its own.
    return array if array.size else array.astype(np.int32)


def _whole(field: str, value: Any, least: int) -> Int32:
    array = _vector(field, value)
    if array.dtype.kind not in "iuf":
        raise InvalidSampleError(f"{field} holds {array.dtype} values, not whole numbers")
    # NaN is in no range.
    bad = np.flatnonzero(~((array >= least) & (array <= _INT32_MAX)))
    if not len(bad) and array.dtype.kind == "f":
        bad = np.flatnonzero(array != np.floor(array))
    if len(bad):
        raise InvalidSampleError(
            f"{field}[{bad[0]}] is {array[bad[0]]}, no whole number from {least} to {_INT32_MAX}"
        )
    return array.astype(np.int32, copy=False)


def _binary(value: Any) -> Bool:
    array = _vector("loss_mask", value)
    if array.dtype.kind not in "biuf":
        raise InvalidSampleError(f"loss_mask holds {array.dtype} values, not True and False")
    if array.dtype.kind != "b":
        bad = np.flatnonzero((array != 0) & (array != 1))
        if len(bad):
            raise InvalidSampleError(f"loss_mask[{bad[0]}] is {array[bad[0]]}; a mask is binary")
    return array.astype(np.bool_, copy=False)


def _real(field: str, value: Any) -> Float32:
    array = _vector(field, value)
    if array.dtype.kind not in "iuf":
        raise InvalidSampleError(f"{field} holds {array.dtype} values, not numbers")
    return array.astype(np.float32, copy=False)


def _spans(versions: Any) -> VersionSpans:
    if isinstance(versions, VersionSpans):
        return VersionSpans(
            _whole("versions.starts", versions.starts, 0),
            _whole("versions.versions", versions.versions, -1),
        )
    if isinstance(versions, int | np.integer):
        return VersionSpans(np.zeros(1, np.int32), _whole("versions", [versions], -1))
    per_token = _whole("versions", versions, -1)
    starts = np.flatnonzero(np.diff(per_token, prepend=np.int32(-2))).astype(np.int32)
    return VersionSpans(starts, per_token[starts])


def _number(field: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError) as exc:
        raise InvalidSampleError(f"{field} is {value!r}, no number") from exc
    if isinstance(value, str):
        raise InvalidSampleError(f"{field} is the text {value!r}, no number")
    return number
