"""A vLLM server behind the engine protocol: token ids in; ids, logprobs and true versions out.

- ``/inference/v1/generate`` (a server started with ``--enable-scale-out``) is preferred: it says
  which weights made every token. Where it is not served, ``/v1/completions`` with token ids.
- Versions are what the server says. ``/v1/completions`` says nothing per token: there the older
  of ``/weight_info`` before and after counts, and without that route the pinned version of the
  request. Then a server that lags behind the board is not noticed: prefer the other route.
- "default" is vLLM's tag for weights that were never refitted: `base_version`, else the pinned one.
- A generation that the server aborts goes on from its tokens, on the original budget.
- Prefix caches are salted by version, so that no request reads keys and values of older weights.

vLLM ignores sampling fields that it does not know, so a misspelt one in `Sampling.extra` has no
effect and no error. Its logprobs are those before temperature and top-p unless it is started with
``--logprobs-mode processed_logprobs``. Shapes were recorded from vLLM 0.32.0.
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal
from urllib.parse import quote

from rollfleet_common.errors import (
    EngineProtocolError,
    EngineRefusedError,
    EngineUnavailableError,
    InfraError,
    SettingsError,
)
from rollfleet_common.messages import NO_VERSION, VersionSpans
from rollfleet_worker.inference.answers import (
    logprob_array,
    span_array,
    token_array,
)
from rollfleet_worker.inference.engine import Generation, Request
from rollfleet_worker.inference.http import HttpClient, Reply
from rollfleet_worker.inference.resume import ABORTED, continue_generation, resumable
from rollfleet_worker.inference.weights import NOT_OFFERED, WeightInfo

__all__ = ["Route", "VllmEngine"]

Route = Literal["auto", "generate", "completions"]

_GENERATE = "/inference/v1/generate"
_COMPLETIONS = "/v1/completions"
_FINISHED = frozenset({"stop", "length", "repetition"})
#: Below this vLLM samples greedily, and then refuses n > 1.
_GREEDY = 1e-5
#: RequestOutputKind.FINAL_ONLY: older servers default to an answer that holds only one of n.
_FINAL_ONLY = 2
_PROBE_S = 5.0
#: Fields whose meaning this client relies on: a sampling parameter may not change them.
_RESERVED = frozenset(
    {
        "cache_salt",
        "echo",
        "logprobs",
        "max_tokens",
        "min_p",
        "model",
        "n",
        "output_kind",
        "prompt",
        "return_token_ids",
        "seed",
        "stop_token_ids",
        "stream",
        "temperature",
        "token_ids",
        "top_k",
        "top_p",
        "truncate_prompt_tokens",
    }
)


class VllmEngine:
    """One vLLM server.

    Args:
        url: ``http://host:port``; a trailing ``/v1`` is ignored.
        model: As the server names it; None: whatever it serves.
        api_key: Sent as a bearer token.
        route: Which route to use; ``auto`` finds out, and again after the server was down.
        timeout_s: For one request; a generation that takes longer counts as a failing server.
        connect_timeout_s: For opening a connection.
        max_connections: Requests in flight at most; further ones wait.
        max_resumes: How often one completion goes on after the server aborted it.
        base_version: Version of the weights that the server starts with; None: the pinned one.

    Raises:
        SettingsError: A setting makes no sense.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        route: Route = "auto",
        timeout_s: float = 1800.0,
        connect_timeout_s: float = 10.0,
        max_connections: int = 1024,
        max_resumes: int = 16,
        base_version: int | None = None,
    ) -> None:
        if route not in ("auto", "generate", "completions"):
            raise SettingsError(f"vLLM route {route!r} is none of auto, generate, completions")
        self._http = HttpClient(
            url.rstrip("/").removesuffix("/v1"),
            api_key=api_key,
            timeout_s=timeout_s,
            connect_timeout_s=connect_timeout_s,
            max_connections=max_connections,
        )
        self._model = model
        self._auto = route == "auto"
        self._route: Route = route
        self._max_resumes = max_resumes
        self._base_version = base_version
        self._weights = WeightInfo(self._http)
        self._spans = True
        self._version = NO_VERSION

    @property
    def name(self) -> str:
        """The server's URL, without credentials."""
        return self._http.name

    @property
    def version(self) -> int:
        """Version of the newest token that the server made; NO_VERSION if it made none."""
        return self._version

    @property
    def route(self) -> Route:
        """The route in use; "auto" until one has answered."""
        return self._route

    async def generate(self, request: Request, n: int = 1) -> Sequence[Generation]:
        """Make `n` independent completions; see :class:`Engine`.

        A completion of fewer tokens than asked for that ended by "length" met the end of the
        server's context.

        Raises:
            EngineUnavailableError: The server is unreachable, failing, overloaded or set up
                otherwise than we are; or it aborted a completion `max_resumes` times.
            EngineProtocolError: The answer is no usable generation.
            EngineRefusedError: The server, or this client, refuses the request itself.
        """
        self._admit(request, n)
        # Greedy completions are all the same one, and vLLM refuses to make it twice.
        greedy = request.sampling.temperature < _GREEDY
        made = await self._ask(request, 1 if greedy else n, 0)
        if any(one.finish_reason == ABORTED for one in made):
            made = await self._finish(request, made)
        return made * n if greedy else made

    async def ready(self) -> bool:
        """Whether the server answers, is healthy and knows our model and our key."""
        try:
            health = await self._http.get("/health", timeout_s=_PROBE_S)
            if health.status != 404:
                health.checked()
            models = await self._http.get("/v1/models", timeout_s=_PROBE_S)
            if models.status == 404:
                return health.status != 404
            listed = models.checked().json().get("data")
        except (InfraError, EngineRefusedError):
            self._forget()
            return False
        if self._model is None or not isinstance(listed, list):
            return True
        return any(isinstance(one, dict) and one.get("id") == self._model for one in listed)

    async def close(self) -> None:
        """Release connections. Idempotent."""
        await self._http.close()

    def _admit(self, request: Request, n: int) -> None:
        sampling = request.sampling
        if n < 1:
            raise EngineRefusedError(f"asked for {n} completions: at least one makes sense")
        if not len(request.token_ids):
            raise EngineRefusedError("an empty prompt cannot be completed: it needs a token id")
        if sampling.max_tokens < 1:
            raise EngineRefusedError(f"max_tokens is {sampling.max_tokens}: no token may be made")
        if taken := _RESERVED & sampling.extra.keys():
            raise EngineRefusedError(
                f"sampling fields {sorted(taken)} cannot be set in `extra`: use the fields of "
                f"Sampling, or leave them to the client"
            )

    async def _finish(self, request: Request, made: list[Generation]) -> list[Generation]:
        """Every completion of `made`, those that were cut off brought to their end."""

        async def ask(rest: Request, segment: int) -> Generation:
            return (await self._ask(rest, 1, segment))[0]

        async def finish(one: Generation) -> Generation:
            if one.finish_reason != ABORTED:
                return one
            return await continue_generation(request, one, ask, max_resumes=self._max_resumes)

        tasks = [asyncio.ensure_future(finish(one)) for one in made]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, request: Request, n: int, segment: int) -> list[Generation]:
        """One exchange: `n` completions, possibly cut off."""
        # A resumed segment may run on newer weights than the ones the request was pinned to.
        salt = f"{request.version}.{segment}" if segment else str(request.version)
        headers = {"X-Session-ID": quote(request.affinity, safe="/:.-_")[:256]}
        try:
            if self._route != "completions":
                before = request.version if self._spans else await self._weight_version(request)
                body = self._generate_body(request, n, salt)
                reply = await self._http.post(_GENERATE, body, headers=headers)
                if not (self._auto and reply.status in NOT_OFFERED):
                    return await self._parse(reply, request, n, before, "generate")
            before = await self._weight_version(request)
            body = self._completions_body(request, n, salt)
            reply = await self._http.post(_COMPLETIONS, body, headers=headers)
            return await self._parse(reply, request, n, before, "completions")
        except EngineUnavailableError:
            self._forget()
            raise

    def _forget(self) -> None:
        """The server may come back as another one: find out again what it offers."""
        self._weights.forget()
        self._spans = True
        if self._auto:
            self._route = "auto"

    def _sampling(self, request: Request, n: int) -> dict[str, Any]:
        sampling = request.sampling
        fields: dict[str, Any] = {
            "n": n,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            # Older servers refuse 0 and newer ones take both.
            "top_k": sampling.top_k or -1,
            "min_p": sampling.min_p,
            "stop_token_ids": list(sampling.stop_token_ids),
            "logprobs": 0,
        }
        if sampling.seed is not None:
            fields["seed"] = sampling.seed
        return fields

    def _generate_body(self, request: Request, n: int, salt: str) -> dict[str, Any]:
        extra = request.sampling.extra
        sampling = self._sampling(request, n) | {"output_kind": _FINAL_ONLY}
        if resumable(extra):
            sampling["detokenize"] = False
        body: dict[str, Any] = {
            "token_ids": request.token_ids.tolist(),
            "sampling_params": {**sampling, **extra},
            "cache_salt": salt,
            "stream": False,
        }
        return body if self._model is None else {"model": self._model, **body}

    def _completions_body(self, request: Request, n: int, salt: str) -> dict[str, Any]:
        body: dict[str, Any] = {
            **self._sampling(request, n),
            # Said aloud, or the server takes it from the model's generation_config.json.
            "repetition_penalty": 1.0,
            **request.sampling.extra,
            "prompt": request.token_ids.tolist(),
            "add_special_tokens": False,
            "return_token_ids": True,
            "cache_salt": salt,
            "stream": False,
        }
        return body if self._model is None else {"model": self._model, **body}

    def _untagged(self, request: Request) -> int:
        return request.version if self._base_version is None else self._base_version

    async def _weight_version(self, request: Request) -> int:
        """The version that the server as a whole has now; the pinned one if it does not tell."""
        offered, version = await self._weights.read()
        if not offered:
            return request.version
        return self._untagged(request) if version is None else version

    async def _parse(
        self, reply: Reply, request: Request, n: int, before: int, route: Route
    ) -> list[Generation]:
        """The completions in `reply`; tagged `before`, or older, where the server tags none."""
        choices = reply.checked().json().get("choices")
        if not isinstance(choices, list) or len(choices) != n:
            got = len(choices) if isinstance(choices, list) else type(choices).__name__
            raise EngineProtocolError(f"{reply.where}: asked for {n} completions, got {got}")
        whole = before
        tells = all(isinstance(one, dict) and one.get("weight_versions") for one in choices)
        if not tells:
            # Those who went on to read the reply know that the server was there: what it cannot
            # tell any more cannot make the tag any older.
            with suppress(InfraError):
                whole = min(before, await self._weight_version(request))
        made: dict[int, Generation] = {}
        for position, choice in enumerate(choices):
            where = f"{reply.where}: completion {position} of {n}"
            if not isinstance(choice, dict):
                raise EngineProtocolError(f"{where} is {type(choice).__name__}, not an object")
            index = choice.get("index", position)
            if index in made or index not in range(n):
                raise EngineProtocolError(f"{where} has index {index!r}, twice or out of range")
            made[index] = self._completion(choice, request, whole, where)
        self._route = route
        self._spans = tells
        return [made[index] for index in range(n)]

    def _completion(
        self, choice: dict[str, Any], request: Request, whole: int, where: str
    ) -> Generation:
        finish_reason = choice.get("finish_reason")
        if finish_reason not in _FINISHED and finish_reason != ABORTED:
            raise EngineProtocolError(f"{where} ended by {finish_reason!r}: not a whole generation")
        echo = choice.get("prompt_token_ids")
        if echo is not None and echo != request.token_ids.tolist():
            raise EngineProtocolError(f"{where}: the server completed another prompt than ours")
        ids = token_array(choice.get("token_ids"), where)
        tokens = len(ids)
        if not tokens and finish_reason != ABORTED:
            raise EngineProtocolError(f"{where} has no token, and ended by {finish_reason!r}")
        if tokens > request.sampling.max_tokens:
            raise EngineProtocolError(
                f"{where} has {tokens} tokens where {request.sampling.max_tokens} were allowed"
            )
        logprobs = logprob_array(_logprobs(choice.get("logprobs")), tokens, where)
        spans = choice.get("weight_versions")
        versions = (
            VersionSpans.of([(tokens, whole)])
            if spans is None
            else span_array(spans, tokens, self._untagged(request), where)
        )
        if tokens:
            self._version = int(versions.versions[-1])
        return Generation(ids, logprobs, versions, finish_reason, self.name)


def _logprobs(said: Any) -> Any:
    """The list of logprobs in a choice of either route, or None."""
    if not isinstance(said, dict):
        return None
    content = said.get("content")
    if content is None:
        return said.get("token_logprobs")
    try:
        return [entry["logprob"] for entry in content]
    except (TypeError, KeyError):
        return None
