"""An SGLang server behind the engine protocol: token ids in; ids, logprobs and true versions out.

- ``/generate`` with ``input_ids``. Servers that tell which weights made every token
  (``weight_versions``) are believed; where only the version at the end is told, the older of that
  and of ``/model_info`` before counts.
- ``n`` completions of a seeded request are asked for one by one: with one seed for all of them
  they would be n times the same.
- SGLang writes an end token in place of a token that is outside of its vocabulary, and says that
  the generation stopped at "NaN happened": that is no generation.
- Sampling fields that the release does not know are refused here: the server answers them with
  500, as if it were failing.
- Prefix caches are salted by version (``extra_key``).

Logprobs are those after temperature and before top-p, unless the server was started with
``SGLANG_RETURN_ORIGINAL_LOGPROB``; and seeds count only with ``--enable-deterministic-inference``.
Shapes are those of SGLang 0.5.23, and of 0.5.9 for a server that tells no spans, read in their
source: this client has not met a real server yet.
"""

from typing import Any

from rollfleet_common.errors import (
    EngineProtocolError,
    EngineRefusedError,
    EngineUnavailableError,
)
from rollfleet_common.messages import NO_VERSION, LogprobsKind
from rollfleet_engines.answers import parse_version
from rollfleet_engines.cards import read_cards
from rollfleet_engines.client import (
    Said,
    ServerClient,
    affinity_header,
    all_of,
    seeded,
)
from rollfleet_engines.http import Reply
from rollfleet_engines.interface import Generation, Request, Sampling
from rollfleet_engines.resume import ABORTED

__all__ = ["SglangEngine"]

_GENERATE = "/generate"
_FINISHED = frozenset({"stop", "length", ABORTED})
_BROKEN = "NaN happened"
#: Sampling parameters of the release that are not fields of Sampling; `min_tokens` is renamed.
_EXTRA = frozenset(
    {
        "custom_params",
        "ebnf",
        "frequency_penalty",
        "ignore_eos",
        "json_schema",
        "logit_bias",
        "min_tokens",
        "no_stop_trim",
        "presence_penalty",
        "regex",
        "repetition_penalty",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "stop",
        "stop_regex",
        "structural_tag",
    }
)


class SglangEngine(ServerClient):
    """One SGLang server; arguments as :class:`ServerClient` takes them."""

    _weights_path = "/model_info"
    _default_kind = LogprobsKind.TEMPERED
    #: Whether the server was seen to serve the configured model.
    _checked = False

    def _forget(self) -> None:
        super()._forget()
        self._checked = False

    def _admit(self, request: Request, n: int) -> None:
        super()._admit(request, n)
        if unknown := request.sampling.extra.keys() - _EXTRA:
            raise EngineRefusedError(
                f"sampling fields {sorted(unknown)} cannot be set in `extra` for SGLang: use the "
                f"fields of Sampling, or one of {', '.join(sorted(_EXTRA))}"
            )

    async def _exchange(self, request: Request, n: int, salt: str) -> list[Generation]:
        seed = request.sampling.seed
        if n > 1 and seed is not None:
            pairs = await all_of(self._exchange(one, 1, salt) for one in seeded(request, n))
            return [one for pair in pairs for one in pair]
        await self._check_model()
        before = await self._before(request)
        reply = await self._http.post(
            _GENERATE,
            _body(request, n, salt),
            headers={"X-SMG-Routing-Key": affinity_header(request.affinity)},
        )
        return self._parse(reply, request, n, before)

    async def _check_model(self) -> None:
        """See that the server serves our model: ``/generate`` takes no name, and would not mind."""
        if self._model is None or self._checked:
            return
        # Adapters are not among them: /generate would sample from what an adapter belongs to, and
        # nobody would notice.
        names = [card.name for card in await read_cards(self._http)]
        # A router that does not know its models names none.
        if self._model not in names and (any(names) or not names):
            raise EngineUnavailableError(
                f"{self.name} serves {names}, not {self._model!r}: check this server's url and "
                f"model name (a LoRA adapter cannot be named here)"
            )
        self._checked = True

    def _parse(
        self, reply: Reply, request: Request, n: int, before: int | None
    ) -> list[Generation]:
        """The completions in `reply`; tagged `before`, or older, where the server tags none."""
        answers = self._accepted(reply, request).parsed()
        if n == 1 and isinstance(answers, dict):
            answers = [answers]
        if not isinstance(answers, list) or len(answers) != n:
            got = len(answers) if isinstance(answers, list) else type(answers).__name__
            raise EngineProtocolError(f"{reply.where}: asked for {n} completions, got {got}")
        made: list[Generation] = []
        names: set[str] = set()
        tells = True
        for position, answer in enumerate(answers):
            where = f"{reply.where}: completion {position} of {n}"
            meta = answer.get("meta_info") if isinstance(answer, dict) else None
            if not isinstance(meta, dict):
                raise EngineProtocolError(f"{where} has no meta_info: {reply.quoted}")
            name = str(meta.get("id", position))
            if name in names:
                raise EngineProtocolError(f"{where} is request {name!r} a second time")
            names.add(name)
            said = _said(answer, meta, request, where)
            whole = NO_VERSION
            if said.spans is None and said.token_ids:
                tells = False
                whole = self._oldest(before, self._after(meta, request, where), request, where)
            made.append(self._judged(said, request, whole, where))
        self._spans = tells
        return made

    def _after(self, meta: dict[str, Any], request: Request, where: str) -> int | None:
        """The version at the end of a generation without spans; None if that is not told."""
        if "weight_version" not in meta:
            return None
        version = parse_version(meta["weight_version"], where)
        return self._untagged(request) if version is None else version


