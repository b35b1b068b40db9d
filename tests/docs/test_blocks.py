"""What README and docs show: Python, commands, variables; all of it must exist."""

import ast
import importlib
import inspect
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer.main

import rollfleet
from rollfleet.settings import TrainerSettings
from rollfleet_console.cli import app
from rollfleet_worker.settings import WorkerSettings

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
#: Prefixes of variables that are of tests, and of no part of rollfleet.
TEST_VARIABLES = ("ROLLFLEET_TEST_", "ROLLFLEET_VLLM_")


def blocks() -> Iterator[Any]:
    """The Python blocks: page, line, code."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for found in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            line = text.count("\n", 0, found.start()) + 2
            yield pytest.param(found[1], id=f"{page.name}:{line}")


def tree_of(code: str) -> ast.Module:
    return ast.parse(code)


def resolve(node: ast.expr, names: dict[str, Any]) -> Any:
    """The object of ours that `node` names; None for what only a reader knows."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        return getattr(resolve(node.value, names), node.attr, None)
    return None


def known(tree: ast.Module) -> dict[str, Any]:
    """What the block imports, and the names that stand for objects of ours on all pages."""
    names: dict[str, Any] = {
        "rollfleet": rollfleet,
        "fleet": rollfleet.Fleet,
        "batch": rollfleet.Batch,
        "micros": SimpleNamespace(within=rollfleet.MicroBatches.within),
        **{name: getattr(rollfleet, name) for name in rollfleet.__all__},
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rollfleet"):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"
                names[alias.asname or alias.name] = getattr(module, alias.name)
    return names


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("code", list(blocks()))
def test_a_block_compiles_and_names_what_there_is(code: str) -> None:
    """That they also run, test_blocks_run.py shows."""
    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    compile(code, "block", "exec", flags=flags)
    tree = tree_of(code)
    names = known(tree)
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "rollfleet"
        ):
            assert hasattr(rollfleet, node.attr), f"there is no rollfleet.{node.attr}"
        if isinstance(node, ast.Call) and (call := resolve(node.func, names)) is not None:
            check_call(call, node)


def check_call(call: Any, node: ast.Call) -> None:
    """The keywords of a call are parameters, or settings where these are taken."""
    parameters = inspect.signature(call).parameters
    catches = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    settings = call in (rollfleet.connect, rollfleet.connect_ranks)
    for keyword in node.keywords:
        if keyword.arg is None or keyword.arg in parameters:
            continue
        assert catches, f"{ast.unparse(node.func)} takes no {keyword.arg}"
        if settings:
            assert keyword.arg in TrainerSettings.model_fields, f"no setting {keyword.arg}"


def shell_lines(text: str) -> Iterator[str]:
    """The lines of fenced blocks that are no Python."""
    inside = language = ""
    for line in text.splitlines():
        if line.startswith("```"):
            inside, language = ("", "") if inside else ("yes", line[3:].strip())
        elif inside and language in ("", "console", "sh", "shell", "bash"):
            yield line.removeprefix("$ ").partition(" #")[0]


def commands() -> Iterator[Any]:
    """Every `rollfleet ...` of a code block or a code span, with lines that a backslash continues."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        lines = re.findall(r"`(rollfleet [a-z][^`]*)`", text)
        lines += [line for line in shell_lines(text) if line.startswith("rollfleet ")]
        for line in dict.fromkeys(" ".join(line.split()) for line in lines):
            yield pytest.param(line, id=f"{page.name}: {line}")


@pytest.mark.parametrize("line", list(commands()))
def test_a_command_has_the_subcommand_and_the_flags_that_are_shown(line: str) -> None:
    command: Any = typer.main.get_command(app)
    words = line.split()[1:]
    where = "rollfleet"
    while words and getattr(command, "commands", None):
        names = words.pop(0).split("|")
        assert set(names) <= set(command.commands), f"{where} has no {names}"
        command, where = command.commands[names[0]], f"{where} {names[0]}"
    flags = {opt for p in command.params for opt in (*p.opts, *p.secondary_opts)} | {"--help"}
    if where == "rollfleet worker":
        flags |= {
            f for one in WorkerSettings.described() for f in re.findall(r"--[\w-]+", one.flag)
        }
        flags.add("--config")
    for flag in re.findall(r"(?<!\S)\[?(--[a-z][\w-]*)", " ".join(words)):
        assert flag in flags, f"{where} has no flag {flag}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_targets_and_variables_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shown = re.findall(r"`make ([a-z][\w-]*)", text) + re.findall(
        r"^make ([a-z][\w-]*)", text, re.MULTILINE
    )
    assert set(shown) <= targets
    settings = {*WorkerSettings.model_fields, *TrainerSettings.model_fields, "config"}
    known_names = {f"ROLLFLEET_{name.upper()}" for name in settings}
    variables = set(re.findall(r"ROLLFLEET_[A-Z_]*[A-Z]", text))
    assert {v for v in variables if not v.startswith(TEST_VARIABLES)} <= known_names


def raises(what: Any, path: str, seen: set[int]) -> Iterator[tuple[str, str]]:
    """(where, error) of every "Raises:" of a public object and its public members."""
    if id(what) in seen:
        return
    seen.add(id(what))
    section = re.search(r"^Raises:\n((?: {4}.*\n?|\n)+)", inspect.getdoc(what) or "", re.MULTILINE)
    for line in section[1].splitlines() if section else ():
        if names := re.match(r" {4}([A-Z]\w+(?:, [A-Z]\w+)*):", line):
            yield from ((path, name) for name in names[1].split(", "))
    if inspect.isclass(what) and what.__module__.startswith("rollfleet"):
        for name, member in vars(what).items():
            function = member.fget if isinstance(member, property) else member
            function = getattr(function, "__func__", function)
            if not name.startswith("_") and callable(function):
                yield from raises(function, f"{path}.{name}", seen)


def test_every_error_that_public_docstrings_name_is_exported() -> None:
    seen: set[int] = set()
    said = [
        each for name in rollfleet.__all__ for each in raises(getattr(rollfleet, name), name, seen)
    ]
    assert len(said) > 40
    builtin = {"OSError", "ValueError"}
    missing = [(path, name) for path, name in said if name not in {*rollfleet.__all__, *builtin}]
    assert not missing


def test_blocks_are_of_languages_that_are_checked() -> None:
    """A block of another language (TOML, YAML) needs a test here that parses it."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        opened = re.findall(r"^```([a-z]*)\n.*?^```$", text, re.MULTILINE | re.DOTALL)
        assert {*opened} <= {"", "console", "python"}, page.name


def modules() -> list[str]:
    """Every `python -m ...` of a block, with lines that a backslash continues."""
    text = "\n".join(page.read_text(encoding="utf-8").replace("\\\n", " ") for page in PAGES)
    return sorted({line for line in shell_lines(text) if line.startswith("python -m ")})


@pytest.mark.parametrize("line", modules())
def test_a_module_takes_the_flags_that_are_shown(line: str) -> None:
    module, *words = line.removeprefix("python -m ").split()
    shown = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    taken = set(re.findall(r"--[a-z][\w-]*", shown))
    assert {word for word in words if word.startswith("--")} <= taken


def test_the_page_of_settings_is_current() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "settings_page.py"))["page"]()
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == made
