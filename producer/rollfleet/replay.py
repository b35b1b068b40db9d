"""A recorded run as a fleet: the same loop, the same batches, and no Redis, workers or servers.

- Deterministic: the batches of the recording, by number; in each the groups in the order in which
  they were settled (of partition 0 first), their members by index.
- What the loop does to the run (feed, submit, pause, publish) is taken and changes nothing but the
  version; what needs a live run (evaluate, batches of given prompts) is refused.
- What was dropped, and why, stands in :attr:`Replay.dropped`.
- After a rollback, what lost weights made is dated as the live run dated it, as far as the recording
  tells: it shows a rollback by a version that falls, or that is behind what an older epoch made.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rollfleet.batch import Batch, check_collate
from rollfleet.policy.checked import CheckedPolicy
from rollfleet.policy.metrics import BiasMeter
from rollfleet.policy.policies import Policy
from rollfleet.policy.version_history import VersionHistory
from rollfleet_common.codec import decode_samples
from rollfleet_common.errors import CodecError, RollfleetError, SettingsError
from rollfleet_common.logs import get_logger
from rollfleet_common.messages import NO_VERSION, Kind, Rollout
from rollfleet_common.recording import Row, read_rows
from rollfleet_common.validate import check_samples

__all__ = ["Replay", "replay"]

log = get_logger("rollfleet.trainer")


def replay(
    path: str | Path,
    *,
    policy: Policy | None = None,
    state: Mapping[str, Any] | None = None,
    collate: Mapping[str, Any] | None = None,
) -> "Replay":
    """Open a recording that ``rollfleet record`` made.

    Args:
        path: The file.
        policy: What the live run refined its samples by (masks, advantages of segments); a recording
            holds them as the workers sent them. Nothing is judged anew.
        state: What :meth:`Replay.state_dict` returned: goes on after that batch.
        collate: Options of :func:`rollfleet.collate` for ``batch.tensors``.

    Raises:
        CodecError, SchemaError: It is no recording of this release, or it is damaged.
        SettingsError: `state` is of a live run, not of a recording.
        OSError: It cannot be read.
    """
    return Replay(Path(path), policy, state or {}, collate or {})


class Replay:
    """Stands in for :class:`rollfleet.Fleet`; made by :func:`replay`."""

    def __init__(
        self,
        path: Path,
        policy: Policy | None,
        state: Mapping[str, Any],
        collate: Mapping[str, Any],
    ) -> None:
        if state and "replayed" not in state:
            raise SettingsError(
                "the state is of a live run: a recording goes on from a state of its own"
            )
        self.path = path
        self.version = int(state.get("version", 0))
        self._policy = None if policy is None else CheckedPolicy(policy)
        check_collate(collate)
        self._collate = dict(collate)
        self._last = int(state.get("replayed", 0))
        self._closed = False
        #: Rows by batch number, and what was dropped.
        self._batches: dict[int, list[Row]] = {}
        self._drops: list[Row] = []
        self._evaluations = 0
        for row in read_rows(path):
            if row.header.kind is Kind.EVAL:
                self._evaluations += 1
            elif row.dropped:
                self._drops.append(row)
            else:
                self._batches.setdefault(row.batch, []).append(row)
        self._histories = _histories(self._batches)
        self._left = iter(sorted(n for n in self._batches if n > self._last))

    # ---- batches -----------------------------------------------------------------------------

    def __len__(self) -> int:
        """Batches in the recording."""
        return len(self._batches)

    @property
    def dropped(self) -> Iterator[tuple[Rollout, str]]:
        """What was dropped, with its reason, in order; without those whose payload was gone."""
        for row in self._drops:
            if row.payload is not None:
                yield self._rollout(row), row.dropped

    def next_batch(
        self, samples: int | None = None, *, timeout_s: float | None = None
    ) -> Batch | None:
        """The next recorded batch; None after the last. `samples` and `timeout_s` have no effect.

        Rollouts whose payload was not recorded are missing, which is logged.
        """
        self._check()
        for number in self._left:
            rows = sorted(self._batches[number], key=_order(self._batches[number]))
            rollouts = [self._rollout(row) for row in rows if row.payload is not None]
            if len(rollouts) < len(rows):
                log.warning(
                    "payloads not recorded", batch=number, missing=len(rows) - len(rollouts)
                )
            if not rollouts:
                continue
            at = rows[0].version
            dated = [self._histories[number].redate(rollout) for rollout in rollouts]
            rollouts = self._refined(dated, at)
            self.version, self._last = max(self.version, at), number
            return Batch(
                number=number,
                version=at,
                rollouts=rollouts,
                counted=_counted(rollouts, at),
                bias=BiasMeter(),
                groups=[],
                collate=self._collate,
            )
        return None

    def batches(self, steps: int | None = None, *, commit: str = "step") -> Iterator[Batch]:
        """The recorded batches, at most `steps`; `commit` is taken as it is of a live run."""
        if commit not in ("step", "checkpoint"):
            raise SettingsError(f'commit is {commit!r}; it must be "step" or "checkpoint"')
        done = 0
        while steps is None or done < steps:
            batch = self.next_batch()
            if batch is None:
                return
            yield batch
            batch.state = "committed" if commit == "step" else "trained"
            done += 1

    def trained(self, batch: Batch) -> None:
        """Mark `batch` as trained."""
        batch.state = "trained"

    def commit(self, batch: Batch | None = None) -> None:
        """Mark `batch` as committed."""
        if batch is not None:
            batch.state = "committed"

    # ---- what steers a live run ----------------------------------------------------------------

    def feed(self, source: Iterable[Any]) -> None:
        """Nothing is submitted: the batches are recorded. `source` is not read."""
        self._check()

    def publish(
        self,
        version: int | None = None,
        weights: str = "",
        *,
        transfer: Callable[[int, str], object] | None = None,
        load: Callable[[int, Sequence[str]], object] | None = None,
    ) -> int:
        """Count the version on; no server is refitted.

        Raises:
            SettingsError: The version is below the last.
        """
        self._check()
        new = self.version + 1 if version is None else version
        if new < self.version:
            raise SettingsError(f"version {new} is below version {self.version}")
        self.version = new
        return new

    def pause(self, seconds: float) -> None:
        """There are no workers to pause."""

    def evaluate(self, items: Sequence[Any], *, timeout_s: float | None = None) -> Any:
        """Refused: nothing can generate here.

        Raises:
            RollfleetError: Always.
        """
        raise RollfleetError(
            f"{self.path} is a recording: it cannot run {len(items)} evaluations; connect to a run"
        )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold to go on in this recording."""
        return {"replayed": self._last, "version": self.version}

    # ---- life ----------------------------------------------------------------------------------

    def close(self) -> None:
        """Forget the recording. Idempotent."""
        self._closed = True
        self._batches, self._drops = {}, []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def _check(self) -> None:
        if self._closed:
            raise RollfleetError("the recording is closed")

    def _refined(self, rollouts: list[Rollout], version: int) -> list[Rollout]:
        if self._policy is None:
            return rollouts
        refined: list[Rollout] = []
        for _, group in groupby(rollouts, key=lambda rollout: rollout.header.group):
            made = self._policy.refine(list(group), version)
            # It was trained on: a policy that refuses it now is not the one of the live run.
            if isinstance(made, str):
                raise SettingsError(f"{self.path}: the policy refuses what was trained on: {made}")
            refined += made
        return refined

    def _rollout(self, row: Row) -> Rollout:
        where = f"{self.path}, group {row.header.group} #{row.header.index}"
        try:
            samples = decode_samples(row.payload or b"")
        except CodecError as exc:
            raise CodecError(f"{where}: {exc}") from exc
        check_samples(samples, where=where, need_trained=False)
        return Rollout(row.header, samples)