def _body(request: Request, n: int, salt: str) -> dict[str, Any]:
    sampling = _sampling(request.sampling)
    if n > 1:
        sampling["n"] = n
    return {
        "input_ids": request.token_ids.tolist(),
        "sampling_params": sampling,
        "return_logprob": True,
        "return_text_in_logprobs": False,
        "extra_key": salt,
        "stream": False,
    }


def _sampling(sampling: Sampling) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "max_new_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k if sampling.top_k > 0 else -1,
        "min_p": sampling.min_p,
        # Said aloud, or the server takes them from its --preferred-sampling-params.
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
        "min_new_tokens": 0,
        **sampling.extra,
    }
    if "min_tokens" in fields:
        fields["min_new_tokens"] = fields.pop("min_tokens")
    if sampling.stop_token_ids:
        fields["stop_token_ids"] = list(sampling.stop_token_ids)
    if sampling.seed is not None:
        fields["sampling_seed"] = sampling.seed
    return fields


def _said(answer: dict[str, Any], meta: dict[str, Any], request: Request, where: str) -> Said:
    """One answer, with the ids of its tokens held against the ids of its logprobs."""
    finish_reason = _finish_reason(meta.get("finish_reason"), where)
    prompt_tokens = meta.get("prompt_tokens")
    if isinstance(prompt_tokens, int) and prompt_tokens != len(request.token_ids):
        raise EngineProtocolError(
            f"{where}: the server completed a prompt of {prompt_tokens} tokens, not ours of "
            f"{len(request.token_ids)} (started with --allow-auto-truncate?)"
        )
    logprobs, theirs = _columns(meta.get("output_token_logprobs"))
    ids = answer.get("output_ids", theirs)
    if finish_reason == ABORTED and not ids:
        # A request that was aborted in its prefill may carry the logprob of a token it never had.
        return Said([], [], None, finish_reason)
    if isinstance(ids, list) and theirs and len(ids) == len(theirs) and ids != theirs:
        raise EngineProtocolError(f"{where}: its logprobs are of other tokens than its ids")
    took_s = meta.get("e2e_latency")
    return Said(
        token_ids=ids,
        logprobs=logprobs,
        spans=meta.get("weight_versions"),
        finish_reason=finish_reason,
        server_s=float(took_s) if isinstance(took_s, int | float) else 0.0,
    )


def _finish_reason(said: Any, where: str) -> str:
    kind = said.get("type") if isinstance(said, dict) else None
    if not isinstance(kind, str) or kind not in _FINISHED:
        raise EngineProtocolError(f"{where} ended by {said!r:.200}: not a whole generation")
    if said.get("matched") == _BROKEN:
        raise EngineProtocolError(
            f"{where}: the server sampled a token outside of its vocabulary ({_BROKEN!r}): its "
            f"weights or its kernels are broken"
        )
    return kind


def _columns(entries: Any) -> tuple[Any, Any]:
    """Logprobs and ids out of ``[[logprob, id, text], ...]``; None where that cannot be read."""
    try:
        return [entry[0] for entry in entries], [entry[1] for entry in entries]
    except (TypeError, IndexError, KeyError):
        return None, None
