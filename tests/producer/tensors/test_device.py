"""Tensors ahead of time: on the host everywhere; and what is asked of CUDA, by a stand-in for it."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from fixtures.rollouts import make_rollout
from torch import Tensor

from rollfleet.tensors import device
from rollfleet.tensors.collate import collate
from rollfleet.tensors.device import PreparedTensors, make, tensors_of
from rollfleet.tensors.padded import TensorBatch
from rollfleet_common.errors import SettingsError
from rollfleet_common.messages import Rollout

ROLLOUTS = [make_rollout([0, 1]), make_rollout([1], [1, 1], index=1)]


def done(made: PreparedTensors) -> "Future[PreparedTensors]":
    future: Future[PreparedTensors] = Future()
    future.set_result(made)
    return future


def same(one: TensorBatch, other: TensorBatch) -> bool:
    return torch.equal(one.input_ids, other.input_ids) and one.headers == other.headers


@pytest.mark.parametrize("options", [{}, {"device": "cpu"}, {"device": "auto"}])
def test_without_cuda_tensors_are_made_ahead_on_the_host(options: dict[str, Any]) -> None:
    made = make(ROLLOUTS, options)
    assert made.copied is None
    assert same(made.batch, collate(ROLLOUTS))
    assert tensors_of(ROLLOUTS, options, done(made)) is made.batch
    assert same(tensors_of(ROLLOUTS, options), made.batch)


def test_another_device_gets_them_when_they_are_asked_for() -> None:
    options = {"device": "meta", "pad_multiple": 8}
    made = make(ROLLOUTS, options)
    assert made.batch.input_ids.device.type == "cpu"
    batch = tensors_of(ROLLOUTS, options, done(made))
    assert (batch.input_ids.device.type, batch.input_ids.shape) == ("meta", (3, 8))


def test_a_cuda_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SettingsError, match='"auto" for CUDA where there is any'):
        tensors_of(ROLLOUTS, {"device": "cuda"})


def test_what_failed_ahead_is_made_again() -> None:
    failed: Future[PreparedTensors] = Future()
    failed.set_exception(MemoryError("no room"))
    cancelled: Future[PreparedTensors] = Future()
    cancelled.cancel()
    for ahead in (failed, cancelled):
        assert same(tensors_of(ROLLOUTS, {}, ahead), collate(ROLLOUTS))


# ---- what is asked of CUDA ---------------------------------------------------------------------


class Cuda:
    """Stands in for torch.cuda, and writes down what is asked of it; tensors stay where they are."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.room = True
        self.pinnable = True
        self.on = "trainer's stream"

    def stream_of(self, name: str) -> Any:
        cuda = self

        class Stream:
            def wait_event(self, event: Any) -> None:
                cuda.said.append(f"{name} waits for {event.name}")

            def __repr__(self) -> str:
                return name

        return Stream()

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.on = self.on, repr(stream)
        try:
            yield
        finally:
            self.on = before

    @contextmanager
    def device(self, where: torch.device) -> Iterator[None]:
        self.said.append(f"on {where}")
        yield

    def to(self, batch: TensorBatch, where: torch.device, *, non_blocking: bool) -> TensorBatch:
        if not self.room and self.on == "side stream":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")
        self.said.append(f"{'async ' if non_blocking else ''}copy to {where} on {self.on}")
        return batch

    def collate(self, rollouts: Sequence[Rollout], **options: Any) -> TensorBatch:
        if options["pin"] and not self.pinnable:
            raise RuntimeError("CUDA error: out of memory")
        self.said.append("pinned" if options["pin"] else "pageable")
        return collate(rollouts, **{**options, "pin": False})


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    fake = Cuda()

    class Event:
        name = "copied"

        def record(self, stream: Any) -> None:
            fake.said.append(f"{self.name} recorded on {stream!r}")

    def note(tensor: Tensor, stream: Any) -> None:
        fake.said.append(f"used on {stream!r}")

    def to(batch: TensorBatch, where: torch.device, *, non_blocking: bool) -> TensorBatch:
        return fake.to(batch, where, non_blocking=non_blocking)

    changes: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "current_device": lambda: 1,
        "Stream": lambda _: fake.stream_of("side stream"),
        "current_stream": lambda _: fake.stream_of("trainer's stream"),
        "stream": fake.stream,
        "device": fake.device,
        "Event": Event,
    }
    for name, change in changes.items():
        monkeypatch.setattr(torch.cuda, name, change)
    monkeypatch.setattr(TensorBatch, "to", to)
    monkeypatch.setattr(torch.Tensor, "record_stream", note)
    monkeypatch.setattr(device, "collate", fake.collate)
    monkeypatch.setattr(device, "_COPIERS", {})
    return fake


CUDA = {"device": "cuda"}


def test_the_copy_has_a_stream_of_its_own_and_the_trainers_waits_for_it(cuda: Cuda) -> None:
    first = tensors_of(ROLLOUTS, CUDA)
    assert same(first, collate(ROLLOUTS))
    assert cuda.said == ["pinned", "async copy to cuda:1 on trainer's stream"]
    del cuda.said[:]
    made = make(ROLLOUTS, CUDA)
    assert cuda.said == [
        "on cuda:1",
        "pinned",
        "async copy to cuda:1 on side stream",
        "copied recorded on side stream",
    ]
    del cuda.said[:]
    batch = tensors_of(ROLLOUTS, CUDA, done(made))
    assert batch is made.batch
    assert cuda.said[0] == "trainer's stream waits for copied"
    tensors = [value for value in vars_of(batch) if isinstance(value, Tensor)]
    assert cuda.said[1:] == ["used on trainer's stream"] * len(tensors)


def vars_of(batch: TensorBatch) -> Iterator[Any]:
    for name in batch.__slots__:
        value = getattr(batch, name)
        yield from value.values() if isinstance(value, dict) else [value]


def test_nothing_is_done_on_a_device_before_the_trainer_has_named_it(cuda: Cuda) -> None:
    """Which device is the current one, only the trainer's own thread can say."""
    made = make(ROLLOUTS, CUDA)
    assert (made.copied, cuda.said) == (None, ["pageable"])


def test_a_full_device_gets_its_batches_when_they_are_asked_for(
    cuda: Cuda, caplog: pytest.LogCaptureFixture
) -> None:
    tensors_of(ROLLOUTS, CUDA)
    cuda.room = False
    for _ in range(2):
        made = make(ROLLOUTS, CUDA)
        assert made.copied is None
        del cuda.said[:]
        assert tensors_of(ROLLOUTS, CUDA, done(made)) is made.batch, "the batch is not lost"
        assert cuda.said == ["async copy to cuda:1 on trainer's stream"]
    said = caplog.text
    assert said.count("no room on the device for a batch ahead") == 1
    assert "Tried to allocate 2.00 GiB." in said


def test_another_error_of_the_device_is_not_taken_for_a_full_one(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors_of(ROLLOUTS, CUDA)

    def broken(*_: Any, **__: Any) -> TensorBatch:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(TensorBatch, "to", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        make(ROLLOUTS, CUDA)


def test_pageable_memory_will_do_where_none_can_be_pinned(cuda: Cuda) -> None:
    cuda.pinnable = False
    assert same(tensors_of(ROLLOUTS, CUDA), collate(ROLLOUTS))
    assert cuda.said == ["pageable", "async copy to cuda:1 on trainer's stream"]


def test_who_pins_himself_is_not_overruled(cuda: Cuda) -> None:
    tensors_of(ROLLOUTS, {"device": "cuda:0", "pin": False})
    assert cuda.said == ["pageable", "async copy to cuda:0 on trainer's stream"]
