"""How each engine is made to load weights: one protocol, a driver for vLLM and one for SGLang.

- A driver knows routes and their quirks; when to pause, and what a failure means, is
  :mod:`rollfleet.weight_sync.update`'s.
- vLLM: routes as of 0.32.0, where they were run. SGLang: as written in the source of 0.5.23; they
  were never run here.
- Weights and their version are switched while the engine is paused, so that no token is tagged with
  a version that did not make it. SGLang's "wait" has no pause: there the server itself lets requests
  end, loads and tags in one call.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

import aiohttp

from rollfleet_common.errors import RefitError
from rollfleet_common.servers import RegisteredServer
from rollfleet_engines.control_http import ControlClient

__all__ = [
    "Drivers",
    "PauseMode",
    "RefitDriver",
    "SglangDriver",
    "VllmDriver",
    "Weights",
    "find_driver",
]

CONNECT_S = 10.0
_LOADING = "its log has the reason: can it read that path, and do the shapes fit its model?"
_VLLM_ADVICE = {
    403: "start vLLM with VLLM_SERVER_DEV_MODE=1, which opens its control routes",
    404: "start vLLM 0.32 or later with VLLM_SERVER_DEV_MODE=1, which opens its control routes; "
    "for LoRA adapters also with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1",
    401: "the server wants another API key: set the trainer's api_key",
}
_SGLANG_ADVICE = {
    401: "the server wants another API key: set the trainer's api_key",
    403: "the server wants its admin key: set the trainer's api_key to it",
    404: "SGLang 0.5.9 or later has this route",
}


class PauseMode(StrEnum):
    """What becomes of the requests in flight while a server is refitted."""

    #: They stay where they are, and go on under the new weights.
    KEEP = "keep"
    #: They end with what they have; workers go on with them elsewhere.
    ABORT = "abort"
    #: The server finishes them first, under the old weights.
    WAIT = "wait"


@dataclass(frozen=True, slots=True)
class Weights:
    """What servers are to serve."""

    version: int
    #: As the servers can read it; "" if a hook moves the weights.
    path: str
    #: The name under which `path`, a LoRA adapter, is served; "": `path` is a whole model.
    adapter: str = ""


class RefitDriver(Protocol):
    """The control of one server; every method raises RefitError, and says why."""

    @property
    def url(self) -> str:
        """Of the server, as all may read it."""
        ...

    def holds(self, mode: PauseMode) -> bool:
        """Whether the engine stands still between `pause` and `resume`."""
        ...

    async def pause(self, mode: PauseMode) -> None:
        """Start nothing new, and do with what runs as `mode` says. May last as long as that."""
        ...

    async def load(self, weights: Weights) -> None:
        """Load `weights` from their path and tag further tokens with their version."""
        ...

    async def tag(self, version: int | str) -> None:
        """Tag further tokens with `version`; a word: with what is no version of any run."""
        ...

    async def abort(self) -> None:
        """End what is in flight, with what it has."""
        ...

    async def resume(self) -> None:
        """Go on. Harmless if the server is not paused."""
        ...

    async def says(self) -> str | None:
        """The version that the server tags tokens with; None if it does not say."""
        ...

    async def is_paused(self) -> bool | None:
        """Whether it is paused; None if it does not say."""
        ...


class VllmDriver:
    """vLLM, started with VLLM_SERVER_DEV_MODE=1."""

    def __init__(self, control: ControlClient) -> None:
        self._control = control
        control.advice = _VLLM_ADVICE

    @property
    def url(self) -> str:
        """Of the server, as all may read it."""
        return self._control.name

    def holds(self, mode: PauseMode) -> bool:
        """In every mode."""
        return True

    async def pause(self, mode: PauseMode) -> None:
        """``/pause``: answered when the engine stands still; with "wait", when all have ended."""
        await self._control.post(f"/pause?mode={mode}", timeout_s=None)

    async def load(self, weights: Weights) -> None:
        """``reload_weights`` in every worker, or the adapter in place; then the tag."""
        if weights.adapter:
            # In place: the name stays, so that requests in flight go on under the new adapter.
            body = {
                "lora_name": weights.adapter,
                "lora_path": weights.path,
                "load_inplace": True,
            }
            await self._control.post("/v1/load_lora_adapter", body, timeout_s=None, advice=_LOADING)
        else:
            call = {"method": "reload_weights", "kwargs": {"weights_path": weights.path}}
            await self._control.post("/collective_rpc", call, timeout_s=None, advice=_LOADING)
        await self.tag(weights.version)

    async def tag(self, version: int | str) -> None:
        """``/update_weight_version``."""
        await self._control.post("/update_weight_version", {"new_version": str(version)})

    async def abort(self) -> None:
        """``/abort_requests`` without ids: all of them."""
        await self._control.post("/abort_requests", {})

    async def resume(self) -> None:
        """``/resume``."""
        await self._control.post("/resume")

    async def says(self) -> str | None:
        """``/weight_info``."""
        return _version(await self._control.get("/weight_info"))

    async def is_paused(self) -> bool | None:
        """``/is_paused``."""
        said = await self._control.get("/is_paused")
        return None if said is None else bool(said.get("is_paused"))


class SglangDriver:
    """SGLang.

    "keep" is its "retract": requests go back to the queue and their keys and values are computed
    anew under the new weights.
    """

    def __init__(self, control: ControlClient) -> None:
        self._control = control
        control.advice = _SGLANG_ADVICE

    @property
    def url(self) -> str:
        """Of the server, as all may read it."""
        return self._control.name

    def holds(self, mode: PauseMode) -> bool:
        """Unless it waits."""
        return mode is not PauseMode.WAIT

    async def pause(self, mode: PauseMode) -> None:
        """``/pause_generation``; nothing for "wait", which is a part of loading."""
        if mode is not PauseMode.WAIT:
            how = "retract" if mode is PauseMode.KEEP else "abort"
            await self._control.post("/pause_generation", {"mode": how}, timeout_s=None)

    async def load(self, weights: Weights) -> None:
        """``/update_weights_from_disk``, which tags and empties the caches, too."""
        if weights.adapter:
            raise RefitError(
                f"workers cannot ask SGLang for adapter {weights.adapter!r}: its /generate answers "
                "with the base model if it knows no such name; merge the adapter into the model"
            )
        body = {
            "model_path": weights.path,
            "weight_version": str(weights.version),
            "abort_all_requests": False,
            "flush_cache": True,
        }
        await self._control.post("/update_weights_from_disk", body, timeout_s=None, advice=_LOADING)

    async def tag(self, version: int | str) -> None:
        """``/update_weight_version``; by default it would abort what is in flight."""
        body = {"new_version": str(version), "abort_all_requests": False}
        await self._control.post("/update_weight_version", body)

    async def abort(self) -> None:
        """``/abort_request`` for all."""
        await self._control.post("/abort_request", {"abort_all": True})

    async def resume(self) -> None:
        """``/continue_generation``."""
        await self._control.post("/continue_generation", {})

    async def says(self) -> str | None:
        """``/model_info``."""
        return _version(await self._control.get("/model_info"))

    async def is_paused(self) -> bool | None:
        """It has no route for that."""
        return None


class Drivers:
    """The drivers of the servers of a run, each found out once.

    Args:
        api_key: Bearer token for their control routes, if they want one.
    """

    def __init__(self, api_key: str | None) -> None:
        self._api_key = api_key
        self._found: dict[tuple[str, str], RefitDriver] = {}
        self._session: aiohttp.ClientSession | None = None

    async def find(self, server: RegisteredServer) -> RefitDriver:
        """Of `server`.

        Raises:
            RefitError: It cannot be reached, or its weights cannot be replaced.
        """
        key = server.url, server.engine
        if key not in self._found:
            if self._session is None:
                timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S)
                # vLLM hangs up after a 500, and a command on a dead connection is lost. No limit:
                # servers that load hold theirs, and others must not stand paused until they are done.
                connector = aiohttp.TCPConnector(force_close=True, limit=0)
                self._session = aiohttp.ClientSession(timeout=timeout, connector=connector)
            self._found[key] = await find_driver(self._session, *key, self._api_key)
        return self._found[key]

    def forget(self, name: str) -> None:
        """Find the server of that name out anew: it may come back as another engine."""
        self._found = {key: d for key, d in self._found.items() if d.url != name}

    async def close(self) -> None:
        """Hang up. Idempotent."""
        self._found.clear()
        if self._session is not None:
            await self._session.close()
            self._session = None


async def find_driver(
    session: aiohttp.ClientSession, url: str, engine: str, api_key: str | None
) -> RefitDriver:
    """The driver of the server at `url`.

    Args:
        session: For its requests.
        url: Of the server.
        engine: As registered; "auto" asks the server.
        api_key: Bearer token for it.

    Raises:
        RefitError: The server cannot be reached, or is none whose weights can be replaced.
    """
    control = ControlClient(session, url, api_key=api_key)
    if engine == "auto":
        if _is(await control.get("/model_info"), "weight_version"):
            engine = "sglang"
        elif _is(await control.get("/version"), "version"):
            engine = "vllm"
    if engine == "sglang":
        return SglangDriver(control)
    if engine == "vllm":
        return VllmDriver(control)
    if engine == "openai":
        raise RefitError("a generic OpenAI server has no route that loads weights")
    raise RefitError(
        "it answers neither vLLM's /version nor SGLang's /model_info: if it is one of them, register "
        f"it by name (rollfleet server add {control.name} --engine vllm)"
    )


def _is(said: dict[str, Any] | None, field: str) -> bool:
    return said is not None and field in said


def _version(said: dict[str, Any] | None) -> str | None:
    version = None if said is None else said.get("weight_version")
    return None if version is None else str(version)
