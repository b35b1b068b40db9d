"""`make vllm`: the client against a real vLLM on this machine, from nothing to a summary.

- Builds the tiny model if it is not there, starts a server on a free port of 127.0.0.1, runs
  tests/vllm against it with the project's own environment, and stops everything.
- Bounded: a suite that takes longer than ``--timeout-s`` is ended and counts as failed.
- A server's log is shown if it did not start, and kept beside the model.

Exit code: pytest's; 1 if it never came to that.
"""

# ruff: noqa: T201  # a program that prints

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rollfleet_common.errors import RollfleetError
from rollfleet_demo.vllm_server import VllmServer, find_vllm

__all__ = ["main"]

HERE = Path(__file__).parent
MODEL_TIMEOUT_S = 300.0


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm", type=Path, help="the vllm command; default: make vllm's own")
    parser.add_argument("--folder", type=Path, default=Path(".vllm"), help="for model and logs")
    parser.add_argument("--timeout-s", type=float, default=1500.0, help="for the whole suite")
    options, for_pytest = parser.parse_known_args(arguments)
    began = time.monotonic()
    try:
        vllm = find_vllm(options.vllm)
        model = _model(vllm, options.folder.absolute())
        print("starting vLLM", flush=True)
        server = VllmServer(vllm, model, _fresh(options.folder / "server.log"))
        try:
            server.wait()
            print(f"it serves at {server.url} after {time.monotonic() - began:.0f} s", flush=True)
            code = _test(server, vllm, model, for_pytest, options.timeout_s)
        finally:
            server.end()
    except RollfleetError as exc:
        print(f"make vllm: {exc}", file=sys.stderr)
        return 1
    word = "passed" if code == 0 else f"failed (exit code {code})"
    print(f"real vLLM: {word} in {time.monotonic() - began:.0f} s; log: {server.log}")
    return code


def _fresh(log: Path) -> Path:
    log.unlink(missing_ok=True)
    return log.absolute()


def _model(vllm: Path, folder: Path) -> Path:
    """The model's first weights; built if they are not there or the program has changed since."""
    program, model = HERE / "make_model.py", folder / "model"
    stamp = folder / "model.py"
    if not stamp.exists() or stamp.read_bytes() != program.read_bytes():
        print(f"building a tiny model in {model}", flush=True)
        model.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            [str(vllm.with_name("python")), str(program), str(model)],
            check=False,
            capture_output=True,
            text=True,
            timeout=MODEL_TIMEOUT_S,
        )
        if done.returncode:
            raise RollfleetError(f"the tiny model was not built: {done.stderr[-500:]}")
        stamp.write_bytes(program.read_bytes())
    return model / "v0"


def _test(
    server: VllmServer, vllm: Path, model: Path, more: Sequence[str], timeout_s: float
) -> int:
    settings = {
        "ROLLFLEET_VLLM_URL": server.url,
        "ROLLFLEET_VLLM_MODEL": str(model),
        "ROLLFLEET_VLLM_BIN": str(vllm),
    }
    env = [f"{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "pytest", str(HERE), "-q", "--durations=5", *more]
    with subprocess.Popen(["/usr/bin/env", *env, *command]) as suite:
        try:
            return suite.wait(timeout_s)
        except subprocess.TimeoutExpired:
            print(f"make vllm: the suite was not over after {timeout_s:g} s", file=sys.stderr)
            return 1
        finally:
            # By a signal that lets it end what it has started.
            if suite.poll() is None:
                suite.send_signal(signal.SIGINT)


if __name__ == "__main__":
    sys.exit(main())
