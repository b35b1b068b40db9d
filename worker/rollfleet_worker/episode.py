"""One episode: workflow, validation, header; any failure becomes a record, never an exception.

- The boundary stands here: whatever user code raises, and whatever its samples break when they are
  checked and encoded, leaves as a typed Failure.
- An infrastructure failure is never turned into a sample with reward zero.
- Cancellation passes through: a cancelled episode has no outcome.
"""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any

import numpy as np

from rollfleet_common.clock import Clock
from rollfleet_common.codec import decode_header, encode_header, encode_samples
from rollfleet_common.errors import (
    DataError,
    EpisodeError,
    FailureKind,
    OversizeError,
    boundary,
)
from rollfleet_common.leases import AttemptFailure
from rollfleet_common.limits import Limits
from rollfleet_common.messages import (
    Claim,
    Header,
    Kind,
    PolicyVersion,
    Sample,
    VersionSpans,
)
from rollfleet_common.streams import Delivery
from rollfleet_common.validate import check_samples
from rollfleet_engines.interface import Completes, Sampling, TextEngine
from rollfleet_worker.metrics import Metrics
from rollfleet_worker.partials.progress import Progress
from rollfleet_worker.rewards.base import RewardPool
from rollfleet_worker.workflows.base import Context, Workflow

__all__ = ["Episodes"]


