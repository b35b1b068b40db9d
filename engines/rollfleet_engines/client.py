"""What the clients of all engines have in common; what differs is one exchange with the server.

- A generation goes one way into the fleet, through `ServerClient._judged`: ids, logprobs and spans
  that do not fit, more tokens than asked for, none at all, or weights older than the fleet gave
  this server are errors, whatever the engine.
- Versions: the server's word for each token; else the older of its word for itself before and
  after; else what the fleet last gave it; else the pinned version of the request.
- A server's word that it never was refitted ("default") is `base_version`, else the pinned
  version; where the fleet did refit it, it has lost those weights (`StaleServerError`).
- A request that does not fit the server's context is asked for again with the tokens that are left.
- A refusal is the server's fault until it has completed a prompt (:mod:`.refusals`).
- A generation that the server cut off is handed back as it is, its `finish_reason` ABORTED: one
  place goes on with it, :class:`~rollfleet_worker.pool.resuming.Resumer`, on any server.
"""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypedDict, TypeVar
from urllib.parse import quote

from rollfleet_common.errors import (
    ContextFullError,
    EngineProtocolError,
    EngineRefusedError,
    EngineUnavailableError,
    InfraError,
    OverloadedError,
    SettingsError,
    StaleServerError,
)
from rollfleet_common.messages import NO_VERSION, LogprobsKind, VersionSpans
from rollfleet_engines.answers import logprob_array, span_array, token_array
from rollfleet_engines.chat import Chat
from rollfleet_engines.http import HttpClient, Reply
from rollfleet_engines.interface import (
    Generation,
    Request,
    Sampling,
    TextAnswer,
    Timings,
)
from rollfleet_engines.refusals import UNPROVEN, Record, context_refusal
from rollfleet_engines.resume import ABORTED
from rollfleet_engines.room import DoesNotFitError, Room, fits
from rollfleet_engines.weights import WeightInfo

__all__ = [
    "ClientOptions",
    "Said",
    "ServerClient",
    "affinity_header",
    "all_of",
    "refuse_reserved",
    "seeded",
]

#: How often a request is asked for, each time with fewer tokens, until it fits the context.
_FITTING_TRIES = 3
#: Statuses by which servers answer token ids that they cannot read.
_FAILS_ON_IDS = frozenset({500, 501})
_IF_NO_IDS = (
    "if it takes no token ids, such a server cannot be trained from: use vLLM or SGLang, or its text "
    "face, chat(), for what is not trained on"
)
#: Below this servers sample greedily, and vLLM then refuses n > 1.
_GREEDY = 1e-5
_PROBE_S = 5.0

_T = TypeVar("_T")


class ClientOptions(TypedDict, total=False):
    """Keyword arguments of every client; see :class:`ServerClient`."""

    model: str | None
    api_key: str | None
    timeout_s: float
    connect_timeout_s: float
    max_connections: int
    base_version: int | None
    logprobs: str


@dataclass(frozen=True, slots=True)
class Said:
    """One completion as a server said it, nothing checked yet."""

    token_ids: Any
    logprobs: Any
    #: Spans of versions over the tokens; None: the server does not tell.
    spans: Any
    #: One of the words that `Generation.finish_reason` knows, or ABORTED.
    finish_reason: str
    #: What the server says of how long it took; 0.0: nothing.
    server_s: float = 0.0


