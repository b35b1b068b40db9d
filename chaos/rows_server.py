"""Rows of the fault matrix: what an inference server can do wrong, played by a fake vLLM."""

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from aiohttp import web
from tests.fixtures.fake_vllm import Behaviour, FakeVllm, body, good, made, reset, status

from chaos.harness import Stage
from chaos.processes import free_port
from chaos.rows import Row, back_s

__all__ = ["ROWS"]

#: How long the server misbehaves.
BAD_S = 4.0


class _Always(deque[Behaviour]):
    """A script without an end."""

    def __init__(self, behaviour: Behaviour) -> None:
        super().__init__([behaviour])

    def popleft(self) -> Behaviour:
        return self[0]


class Server:
    """A fake vLLM in a thread of its own."""

    def __init__(self, port: int) -> None:
        self.fake = FakeVllm(port=port)
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.do(self.fake.start)

    def do(self, what: Callable[[], Any]) -> None:
        """Run a coroutine function in the server's loop."""
        asyncio.run_coroutine_threadsafe(what(), self.loop).result(10)

    def misbehave(self, behaviour: Behaviour | None) -> None:
        """Answer so from now on; None: well."""
        self.fake.script = deque() if behaviour is None else _Always(behaviour)


@contextlib.contextmanager
def serving(port: int) -> Iterator[Server]:
    """A server on `port`."""
    server = Server(port)
    try:
        yield server
    finally:
        server.do(server.fake.stop)
        server.loop.call_soon_threadsafe(server.loop.stop)


async def _hang(fake: FakeVllm, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    await asyncio.sleep(60)
    return await good(fake, request, body)


async def _slow(fake: FakeVllm, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    await asyncio.sleep(1.0)
    return await good(fake, request, body)


def _row(name: str, did: str, behaviour: Behaviour | None, note: str = "") -> Row:
    port = free_port()

    def scene(stage: Stage) -> float | None:
        server: Server = stage.props["server"]
        if behaviour is None:
            server.do(server.fake.stop)
        else:
            server.misbehave(behaviour)
        deadline = time.monotonic() + BAD_S
        while time.monotonic() < deadline:
            stage.tend()
            time.sleep(0.1)
        if behaviour is None:
            server.do(server.fake.start)
        else:
            server.misbehave(None)
        took = back_s(stage)
        stage.disturb()  # a worker that still waits out its server's backoff is rightly not ready
        return took

    shape = {
        "workflow": "chaos.workflows:Served",
        "props": {"server": lambda: serving(port)},
        "worker_flags": ("--server", f"http://127.0.0.1:{port}", "--request-timeout-s", "1.5"),
    }
    return Row(f"inference server: {name}", did, scene, shape, note=note)


ROWS = [
    _row("500s", f"every answer is a 500 for {BAD_S:.0f} s", status(500)),
    _row("hangs", f"no answer at all for {BAD_S:.0f} s; requests time out after 1.5 s", _hang),
    _row("resets mid-body", f"half an answer, then a reset, for {BAD_S:.0f} s", reset),
    _row("slow", f"every answer takes 1 s for {BAD_S:.0f} s", _slow),
    _row("garbage", f"200 with a body that is no JSON for {BAD_S:.0f} s", body("<html>")),
    _row(
        "wrong version",
        f"answers claim versions that were never published, for {BAD_S:.0f} s",
        made(versions=[("1000000", 8)]),
    ),
    _row("dead", f"connections are refused for {BAD_S:.0f} s", None),
]