def _order(rows: Sequence[Row]) -> Any:
    """Groups as they came, members by index."""
    place: dict[str, int] = {}
    for row in rows:
        place.setdefault(row.header.group, len(place))
    return lambda row: (place[row.header.group], row.header.index)


def _histories(batches: Mapping[int, Sequence[Row]]) -> dict[int, VersionHistory]:
    """What the trainer's history was at each batch, from the versions and epochs of their rows."""
    histories: dict[int, VersionHistory] = {}
    rollbacks: list[tuple[int, int]] = []
    before, epoch = NO_VERSION, 0
    for number, rows in sorted(batches.items()):
        at = rows[0].version
        if at < before:
            rollbacks.append((epoch + 1, at))
        epoch = max(epoch, *(row.header.epoch for row in rows))
        ahead = [r.header for r in rows if r.header.epoch < epoch and r.header.max_version > at]
        if not all(map(VersionHistory(rollbacks).lost, ahead)):
            rollbacks.append((epoch, at))  # before the first row: `at` is the most it went back to
        histories[number], before = VersionHistory(rollbacks), at
    return histories


def _counted(rollouts: Sequence[Rollout], version: int) -> dict[str, float]:
    headers = [rollout.header for rollout in rollouts]
    stale = [0 if h.min_version == NO_VERSION else version - h.min_version for h in headers]
    return {
        "rollfleet/samples": len(headers),
        "rollfleet/tokens": sum(h.tokens for h in headers),
        "rollfleet/reward_mean": sum(h.reward for h in headers) / len(headers),
        "rollfleet/staleness_mean": sum(stale) / len(stale),
        "rollfleet/staleness_max": max(stale),
    }
