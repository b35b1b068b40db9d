"""What a worker can be told, by flag, variable or TOML file; :class:`WorkerSettings` is all of it.

- Frozen: a worker runs with the settings it started with, and a rolling deploy changes them.
- Workflows come from here only: no message can name code.
"""

import json
import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, model_validator

from rollfleet_common.errors import SettingsError
from rollfleet_common.keys import check_name
from rollfleet_common.limits import Limits
from rollfleet_common.servers import server_name, server_url
from rollfleet_common.settings import Name, Settings
from rollfleet_common.units import Bytes, Listed, Seconds

__all__ = ["WorkerSettings"]

_TARGET = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def _table(value: Any) -> Any:
    """``name=package.module:Class`` as flags and variables write it; a bare class is `default`."""
    if isinstance(value, str):
        if value.lstrip().startswith("{"):
            try:
                return json.loads(value)
            except ValueError as exc:
                raise ValueError(f"should be NAME=PACKAGE.MODULE:CLASS or JSON ({exc})") from None
        value = value.split(",")
    if not isinstance(value, list):
        return value
    table: dict[str, str] = {}
    for word in value:
        route, equals, target = str(word).strip().partition("=")
        if not equals:
            route, target = "default", route
        if route in table:
            raise ValueError(f"names the route {route!r} twice")
        table[route] = target
    return table


def _workflows(table: dict[str, str]) -> dict[str, str]:
    for route, target in table.items():
        check_name(route, "the route")
        if not _TARGET.fullmatch(target):
            raise ValueError(
                f"the workflow of route {route!r} is {target!r}; write package.module:Class"
            )
    return table


def _servers(urls: list[str]) -> list[str]:
    try:
        bare = [server_url(url) for url in urls]
    except SettingsError as exc:
        raise ValueError(str(exc)) from None
    if len(set(map(server_name, bare))) < len(bare):
        raise ValueError("names a server twice")
    return bare


def _off(value: Any) -> Any:
    return None if isinstance(value, str) and value.lower() in ("off", "none") else value


