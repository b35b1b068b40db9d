"""What a server lists at /v1/models: names, owners and context lengths of its models.

- LoRA adapters are listed beside the model that they belong to, and left out here.
- Routers write null where they do not know a field; a card without a name is kept, because its owner
  and its context length still count.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rollfleet_engines.http import HttpClient

__all__ = ["Card", "cards_in", "read_cards"]

_PROBE_S = 5.0
_NO_ROUTE = frozenset({404, 405})


@dataclass(frozen=True, slots=True)
class Card:
    """One model of a server."""

    #: "" if the server does not name it.
    name: str
    #: "vllm", "sglang", "llamacpp", ...; "" if the server does not say.
    owner: str
    #: Tokens of prompt and completion that it has room for; 0 if the server does not say.
    context: int


def cards_in(listed: Any) -> list[Card]:
    """The models in the `data` of an answer of /v1/models, adapters left out."""
    rows = listed if isinstance(listed, list) else []
    return [_card(row) for row in rows if isinstance(row, dict) and not row.get("parent")]


async def read_cards(http: HttpClient, *, optional: bool = False) -> list[Card]:
    """The models of a server.

    Args:
        http: The server's client.
        optional: A server that has no list of models has none.

    Raises:
        EngineUnavailableError: It is unreachable or failing, or has no list of models.
        EngineProtocolError: The list cannot be read.
    """
    reply = await http.get("/v1/models", timeout_s=_PROBE_S)
    if optional and reply.status in _NO_ROUTE:
        return []
    return cards_in(reply.checked().json().get("data"))


def _card(row: Mapping[str, Any]) -> Card:
    meta = row.get("meta")
    meta = meta if isinstance(meta, dict) else {}
    # vLLM and SGLang write max_model_len; llama.cpp n_ctx, of one slot.
    said = row.get("max_model_len"), meta.get("n_ctx")
    name, owner = row.get("id"), row.get("owned_by")
    return Card(
        name=name if isinstance(name, str) else "",
        owner=owner if isinstance(owner, str) else "",
        context=next((n for n in said if type(n) is int and n > 0), 0),
    )
