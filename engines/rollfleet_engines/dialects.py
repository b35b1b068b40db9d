"""How a server of OpenAI's routes wants sampling stated, so that none of its own defaults applies.

- llama.cpp samples with top-k 40, top-p 0.95 and min-p 0.05 unless told otherwise, while its
  log-probabilities are of the whole softmax; a GGUF file may carry further defaults. Every sampler
  of it is stated, and their order.
- vLLM and SGLang take defaults from the model's generation_config.json: each of them is stated.
- Of other servers nothing is known. They get OpenAI's own fields and the usual extended ones; those
  that refuse the extended ones by name get OpenAI's alone.

Names were read in llama.cpp's server (tools/server/server-schema.cpp) and in vLLM's and SGLang's
request schemas.
"""

from enum import StrEnum
from typing import Any

from rollfleet_common.errors import EngineRefusedError
from rollfleet_engines.cards import Card
from rollfleet_engines.http import HttpClient
from rollfleet_engines.interface import Sampling

__all__ = ["EXTENDED", "Dialect", "dialect_of", "stated"]

_PROBE_S = 5.0


class Dialect(StrEnum):
    """Which sampling fields a server knows."""

    LLAMACPP = "llama.cpp"
    #: vLLM's and SGLang's names.
    VLLM = "vllm"
    UNKNOWN = "unknown"
    #: OpenAI's fields only: it refused others.
    STANDARD = "standard"


#: Fields beyond OpenAI's that a server of unknown kind is sent.
EXTENDED = ("top_k", "min_p", "repetition_penalty", "typical_p", "repeat_penalty")
#: llama.cpp's samplers, in vLLM's order: temperature before truncation. Names that a release does not
#: know are skipped by it.
_SAMPLERS = (
    *("penalties", "dry", "temperature", "top_k", "typ_p", "top_p", "min_p"),
    *("xtc", "top_n_sigma"),
)
_LLAMACPP: dict[str, Any] = {
    "samplers": list(_SAMPLERS),
    "typical_p": 1.0,
    "top_n_sigma": -1.0,
    "xtc_probability": 0.0,
    "dry_multiplier": 0.0,
    "dynatemp_range": 0.0,
    "mirostat": 0,
    "repeat_penalty": 1.0,
    # Of the whole softmax, before any sampler.
    "post_sampling_probs": False,
}


async def dialect_of(http: HttpClient, cards: list[Card]) -> tuple[Dialect, int]:
    """The dialect of a server and its context length in tokens, 0 if it does not say.

    Args:
        http: The server's client.
        cards: Its models.

    Raises:
        EngineUnavailableError: It is unreachable.
        EngineProtocolError: It answers no HTTP.
    """
    owners = {card.owner.lower() for card in cards}
    context = min((card.context for card in cards if card.context), default=0)
    if owners & {"vllm", "sglang"}:
        return Dialect.VLLM, context
    # A gateway may have put its own name in the place of the owner.
    reply = await http.get("/props", timeout_s=_PROBE_S)
    props = reply.object_or_none() if reply.status == 200 else None
    settings = None if props is None else props.get("default_generation_settings")
    if isinstance(settings, dict):
        n_ctx = settings.get("n_ctx")
        return Dialect.LLAMACPP, n_ctx if type(n_ctx) is int and n_ctx > 0 else context
    return (Dialect.LLAMACPP if "llamacpp" in owners else Dialect.UNKNOWN), context


def stated(sampling: Sampling, dialect: Dialect) -> dict[str, Any]:
    """Every field that shapes what is sampled, at its neutral value where nothing else is asked for.

    `Sampling.extra` is included.

    Raises:
        EngineRefusedError: The server takes no field that `sampling` needs.
    """
    fields: dict[str, Any] = {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }
    extra = dict(sampling.extra)
    if dialect is Dialect.STANDARD:
        if sampling.top_k > 0 or sampling.min_p:
            raise EngineRefusedError(
                "top_k and min_p cannot be sampled with here: the server refuses fields beyond "
                "OpenAI's own"
            )
        return {**fields, **extra}
    fields["min_p"] = sampling.min_p
    if dialect is Dialect.LLAMACPP:
        fields |= {"top_k": max(sampling.top_k, 0), **_LLAMACPP}
        if "repetition_penalty" in extra:
            extra.setdefault("repeat_penalty", extra.pop("repetition_penalty"))
        return {**fields, **extra}
    # Older vLLM refuses 0; llama.cpp takes anything below 1 for no limit.
    fields |= {"top_k": sampling.top_k if sampling.top_k > 0 else -1, "repetition_penalty": 1.0}
    if dialect is Dialect.UNKNOWN:
        # llama.cpp's names, should it be one after all.
        fields |= {"typical_p": 1.0, "repeat_penalty": extra.get("repetition_penalty", 1.0)}
    return {**fields, **extra}
