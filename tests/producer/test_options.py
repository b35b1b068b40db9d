"""The options that editors complete are the settings that a trainer has: names, types, defaults."""

import ast
import inspect
import re
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from pydantic import SecretStr

import rollfleet
from rollfleet import AsyncFleet, Fleet, RankFleet, SettingsError, TrainerOptions, TrainerSettings
from rollfleet import options as module
from rollfleet_common.units import DURATION_S, SIZE_BYTES, units_of

#: Parameters of their own in `connect`.
OWN = {"redis_url", "policy"}
FIELDS = {k: v for k, v in TrainerSettings.model_fields.items() if k not in OWN}


def documented() -> dict[str, str]:
    """What stands below each option."""
    tree = ast.parse(inspect.getsource(module))
    (table,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "TrainerOptions"]
    body = table.body[1:]
    return {
        one.target.id: " ".join(text.value.value.split())
        for one, text in zip(body[::2], body[1::2], strict=True)
        if isinstance(one, ast.AnnAssign)
        and isinstance(one.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def default_of(name: str) -> Any:
    return FIELDS[name].get_default(call_default_factory=True, validated_data={})


def options(hint: Any) -> set[Any]:
    """A union as a set."""
    return {hint} if get_origin(hint) is Literal else set(get_args(hint)) or {hint}


def test_the_options_are_the_settings_by_name() -> None:
    assert set(get_type_hints(TrainerOptions)) == set(FIELDS)
    assert not TrainerOptions.__required_keys__


@pytest.mark.parametrize("name", FIELDS)
def test_an_option_has_the_type_of_its_setting(name: str) -> None:
    field = FIELDS[name]
    want = options(field.annotation)
    if units_of(field):  # may also be written with a unit
        want |= {str}
    if SecretStr in want:
        want |= {str}
    if get_origin(field.annotation) is list:
        assert get_type_hints(TrainerOptions)[name].__args__ == get_args(field.annotation)
    else:
        assert options(get_type_hints(TrainerOptions)[name]) == want


@pytest.mark.parametrize("name", FIELDS)
def test_an_option_says_its_default_and_unit(name: str) -> None:
    text, default = documented()[name], default_of(name)
    (said,) = re.findall(r"Default: (.*?)(?:, which is .*|, whole groups only)?\.$", text)
    if default == []:
        assert said == "none"
    elif isinstance(default, str):
        assert said == f'``"{default}"``'
    elif isinstance(default, bool | NoneType):
        assert said == str(default)
    else:
        assert float(said) == default
    unit = {id(DURATION_S): "seconds", id(SIZE_BYTES): "bytes"}.get(id(units_of(FIELDS[name])))
    assert unit is None or f"in {unit}" in text or f", {unit}," in text


@pytest.mark.parametrize("function", [rollfleet.connect, rollfleet.connect_ranks])
def test_the_signature_shows_every_option(function: Any) -> None:
    shown = inspect.signature(function).parameters
    assert {name: shown[name].default for name in FIELDS} == {n: default_of(n) for n in FIELDS}
    assert not any(p.kind is p.VAR_KEYWORD for p in shown.values())


@pytest.mark.parametrize("function", [rollfleet.connect, rollfleet.connect_ranks])
def test_an_unknown_option_is_refused_with_the_nearest_one(function: Any) -> None:
    with pytest.raises(SettingsError, match=r"argument 'group_sise'.*group_size"):
        function("redis://127.0.0.1:1/0", group_sise=4)


def test_an_option_that_is_not_given_comes_from_elsewhere(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "rollfleet.toml"
    config.write_text('[trainer]\ngroup_size = 2\nsamples_per_version = 64\nstarve_s = "7s"\n')
    monkeypatch.setenv("ROLLFLEET_GROUP_SIZE", "4")
    with rollfleet.connect(redis_url, config=config, samples_per_version=32) as fleet:
        s = fleet.aio.settings
        assert (s.group_size, s.samples_per_version, s.starve_s) == (4, 32, 7.0)


def test_publish_has_the_same_parameters_on_every_face() -> None:
    async_face = inspect.signature(AsyncFleet.publish).parameters
    for face in (Fleet, RankFleet):
        parameters = inspect.signature(face.publish).parameters
        assert list(parameters.values()) == list(async_face.values())