class Episodes:
    """Runs episodes with the parts they share."""

    def __init__(
        self,
        *,
        worker: str,
        workflows: Mapping[str, Workflow],
        engine: Completes | None,
        text: TextEngine | None = None,
        rewards: RewardPool,
        sampling: Sampling,
        timeout_s: float,
        max_rollout_bytes: int,
        metrics: Metrics,
        clock: Clock | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.clock = clock or Clock()
        self.worker = worker
        self.workflows = workflows
        self.engine = engine
        self.text = text
        self.rewards = rewards
        self.sampling = sampling
        self.timeout_s = timeout_s
        self.max_rollout_bytes = max_rollout_bytes
        self.metrics = metrics
        self.limits = limits or Limits()

    async def run(
        self, claim: Claim, policy: PolicyVersion, progress: Progress | None = None
    ) -> Delivery | AttemptFailure:
        """Run the workflow of the claim's route; returns what to deliver, or why there is nothing.

        Args:
            claim: Which sample.
            policy: What the board says now.
            progress: What is parked of it; None: nothing is, nor will be.
        """
        began = time.monotonic()
        queue_ms = max(int(self.clock.now_ms()) - claim.queued_ms, 0)
        engine = self.engine if progress is None else progress
        context = Context(claim, policy.version, engine, self.sampling, self.rewards, self.text)
        where = f"group {claim.prompt.group} #{claim.index} on {self.worker}"
        try:
            samples = await self._samples(claim, context, where)
            with boundary(DataError, f"the samples of {where}"):
                payload = self._encode(samples, where)
                header = self._header(claim, context, policy, samples, payload, queue_ms)
                # The context is the workflow's to write to: the trainer must be able to read it.
                decode_header(encode_header(header))
            self.metrics.episode_s.observe(time.monotonic() - began)
            self.metrics.reward_s.observe(float(context.reward_s))
        except Exception as exc:  # noqa: BLE001 - whatever it is, the lease must end with a reason
            kind = exc.kind if isinstance(exc, EpisodeError) else FailureKind.DATA
            return AttemptFailure(kind, _told(exc), self.worker)
        return Delivery(header, payload)

    def _encode(self, samples: Sequence[Sample], where: str) -> bytes:
        payload = encode_samples(samples)
        if len(payload) > self.max_rollout_bytes:
            raise OversizeError(
                f"{where}: its rollout is {len(payload):,} bytes, over the cap of "
                f"{self.max_rollout_bytes:,} (max_rollout_bytes); send large extras by reference"
            )
        return payload

    async def _samples(self, claim: Claim, context: Context, where: str) -> Sequence[Sample]:
        workflow = self.workflows[claim.prompt.route]
        with boundary(DataError, f"workflow {type(workflow).__name__}, {where}"):
            async with asyncio.timeout(self.timeout_s):
                made: Any = await _contained(workflow.run(claim.prompt, context))
            if not isinstance(made, Sample | Sequence) or isinstance(made, str | bytes):
                raise TypeError(_unwanted(made))
            given = [made] if isinstance(made, Sample) else list(made)
            if not all(isinstance(sample, Sample) for sample in given):
                raise TypeError(_unwanted(given))
            samples = [_own(sample) for sample in given]
            check_samples(
                samples,
                where=where,
                need_trained=claim.prompt.kind is Kind.TRAIN,
                limits=self.limits,
            )
        return samples

    def _header(
        self,
        claim: Claim,
        context: Context,
        policy: PolicyVersion,
        samples: Sequence[Sample],
        payload: bytes,
        queue_ms: int,
    ) -> Header:
        prompt = claim.prompt
        trained = [int(np.count_nonzero(s.loss_mask)) for s in samples]
        oldest = [
            s.versions.oldest(s.loss_mask) for s, n in zip(samples, trained, strict=True) if n
        ]
        return Header(
            group=prompt.group,
            index=claim.index,
            n=prompt.n,
            attempt=claim.attempt,
            kind=prompt.kind,
            route=prompt.route,
            task=prompt.task,
            position=prompt.position,
            entry=claim.entry,
            payload=f"{claim.entry}:{secrets.token_hex(4)}",
            payload_bytes=len(payload),
            epoch=policy.epoch,
            min_version=min(oldest, default=policy.version),
            max_version=max(s.versions.newest() for s in samples),
            samples=len(samples),
            tokens=sum(len(s.token_ids) for s in samples),
            trained_tokens=sum(trained),
            reward=float(samples[0].reward),
            worker=self.worker,
            server=context.server,
            queue_ms=queue_ms,
            generate_ms=int(context.generate_s * 1000),
            reward_ms=int(context.reward_s * 1000),
        )


async def _contained(episode: Awaitable[Any]) -> Any:
    """What would end the whole worker, or look like a cancellation of ours, is an error like any."""
    task = asyncio.current_task()
    before = task.cancelling() if task else 0
    try:
        return await episode
    except SystemExit as exc:
        raise RuntimeError(f"it raised SystemExit({exc.code!r})") from exc
    except asyncio.CancelledError as exc:
        if task is None or task.cancelling() > before:
            raise
        raise RuntimeError("it raised a CancelledError of its own") from exc
    except (Exception, GeneratorExit):
        raise
    except BaseException as exc:
        # A worker is stopped by signals, which its loop handles: this is the workflow's own.
        raise RuntimeError(f"it raised {_told(exc)}") from exc


def _own(s: Sample) -> Sample:
    """A sample of plain parts, read once: one of a subclass may answer otherwise the next time."""
    v: Any = s.versions
    maps: list[Any] = [s.components, s.arrays, s.metrics]
    components, arrays, metrics = (dict(m) if isinstance(m, Mapping) else m for m in maps)
    return Sample(
        token_ids=s.token_ids,
        loss_mask=s.loss_mask,
        logprobs=s.logprobs,
        versions=VersionSpans(v.starts, v.versions) if isinstance(v, VersionSpans) else v,
        reward=s.reward,
        components=components,
        arrays=arrays,
        metrics=metrics,
        finish_reason=s.finish_reason,
        logprobs_kind=s.logprobs_kind,
        temperature=s.temperature,
        context_full=s.context_full is True,
    )


def _told(exc: BaseException) -> str:
    """An exception in one line that can be written as UTF-8; its own text may raise, too."""
    name = type(exc).__name__
    try:
        said = f"{name}: {exc}"
    except Exception:  # noqa: BLE001 - user code
        said = f"{name} (whose message cannot be shown)"
    return said.encode("utf-8", "backslashreplace").decode()


def _unwanted(made: object) -> str:
    if isinstance(made, Sequence) and not isinstance(made, str | bytes):
        what = f"a {type(made).__name__} of {sorted({type(part).__name__ for part in made})}"
    else:
        what = "None" if made is None else f"a {type(made).__name__}"
    return f"it returned {what}; `run` must return a Sample or a list of them"
