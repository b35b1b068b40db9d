"""Any other server that speaks OpenAI's routes: what it can say exactly is taken, nothing invented.

- ``/v1/completions`` with token ids, one completion a request: ``n`` is not served everywhere.
- Ids are read where servers put them: ``token_ids`` (asked for by ``return_token_ids``), ``id``
  beside each logprob (llama.cpp), or ``token_id:17`` for a token (``return_tokens_as_token_ids``).
  A server that gives none of these, or no logprobs, cannot be trained from, and its answer is an
  `EngineProtocolError` that says so; text is never tokenised again to guess what was sampled.
- The counts that the server reports must be those of the ids: llama.cpp leaves out the logprob of
  a token that splits a character, and some servers put a token before the prompt.
- How sampling is stated is for :mod:`.dialects`: none of the server's own defaults applies.
- Such a server tells no versions: what the fleet last gave it counts, else `base_version`, else
  the pinned version of the request.
- ``transformers serve`` takes no ids, and ignores that logprobs were asked for.
"""

import asyncio
from dataclasses import replace
from typing import Any, Unpack

from rollfleet_common.errors import EngineProtocolError, EngineUnavailableError
from rollfleet_common.messages import NO_VERSION, LogprobsKind
from rollfleet_engines.cards import read_cards
from rollfleet_engines.client import (
    ClientOptions,
    Said,
    ServerClient,
    affinity_header,
    all_of,
    refuse_reserved,
    seeded,
)
from rollfleet_engines.dialects import EXTENDED, Dialect, dialect_of, stated
from rollfleet_engines.http import Reply
from rollfleet_engines.interface import Generation, Request
from rollfleet_engines.resume import ABORTED

__all__ = ["OpenAIEngine"]

_COMPLETIONS = "/v1/completions"
_FINISHED = frozenset({"stop", "length", ABORTED})
_ID_PREFIX = "token_id:"
_READ_BYTES = 8192
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
        "n_probs",
        "post_sampling_probs",
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

    merges = False

    def __init__(self, url: str, **options: Unpack[ClientOptions]) -> None:
        super().__init__(url, **options)
        #: Which sampling fields the server knows; None until it was asked.
        self._dialect: Dialect | None = None
        self._asking = asyncio.Lock()

    def _forget(self) -> None:
        super()._forget()
        self._dialect = None

    def _kind(self) -> LogprobsKind:
        if self._logprobs is not None:
            return self._logprobs
        # llama.cpp's are of the whole softmax; vLLM's depend on how it was started.
        known = {Dialect.LLAMACPP: LogprobsKind.RAW}
        return known.get(self._dialect, self._default_kind) if self._dialect else self._default_kind

    def _admit(self, request: Request, n: int) -> None:
        super()._admit(request, n)
        refuse_reserved(request.sampling.extra, _RESERVED)

    async def _ask(self, request: Request, n: int) -> list[Generation]:
        try:
            await self._learn()
        except EngineUnavailableError:
            self._forget()
            raise
        return await super()._ask(request, n)

    async def _learn(self) -> None:
        """Find out which fields the server knows, and how long its context is."""
        if self._dialect is None:
            async with self._asking:
                if self._dialect is None:
                    cards = await read_cards(self._http, optional=True)
                    mine = [card for card in cards if card.name == self._model] or cards
                    dialect, self._room.limit = await dialect_of(self._http, mine)
                    self._dialect = dialect

    async def _exchange(self, request: Request, n: int, salt: str) -> list[Generation]:
        if n == 1:
            return [await self._one(request, salt)]
        return await all_of(self._one(one, salt) for one in seeded(request, n))

    async def _one(self, request: Request, salt: str) -> Generation:
        # What it was refitted to, if anybody could do that; else the weights that it came with.
        whole = self._untagged(request) if request.serves == NO_VERSION else request.serves
        model = await self._chat.model()
        named = {"model": model, "cache_salt": salt} if model else {"cache_salt": salt}
        headers = {"X-Session-ID": affinity_header(request.affinity)}
        dialect = self._dialect or Dialect.UNKNOWN
        body = {**_body(request, dialect), **named}
        reply = await self._http.post(_COMPLETIONS, body, headers=headers)
        if dialect is Dialect.UNKNOWN and _refuses_extended(reply):
            self._dialect = Dialect.STANDARD
            body = {**_body(request, Dialect.STANDARD), **named}
            reply = await self._http.post(_COMPLETIONS, body, headers=headers)
        said = _said(self._accepted(reply, request), request)
        return self._judged(said, request, whole, reply.where)


def _refuses_extended(reply: Reply) -> bool:
    """Whether a server refuses a sampling field that is not OpenAI's."""
    if reply.status not in (400, 422):
        return False
    text = reply.body[:_READ_BYTES].decode(errors="replace")
    return any(name in text for name in EXTENDED)


def _body(request: Request, dialect: Dialect) -> dict[str, Any]:
    sampling = request.sampling
    fields: dict[str, Any] = {
        **stated(sampling, dialect),
        "logprobs": 1,
        "prompt": request.token_ids.tolist(),
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "stream": False,
    }
    if sampling.stop_token_ids:
        fields["stop_token_ids"] = list(sampling.stop_token_ids)
    if sampling.seed is not None:
        fields["seed"] = sampling.seed
    return fields


def _said(reply: Reply, request: Request) -> Said:
    """The one completion in `reply`, which was accepted.

    Raises:
        EngineProtocolError: There is not one, or the server cannot say its tokens exactly.
    """
    answer = reply.json()
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
    return _stopped(Said(ids, logprobs, None, finish_reason), request)


def _stopped(said: Said, request: Request) -> Said:
    """`said` up to its first stop token: llama.cpp does not know `stop_token_ids`, and goes on.

    What comes after a stop token has no influence on what came before it, so nothing is biased.
    """
    stops = request.sampling.stop_token_ids
    if not stops or not isinstance(said.token_ids, list) or not isinstance(said.logprobs, list):
        return said
    end = min((said.token_ids.index(one) + 1 for one in stops if one in said.token_ids), default=0)
    if not end or end == len(said.token_ids):
        return said
    ids, logprobs = said.token_ids[:end], said.logprobs[:end]
    return replace(said, token_ids=ids, logprobs=logprobs, finish_reason="stop")


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
