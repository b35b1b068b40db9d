"""Weights on a disk that servers share: each version a folder that appears whole or not at all.

- Written beside its place, synced, renamed: a server never reads half a version, and a full disk or
  a crash leaves the older versions as they were. What a crash left half-written goes at the next save.
- The newest versions are kept, and those that a server still holds or would be healed with.
- One process writes to a folder: in a trainer of several ranks, the first.
"""

import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from rollfleet_common.errors import SettingsError
from rollfleet_common.logs import get_logger

__all__ = ["save_weights"]

log = get_logger("rollfleet.trainer")

_FILE = "model.safetensors"
_VERSION = re.compile(r"v(\d{7,})")
_HALF = re.compile(r"\.v\d{7,}\.[0-9a-f]+\.(new|old)")
#: Weights of the model that `config_from` was saved with.
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}


def save_weights(
    directory: str | Path,
    version: int,
    weights: Mapping[str, Any] | Callable[[Path], object],
    *,
    keep: int = 3,
    config_from: str | Path | None = None,
    in_use: Collection[int] = (),
) -> Path:
    """Write a version for servers to load; returns its folder, absolute, as `publish` wants it.

    Args:
        directory: Where the versions are, ``v0000012`` and so on; made if it is not there.
        version: Number of the version, >= 0. One of that number that is there is replaced.
        weights: Tensors of torch or arrays of numpy by name (a state dict), or what writes them: a
            function that is given an empty folder, such as ``model.save_pretrained``.
        keep: How many versions to keep, this one included.
        config_from: Folder of the model whose config and tokenizer go beside the weights, as a
            server needs them that starts from this folder.
        in_use: Versions to keep besides: ``fleet.in_use``.

    Raises:
        SettingsError: An argument makes no sense.
        OSError: The disk is full or cannot be written to; the other versions are untouched.
    """
    if version < 0 or keep < 1:
        raise SettingsError(f"version = {version} must be at least 0 and keep = {keep} at least 1")
    root = Path(directory).resolve()
    root.mkdir(parents=True, exist_ok=True)
    _sweep(root)
    place = root / f"v{version:07d}"
    new = root / f".{place.name}.{uuid4().hex}.new"
    new.mkdir()
    try:
        if config_from is not None:
            _copy_config(Path(config_from), new)
        if callable(weights):
            weights(new)
        else:
            _write(weights, new / _FILE)
        _sync(new)
        _put(new, place)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    _prune(root, version, keep, in_use)
    return place


def _write(tensors: Mapping[str, Any], path: Path) -> None:
    if not tensors:
        raise SettingsError("weights hold no tensor: there is nothing to save")
    if all(type(tensor).__module__ == "numpy" for tensor in tensors.values()):
        from safetensors.numpy import save_file as save_arrays  # noqa: PLC0415

        save_arrays(dict(tensors), path)
        return
    from safetensors.torch import save_file  # noqa: PLC0415 - torch is optional

    whole: dict[str, Any] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().contiguous()
        # Tied weights share memory, which the format cannot say: each name gets its own.
        if plain.untyped_storage().data_ptr() in storages:
            plain = plain.clone()
        storages.add(plain.untyped_storage().data_ptr())
        whole[name] = plain
    save_file(whole, path, metadata={"format": "pt"})


def _copy_config(source: Path, folder: Path) -> None:
    if not (source / "config.json").is_file():
        raise SettingsError(f"config_from = {str(source)!r} has no config.json: is it a model?")
    for path in source.iterdir():
        if path.is_file() and path.suffix not in _WEIGHTS and not path.name.endswith(".index.json"):
            shutil.copy(path, folder)


def _sync(folder: Path) -> None:
    """All of `folder` is on the disk when this returns."""
    for path in (*folder.rglob("*"), folder):
        _fsync(path)


def _put(new: Path, place: Path) -> None:
    """`new` becomes `place`; the old `place`, if there is one, goes."""
    old = new.with_suffix(".old")
    if place.exists():
        place.rename(old)
    new.rename(place)
    _fsync(place.parent)
    shutil.rmtree(old, ignore_errors=True)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sweep(root: Path) -> None:
    """Remove what a crash left half-written; put back what it left half-replaced."""
    for path in root.iterdir():
        if _HALF.fullmatch(path.name):
            place = root / path.name.split(".")[1]
            if path.suffix == ".old" and not place.exists():
                path.rename(place)
            else:
                shutil.rmtree(path, ignore_errors=True)


def _prune(root: Path, version: int, keep: int, in_use: Collection[int]) -> None:
    """Remove old versions, and those above `version`: they are of a future that was gone back on."""
    found = {int(m[1]): path for path in root.iterdir() if (m := _VERSION.fullmatch(path.name))}
    kept = {*sorted(v for v in found if v <= version)[-keep:], *in_use}
    for number, path in found.items():
        if number not in kept:
            try:
                shutil.rmtree(path)
            except OSError as exc:
                log.warning("old weights could not be removed", path=str(path), error=str(exc))