class ServerClient(ABC):
    """One server.

    Args:
        url: ``http://host:port``; a trailing ``/v1`` is ignored.
        model: As the server names it; None: whatever it serves.
        api_key: Sent as a bearer token.
        timeout_s: For one request; a generation that takes longer counts as a failing server.
        connect_timeout_s: For opening a connection.
        max_connections: Requests in flight at most; further ones wait.
        base_version: Version of the weights that the server starts with; None: the pinned one.
        logprobs: Which distribution the server's log-probabilities are of, a value of
            :class:`~rollfleet_common.messages.LogprobsKind`; "auto": the engine's default.

    Raises:
        SettingsError: A setting makes no sense.
    """

    #: Whether several completions of one prompt travel as one request.
    merges: ClassVar[bool] = True
    #: The route that tells which weights the server has; "": it has none.
    _weights_path: ClassVar[str] = ""
    #: Which distribution the engine's log-probabilities are of, unless it is started otherwise.
    _default_kind: ClassVar[LogprobsKind] = LogprobsKind.UNKNOWN

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        timeout_s: float = 1800.0,
        connect_timeout_s: float = 10.0,
        max_connections: int = 1024,
        base_version: int | None = None,
        logprobs: str = "auto",
    ) -> None:
        if logprobs not in ("auto", *LogprobsKind):
            raise SettingsError(f"logprobs {logprobs!r} is none of auto, {', '.join(LogprobsKind)}")
        #: Why it was not ready when it was last asked; "" if it was.
        self.not_ready = ""
        self._http = HttpClient(
            url.rstrip("/").removesuffix("/v1"),
            api_key=api_key,
            timeout_s=timeout_s,
            connect_timeout_s=connect_timeout_s,
            max_connections=max_connections,
        )
        self._model = model
        self._base_version = base_version
        self._weights = WeightInfo(self._http, self._weights_path)
        self._chat = Chat(self._http, model)
        #: Whether the server tells the version of every token; None until it has answered.
        self._spans: bool | None = None
        self._version = NO_VERSION
        self._logprobs = None if logprobs == "auto" else LogprobsKind(logprobs)
        self._record = Record()
        self._room = Room(self._http, model)

    @property
    def name(self) -> str:
        """The server's URL, without credentials."""
        return self._http.name

    @property
    def version(self) -> int:
        """Version of the newest token that the server made; NO_VERSION if it made none."""
        return self._version

    async def generate(self, request: Request, n: int = 1) -> Sequence[Generation]:
        """Make `n` independent completions; see :class:`Engine`.

        A completion of fewer tokens than asked for that ended by "length" met the end of the
        server's context, and says so (`context_full`).

        Raises:
            EngineUnavailableError: The server is unreachable, failing, overloaded or set up
                otherwise than we are; or, as `StaleServerError`, it serves older weights than it
                was given.
            EngineProtocolError: The answer is no usable generation.
            EngineRefusedError: The server, or this client, refuses the request itself; as
                `ContextFullError`, its prompt leaves no room in the server's context.
        """
        self._admit(request, n)
        began_s = time.monotonic()
        # Greedy completions are all the same one, and vLLM refuses to make it twice.
        greedy = request.sampling.temperature < _GREEDY
        made = await self._ask(request, 1 if greedy else n)
        total_s = time.monotonic() - began_s
        most = request.sampling.max_tokens
        made = [
            replace(
                one,
                timings=Timings(total_s, one.timings.server_s),
                logprobs_kind=self._kind(),
                temperature=request.sampling.temperature,
                context_full=one.finish_reason == "length" and len(one.token_ids) < most,
            )
            for one in made
        ]
        return made * n if greedy else made

    def _kind(self) -> LogprobsKind:
        return self._logprobs or self._default_kind

    async def chat(self, messages: Sequence[Mapping[str, Any]], sampling: Sampling) -> TextAnswer:
        """What the server's model says next; see :class:`TextEngine`."""
        try:
            return await self._chat.ask(messages, sampling)
        except EngineUnavailableError:
            self._forget()
            raise

    async def ready(self) -> bool:
        """Whether the server answers, is healthy and knows our model and our key."""
        self.not_ready = ""
        try:
            health = await self._http.get("/health", timeout_s=_PROBE_S)
            if health.status != 404:
                health.checked()
            models = await self._http.get("/v1/models", timeout_s=_PROBE_S)
            if models.status == 404:
                if health.status == 404:
                    self.not_ready = "neither /health nor /v1/models is found there"
                return health.status != 404
            listed = models.checked().json().get("data")
        except (InfraError, EngineRefusedError) as exc:
            self._forget()
            self.not_ready = str(exc)
            return False
        rows = listed if isinstance(listed, list) else []
        names = [one.get("id") for one in rows if isinstance(one, dict)]
        # Routers that do not know their models write null.
        if self._model is None or all(name is None for name in names) or self._model in names:
            return True
        self.not_ready = f"it does not serve the model {self._model!r}"
        return False

    async def close(self) -> None:
        """Release connections. Idempotent."""
        await self._http.close()

    @abstractmethod
    async def _exchange(self, request: Request, n: int, salt: str) -> list[Generation]:
        """One exchange: `n` completions, possibly cut off.

        Args:
            request: What to complete.
            n: How many completions.
            salt: Of the prefix cache, so that no request reads keys and values of older weights.
        """

    def _forget(self) -> None:
        """The server may come back as another one: find out again what it offers."""
        self._weights.forget()
        self._chat.forget()
        self._record.forget()
        self._spans = None
        self._room.forget()

    def _admit(self, request: Request, n: int) -> None:
        if n < 1:
            raise EngineRefusedError(f"asked for {n} completions: at least one makes sense")
        if not len(request.token_ids):
            raise EngineRefusedError("an empty prompt cannot be completed: it needs a token id")
        if request.sampling.max_tokens < 1:
            raise EngineRefusedError(
                f"max_tokens is {request.sampling.max_tokens}: no token may be made"
            )

    async def _ask(self, request: Request, n: int) -> list[Generation]:
        # By what the server holds, where it is known: then a segment that goes on finds its prefix.
        held = request.version if request.serves == NO_VERSION else request.serves
        try:
            return await self._fitting(request, n, str(held))
        except EngineUnavailableError:
            self._forget()
            raise

    # How much fits.

    async def _fitting(self, request: Request, n: int, salt: str) -> list[Generation]:
        """One exchange, of as many tokens as the server has room for."""
        asked = self._room.fitted(request)
        for left in reversed(range(_FITTING_TRIES)):
            try:
                return await self._exchange(asked, n, salt)
            except DoesNotFitError as exc:
                if not left:
                    # By its own words this fits.
                    self._room.forget()
                    raise self._blamed(str(exc), request) from exc
                shorter = await self._room.shorter(request, asked, exc.said)
                if shorter is None:
                    raise ContextFullError(str(exc)) from exc
                asked = shorter
        raise AssertionError("unreachable: the last try returns or raises")

    # Whose fault a refusal is.

    def _accepted(self, reply: Reply, request: Request) -> Reply:
        """`reply` if its status is 2xx.

        Raises:
            EngineUnavailableError: As :meth:`Reply.checked`.
            EngineRefusedError: The prompt is at fault; `DoesNotFitError` if it is too long.
            EngineProtocolError: As :meth:`Reply.checked`; or the refusal is the server's fault.
        """
        try:
            return reply.checked()
        except OverloadedError:
            raise
        except EngineUnavailableError as exc:
            if reply.status not in _FAILS_ON_IDS or self._record.proven:
                raise
            raise EngineUnavailableError(f"{exc} ({UNPROVEN}; {_IF_NO_IDS})") from exc
        except EngineRefusedError as exc:
            said = context_refusal(reply.body)
            # A server that refuses what by its own words fits refuses something else.
            if said is not None and not fits(request, said):
                raise DoesNotFitError(str(exc), said) from exc
            raise self._blamed(str(exc), request) from exc

    def _blamed(self, refusal: str, request: Request) -> EngineRefusedError | EngineProtocolError:
        """The error of a refusal that is not about the prompt's length."""
        why = self._record.refused(request.affinity)
        if not why:
            return EngineRefusedError(refusal)
        return EngineProtocolError(f"{refusal} ({why}; {_IF_NO_IDS})")

    # Whose weights made a token.

    def _untagged(self, request: Request) -> int:
        """The version of weights that never were refitted, by the server's own word."""
        if self._base_version is not None:
            return self._base_version
        return request.version if request.serves == NO_VERSION else NO_VERSION

    async def _before(self, request: Request) -> int | None:
        """The version that the server has before it is asked; None where its answer will tell."""
        return None if self._spans else await self._weight_version(request)

    async def _weight_version(self, request: Request) -> int:
        """The version that the server as a whole has now, as well as it can be known."""
        offered, version = await self._weights.read(request.serves)
        if not offered:
            return request.version if request.serves == NO_VERSION else request.serves
        return self._untagged(request) if version is None else version

    async def _older(self, before: int | None, request: Request, where: str) -> int:
        """The older of `before` and the version that the server has now; as `_oldest`."""
        after = None
        with suppress(InfraError):
            after = await self._weight_version(request)
        return self._oldest(before, after, request, where)

    def _oldest(self, before: int | None, after: int | None, request: Request, where: str) -> int:
        """The older of the versions before and after, each None if it is not known.

        Raises:
            EngineUnavailableError: Nobody knows, of a server that told every token's until now.
        """
        if before is None and request.serves != NO_VERSION:
            before = request.serves
        elif before is None:
            if after is None:
                # The board alone may be ahead of the server. It is asked beforehand next time.
                raise EngineUnavailableError(
                    f"{where} does not say which weights made it, as this server did until now"
                )
            before = request.version
        return before if after is None else min(before, after)

    def _judged(self, said: Said, request: Request, whole: int, where: str) -> Generation:
        """What a server said, as a generation that can be trained on.

        Args:
            said: The completion.
            request: What was asked for.
            whole: The version of all tokens, where the server does not tell it for each.
            where: Which answer of which server, for messages.

        Raises:
            EngineProtocolError: It cannot be trained on.
            StaleServerError: Older weights made it than the fleet gave this server.
        """
        ids = token_array(said.token_ids, where)
        tokens = len(ids)
        if not tokens and said.finish_reason != ABORTED:
            raise EngineProtocolError(f"{where} has no token, and ended by {said.finish_reason!r}")
        if tokens > request.sampling.max_tokens:
            raise EngineProtocolError(
                f"{where} has {tokens} tokens where {request.sampling.max_tokens} were allowed"
            )
        logprobs = logprob_array(said.logprobs, tokens, where)
        versions = (
            VersionSpans.of([(tokens, whole)])
            if said.spans is None
            else span_array(said.spans, tokens, self._untagged(request), where)
        )
        self._record.completed()
        if tokens:
            _refuse_stale(int(versions.versions[0]), request.serves, where)
            self._version = int(versions.versions[-1])
        timings = Timings(server_s=said.server_s)
        return Generation(ids, logprobs, versions, said.finish_reason, self.name, timings)


