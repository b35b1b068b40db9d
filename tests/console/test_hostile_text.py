"""Whatever stands in Redis, what a command prints obeys no one: no control character but newline."""

import asyncio
import json
from typing import Any

import pytest
from fixtures.staged import StagedRun
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from rollfleet_common.errors import BrokerError
from rollfleet_common.logs import configure_logs, get_logger
from rollfleet_common.servers import ServerWeights, WeightState
from rollfleet_console import cli, dead_letters
from rollfleet_console.cli import app
from rollfleet_console.commands.options import show
from rollfleet_console.doctor import examine
from rollfleet_console.status import render, servers
from rollfleet_console.status.snapshot import take

#: Clear the screen, change the title, go up, C1, overrides of direction, markup, a lone surrogate.
HOSTILE = "\x1b[2J\x1b]0;owned\x07\r\x08\x9b1A\u202eevil\u2066[red]x[/red][/]\ud800\x00\n\t"
UNSAFE = {*map(chr, range(32)), *map(chr, range(127, 160)), *"\u202a\u202e\u2066\u2069\u200f\u2028"}
COMMANDS = (
    ["status"],
    ["status", "--json"],
    ["doctor"],
    ["doctor", "--json"],
    ["server", "list"],
    ["server", "list", "--json"],
    ["dead", "list"],
    ["dead", "list", "--json"],
)


def safe(output: str) -> None:
    output.encode()
    found = {c for c in output if c in UNSAFE and c != "\n"}
    assert not found, found


def run(url: str, *args: str) -> str:
    result = CliRunner().invoke(app, [*args, "--redis-url", url, "--run", "staged"])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code in (0, 1, 2), result.output
    safe(result.output)
    if "--json" in args:
        json.loads(result.output)
    return result.output


def wire(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def hostile_card(text: str) -> dict[str, Any]:
    names = ("host", "version", "state", "extra")
    return {
        **dict.fromkeys(names, text),
        "routes": [text, "default"],
        "servers": [{"name": text, "state": text, "error": text, "why": text, "version": 3}],
        "slots": 4,
    }


async def plant(run_: StagedRun, text: str) -> None:
    c, k = run_.client, run_.part()
    for name, card in (
        (b"w0", json.dumps(hostile_card(text)).encode()),
        (
            wire(text) or b"-",
            json.dumps(hostile_card(text), ensure_ascii=False).encode("utf-8", "replace"),
        ),
        (b"w-brackets", b"[" * 100_000),
        (b"w-number", b'{"pid": ' + b"9" * 5000 + b"}"),
        (b"w-inf", b'{"slots": 1e999, "seen_ms": NaN}'),
    ):
        await c.hset(run_.keys.workers, name, card)
    await c.hset(run_.keys.servers, wire(text) or b"-", b"{}")
    await c.hset(
        run_.keys.weights, wire(text) or b"-", b'{"state": "stale", "why": "%b"}' % wire(text)
    )
    row = ServerWeights(
        "http://s", WeightState.STALE, 3, why=text.encode("utf-8", "replace").decode()
    )
    await run_.board.publish("trainer-1", {"warnings": json.dumps([text])})
    await c.hset(run_.keys.board, "who", wire(text))
    await c.hset(run_.keys.weights, "http://s", json.dumps({"state": "stale", "why": row.why}))
    await c.sadd(k.routes, wire(text))
    await c.hset(k.ledger, wire(f"dropped:{text}"), 1)
    await c.hset(k.group(text.encode("utf-8", "replace").decode()), wire(text) or b"-", wire(text))
    await c.xgroup_createconsumer(k.prompts("default"), "workers", wire(text) or b"-")
    fields = {name: wire(text) for name in ("g", "i", "a", "k", "n", "why", "from")}
    await c.xadd(k.dead, {**fields, "d": b"\xc1", "e": wire(text) + b"\n" + b"[" * 100_000})
    record = json.dumps({"attempt": text, "kind": text, "detail": text, "worker": text})
    await c.xadd(k.dead, {**fields, "why": "data", "d": b"\xc1", "e": record.encode()})
    await c.xadd(k.rollouts, {wire(text) or b"-": wire(text), "h": wire(text)})


async def test_no_command_prints_what_a_terminal_would_obey(redis_url: str) -> None:
    async with StagedRun(redis_url) as staged:
        await staged.open()
        await staged.submit("g0", 2)
        await staged.claim("w0", 1)
        await plant(staged, HOSTILE)
        for command in COMMANDS:
            await asyncio.to_thread(run, redis_url, *command)
        async for letter in dead_letters.read(staged.client, "staged"):
            for more in ([], ["--json"]):
                await asyncio.to_thread(run, redis_url, "dead", "show", letter.id, *more)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=st.text(max_size=60) | st.text(st.characters(max_codepoint=160), max_size=60))
async def test_any_text_in_any_field_is_drawn_safely(redis_url: str, text: str) -> None:
    """What is drawn has no control characters for any width."""
    async with StagedRun(redis_url) as staged:
        await staged.open()
        await staged.submit("g0", 2)
        await staged.claim("w0", 1)
        await plant(staged, text)
        snapshot = await take(staged.client, "staged")
        letters = await dead_letters.select(staged.client, "staged")
        report = await examine.examine(staged.client, "staged", pause_s=0)
        for width in (80, 200):
            for drawn in (
                render.render(snapshot),
                servers.render_servers(snapshot.servers),
                dead_letters.render_list(letters),
                *map(dead_letters.render_letter, letters),
                examine.render(report),
            ):
                console = Console(width=width, highlight=False)
                with console.capture() as captured:
                    console.print(drawn)
                safe(captured.get())


def test_what_was_not_made_printable_before_is_made_so_where_it_is_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from rich.text import Text  # noqa: PLC0415

    show(Text(HOSTILE))
    said = capsys.readouterr().out
    safe(said)
    assert "\\x1b[2J" in said


def test_an_error_is_told_safely(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise BrokerError(HOSTILE)

    monkeypatch.setattr(cli, "ask", refuse)
    result = CliRunner().invoke(app, ["status", "--redis-url", "redis://h", "--run", "r"])
    assert result.exit_code == 2
    safe(result.output)


@pytest.mark.parametrize("style", ["console", "json"])
def test_a_worker_logs_no_escape_sequences(
    style: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    undo = configure_logs("info", style)
    try:
        get_logger("rollfleet.x").error("episode failed", detail=HOSTILE, group=HOSTILE)
    finally:
        undo()
    safe(capsys.readouterr().err)


def test_what_goes_into_a_pipe_is_not_wrapped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.text import Text  # noqa: PLC0415

    monkeypatch.delenv("COLUMNS", raising=False)
    show(Text("word " * 100))
    assert capsys.readouterr().out.count("\n") == 1
    monkeypatch.setenv("COLUMNS", "80")
    show(Text("word " * 100))
    assert capsys.readouterr().out.count("\n") > 5


def test_a_narrow_terminal_has_room_for_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    from rollfleet_console.status.views import FleetServer  # noqa: PLC0415

    why = "it answered 500 to /v1/completions five times in a row: CUDA out of memory"
    server = FleetServer(
        "http://10.0.0.1:8000", True, "vllm", False, "stale", 3, why, {"out": 2}, 0, 8, (3,)
    )
    for width in (80, 200):
        Console(width=width, highlight=False).print(servers.render_servers((server,)))
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) <= 4
        assert max(map(len, lines)) <= width
        assert why[:50] in " ".join(lines)
