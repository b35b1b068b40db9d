"""vLLM's HTTP shapes for token-in, token-out generation, as far as the demo serves them.

- Requests are checked as vLLM checks them; what it refuses, this refuses, in the same words' shape:
  ``{"error": {"message", "type", "param", "code"}}``.
- A field that would change the answer and that the demo cannot honour is refused, never ignored.
- Only ``/inference/v1/generate`` reports `weight_versions`; ``/v1/completions`` has no such field.
"""

import time
from collections.abc import Sequence
from http import HTTPStatus
from typing import Annotated, Any, Literal
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rollfleet_demo.requests import Completion
from rollfleet_demo.sampling import SamplerSettings
from rollfleet_demo.task import END, VOCABULARY, decode, encode

__all__ = [
    "CompletionBody",
    "GenerateBody",
    "RequestError",
    "check_model",
    "check_prompt",
    "completion_answer",
    "error_body",
    "generate_answer",
    "validation_message",
]

#: JSON has no infinity; vLLM reports nothing below this.
_LOWEST_LOGPROB = -9999.0
#: vLLM's `--max-logprobs`.
_MOST_LOGPROBS = 20
_TokenId = Annotated[int, Field(ge=0, strict=True)]


class RequestError(Exception):
    """A request that is refused: status, vLLM's name of the error, and the field."""

    def __init__(
        self,
        message: str,
        *,
        status: HTTPStatus = HTTPStatus.BAD_REQUEST,
        kind: str = "BadRequestError",
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param


class _SamplingFields(BaseModel):
    """Sampling settings as they stand in JSON; fields that are not listed are ignored, as in vLLM."""

    model_config = ConfigDict(extra="ignore")

    n: int = Field(1, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0.0, le=100.0)
    top_p: float | None = Field(None, gt=0.0, le=1.0)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0.0, le=1.0)
    stop_token_ids: list[_TokenId] | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool = False
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    logprobs: int | None = Field(None, ge=-1, le=_MOST_LOGPROBS)
    # Accepted at their neutral values only: the demo has no such machinery.
    min_tokens: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    repetition_penalty: Literal[1] | None = None

    @model_validator(mode="after")
    def _no_empty_stop(self) -> "_SamplingFields":
        if "" in self.stops() and self.stop != "":
            raise ValueError("stop cannot contain an empty string.")
        return self

    def stops(self) -> tuple[str, ...]:
        """The texts that end a choice."""
        return (self.stop,) if isinstance(self.stop, str) and self.stop else tuple(self.stop or ())

    def sampling(self) -> SamplerSettings:
        """The engine's settings; what is unset has vLLM's default."""
        return SamplerSettings(
            n=self.n,
            max_tokens=self.max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            min_p=self.min_p or 0.0,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            stop=self.stops(),
            ignore_eos=self.ignore_eos,
            seed=self.seed,
            logprobs=len(VOCABULARY) if self.logprobs == -1 else self.logprobs,
        )


class GenerateBody(BaseModel):
    """Body of ``POST /inference/v1/generate``."""

    request_id: str = Field(default_factory=lambda: uuid4().hex)
    token_ids: list[_TokenId] = Field(min_length=1)
    sampling_params: _SamplingFields
    model: str | None = None
    stream: Literal[False] | None = None
    cache_salt: str | None = Field(None, min_length=1, max_length=1024)
    return_token_ids: bool | None = None


class CompletionBody(_SamplingFields):
    """Body of ``POST /v1/completions``."""

    request_id: str = Field(default_factory=lambda: uuid4().hex)
    model: str | None = None
    prompt: list[_TokenId] | list[list[_TokenId]] | str | list[str]
    max_tokens: int | None = Field(16, ge=1)
    stream: Literal[False] | None = None
    echo: Literal[False] | None = None
    cache_salt: str | None = Field(None, min_length=1, max_length=1024)
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None

    def prompts(self) -> list[list[int]]:
        """Token ids of every prompt.

        Raises:
            RequestError: No prompt, an empty one, or a character that has no token.
        """
        flat: list[int] = []
        ids: list[list[int]] = []
        try:
            for item in [self.prompt] if isinstance(self.prompt, str) else self.prompt:
                if isinstance(item, int):
                    flat.append(item)
                else:
                    ids.append(encode(item) if isinstance(item, str) else item)
        except ValueError as exc:
            raise RequestError(str(exc), param="prompt") from exc
        ids = [flat] if flat else ids
        if not ids or not all(ids):
            raise RequestError("The prompt cannot be empty", param="prompt")
        return ids


def check_model(asked: str | None, served: str) -> None:
    """Refuse a model that is not served.

    Raises:
        RequestError: 404, as vLLM answers.
    """
    if asked is not None and asked != served:
        raise RequestError(
            f"The model `{asked}` does not exist.",
            status=HTTPStatus.NOT_FOUND,
            kind="NotFoundError",
            param="model",
        )


def check_prompt(
    token_ids: Sequence[int], sampling: SamplerSettings, limit: int, max_num_seqs: int
) -> None:
    """Refuse what the model cannot take.

    Raises:
        RequestError: An id out of the vocabulary, no room for one token, or too many choices.
    """
    if max(token_ids) >= len(VOCABULARY):
        raise RequestError(f"Token id {max(token_ids)} is out of vocabulary")
    if len(token_ids) >= limit:
        raise RequestError(
            f"The decoder prompt (length {len(token_ids)}) plus the number of requested output "
            f"tokens (at least 1) is longer than the maximum model length of {limit}."
        )
    if sampling.n > 1 and sampling.greedy:
        raise RequestError(f"n must be 1 when using greedy sampling, got {sampling.n}.")
    if sampling.n > max_num_seqs:
        raise RequestError(
            f"sampling_params.n must be at most the server's max_num_seqs ({max_num_seqs}), "
            f"got {sampling.n}."
        )


