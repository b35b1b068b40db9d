"""Weights on a shared disk: whole or not at all, and no older than a server may need."""

import errno
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch

from rollfleet import save_weights
from rollfleet_common.errors import SettingsError

TENSORS = {"w": np.arange(4, dtype=np.float32)}


def versions(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_a_version_is_a_folder_that_loads(tmp_path: Path):
    place = save_weights(tmp_path / "weights", 12, TENSORS)
    assert place == tmp_path / "weights" / "v0000012"
    np.testing.assert_array_equal(load_file(place / "model.safetensors")["w"], TENSORS["w"])


def test_tied_and_strided_tensors_are_written_whole(tmp_path: Path):
    embed = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    state = {"embed": embed, "head": embed, "turned": embed.t()}
    loaded = load_torch(save_weights(tmp_path, 0, state) / "model.safetensors")
    assert torch.equal(loaded["head"], embed)
    assert torch.equal(loaded["turned"], embed.t())


def test_a_model_may_write_itself_beside_the_config_of_another(tmp_path: Path):
    base = tmp_path / "base"
    base.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors", "x.safetensors.index.json"):
        (base / name).write_text(name)

    def write(folder: Path) -> None:
        (folder / "adapter.safetensors").write_text("mine")

    place = save_weights(tmp_path / "w", 1, write, config_from=base)
    assert versions(place) == ["adapter.safetensors", "config.json", "tokenizer.json"]


def test_the_newest_are_kept_and_those_in_use(tmp_path: Path):
    for version in range(6):
        save_weights(tmp_path, version, TENSORS, keep=2, in_use={1})
    assert versions(tmp_path) == ["v0000001", "v0000004", "v0000005"]


def test_what_a_rollback_left_ahead_goes_and_never_counts_as_newest(tmp_path: Path):
    for version in range(5):
        save_weights(tmp_path, version, TENSORS, keep=9)
    save_weights(tmp_path, 2, {"w": np.ones(1, np.float32)}, keep=2, in_use={4})
    assert versions(tmp_path) == ["v0000001", "v0000002", "v0000004"]
    assert load_file(tmp_path / "v0000002" / "model.safetensors")["w"].size == 1


def test_other_things_in_the_folder_are_left_alone(tmp_path: Path):
    (tmp_path / "v1").mkdir()
    (tmp_path / "optimizer.pt").write_text("mine")
    save_weights(tmp_path, 5, TENSORS, keep=1)
    assert versions(tmp_path) == ["optimizer.pt", "v0000005", "v1"]


def test_a_full_disk_leaves_the_older_versions_and_nothing_half_written(tmp_path: Path):
    save_weights(tmp_path, 1, TENSORS)

    def full(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    for version in (1, 2):
        with pytest.raises(OSError, match="No space left"):
            save_weights(tmp_path, version, full, keep=1)
    assert versions(tmp_path) == ["v0000001"]
    assert load_file(tmp_path / "v0000001" / "model.safetensors")["w"].size == 4


KILLED = """
import os, signal, sys
from pathlib import Path
from rollfleet.weight_sync import saving

if sys.argv[2] == "writing":
    def weights(folder):
        (folder / "model.safetensors").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
else:
    weights = lambda folder: (folder / "model.safetensors").write_bytes(b"new")
    rename = Path.rename
    def die(self, target):
        if self.suffix == ".new":
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(self, target)
    Path.rename = die
saving.save_weights(sys.argv[1], 1, weights)
"""


@pytest.mark.parametrize("when", ["writing", "replacing"])
def test_a_crash_costs_no_version_and_its_rest_is_swept(tmp_path: Path, when: str):
    save_weights(tmp_path, 1, TENSORS)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), when], check=False)
    assert killed.returncode == -9
    assert len(versions(tmp_path)) == 2
    save_weights(tmp_path, 2, TENSORS)
    assert versions(tmp_path) == ["v0000001", "v0000002"]
    assert load_file(tmp_path / "v0000001" / "model.safetensors")["w"].size == 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": -1}, "version = -1"),
        ({"keep": 0}, "keep = 0"),
        ({"weights": {}}, "no tensor"),
        ({"config_from": "/nowhere"}, "no config.json"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, change: dict[str, object], said: str):
    options = {"directory": tmp_path, "version": 1, "weights": TENSORS, **change}
    with pytest.raises(SettingsError, match=said):
        save_weights(**options)  # type: ignore[arg-type]
    assert versions(tmp_path) == []