def _refuse_stale(first: int, serves: int, where: str) -> None:
    """Raise if the first token is older than what the server was given before it was asked."""
    if first >= serves:
        return
    what = "weights that never were refitted" if first == NO_VERSION else f"version {first}"
    raise StaleServerError(
        f"{where} was made by {what}, where this server was refitted to version {serves}: it has "
        f"lost those weights, most likely in a restart, and must be refitted",
        serves,
        first,
    )


def refuse_reserved(extra: Mapping[str, Any], reserved: frozenset[str]) -> None:
    """Refuse further sampling fields that would change what the client relies on.

    Raises:
        EngineRefusedError: `extra` holds one of `reserved`.
    """
    if taken := reserved & extra.keys():
        raise EngineRefusedError(
            f"sampling fields {sorted(taken)} cannot be set in `extra`: use the fields of "
            f"Sampling, or leave them to the client"
        )


def seeded(request: Request, n: int) -> list[Request]:
    """`request` `n` times, each with a seed of its own if it has one: the seed plus its index."""
    seed = request.sampling.seed
    if seed is None:
        return [request] * n
    return [replace(request, sampling=replace(request.sampling, seed=seed + at)) for at in range(n)]


def affinity_header(affinity: str) -> str:
    """`affinity` as the value of an HTTP header."""
    return quote(affinity, safe="/:.-_")[:256]


async def all_of(asked: Iterable[Coroutine[Any, Any, _T]]) -> list[_T]:
    """The results of all, in order; when one fails the others are called off."""
    tasks = [asyncio.ensure_future(one) for one in asked]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