def error_body(message: str, kind: str, code: int, param: str | None = None) -> dict[str, Any]:
    """The error answer, in the shape of vLLM."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def validation_message(exc: ValidationError) -> tuple[str, str]:
    """What a failed check says, and the field that it is about."""
    errors = exc.errors(include_url=False, include_context=False, include_input=False)
    label = "error" if len(errors) == 1 else "errors"
    lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in errors[:10]]
    first = ".".join(map(str, errors[0]["loc"]))
    return f"{len(errors)} validation {label}:\n  " + "\n  ".join(lines), first


def _usage(prompt_tokens: int, choices: Sequence[Completion]) -> dict[str, Any]:
    """Token counts of an answer."""
    made = sum(len(choice.token_ids) for choice in choices)
    return {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + made,
        "completion_tokens": made,
        "prompt_tokens_details": None,
    }


def _alternatives(choice: Completion, at: int) -> list[tuple[int, float, int]]:
    """``(token id, logprob, rank)``: the sampled token first, then the likeliest others."""
    sampled = choice.token_ids[at]
    others = [
        (token, logprob, rank)
        for rank, (token, logprob) in enumerate(choice.tops[at], 1)
        if token != sampled
    ]
    return [(sampled, choice.logprobs[at], choice.ranks[at]), *others]


def _generate_logprobs(choice: Completion, count: int) -> dict[str, Any]:
    """Log-probabilities by token id."""
    content = []
    for at in range(len(choice.token_ids)):
        candidates = [
            {"token_id": token, "logprob": max(logprob, _LOWEST_LOGPROB), "rank": rank}
            for token, logprob, rank in _alternatives(choice, at)[: max(count, 1)]
        ]
        content.append({**candidates[0], "top_logprobs": candidates})
    return {"content": content}


def generate_answer(
    body: GenerateBody, model: str, request_id: str, choices: Sequence[Completion]
) -> dict[str, Any]:
    """Answer of ``/inference/v1/generate``; `weight_versions` stands in each choice."""
    logprobs = body.sampling_params.sampling().logprobs
    return {
        "request_id": f"generate-tokens-{request_id}",
        "model": model,
        "created": int(time.time()),
        "usage": _usage(len(body.token_ids), choices),
        "prompt_logprobs": None,
        "prompt_token_ids": body.token_ids if body.return_token_ids else None,
        "kv_transfer_params": None,
        "output_mode": "tokens",
        "choices": [
            {
                "index": choice.index,
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.stop_reason,
                "token_ids": choice.token_ids,
                "weight_versions": [
                    {"version": version, "start": start, "end": end}
                    for version, start, end in choice.spans()
                ],
                "logprobs": None if logprobs is None else _generate_logprobs(choice, logprobs),
            }
            for choice in choices
        ],
    }


def _completion_logprobs(choice: Completion, count: int, *, as_ids: bool) -> dict[str, Any]:
    """Log-probabilities in the shape of OpenAI's completions."""

    def name(token: int) -> str:
        return f"token_id:{token}" if as_ids else VOCABULARY[token]

    return {
        "text_offset": list(range(len(choice.token_ids))),
        "token_logprobs": [max(value, _LOWEST_LOGPROB) for value in choice.logprobs],
        "tokens": [name(token) for token in choice.token_ids],
        "top_logprobs": [
            {
                name(token): max(logprob, _LOWEST_LOGPROB)
                for token, logprob, _ in _alternatives(choice, at)[: count + 1]
            }
            for at in range(len(choice.token_ids))
        ],
    }


def _text(choice: Completion) -> str:
    """What a choice says, up to the stop text that ended it."""
    text = decode(choice.token_ids).replace(END, "")
    stop = choice.stop_reason
    return text.removesuffix(stop) if isinstance(stop, str) else text


def completion_answer(
    body: CompletionBody,
    model: str,
    request_id: str,
    results: Sequence[tuple[Sequence[int], Sequence[Completion]]],
) -> dict[str, Any]:
    """Answer of ``/v1/completions``: the choices of all prompts in a row."""
    asked = body.sampling().logprobs
    choices: list[dict[str, Any]] = []
    for prompt, made in results:
        for choice in made:
            logprobs = None
            if asked is not None:
                as_ids = bool(body.return_tokens_as_token_ids)
                logprobs = _completion_logprobs(choice, asked, as_ids=as_ids)
            choices.append(
                {
                    "index": len(choices),
                    "text": _text(choice),
                    "logprobs": logprobs,
                    "finish_reason": choice.finish_reason,
                    "stop_reason": choice.stop_reason,
                    "token_ids": choice.token_ids if body.return_token_ids else None,
                    "prompt_logprobs": None,
                    "prompt_token_ids": list(prompt) if body.return_token_ids else None,
                }
            )
    made_by_all = [choice for _, made in results for choice in made]
    return {
        "id": f"cmpl-{request_id}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": choices,
        "usage": _usage(sum(len(prompt) for prompt, _ in results), made_by_all),
        "kv_transfer_params": None,
    }
