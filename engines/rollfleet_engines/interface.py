"""The protocols that every inference client speaks: token ids in, token ids and versions out; text.

- A request says what it wants in token ids; no client tokenises behind the caller's back.
- What a server cannot give (exact ids, logprobs, versions) is an error, never an invention.
- The versions of a generation are what the server said, token by token; where it says nothing
  they are what is known of the server as a whole, the older where that changed meanwhile.
- Text is another face of the same servers, for judges and simulated users: what it returns has no
  ids, no logprobs and no versions, and so cannot be trained on by mistake.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from rollfleet_common.messages import NO_VERSION, Float32, Int32, LogprobsKind, VersionSpans

__all__ = [
    "Completes",
    "Engine",
    "Generation",
    "NamedEngine",
    "Request",
    "Sampling",
    "ServerEngine",
    "TextAnswer",
    "TextEngine",
    "Timings",
]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample; names and meaning as in vLLM's SamplingParams."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    #: 0 or -1: no limit.
    top_k: int = 0
    min_p: float = 0.0
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    #: Further fields passed on to the server as they are.
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Request:
    """One generation asked for."""

    #: int32[P]
    token_ids: Int32
    sampling: Sampling
    #: Requests of one affinity key should reach the server that holds their prefix.
    affinity: str
    #: The board's version when the request was made; NO_VERSION if nothing was published yet.
    version: int
    #: The version that the fleet last refitted this very server to; NO_VERSION if nobody knows.
    #: A pool fills it in for each server that it asks.
    serves: int = NO_VERSION
    #: Version of the newest token of what is gone on with: a pool rather asks a server that has it.
    not_before: int = NO_VERSION
    #: The name under which this server serves what it was refitted to; "": the configured model.
    model: str = ""


@dataclass(frozen=True, slots=True)
class Timings:
    """How long a generation took."""

    #: Seconds from asking to the whole answer, segments and waits between them included.
    total_s: float = 0.0
    #: Seconds that the server reports for its own part; 0.0 if it reports nothing.
    server_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Generation:
    """One completion."""

    #: int32[C]: the completion's ids only, the stop token included if the server returns it.
    token_ids: Int32
    #: float32[C]: log-probability of each token under the policy that sampled it.
    logprobs: Float32
    #: Versions over these C tokens.
    versions: VersionSpans
    #: "stop" or "length"; "abort" if the server cut it off, which nobody above a Resumer sees.
    finish_reason: str
    #: Which server made it.
    server: str
    timings: Timings = Timings()
    #: What `logprobs` are log-probabilities of, a value of :class:`LogprobsKind`.
    logprobs_kind: str = LogprobsKind.UNKNOWN
    #: Temperature that it was sampled with; None if unknown.
    temperature: float | None = None
    #: Whether it ended by "length" because the server's context was full, before `max_tokens`.
    context_full: bool = False


@dataclass(frozen=True, slots=True)
class TextAnswer:
    """What a server said in a conversation."""

    text: str
    #: As the server names it: "stop", "length", ...
    finish_reason: str
    #: Which server said it.
    server: str
    #: Tokens of the conversation and of the answer, as the server counts; 0 if it does not.
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Completes(Protocol):
    """Whatever makes completions."""

    async def generate(self, request: Request, n: int = 1) -> Sequence[Generation]:
        """Make `n` independent completions of one prompt.

        Raises:
            EngineUnavailableError: The server cannot be reached, is overloaded or failing.
            EngineProtocolError: The answer is no usable generation.
            EngineRefusedError: The server refused the request itself.
        """
        ...


class Engine(Completes, Protocol):
    """An inference server, or a pool of them."""

    async def ready(self) -> bool:
        """Whether at least one server answers now."""
        ...

    async def close(self) -> None:
        """Release connections. Idempotent."""
        ...


class NamedEngine(Engine, Protocol):
    """An engine that says which server it is, and what it serves."""

    @property
    def name(self) -> str:
        """Unique in a pool."""
        ...

    @property
    def version(self) -> int:
        """Version that the server was last seen to serve; NO_VERSION if unknown."""
        ...


class TextEngine(Protocol):
    """Something that answers conversations with text."""

    async def chat(self, messages: Sequence[Mapping[str, Any]], sampling: Sampling) -> TextAnswer:
        """What the server's model says next.

        Args:
            messages: As in OpenAI's chat completions: ``{"role": "user", "content": "..."}``.
            sampling: `max_tokens`, `temperature` and `top_p` are sent, the rest where it is set.

        Raises:
            EngineUnavailableError: The server cannot be reached, is overloaded or failing.
            EngineProtocolError: The answer holds no text.
            EngineRefusedError: The server refused the request itself.
        """
        ...


class ServerEngine(NamedEngine, TextEngine, Protocol):
    """One server with both its faces: generations to train on, and text."""
