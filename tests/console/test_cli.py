"""The command `rollfleet`: what it prints, where, and with which exit code."""

import http.server
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

from rollfleet_common.errors import BrokerSetupError
from rollfleet_console.cli import app
from rollfleet_worker.settings import WorkerSettings

NOBODY = "redis://:sesame@127.0.0.1:1"


def command(*args: str, **env: str) -> "subprocess.CompletedProcess[str]":
    clean = {k: v for k, v in os.environ.items() if not k.startswith("ROLLFLEET_")}
    return subprocess.run(
        [sys.executable, "-m", "rollfleet_console", *args],
        env=clean | {"COLUMNS": "100", "NO_COLOR": "1"} | env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@contextmanager
def health(status: int, body: bytes) -> Iterator[int]:
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/readyz" else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | BaseException], list[Any]]:
    """Puts an answer in the place of the daemon; returns the settings that it was given."""

    def put(answer: int | BaseException) -> list[Any]:
        given: list[Any] = []

        def run(settings: WorkerSettings) -> int:
            given.append(settings)
            if isinstance(answer, BaseException):
                raise answer
            return answer

        monkeypatch.setattr(importlib.import_module("rollfleet_worker.daemon"), "run", run)
        return given

    return put


def test_help_is_there_at_once_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from rollfleet_console.cli import app; "
        "from typer.testing import CliRunner; r = CliRunner().invoke(app, ['--help']); "
        "assert r.exit_code == 0, r.output; "
        "bad = {'torch', 'numpy', 'redis', 'pydantic', 'aiohttp'} & set(sys.modules); "
        "assert not bad, bad; print(r.output)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    for name in ("worker", "status", "dead", "demo", "version"):
        assert name in done.stdout


def test_version() -> None:
    done = command("version")
    assert done.returncode == 0
    assert done.stdout.startswith("rollfleet 0.")


def test_worker_help_tells_every_setting() -> None:
    done = command("worker", "--help")
    assert done.returncode == 0
    words = done.stdout
    for one in WorkerSettings.described():
        assert one.flag.partition(" ")[0] in words, one.name
    assert "How many episodes run at once in this worker." in words
    assert "[default: 16MiB]" in words
    assert "--config" in words
    assert "Flags win over variables, these over the file." in " ".join(words.split())


@pytest.mark.parametrize(
    ("args", "env", "said"),
    [
        (["worker"], {}, "rollfleet: a worker needs at least one workflow"),
        (
            ["worker", "--slto", "3"],
            {},
            "rollfleet: flag --slto is no setting of rollfleet worker;",
        ),
        (["worker", "--check"], {}, "rollfleet: --check needs a health_port that is known"),
        (["status"], {"ROLLFLEET_REDIS_URL": NOBODY}, "rollfleet: Redis at redis://:***@127.0.0.1"),
        (["status"], {"ROLLFLEET_REDIS_URL": "http://x"}, "unknown scheme; write redis://host"),
        (
            ["dead", "list", "--redis-url", "embedded://"],
            {},
            "names no directory that is there",
        ),
        (
            ["status", "--redis-url", "embedded:///no/such/dir"],
            {},
            "names no directory that is there",
        ),
        (
            ["status", "--redis-url", "redis://:sesame@[bad"],
            {},
            "redis://:***@[bad' cannot be pars",
        ),
        (["status", "--redis-url", "redis://:ses#ame@h"], {}, "(# is %23)"),
        (["status", "--redis-url", "embedded:///tmp#b"], {}, "as %23"),
        (["status", "--redis-url", "redis://:sesame@a..b"], {}, "check the host"),
        (["status", "--redis-url", "rediss://:sesame@h?ssl_x=1"], {}, "the query"),
        (["status", "--run", "a/b"], {}, "cannot be part of a Redis key"),
        (["status", "--config", "/no/such"], {}, "settings file /no/such"),
        (["status", "--config", "/"], {}, "settings file /: Is a directory"),
        (["server", "add", "http://[bad"], {}, "should be a URL"),
        (["doctor", "--lease", "soon"], {}, "--lease = 'soon'"),
        (
            [
                "worker",
                "--workflow",
                "rollfleet_demo.workflow:Sort",
                "--redis-url",
                "redis://:sesame@[bad",
            ],
            {},
            "cannot be pa",
        ),
    ],
)
def test_errors_are_one_line_on_stderr_and_exit_code_2(
    args: list[str], env: dict[str, str], said: str
) -> None:
    done = command(*args, **env)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stdout == ""
    assert "sesame" not in done.stderr


def test_an_unknown_command_names_the_nearest() -> None:
    done = command("stauts")
    assert done.returncode == 2
    assert "Did you mean 'status'?" in done.stderr


def test_the_worker_runs_with_its_settings_and_its_exit_code(
    daemon: Callable[[int | BaseException], list[Any]], tmp_path: Path
) -> None:
    path = tmp_path / "r.toml"
    path.write_text('run = "r1"\n[worker]\nslots = 3\nserver_cap = 9')
    given = daemon(7)
    args = ["worker", "--workflow", "math=a.b:C", "--config", str(path), "--server", "http://x:1"]
    result = CliRunner().invoke(app, [*args, "--strict", "--slots=4"])
    assert result.exit_code == 7, result.output
    (settings,) = given
    assert (settings.run, settings.slots, settings.server_cap) == ("r1", 4, 9)
    assert (settings.servers, settings.strict) == (["http://x:1"], True)


def test_what_the_worker_refuses_is_said_in_one_line(
    daemon: Callable[[int | BaseException], list[Any]],
) -> None:
    daemon(BrokerSetupError("maxmemory-policy is allkeys-lru"))
    result = CliRunner().invoke(app, ["worker", "--workflow", "a.b:C"])
    assert result.exit_code == 2
    assert result.stderr == "rollfleet: maxmemory-policy is allkeys-lru\n"


def test_a_defect_keeps_its_traceback(
    daemon: Callable[[int | BaseException], list[Any]],
) -> None:
    daemon(ZeroDivisionError("a defect"))
    result = CliRunner().invoke(app, ["worker", "--workflow", "a.b:C"])
    assert isinstance(result.exception, ZeroDivisionError)


@pytest.mark.parametrize(
    ("status", "body", "code", "said"),
    [(200, b"ok\n", 0, "ready"), (503, b"no-redis\n", 1, "not ready: no-redis")],
)
def test_check_asks_the_worker_of_this_host(status: int, body: bytes, code: int, said: str) -> None:
    with health(status, body) as port:
        args = ["worker", "--check", "--health-port", str(port), "--health-host", "0.0.0.0"]  # noqa: S104
        result = CliRunner().invoke(app, args)
        assert (result.exit_code, result.stdout) == (code, f"{said}\n")
        # A container's proxy variables have no say.
        done = command(
            *("worker", "--check"),
            ROLLFLEET_HEALTH_PORT=str(port),
            http_proxy="http://127.0.0.1:1",
        )
        assert (done.returncode, done.stdout) == (code, f"{said}\n")


def test_check_of_a_worker_that_is_not_there() -> None:
    result = CliRunner().invoke(app, ["worker", "--check", "--health-port", "1"])
    assert result.exit_code == 1
    assert "not ready: http://127.0.0.1:1/readyz does not answer" in result.stdout
    result = CliRunner().invoke(app, ["worker", "--check", "--health-port=1", "--health-host=::"])
    assert "not ready: http://[::1]:1/readyz does not answer" in result.stdout


def test_demo_hands_on_only_what_was_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[dict[str, Any]] = []
    job = ModuleType("rollfleet_demo.job")
    job.main = given.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rollfleet_demo.job", job)
    report = tmp_path / "r.json"
    args = ["demo", "--steps", "3", "--report", str(report), "--kill-worker-at", "2"]
    assert CliRunner().invoke(app, args).exit_code == 0
    assert given == [{"steps": 3, "report": report, "kill_worker_at": 2}]
    job.main = lambda _: 3  # type: ignore[attr-defined]
    assert CliRunner().invoke(app, ["demo"]).exit_code == 3


def test_demo_without_torch_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> ModuleType:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(importlib, "import_module", missing)
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == 2
    assert 'the demo needs torch: pip install "rollfleet[demo]"' in result.stderr


def test_ctrl_c_ends_watch_with_130(redis_url: str) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("ROLLFLEET_")}
    args = [sys.executable, "-m", "rollfleet_console", "status", "--watch", "--interval", "0.1"]
    with subprocess.Popen(
        [*args, "--redis-url", redis_url],
        env=env | {"COLUMNS": "100", "TERM": "xterm", "FORCE_COLOR": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        seen = b""
        while b"Ctrl-C ends it" not in seen:
            more = os.read(process.stdout.fileno(), 65536)
            assert more, process.stderr.read()
            seen += more
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        process.stdout.read()
        assert b"Traceback" not in process.stderr.read()


def test_status_of_an_embedded_run_by_its_directory(
    make_server: Callable[..., Any], tmp_path: Path
) -> None:
    make_server(tmp_path)
    done = command("status", "--json", "--redis-url", f"embedded://{tmp_path}")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["policy"] is None
