"""Any other server that speaks OpenAI's routes: what it can say exactly is taken, nothing invented.

- ``/v1/completions`` with token ids, one completion a request: ``n`` is not served everywhere.
- Ids are read where servers put them: ``token_ids`` (asked for by ``return_token_ids``), ``id``
  beside each logprob (llama.cpp), or ``token_id:17`` for a token (``return_tokens_as_token_ids``).
  A server that gives none of these, or no logprobs, cannot be trained from, and its answer is an
  `EngineProtocolError` that says so; text is never tokenised again to guess what was sampled.
- The counts that the server reports must be those of the ids: llama.cpp leaves out the logprob of
  a token that splits a character, and some servers put a token before the prompt.
- Such a server tells no versions: what the fleet last gave it counts, else `base_version`, else
  the pinned version of the request.
- ``transformers serve`` takes no ids, and ignores that logprobs were asked for.
"""

from dataclasses import replace
from typing import Any

from rollfleet_common.errors import EngineProtocolError, EngineRefusedError
from rollfleet_common.messages import NO_VERSION
from rollfleet_worker.inference.client import (
    Said,
    ServerClient,
    affinity_header,
    all_of,
    refuse_reserved,
)
from rollfleet_worker.inference.engine import Generation, Request
from rollfleet_worker.inference.http import Reply
from rollfleet_worker.inference.resume import ABORTED

__all__ = ["OpenAIEngine"]

_COMPLETIONS = "/v1/completions"
_FINISHED = frozenset({"stop", "length", ABORTED})
_ID_PREFIX = "token_id:"
_ADVICE = (
    "such a server cannot be trained from: use vLLM or SGLang, or its text face, chat(), for what "
    "is not trained on"
)
_RESERVED = frozenset(
    {
        "echo",
        "logprobs",
        "max_tokens",
        "min_p",
        "model",
        "n",
        "prompt",
        "return_token_ids",
        "return_tokens_as_token_ids",
        "seed",
        "stop_token_ids",
        "stream",
        "temperature",
        "top_k",
        "top_p",
    }
)


class OpenAIEngine(ServerClient):
    """One server of OpenAI's routes; arguments as :class:`ServerClient` takes them."""

    #: Whether it has completed token ids with token ids since it was last down.
    _proven = False

    def _forget(self) -> None:
        super()._forget()
        self._proven = False

    def _admit(self, request: Request, n: int) -> None:
        super()._admit(request, n)
        refuse_reserved(request.sampling.extra, _RESERVED)

    async def _exchange(self, request: Request, n: int, salt: str) -> list[Generation]:
        if n == 1:
            return [await self._one(request, salt)]
        seed = request.sampling.seed
        singles = [
            request
            if seed is None
            else replace(request, sampling=replace(request.sampling, seed=seed + at))
            for at in range(n)
        ]
        return await all_of(self._one(one, salt) for one in singles)

    async def _one(self, request: Request, salt: str) -> Generation:
        # What it was refitted to, if anybody could do that; else the weights that it came with.
        whole = self._untagged(request) if request.serves == NO_VERSION else request.serves
        body = {**_body(request), "model": await self._chat.model(), "cache_salt": salt}
        headers = {"X-Session-ID": affinity_header(request.affinity)}
        reply = await self._http.post(_COMPLETIONS, body, headers=headers)
        try:
            said = _said(reply, request)
        except EngineRefusedError as exc:
            if self._proven:
                raise
            # A prompt may be at fault, but as long as no other one went through it is more likely
            # that this server takes no ids; and then no prompt must be buried for it.
            raise EngineProtocolError(
                f"{exc} (it has not completed any token ids yet; if it takes none, {_ADVICE})"
            ) from exc
        made = self._judged(said, request, whole, reply.where)
        self._proven = True
        return made


def _body(request: Request) -> dict[str, Any]:
    sampling = request.sampling
    fields: dict[str, Any] = {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "logprobs": 1,
        **sampling.extra,
        "prompt": request.token_ids.tolist(),
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "stream": False,
    }
    if sampling.top_k > 0:
        fields["top_k"] = sampling.top_k
    if sampling.min_p:
        fields["min_p"] = sampling.min_p
    if sampling.stop_token_ids:
        fields["stop_token_ids"] = list(sampling.stop_token_ids)
    if sampling.seed is not None:
        fields["seed"] = sampling.seed
    return fields


def _said(reply: Reply, request: Request) -> Said:
    """The one completion in `reply`.

    Raises:
        EngineProtocolError: There is not one, or the server cannot say its tokens exactly.
    """
    answer = reply.checked().json()
    choices = answer.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        got = len(choices) if isinstance(choices, list) else type(choices).__name__
        raise EngineProtocolError(f"{reply.where}: asked for 1 completions, got {got}")
    choice: dict[str, Any] = choices[0]
    finish_reason = choice.get("finish_reason")
    if not isinstance(finish_reason, str) or finish_reason not in _FINISHED:
        raise EngineProtocolError(
            f"{reply.where} ended by {finish_reason!r}: not a whole generation"
        )
    ids, logprobs = _tokens(choice)
    missing = [what for what, told in (("token ids", ids), ("logprobs", logprobs)) if told is None]
    if missing:
        raise EngineProtocolError(
            f"{reply.where}: no {' and no '.join(missing)} in the answer: {_ADVICE}"
        )
    _refuse_other_counts(answer.get("usage"), request, ids, reply.where)
    return Said(ids, logprobs, None, finish_reason)


def _tokens(choice: dict[str, Any]) -> tuple[Any, Any]:
    """Ids and logprobs of a choice, each None if the server did not give them."""
    ids = choice.get("token_ids")
    said = choice.get("logprobs")
    if not isinstance(said, dict):
        return ids, None
    content = said.get("content")
    if isinstance(content, list):
        entries = [entry if isinstance(entry, dict) else {} for entry in content]
        if ids is None and all("id" in entry for entry in entries):
            ids = [entry["id"] for entry in entries]
        has_all = all("logprob" in entry for entry in entries)
        return ids, [entry["logprob"] for entry in entries] if has_all else None
    names = said.get("tokens")
    if ids is None and isinstance(names, list) and all(_is_id(name) for name in names):
        ids = [int(name.removeprefix(_ID_PREFIX)) for name in names]
    return ids, said.get("token_logprobs")


def _is_id(name: Any) -> bool:
    return (
        isinstance(name, str)
        and name.startswith(_ID_PREFIX)
        and name.removeprefix(_ID_PREFIX).isdecimal()
        and name.isascii()
    )


def _refuse_other_counts(usage: Any, request: Request, ids: Any, where: str) -> None:
    """Hold the server's own counts against the prompt's and the completion's lengths."""
    if not isinstance(usage, dict):
        return
    wanted = len(request.token_ids)
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if isinstance(prompt, int) and prompt != wanted:
        raise EngineProtocolError(
            f"{where}: the server completed a prompt of {prompt} tokens, not ours of {wanted}: "
            f"{_ADVICE}"
        )
    if isinstance(completion, int) and isinstance(ids, list) and completion != len(ids):
        raise EngineProtocolError(
            f"{where}: the server counts {completion} tokens and names {len(ids)}: {_ADVICE}"
        )