class WorkerSettings(Settings):
    """The settings of one worker process."""

    part: ClassVar[str] = "worker"
    owns_env: ClassVar[bool] = True

    # ---- who, and what it runs ---------------------------------------------------------------

    name: Name | None = Field(
        None, description="What this worker's id begins with; the name of the host if not given."
    )
    slots: int = Field(64, ge=1, description="How many episodes run at once in this worker.")
    workflows: Annotated[dict[str, str], BeforeValidator(_table), AfterValidator(_workflows)] = (
        Field(
            default_factory=dict,
            description="Which workflow class runs the prompts of a route; only these routes are "
            "claimed. A class without a name serves the route 'default'.",
            json_schema_extra={"flag": "workflow", "metavar": "NAME=PACKAGE.MODULE:CLASS"},
        )
    )

    # ---- inference servers -------------------------------------------------------------------

    servers: Annotated[list[str], Listed, AfterValidator(_servers)] = Field(
        default_factory=list,
        description="URL of an inference server, beside those that `rollfleet server add` registers; "
        "none is needed by workflows that call no model.",
        json_schema_extra={"flag": "server", "metavar": "URL"},
    )
    engine: Literal["auto", "vllm", "sglang", "openai"] = Field(
        "auto", description="What the servers of --server run; auto asks each of them."
    )
    model: str | None = Field(
        None, description="Name of the model in requests; the server's only one if not given."
    )
    api_key: SecretStr | None = Field(
        None,
        description="Bearer token for the inference servers; best given as a variable, because "
        "flags are seen by everyone on the host.",
    )
    logprobs: Literal["auto", "raw", "tempered", "processed"] = Field(
        "auto",
        description="Which distribution the servers' log-probabilities are of: the model's own (raw), "
        "after temperature, or the one sampled from; auto is the default of each engine. Set it for "
        "a vLLM with --logprobs-mode processed_logprobs, or an SGLang with "
        "SGLANG_RETURN_ORIGINAL_LOGPROB.",
    )
    server_cap: int = Field(
        256, ge=1, description="Requests at once that one server is sent at most."
    )
    adaptive: bool = Field(
        True,
        description="Send a server less than server_cap while it preempts, queues or has its KV "
        "cache full, by its own /metrics.",
    )
    stall_s: Seconds = Field(
        60.0,
        ge=0,
        description="A server that holds requests and makes no progress for so long is out, and they "
        "go to another; 0 turns it off.",
    )
    dead_s: Seconds = Field(
        300.0, gt=0, description="A server that has not answered for so long is asked seldom."
    )
    max_siblings: int = Field(
        8,
        ge=1,
        description="Members of one group that may share one request with n > 1; 1 turns it off.",
    )
    request_timeout_s: Seconds = Field(
        600.0, gt=0, description="Longest wait for the answer to one request: one segment."
    )
    segment_tokens: int = Field(
        2048,
        ge=0,
        description="Tokens asked for at once; a longer generation goes on from them, so that a "
        "server that dies takes no more with it. 0 asks for all at once.",
    )
    park: bool = Field(
        False,
        description="Keep what is done of a generation in Redis after every segment, so that the "
        "next worker goes on from there when this one dies or is stopped.",
    )

    # ---- sampling, where the prompt does not say ---------------------------------------------

    max_tokens: int = Field(256, ge=1, description="Tokens that one episode may generate.")
    temperature: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="Sampling temperature; 0 is greedy."
    )
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus sampling; 1 keeps every token.")
    stop_token_ids: Annotated[list[int], Listed] = Field(
        default_factory=list,
        description="Token id that ends a generation.",
        json_schema_extra={"flag": "stop-token-id", "metavar": "N"},
    )

    # ---- time --------------------------------------------------------------------------------

    lease_s: Seconds = Field(
        30.0,
        ge=1,
        description="How long a dead worker's prompts stay its own; renewed while it lives.",
    )
    drain_s: Seconds = Field(
        30.0,
        ge=0,
        description="After SIGTERM, how long episodes may finish before they are handed back.",
    )
    episode_timeout_s: Seconds = Field(
        900.0, gt=0, description="Longest life of one episode; past it, the attempt has failed."
    )

    # ---- rewards -----------------------------------------------------------------------------

    reward_processes: int = Field(
        2, ge=0, description="Processes that compute rewards; 0 computes them in the event loop."
    )
    reward_timeout_s: Seconds = Field(
        15.0, gt=0, description="Longest run of one reward function; past it, it is killed."
    )

    # ---- retries -----------------------------------------------------------------------------

    attempts_infra: int = Field(
        10, ge=1, description="Attempts of a prompt when servers, network or workers fail."
    )
    attempts_data: int = Field(
        2, ge=1, description="Attempts of a prompt when the prompt or the workflow's code fails."
    )
    attempts_timeout: int = Field(
        3, ge=1, description="Attempts of a prompt whose episode or reward takes too long."
    )
    attempts_poison: int = Field(
        3,
        ge=1,
        description="Deliveries of a prompt whose worker died, before it counts as poison.",
    )
    retry_base_s: Seconds = Field(
        0.5, ge=0, description="Delay before the second attempt; it doubles with every further one."
    )
    retry_max_s: Seconds = Field(30.0, ge=0, description="Longest delay before an attempt.")

    # ---- sizes -------------------------------------------------------------------------------

    max_rollout_bytes: Bytes = Field(
        16 * 2**20, ge=1024, description="Largest rollout that is delivered."
    )
    max_rollout_samples: int = Field(
        4096, ge=1, description="Sequences of one rollout that are delivered at most."
    )
    max_sample_tokens: int = Field(
        1 << 20, ge=1, description="Tokens of the longest sequence that is delivered."
    )
    max_rollout_spans: int = Field(
        1 << 16,
        ge=1,
        description="Version spans and runs of the loss mask, over all sequences of a rollout, that "
        "are delivered at most.",
    )
    max_names: int = Field(
        1024,
        ge=0,
        description="Names of components, metrics and arrays in one sequence that are delivered at "
        "most.",
    )
    buffer_bytes: Bytes = Field(
        256 * 2**20,
        ge=1024,
        description="Finished rollouts that may wait here while Redis is away; at the limit, "
        "nothing new is claimed.",
    )

    # ---- health and logs ---------------------------------------------------------------------

    health_host: str = Field(
        "127.0.0.1", min_length=1, description="Address of /livez, /readyz and /metrics."
    )
    health_port: Annotated[int | None, BeforeValidator(_off)] = Field(
        None,
        ge=0,
        le=65535,
        description="Port of /livez, /readyz and /metrics; 0 takes any free one, off is none.",
    )
    strict: bool = Field(
        False, description="Refuse to start with a Redis that may evict keys, instead of warning."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least important lines that are logged."
    )
    log_format: Literal["auto", "console", "json"] = Field(
        "auto", description="Lines for people or for machines; auto asks whether it is a terminal."
    )

    @property
    def limits(self) -> Limits:
        """Caps on one rollout."""
        return Limits(
            samples=self.max_rollout_samples,
            tokens=self.max_sample_tokens,
            spans=self.max_rollout_spans,
            names=self.max_names,
        )

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if not self.workflows:
            raise ValueError(
                "a worker needs at least one workflow: --workflow NAME=PACKAGE.MODULE:CLASS, "
                "ROLLFLEET_WORKFLOWS, or a table [worker.workflows] in the settings file"
            )
        if self.retry_max_s < self.retry_base_s:
            raise ValueError(
                f"retry_max_s ({self.retry_max_s:g}) is less than retry_base_s "
                f"({self.retry_base_s:g}): the longest delay cannot be shorter than the first"
            )
        if self.park and not self.segment_tokens:
            raise ValueError(
                "park is on and segment_tokens is 0: generations are parked after every segment, "
                "so a long one would never be; set segment_tokens, or turn park off"
            )
        if self.buffer_bytes < self.max_rollout_bytes:
            raise ValueError(
                f"buffer_bytes ({self.buffer_bytes:,}) is less than max_rollout_bytes "
                f"({self.max_rollout_bytes:,}): a rollout of the largest size could never wait for "
                "Redis; raise the one or lower the other"
            )
        return self
