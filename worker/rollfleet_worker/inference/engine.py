"""The protocol that every inference client speaks: token ids in, token ids and versions out.

- A request says what it wants in token ids; no client tokenises behind the caller's back.
- What a server cannot give (exact ids, logprobs, versions) is an error, never an invention.
- The versions of a generation are what the server said, token by token; where it says nothing
  they are the pinned version of the request.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from rollfleet_common.messages import Float32, Int32, VersionSpans

__all__ = ["Engine", "Generation", "Request", "Sampling"]


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


@dataclass(frozen=True, slots=True)
class Generation:
    """One completion."""

    #: int32[C]: the completion's ids only, the stop token included if the server returns it.
    token_ids: Int32
    #: float32[C]: log-probability of each token under the policy that sampled it.
    logprobs: Float32
    #: Versions over these C tokens.
    versions: VersionSpans
    #: "stop" or "length".
    finish_reason: str
    #: Which server made it.
    server: str


class Engine(Protocol):
    """An inference server, or a pool of them."""

    async def generate(self, request: Request, n: int = 1) -> Sequence[Generation]:
        """Make `n` independent completions of one prompt.

        Raises:
            EngineUnavailableError: The server cannot be reached, is overloaded or failing.
            EngineProtocolError: The answer is no usable generation.
            EngineRefusedError: The server refused the request itself.
        """
        ...

    async def ready(self) -> bool:
        """Whether at least one server answers now."""
        ...

    async def close(self) -> None:
        """Release connections. Idempotent."""
        ...
