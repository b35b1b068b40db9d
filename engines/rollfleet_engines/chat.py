"""Conversations with one server through /v1/chat/completions: text in, text out.

- Only for what is never trained on: judges, simulated users, evaluation.
- Sends no field that was not asked for: servers of this route differ in which they take, and some
  refuse those that they do not know.
- The model is named, because most servers want that: the configured one, else the only one served.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rollfleet_common.errors import (
    EngineProtocolError,
    EngineRefusedError,
    EngineUnavailableError,
)
from rollfleet_engines.cards import read_cards
from rollfleet_engines.http import HttpClient, Reply
from rollfleet_engines.interface import Sampling, TextAnswer

__all__ = ["Chat"]

_CHAT = "/v1/chat/completions"
#: Fields of the request that are not the caller's to set in `Sampling.extra`.
_RESERVED = frozenset({"max_tokens", "messages", "model", "n", "stream", "temperature", "top_p"})


class Chat:
    """The text face of one server.

    Args:
        http: The server's client.
        model: As the server names it; None: the only one that it serves.
    """

    def __init__(self, http: HttpClient, model: str | None) -> None:
        self._http = http
        self._configured = model
        self._served: str | None = None

    def forget(self) -> None:
        """The server may come back with another model."""
        self._served = None

    async def model(self) -> str:
        """The model's name for requests; "" if the server serves one and does not name it.

        Raises:
            EngineUnavailableError: None is configured, and the server does not serve just one.
            EngineProtocolError: The server's list of models cannot be read.
        """
        if self._configured is not None:
            return self._configured
        if self._served is None:
            cards = await read_cards(self._http)
            names = [card.name for card in cards]
            if len(names) != 1:
                raise EngineUnavailableError(
                    f"{self._http.name} serves {len(names)} models ({', '.join(names)[:200]}): "
                    f"set this server's model"
                )
            self._served = names[0]
        return self._served

    async def ask(self, messages: Sequence[Mapping[str, Any]], sampling: Sampling) -> TextAnswer:
        """What the model says next; see :class:`TextEngine`."""
        if taken := _RESERVED & sampling.extra.keys():
            raise EngineRefusedError(
                f"sampling fields {sorted(taken)} cannot be set in `extra` of a conversation: use "
                f"the fields of Sampling"
            )
        model = await self.model()
        body = {
            **({"model": model} if model else {}),
            "messages": [dict(message) for message in messages],
            **_fields(sampling),
            **sampling.extra,
        }
        return self._answer(await self._http.post(_CHAT, body))

    def _answer(self, reply: Reply) -> TextAnswer:
        said = reply.checked().json()
        choices = said.get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise EngineProtocolError(f"{reply.where}: expected one answer, got {reply.quoted}")
        message, finish_reason = choices[0].get("message"), choices[0].get("finish_reason")
        text = message.get("content") if isinstance(message, dict) else None
        if not isinstance(text, str):
            raise EngineProtocolError(
                f"{reply.where}: the answer holds no text, and ended by {finish_reason!r} (a "
                f"reasoning model may have spent max_tokens before it came to its answer)"
            )
        usage = said.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        return TextAnswer(
            text=text,
            finish_reason=str(finish_reason),
            server=self._http.name,
            prompt_tokens=_count(usage.get("prompt_tokens")),
            completion_tokens=_count(usage.get("completion_tokens")),
        )


def _fields(sampling: Sampling) -> dict[str, Any]:
    """The fields that say `sampling`, without those that say nothing."""
    fields: dict[str, Any] = {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
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


def _count(said: Any) -> int:
    return said if isinstance(said, int) else 0
