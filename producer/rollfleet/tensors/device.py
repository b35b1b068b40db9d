"""The tensors of a batch, on the device that they are to be on, ahead of time where that pays.

- A copy to a CUDA device is made from pinned memory on a stream of its own; whoever gets the
  tensors has his current stream wait for it, and the allocator knows that he uses them.
- A device without room for a batch ahead gets it at hand-over: the batch waits on the host.
- Without CUDA the same calls collate ahead, and nothing else.
- A device is told apart in the trainer's thread, when a batch is first asked for its tensors: which
  CUDA device is the current one differs from thread to thread.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from rollfleet.tensors.collate import collate
from rollfleet.tensors.padded import TensorBatch
from rollfleet_common.errors import SettingsError
from rollfleet_common.logs import get_logger
from rollfleet_common.messages import Rollout

__all__ = ["PreparedTensors", "make", "tensors_of"]

log = get_logger("rollfleet.trainer")


@dataclass(frozen=True, slots=True)
class PreparedTensors:
    """A batch on the host, or under way to a device."""

    batch: TensorBatch
    #: When the copy has ended; None if there is none.
    copied: torch.cuda.Event | None = None


def make(rollouts: Sequence[Rollout], options: Mapping[str, Any]) -> PreparedTensors:
    """Make the tensors of a batch ahead of time; in any thread.

    Args:
        rollouts: Of the batch.
        options: Of :func:`rollfleet.collate`; and `device`.
    """
    copier = _COPIERS.get(options.get("device"))
    if copier is None:
        return PreparedTensors(_collated(rollouts, options))
    with torch.cuda.device(copier.device):  # memory is pinned for this one
        return copier.begin(_collated(rollouts, options, pin=True))


def tensors_of(
    rollouts: Sequence[Rollout],
    options: Mapping[str, Any],
    ahead: "Future[PreparedTensors] | None" = None,
) -> TensorBatch:
    """The tensors of a batch, for the stream that is current in the calling thread.

    Args:
        rollouts: Of the batch.
        options: As in :func:`make`.
        ahead: What :func:`make` makes of the same; what failed is made again here.

    Raises:
        SettingsError: `device` is a CUDA device, and there is none.
    """
    device = _device(options.get("device"))
    cuda = device.type == "cuda"
    made = _result(ahead) or PreparedTensors(_collated(rollouts, options, pin=cuda))
    if made.copied is not None:
        _take_over(made.batch, made.copied)
        return made.batch
    return made.batch if device.type == "cpu" else made.batch.to(device, non_blocking=cuda)


class _Copier:
    """Copies batches to one CUDA device beside what the trainer does there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        #: There was no room for a batch ahead: there may never be, and trying costs the trainer.
        self._full = False

    def begin(self, batch: TensorBatch) -> PreparedTensors:
        """Begin to copy a pinned batch, if there is room for it."""
        if self._full:
            return PreparedTensors(batch)
        try:
            with torch.cuda.stream(self._stream):
                there = batch.to(self.device, non_blocking=True)
                copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
                copied.record(self._stream)
                return PreparedTensors(there, copied)
        except RuntimeError as exc:
            if not _out_of_memory(exc):
                raise
            self._full = True
            log.warning(
                "no room on the device for a batch ahead: batches are copied when asked for",
                device=str(self.device),
                error=str(exc).partition("\n")[0],
            )
            return PreparedTensors(batch)


#: By device as the options name it.
_COPIERS: dict[Any, _Copier] = {}


def _device(name: Any) -> torch.device:
    """Where tensors are to be; asked in the trainer's thread."""
    if name in _COPIERS:
        return _COPIERS[name].device
    there = torch.cuda.is_available()
    if name is None or (name == "auto" and not there):
        return torch.device("cpu")
    device = torch.device("cuda" if name == "auto" else name)
    if device.type != "cuda":
        return device
    if not there:
        raise SettingsError(
            f"collate's device is {str(name)!r}, but torch sees no CUDA device here: name another, "
            'or "auto" for CUDA where there is any'
        )
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    _COPIERS[name] = _Copier(device)
    return device


def _collated(
    rollouts: Sequence[Rollout], options: Mapping[str, Any], *, pin: bool = False
) -> TensorBatch:
    rest = {name: value for name, value in options.items() if name != "device"}
    # A metric that some rollouts lack is no reason to fail in the middle of training.
    said = {"missing": "fill", "pin": pin, **rest}
    batch: TensorBatch
    try:
        batch = collate(rollouts, **said)
    except RuntimeError as exc:
        if not (said["pin"] and _out_of_memory(exc)):
            raise
        log.warning("no pinned memory for a batch: it is copied from pageable memory")
        batch = collate(rollouts, **{**said, "pin": False})
    return batch


def _result(ahead: "Future[PreparedTensors] | None") -> PreparedTensors | None:
    if ahead is None:
        return None
    try:
        return ahead.result()
    except Exception as exc:  # noqa: BLE001 - done again, and raised, where it can be seen
        log.warning("could not collate ahead", error=f"{type(exc).__name__}: {exc}")
        return None


def _take_over(batch: TensorBatch, copied: torch.cuda.Event) -> None:
    """Have the current stream wait for the copy, and the memory be its own, too."""
    stream = torch.cuda.current_stream(batch.rewards.device)
    stream.wait_event(copied)
    for tensor in _tensors(batch):
        tensor.record_stream(stream)


def _tensors(batch: TensorBatch) -> Iterator[Tensor]:
    for field in fields(batch):
        value = getattr(batch, field.name)
        every = value.values() if isinstance(value, dict) else (value,)
        yield from (tensor for tensor in every if isinstance(tensor, Tensor))


def _out_of_memory(exc: RuntimeError) -> bool:
    # Device and pinned memory raise different classes, and torch's releases again others.
    return "out of memory" in str(exc)
