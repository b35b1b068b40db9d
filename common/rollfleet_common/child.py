"""A child process that ends with the process that started it, also when that one is killed with -9.

- On Linux by a parent-death signal, elsewhere by a watchdog on a pipe that only we hold open.
- No Python runs between fork and exec, which could deadlock in a program with threads.
- The child has a session of its own: Ctrl-C in our terminal does not reach it.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

__all__ = ["GuardedChild"]

STOP_TIMEOUT_S = 10.0

#: Sets PR_SET_PDEATHSIG (1) to SIGKILL (9) in a fresh interpreter and becomes the program: what
#: preexec_fn would do, after exec instead of before. The parent may have died before the prctl.
_LAUNCHER = (
    "import ctypes, os, sys\n"
    "ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)\n"
    "os.getppid() == int(sys.argv[1]) or sys.exit('the parent is gone')\n"
    "os.execv(sys.argv[2], sys.argv[2:])\n"
)
#: Reads a pid, then waits until the pipe closes, which it does when we die, and kills that pid.
_WATCHDOG = 'IFS= read -r pid || exit 0; IFS= read -r _; kill -9 "$pid"'


def has_death_signal() -> bool:
    """Whether the kernel ends the child for us."""
    return sys.platform == "linux" and bool(sys.executable)


class GuardedChild:
    """A process, started and awaited by a thread of its own.

    The kernel sends the parent-death signal when the *thread* that started the child ends, so that
    thread does nothing but wait for the child: it never ends first while this process lives.

    Args:
        command: The program, by its path, and its arguments.
        log: Standard output and error are appended here.
        pass_fds: Descriptors that the child inherits under the same numbers.

    Raises:
        OSError: It could not be started.
    """

    def __init__(self, command: Sequence[str], *, log: Path, pass_fds: Sequence[int] = ()) -> None:
        if not os.access(command[0], os.X_OK):
            # The launcher's own exec would say so too late, and only in the log.
            raise OSError(f"{command[0]} is not an executable file")
        self._command, self._log, self._pass_fds = list(command), log, tuple(pass_fds)
        self._process: subprocess.Popen[bytes] | None = None
        self._error: OSError | None = None
        self._started, self._ended = threading.Event(), threading.Event()
        threading.Thread(target=self._run, name="guarded-child", daemon=True).start()
        self._started.wait()
        if self._error is not None:
            raise self._error

    @property
    def pid(self) -> int | None:
        """Its process id, also after its end."""
        return None if self._process is None else self._process.pid

    @property
    def returncode(self) -> int | None:
        """As in subprocess: -9 for SIGKILL; None while it runs."""
        return None if self._process is None else self._process.returncode

    def alive(self) -> bool:
        """Whether it still runs."""
        return not self._ended.is_set()

    def end(self, how: signal.Signals) -> None:
        """Send `how` and wait until it is gone; after 10 s, SIGKILL."""
        for each in (how, signal.SIGKILL):
            if self._process is not None and self.alive():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._process.pid, each)
                    # A stopped process takes no SIGTERM until it goes on.
                    os.kill(self._process.pid, signal.SIGCONT)
            if self._ended.wait(STOP_TIMEOUT_S):
                return

    def _run(self) -> None:
        watchdog = None
        try:
            watchdog = None if has_death_signal() else _start_watchdog()
            self._process = process = self._start()
            if watchdog is not None and watchdog.stdin is not None:
                watchdog.stdin.write(b"%d\n" % process.pid)
                watchdog.stdin.flush()
            self._started.set()
            process.wait()
        except OSError as exc:
            self._error = exc
        finally:
            if watchdog is not None and watchdog.stdin is not None:
                # Killed, not let go: the pid that it watches may be another process's by now.
                watchdog.kill()
                watchdog.wait()
                watchdog.stdin.close()
            self._ended.set()
            self._started.set()

    def _start(self) -> subprocess.Popen[bytes]:
        command = self._command
        if has_death_signal():
            launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid())]
            command = [*launcher, *command]
        with self._log.open("ab") as log:
            return subprocess.Popen(  # noqa: S603  # the caller's command, no shell
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=self._pass_fds,
                start_new_session=True,
            )


def _start_watchdog() -> subprocess.Popen[bytes]:
    return subprocess.Popen(  # noqa: S603  # a constant
        ["/bin/sh", "-c", _WATCHDOG], stdin=subprocess.PIPE, start_new_session=True
    )
