"""A vLLM server behind the engine protocol: token ids in; ids, logprobs and true versions out.

- ``/inference/v1/generate`` (a server started with ``--enable-scale-out``) is preferred: it says
  which weights made every token. Where it is not served, ``/v1/completions`` with token ids.
- ``/v1/completions`` says no versions: there the older of ``/weight_info`` before and after
  counts. Without that route a server that lags behind the board may not be noticed: prefer the
  other route, or at least start the server with ``VLLM_SERVER_DEV_MODE=1``.
- Prefix caches are salted by version, so that no request reads keys and values of older weights.

vLLM ignores sampling fields that it does not know, so a misspelt one in `Sampling.extra` has no
effect and no error. Its logprobs are those before temperature and top-p unless it is started with
``--logprobs-mode processed_logprobs``. Shapes were recorded from vLLM 0.32.0.
"""

from typing import Any, Literal, Unpack

from rollfleet_common.errors import EngineProtocolError, SettingsError
from rollfleet_common.messages import NO_VERSION, LogprobsKind
from rollfleet_engines.client import (
    ClientOptions,
    Said,
    ServerClient,
    affinity_header,
    refuse_reserved,
)
from rollfleet_engines.http import Reply
from rollfleet_engines.interface import Generation, Request
from rollfleet_engines.resume import ABORTED, resumable
from rollfleet_engines.weights import NOT_OFFERED

__all__ = ["Route", "VllmEngine"]

Route = Literal["auto", "generate", "completions"]

_GENERATE = "/inference/v1/generate"
_COMPLETIONS = "/v1/completions"
_FINISHED = frozenset({"stop", "length", "repetition", ABORTED})
#: RequestOutputKind.FINAL_ONLY: older servers default to an answer that holds only one of n.
_FINAL_ONLY = 2
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


class VllmEngine(ServerClient):
    """One vLLM server.

    Args:
        url: ``http://host:port``; a trailing ``/v1`` is ignored.
        route: Which route to use; ``auto`` finds out, and again after the server was down.
        options: As :class:`ServerClient` takes them.

    Raises:
        SettingsError: A setting makes no sense.
    """

    _weights_path = "/weight_info"
    _default_kind = LogprobsKind.RAW

    def __init__(
        self, url: str, *, route: Route = "auto", **options: Unpack[ClientOptions]
    ) -> None:
        if route not in ("auto", "generate", "completions"):
            raise SettingsError(f"vLLM route {route!r} is none of auto, generate, completions")
        super().__init__(url, **options)
        self._auto = route == "auto"
        self._route: Route = route

    @property
    def route(self) -> Route:
        """The route in use; "auto" until one has answered."""
        return self._route

    def _forget(self) -> None:
        super()._forget()
        if self._auto:
            self._route = "auto"

    def _admit(self, request: Request, n: int) -> None:
        super()._admit(request, n)
        refuse_reserved(request.sampling.extra, _RESERVED)

    async def _exchange(self, request: Request, n: int, salt: str) -> list[Generation]:
        headers = {"X-Session-ID": affinity_header(request.affinity)}
        before = await self._before(request)
        if self._route != "completions":
            body = self._generate_body(request, n, salt)
            reply = await self._http.post(_GENERATE, body, headers=headers)
            if not (self._auto and reply.status in NOT_OFFERED):
                return await self._parse(reply, request, n, before, "generate")
        body = self._completions_body(request, n, salt)
        reply = await self._http.post(_COMPLETIONS, body, headers=headers)
        return await self._parse(reply, request, n, before, "completions")

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
            # Said aloud, or the server takes them from the model's generation_config.json.
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "repetition_penalty": 1.0,
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
        return self._named(request, body)

    def _named(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """`body` with the model that it asks for; without one, a server takes its first."""
        model = request.model or self._model
        return {"model": model, **body} if model else body

    def _completions_body(self, request: Request, n: int, salt: str) -> dict[str, Any]:
        body: dict[str, Any] = {
            **self._sampling(request, n),
            **request.sampling.extra,
            "prompt": request.token_ids.tolist(),
            "add_special_tokens": False,
            "return_token_ids": True,
            "cache_salt": salt,
            "stream": False,
        }
        return self._named(request, body)

    async def _parse(
        self, reply: Reply, request: Request, n: int, before: int | None, route: Route
    ) -> list[Generation]:
        """The completions in `reply`; tagged `before`, or older, where the server tags none."""
        choices = self._accepted(reply, request).json().get("choices")
        if not isinstance(choices, list) or len(choices) != n:
            got = len(choices) if isinstance(choices, list) else type(choices).__name__
            raise EngineProtocolError(f"{reply.where}: asked for {n} completions, got {got}")
        tells = all(isinstance(one, dict) and one.get("weight_versions") for one in choices)
        untold = any(
            isinstance(one, dict) and one.get("token_ids") and not one.get("weight_versions")
            for one in choices
        )
        whole = await self._older(before, request, reply.where) if untold else NO_VERSION
        made: dict[int, Generation] = {}
        for position, choice in enumerate(choices):
            where = f"{reply.where}: completion {position} of {n}"
            if not isinstance(choice, dict):
                raise EngineProtocolError(f"{where} is {type(choice).__name__}, not an object")
            index = choice.get("index", position)
            if type(index) is not int or index in made or index not in range(n):
                raise EngineProtocolError(f"{where} has index {index!r}, twice or out of range")
            made[index] = self._judged(_said(choice, request, where), request, whole, where)
        self._route = route
        self._spans = tells
        return [made[index] for index in range(n)]


def _said(choice: dict[str, Any], request: Request, where: str) -> Said:
    """One choice of either route."""
    finish_reason = choice.get("finish_reason")
    if not isinstance(finish_reason, str) or finish_reason not in _FINISHED:
        raise EngineProtocolError(f"{where} ended by {finish_reason!r}: not a whole generation")
    echo = choice.get("prompt_token_ids")
    if echo is not None and echo != request.token_ids.tolist():
        raise EngineProtocolError(f"{where}: the server completed another prompt than ours")
    return Said(
        token_ids=choice.get("token_ids"),
        logprobs=_logprobs(choice.get("logprobs")),
        spans=choice.get("weight_versions"),
        finish_reason=finish_reason,
    )


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
