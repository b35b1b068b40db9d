"""What a trainer can be told, by argument, variable or TOML file."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, SecretStr, model_validator

from rollfleet_common.errors import SettingsError
from rollfleet_common.limits import Limits
from rollfleet_common.servers import server_name, server_url
from rollfleet_common.settings import Settings
from rollfleet_common.staleness import check_shape
from rollfleet_common.units import Bytes, Listed, Seconds

__all__ = ["TrainerSettings"]


def _urls(urls: list[str]) -> list[str]:
    """As all parts of a run write them, each once."""
    return list({server_name(url): url for url in map(server_url, urls)}.values())


class TrainerSettings(Settings):
    """The settings of one trainer. All counts are in samples."""

    part: ClassVar[str] = "trainer"

    redis_url: str = Field(
        "embedded://",
        min_length=1,
        repr=False,
        description="Where Redis is: redis://, rediss:// (TLS), unix:// or embedded://.",
    )
    samples_per_version: int = Field(
        256, description="Samples that one version of the policy is trained on."
    )
    batch_size: int | None = Field(
        None, description="Samples of one batch; samples_per_version if not given."
    )
    group_size: int = Field(8, description="Samples of one prompt (GRPO).")
    oversample: int = Field(
        0,
        ge=0,
        description="Samples launched beyond group_size; the first group_size are taken and the "
        "rest cancelled. It favours short rollouts.",
    )
    max_staleness: int = Field(
        2, description="Versions that a sample's oldest trained token may be behind at hand-over."
    )
    pipeline_depth: int | None = Field(
        None,
        description="Versions that rollouts may be started ahead of; max_staleness if not given.",
    )
    min_group_size: int | None = Field(
        None,
        ge=1,
        description="Train on a torn group if so many of its samples came; whole groups only if "
        "not given.",
    )
    policy: Literal["drop", "mask", "wait", "standard", "segment", "segment-recomputed"] = Field(
        "drop", description="What to do with what is too old; see docs/policies.md."
    )
    order: Literal["oldest", "freshest", "windowed"] = Field(
        "oldest", description="Which ready groups go into a batch first."
    )
    on_rollback: Literal["replay", "drop"] = Field(
        "replay",
        description="Rollouts of weights that a resume lost: count them as far away as they were, "
        "or drop them.",
    )
    partitions: int = Field(
        1, ge=1, le=1024, description="Hash tags that the run is spread over, for a Redis Cluster."
    )
    max_prompt_bytes: Bytes = Field(1 << 20, ge=256, description="Largest encoded prompt.")
    max_rollout_samples: int = Field(
        4096,
        ge=1,
        description="Sequences of the largest rollout that is trained on; the group of one that has "
        "more is dropped as oversize, as for the next three.",
    )
    max_sample_tokens: int = Field(
        1 << 20, ge=1, description="Tokens of the longest sequence that is trained on."
    )
    max_rollout_spans: int = Field(
        1 << 16,
        ge=1,
        description="Version spans and runs of the loss mask, over all sequences of a rollout, that "
        "are trained on at most.",
    )
    max_names: int = Field(
        1024,
        ge=0,
        description="Names of components, metrics and arrays, in one sequence and over one batch, "
        "that are trained on at most.",
    )
    max_batch_bytes: Bytes = Field(
        32 << 30,
        ge=1024,
        description="Largest memory that one batch or micro-batch of tensors may take with its "
        "padding, before asking for it is refused.",
    )
    reserve_bytes: Bytes = Field(
        1 << 20, ge=1, description="Memory to reserve in Redis for one rollout, if it has a limit."
    )
    lease_s: Seconds = Field(
        10.0, ge=1, description="Silence after which another trainer may open the run."
    )
    starve_s: Seconds = Field(
        1800.0, gt=0, description="Longest wait for a batch before StarvedError says why."
    )
    breaker_deaths: int = Field(
        200,
        ge=0,
        description="Samples that die in a row, or groups that are torn or cannot be used in a row, "
        "after which the feed is stopped with a FailingError; 0: never.",
    )
    breaker_prompts: int = Field(
        20, ge=1, description="Distinct prompts over which these deaths must be spread."
    )
    dead_letters: int = Field(
        10_000,
        ge=0,
        description="Dead letters that a partition keeps, approximately: the oldest go; 0: all are kept.",
    )
    dead_letters_s: Seconds = Field(
        604_800.0, ge=0, description="Age after which a dead letter may go; 0: they do not age."
    )
    prefetch: int = Field(
        1,
        ge=0,
        le=16,
        description="Batches made ready ahead while the trainer computes; 0: none.",
    )
    servers: Annotated[list[str], Listed, AfterValidator(_urls)] = Field(
        default_factory=list,
        description="Inference servers that publish() refits, besides those registered with "
        "`rollfleet server add`; none if the trainer moves weights itself.",
    )
    api_key: SecretStr | None = Field(
        None,
        description="Bearer token for the servers' control routes; best given as a variable.",
    )
    refit_mode: Literal["keep", "abort", "wait"] = Field(
        "keep",
        description="Requests in flight while a server is refitted: keep them (they go on under the "
        "new weights), abort them (workers go on with them elsewhere), or wait for them.",
    )
    refit_at_once: int = Field(
        0,
        ge=0,
        description="Servers that are refitted at the same time, so that the others generate; "
        "0: all of them.",
    )
    refit_s: Seconds = Field(600.0, gt=0, description="Longest refit of one server.")
    refit_quorum: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the servers that must take a version, or publish() raises; "
        "0: one of them.",
    )
    heal_s: Seconds = Field(
        5.0, gt=0, description="How often servers are asked whether they hold the current weights."
    )
    adapter: str = Field(
        "",
        description="Name under which servers serve what is published, which then is a LoRA adapter; "
        "workers ask for that model.",
    )
    strict: bool = Field(
        default=False, description="Refuse a Redis that may lose data instead of warning."
    )
    take_over: bool = Field(
        default=False, description="Open the run even if another trainer holds it."
    )
    lost_batches: Literal["refuse", "accept"] = Field(
        "refuse",
        description="What to do when batches were committed after the checkpoint that is resumed: "
        "refuse to open the run, or accept that no model has them.",
    )
    fresh: bool = Field(
        default=False, description="Delete the run and start a new one under its name."
    )

    @property
    def depth(self) -> int:
        """`pipeline_depth`, or what it is when not given."""
        return self.max_staleness if self.pipeline_depth is None else self.pipeline_depth

    @property
    def limits(self) -> Limits:
        """Caps on one rollout."""
        return Limits(
            samples=self.max_rollout_samples,
            tokens=self.max_sample_tokens,
            spans=self.max_rollout_spans,
            names=self.max_names,
        )

    @property
    def kept_letters(self) -> tuple[int, int]:
        """How many dead letters a partition keeps, and for how many ms; 0: no bound."""
        return self.dead_letters, int(self.dead_letters_s * 1000)

    @property
    def launched(self) -> int:
        """Samples launched for one prompt."""
        return self.group_size + self.oversample

    def surplus(self, n: int) -> int:
        """Of n launched samples of a group, those that are not needed."""
        return self.oversample if n == self.launched else 0

    @property
    def batch(self) -> int:
        """`batch_size`, or what it is when not given."""
        return self.samples_per_version if self.batch_size is None else self.batch_size

    @model_validator(mode="after")
    def _agree(self) -> Self:
        try:
            check_shape(
                samples_per_version=self.samples_per_version,
                batch_size=self.batch,
                group_size=self.group_size,
                max_staleness=self.max_staleness,
                pipeline_depth=self.depth,
                oversample=self.oversample,
                torn=self.min_group_size is not None and self.min_group_size < self.group_size,
            )
        except SettingsError as exc:
            said = str(exc)
            if self.batch_size is None and "batch_size" in said:
                said += "; batch_size is samples_per_version where it is not given"
            if self.pipeline_depth is None and "pipeline_depth" in said:
                said += "; pipeline_depth is max_staleness where it is not given"
            raise ValueError(said) from None
        if self.min_group_size is not None and self.min_group_size > self.group_size:
            raise ValueError(
                f"min_group_size = {self.min_group_size} is more than group_size = {self.group_size}"
            )
        return self
