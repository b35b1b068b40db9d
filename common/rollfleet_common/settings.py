"""Settings of every part of rollfleet: one frozen object, loaded from four places, errors in words.

- Flags win over ``ROLLFLEET_*`` variables, these over the TOML file, and that over the defaults. A
  list or table is taken whole from one place, never merged.
- Nothing is guessed: an unknown name is an error that names the nearest known one. Only variables
  are warned about instead, because other parts share the prefix. Those that Kubernetes sets for a
  Service whose name begins with ``rollfleet`` are ignored, or refused where they hit a setting.
- Every message says which value is wrong, what is allowed and where the value came from, and never
  shows a secret.

One file serves all parts: what they share stands at its top, the rest in a section per part::

    redis_url = "redis://10.0.0.5:6379/0"
    run = "math-7b"

    [worker]
    slots = 128
    lease_s = "30s"
"""

import argparse
import difflib
import logging
import os
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, ClassVar, NoReturn, Self, get_args

from pydantic import AfterValidator, Field, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from rollfleet_common.errors import SettingsError
from rollfleet_common.keys import check_name
from rollfleet_common.units import DURATION_S, SIZE_BYTES, units_of

__all__ = ["ENV_PREFIX", "PARTS", "Described", "Name", "Settings"]

ENV_PREFIX = "ROLLFLEET_"
#: Sections that a TOML file may have: one file serves all parts, each reads its own.
PARTS = ("worker", "trainer", "console")
#: Variables with the prefix that are no settings.
_OTHER_ENV = ("ROLLFLEET_CONFIG", "ROLLFLEET_TEST_")
#: What Kubernetes adds to a pod's variables for every Service: that of `rollfleet-redis` begins with
#: ROLLFLEET_REDIS_.
_SERVICE_LINK = re.compile(
    r"\w+_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_SERVICE_LINK_URL = re.compile(r"(tcp|udp|sctp)://")

_log = logging.getLogger("rollfleet.settings")

#: What may stand in a Redis key.
Name = Annotated[str, AfterValidator(lambda name: check_name(name, "the name"))]


@dataclass(frozen=True, slots=True)
class Described:
    """One setting, for people."""

    name: str
    #: As it is written on the command line: ``--server URL``.
    flag: str
    env: str
    #: Empty if there is none.
    default: str
    text: str
    repeatable: bool


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{self.prog}: {message}")


class Settings(BaseSettings):
    """What every part needs: where Redis is, and which run is meant.

    A part derives from it and names itself in `part`. ``Part(...)`` takes values as they are given
    and reads nothing else; :meth:`load` reads flags, variables and file.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_ignore_empty=True,
        enable_decoding=False,
        frozen=True,
        extra="forbid",
        str_strip_whitespace=True,
        hide_input_in_errors=True,
        protected_namespaces=(),
    )

    #: Section of the TOML file, and the name in messages.
    part: ClassVar[str] = "console"
    #: Whether every ROLLFLEET_* variable is meant for this part. The console also runs inside the
    #: containers of other parts, where it warns of misspellings of its own names only.
    owns_env: ClassVar[bool] = False

    redis_url: str = Field(
        "redis://127.0.0.1:6379/0",
        min_length=1,
        repr=False,  # it may hold a password
        description="Where Redis is: redis://, rediss:// (TLS), unix:// or embedded://.",
        json_schema_extra={"metavar": "URL"},
    )
    run: Name = Field(
        "default", description="Which run to work for: a namespace of its own in one Redis."
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003  # all of it is pydantic-settings' own
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what the constructor is given: merged sources forget where a value came from."""
        return (init_settings,)

    @classmethod
    def load(
        cls, *, config: Path | None = None, argv: Sequence[str] | None = None, **overrides: Any
    ) -> Self:
        """Settings from flags, variables, a TOML file and defaults, in this order of precedence.

        Args:
            config: The TOML file; else what ``--config`` or ROLLFLEET_CONFIG names; else none.
            argv: Flags, without the program's name; None for none.
            overrides: Values by field name that win over all else.

        Raises:
            SettingsError: A name is unknown, a value is not allowed, or the file cannot be read.
        """
        flags, named = cls._from_flags(argv or ())
        path = config or named or Path(os.environ.get("ROLLFLEET_CONFIG", ""))
        values: dict[str, Any] = {}
        origins: dict[str, str] = {}
        sources = [cls._from_overrides(overrides), flags, cls._from_env()]
        if path != Path():
            sources.append(cls._from_file(path))
        for source in sources:
            for name, (value, origin) in source.items():
                if name not in values:
                    values[name], origins[name] = value, origin
        try:
            return cls(**values)
        except ValidationError as exc:
            problems = [cls._problem(error, values, origins) for error in exc.errors()]
        many = f"{len(problems)} settings are wrong: " if len(problems) > 1 else ""
        raise SettingsError(f"{many}{'; '.join(problems)}")

    @classmethod
    def described(cls) -> list[Described]:
        """All settings in the order of their definition, for a help page."""
        described = []
        for name, field in cls.model_fields.items():
            is_bool = field.annotation is bool
            flag = _flag(name, field)
            described.append(
                Described(
                    name=name,
                    flag=f"{flag} / --no-{flag[2:]}" if is_bool else f"{flag} {_metavar(field)}",
                    env=ENV_PREFIX + name.upper(),
                    default=_default(field),
                    text=field.description or "",
                    repeatable=_repeatable(field),
                )
            )
        return described

    # ---- where values come from: {name: (value, origin)} -------------------------------------

    @classmethod
    def _from_overrides(cls, overrides: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
        for name in overrides:
            if name not in cls.model_fields:
                raise _unknown(f"argument {name!r}", cls.part, name, cls.model_fields)
        return {name: (value, f"argument {name}") for name, value in overrides.items()}

    @classmethod
    def _from_flags(cls, argv: Sequence[str]) -> tuple[dict[str, tuple[Any, str]], Path | None]:
        parser = _Parser(prog=f"rollfleet {cls.part}", add_help=False, allow_abbrev=False)
        parser.add_argument("--config", type=Path)
        flags = {name: _flag(name, field) for name, field in cls.model_fields.items()}
        for name, field in cls.model_fields.items():
            options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS}
            if field.annotation is bool:
                options["action"] = argparse.BooleanOptionalAction
            elif _repeatable(field):
                options["action"] = "append"
            parser.add_argument(flags[name], **options)
        parsed, rest = parser.parse_known_args(list(argv))
        if rest:
            said = rest[0].partition("=")[0]
            what = f"flag {said}" if said.startswith("-") else f"argument {said!r}"
            raise _unknown(what, cls.part, said, [*flags.values(), "--config"])
        given = vars(parsed)
        path = given.pop("config")
        return {name: (value, f"flag {flags[name]}") for name, value in given.items()}, path

    @classmethod
    def _from_env(cls) -> dict[str, tuple[Any, str]]:
        known = {ENV_PREFIX + name.upper(): name for name in cls.model_fields}
        for said, value in sorted(os.environ.items()):
            if not said.startswith(ENV_PREFIX) or said in known or said.startswith(_OTHER_ENV):
                continue
            if _is_service_link(said, value):
                continue
            bare = said.removeprefix(ENV_PREFIX).lower()
            near = difflib.get_close_matches(bare, cls.model_fields, 1, 0.7)
            if near or cls.owns_env:
                hint = f"; did you mean {ENV_PREFIX}{near[0].upper()}?" if near else ""
                _log.warning(
                    "variable %s is no setting of rollfleet %s and is ignored%s",
                    *(said, cls.part, hint),
                )
        found = EnvSettingsSource(cls)()
        return {
            name: (found[name], f"variable {variable}")
            for variable, name in known.items()
            if name in found
        }

    @classmethod
    def _from_file(cls, path: Path) -> dict[str, tuple[Any, str]]:
        try:
            tree = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as exc:
            raise SettingsError(f"settings file {path}: {exc.strerror or exc}") from exc
        except ValueError as exc:  # TOMLDecodeError and UnicodeDecodeError
            raise SettingsError(f"settings file {path} is not TOML: {exc}") from exc
        section = tree.pop(cls.part, {})
        if not isinstance(section, dict):
            raise SettingsError(f"settings file {path}: {cls.part} should be a table: [{cls.part}]")
        shared = Settings.model_fields
        for name, value in tree.items():
            if name in shared or name in PARTS:
                continue
            if name in cls.model_fields:
                raise SettingsError(
                    f"settings file {path}: {name} stands at the top, where only "
                    f"{' and '.join(shared)} may; move it below [{cls.part}]"
                )
            what = f"section [{name}]" if isinstance(value, dict) else f"key {name!r}"
            known = [*shared, *PARTS, *cls.model_fields]
            raise _unknown(f"settings file {path}: {what}", cls.part, name, known)
        for name in section:
            if name not in cls.model_fields:
                what = f"settings file {path}: key {name!r} in [{cls.part}]"
                raise _unknown(what, cls.part, name, cls.model_fields)
        top = {name: (tree[name], f"file {path}") for name in shared if name in tree}
        return top | {name: (v, f"file {path} [{cls.part}]") for name, v in section.items()}

    @classmethod
    def _problem(
        cls, error: ErrorDetails, values: Mapping[str, Any], origins: Mapping[str, str]
    ) -> str:
        """One validation error in words: the field, its value, its origin, what is allowed."""
        said = error["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
        said = said.replace("Input should be", "should be")
        if not error["loc"]:
            return said
        name = str(error["loc"][0])
        where = "".join(f"[{part!r}]" for part in error["loc"][1:])
        if name not in values:
            return f"{name}{where}: {said}"
        variable = ENV_PREFIX + name.upper()
        if origins[name] == f"variable {variable}" and _is_service_link(variable, values[name]):
            flag = _flag(name, cls.model_fields[name])
            service = variable.removesuffix("_PORT").lower().replace("_", "-")
            said = (
                f"Kubernetes sets this variable for the Service {service!r}; set enableServiceLinks: "
                f"false in the pod's spec, rename the Service, or give {flag}, which wins"
            )
        return f"{name}{where} = {cls._shown(name, values[name])} (from {origins[name]}): {said}"

    @classmethod
    def _shown(cls, name: str, value: Any) -> str:
        field = cls.model_fields[name]
        if not field.repr or SecretStr in (field.annotation, *get_args(field.annotation)):
            return "***"
        # Also where somebody forgot the scheme.
        return re.sub(r"://[^@/\s]*@|[\w.%+~-]+:[^@/\s'\"]+@", _masked, repr(value))


def _is_service_link(variable: str, value: Any) -> bool:
    if _SERVICE_LINK.fullmatch(variable):
        return True
    return variable.endswith("_PORT") and _SERVICE_LINK_URL.match(str(value)) is not None


def _masked(found: "re.Match[str]") -> str:
    return "://***@" if found[0].startswith("://") else "***@"


def _extra(field: FieldInfo, key: str) -> str:
    extra = field.json_schema_extra
    return str(extra.get(key, "")) if isinstance(extra, dict) else ""


def _flag(name: str, field: FieldInfo) -> str:
    return f"--{_extra(field, 'flag') or name.replace('_', '-')}"


def _repeatable(field: FieldInfo) -> bool:
    return getattr(field.annotation, "__origin__", None) in (list, dict)


def _default(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True, validated_data={})
    if default in (None, PydanticUndefined, [], {}):
        return ""
    if isinstance(default, bool):
        return str(default).lower()
    if not isinstance(default, (int, float)):
        return str(default)
    if units_of(field) is DURATION_S:
        return f"{default:g}s"
    if units_of(field) is SIZE_BYTES and default % 2**20 == 0:
        return f"{int(default) // 2**20}MiB"
    return str(default) if isinstance(default, int) else f"{default:g}"


def _metavar(field: FieldInfo) -> str:
    if said := _extra(field, "metavar"):
        return said
    if units := units_of(field):
        return "TIME" if units is DURATION_S else "SIZE"
    kinds = [k for k in get_args(field.annotation) or (field.annotation,) if k is not NoneType]
    if all(isinstance(kind, str) for kind in kinds):
        return "|".join(map(str, kinds))
    return {int: "N", float: "X", SecretStr: "SECRET"}.get(kinds[0], "TEXT")


def _unknown(what: str, part: str, name: str, known: Iterable[str]) -> SettingsError:
    names = sorted(known)
    near = difflib.get_close_matches(name, names, 1, 0.5)
    if near:
        hint = f"did you mean {near[0]}?"
    else:
        hint = f"see rollfleet {part} --help" if len(names) > 12 else f"known: {', '.join(names)}"
    return SettingsError(f"{what} is no setting of rollfleet {part}; {hint}")
