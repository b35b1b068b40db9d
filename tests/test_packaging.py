"""What is installed: six packages and a command, workers without torch, from the wheel itself."""

import ipaddress
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from rollfleet_worker.settings import WorkerSettings

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "rollfleet",
    "rollfleet_common",
    "rollfleet_console",
    "rollfleet_demo",
    "rollfleet_engines",
    "rollfleet_worker",
}


def run(*argv: str | Path, **env: str) -> "subprocess.CompletedProcess[str]":
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("ROLLFLEET_", "PYTHON"))}
    return subprocess.run(
        [str(word) for word in argv],
        env=clean | env,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist, built with the build backend that is installed."""
    out = tmp_path_factory.mktemp("dist")
    made = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT)
    assert made.returncode == 0, made.stdout + made.stderr
    return out


def test_the_wheel_holds_the_six_packages_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == PACKAGES
    scripts = {
        path.relative_to(ROOT / "common").as_posix()
        for path in (ROOT / "common/rollfleet_common/lua").glob("*.lua")
    }
    assert scripts
    assert scripts <= set(names)
    for package in PACKAGES:
        assert f"{package}/py.typed" in names


def test_the_sdist_can_build_and_test_itself(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    wanted = {"pyproject.toml", "README.md", "LICENSE", "tests/conftest.py"}
    wanted |= {"common/rollfleet_common/lua/submit.lua", "worker/rollfleet_worker/daemon.py"}
    assert wanted <= names


def test_the_wheel_installs_and_its_command_runs(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    target = tmp_path / "env"
    made = run(sys.executable, "-m", "venv", "--without-pip", target)
    assert made.returncode == 0, made.stderr
    python = target / "bin" / "python"
    installed = run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps"),
        *("--no-index", "--disable-pip-version-check", wheel),
    )
    assert installed.returncode == 0, installed.stdout + installed.stderr
    (site,) = target.glob("lib/python*/site-packages")
    tops = {path.name for path in site.iterdir()}
    assert {top for top in tops if not top.endswith(".dist-info")} == PACKAGES
    # Its dependencies come from this environment; rollfleet itself does not.
    (site / "dependencies.pth").write_text(next(p for p in sys.path if p.endswith("site-packages")))
    said = run(target / "bin" / "rollfleet", "version")
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("rollfleet ")
    where = run(python, "-c", "import rollfleet_worker.daemon as d; print(d.__file__)")
    assert Path(where.stdout.strip()).is_relative_to(site), where.stderr


@pytest.mark.parametrize(
    "code",
    [
        "import rollfleet_worker, rollfleet_worker.daemon",
        "import rollfleet_console.cli",
        "import rollfleet; rollfleet.connect; rollfleet.Batch",
    ],
)
def test_torch_is_not_needed(code: str) -> None:
    blocked = f"import sys; sys.modules['torch'] = None; {code}; print('fine')"
    said = run(sys.executable, "-c", blocked)
    assert (said.returncode, said.stdout) == (0, "fine\n"), said.stderr


def test_torch_is_named_where_it_is_missing() -> None:
    code = "import sys; sys.modules['torch'] = None; import rollfleet; rollfleet.collate"
    said = run(sys.executable, "-c", code)
    assert said.returncode == 1
    assert "torch" in said.stderr


def test_every_public_name_is_the_same_thing_each_time_it_is_asked_for() -> None:
    """A module of the same name would take the place of a function once it was imported."""
    code = (
        "import rollfleet, types\n"
        "for name in rollfleet.__all__:\n"
        "    first, second = getattr(rollfleet, name), getattr(rollfleet, name)\n"
        "    assert first is second and not isinstance(second, types.ModuleType), name\n"
        "print('fine')"
    )
    said = run(sys.executable, "-c", code)
    assert (said.returncode, said.stdout) == (0, "fine\n"), said.stderr


def test_probes_reach_the_health_pages_of_the_worker_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bound to loopback, no kubelet and no Prometheus could reach them."""
    text = (ROOT / "worker" / "Dockerfile").read_text().replace("\\\n", " ")
    environment = {
        name: value
        for line in text.splitlines()
        if line.startswith("ENV ")
        for name, _, value in (pair.partition("=") for pair in line.split()[1:])
    }
    for name, value in environment.items():
        if name.startswith("ROLLFLEET_"):
            monkeypatch.setenv(name, value)
    settings = WorkerSettings.load(argv=[], workflows={"default": "a:B"})
    assert ipaddress.ip_address(settings.health_host).is_unspecified
    assert f"EXPOSE {settings.health_port}" in text
    # Elsewhere the pages stay on this host.
    for name in environment:
        if name.startswith("ROLLFLEET_"):
            monkeypatch.delenv(name)
    plain = WorkerSettings.load(argv=[], workflows={"default": "a:B"})
    assert (plain.health_host, plain.health_port) == ("127.0.0.1", None)
    compose = (ROOT / "docker-compose.yml").read_text()
    assert "ROLLFLEET_HEALTH_HOST" not in compose
    assert "ROLLFLEET_HEALTH_PORT" not in compose
