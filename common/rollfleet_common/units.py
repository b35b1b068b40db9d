"""Types of settings that people write with units, or in lists.

- A plain number is in the base unit, which the name of its setting carries: ``_s``, ``_bytes``.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic.fields import FieldInfo

from rollfleet_common.errors import SettingsError

__all__ = ["DURATION_S", "SIZE_BYTES", "Bytes", "Listed", "Seconds", "parse_seconds", "units_of"]

#: Seconds in one of each unit, in small letters.
DURATION_S = {"ms": 0.001, "": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
#: Bytes in one of each unit, in small letters.
SIZE_BYTES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}
SIZE_BYTES |= {"kib": 2**10, "mib": 2**20, "gib": 2**30}


def _measured(value: Any, units: Mapping[str, float], allowed: str) -> Any:
    """`value` in the base unit if it is text with a unit; pydantic judges everything else."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", value)
    if found is None or (unit := found.group(2).lower()) not in units:
        raise ValueError(f"should be {allowed}")
    scaled = float(found.group(1)) * units[unit]
    return int(scaled) if scaled.is_integer() else scaled


def _seconds(value: Any) -> Any:
    return _measured(
        value, DURATION_S, 'a number of seconds or a time such as "250ms", "30s", "5m"'
    )


def parse_seconds(text: str, what: str) -> float:
    """A duration that is written outside of settings.

    Raises:
        SettingsError: `text` is none; the message names `what`.
    """
    try:
        return float(_seconds(text))
    except ValueError as exc:
        raise SettingsError(f"{what} = {text!r}: {exc}") from None


def _bytes(value: Any) -> Any:
    return _measured(value, SIZE_BYTES, 'a number of bytes or a size such as "64KiB", "16MiB"')


def _listed(value: Any) -> Any:
    """Text as variables and flags write lists: JSON, or separated by commas."""
    if isinstance(value, str):
        if value.lstrip().startswith("["):
            try:
                return json.loads(value)
            except ValueError as exc:
                raise ValueError(f"should be a JSON list or separated by commas ({exc})") from None
        value = [value]
    if isinstance(value, Sequence) and all(isinstance(part, str) for part in value):
        return [word.strip() for part in value for word in part.split(",") if word.strip()]
    return value


#: A duration: a number of seconds, or text such as ``"30s"``, ``"5m"``, ``"250ms"``.
Seconds = Annotated[float, BeforeValidator(_seconds), Field(allow_inf_nan=False)]
#: A size: a number of bytes, or text such as ``"16MiB"``.
Bytes = Annotated[int, BeforeValidator(_bytes)]
#: Marks a list that variables may give as ``a,b`` or as JSON, and flags one by one.
Listed = BeforeValidator(_listed)


def units_of(field: FieldInfo) -> Mapping[str, float]:
    """The units in which a setting may be written; none for a plain number."""
    validators = [m.func for m in field.metadata if isinstance(m, BeforeValidator)]
    if _seconds in validators:
        return DURATION_S
    return SIZE_BYTES if _bytes in validators else {}
