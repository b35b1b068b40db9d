"""TRL's AsyncGRPOTrainer on a fleet: TRL trains, the fleet rolls out. Proven with trl 1.16.0.

    args = AsyncGRPOConfig(..., num_generations=8, token_budget=0)
    with rollfleet.connect(url, run="grpo", servers=servers, **fleet_settings(args)) as fleet:
        bridge = TrlBridge(fleet, args, Epochs(prompts), weights="/shared/weights")
        AsyncGRPOTrainer(
            model, args=args, train_dataset=dataset, rollout_worker=bridge,
            weight_transfer=bridge, callbacks=[callback(bridge)],
        ).train()

- TRL's two seams, RolloutWorkerProtocol and WeightTransferProtocol, are one object: a version is
  announced when the servers have its weights, and not before.
- TRL's queue is the fleet: a group is judged and handed over when TRL takes its first row. No
  second buffer lets it grow stale, and what TRL has not taken stays in Redis.
- A group is trained when TRL has trained all its rows, not when TRL takes them: its loader reads a
  micro-batch ahead. What a crash finds in there is served again.
- Nothing of TRL is imported before it is used.
"""

import queue
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from rollfleet.adapters.trl_seam import agree, fleet_settings, row_class
from rollfleet.adapters.trl_watch import STATE_FILE, callback, load_state
from rollfleet.batch import Batch
from rollfleet.fleet import Fleet
from rollfleet.weight_sync.saving import save_weights
from rollfleet_common.errors import RollfleetError, SettingsError, StarvedError
from rollfleet_common.logs import get_logger
from rollfleet_common.messages import Rollout
from rollfleet_common.redis import is_transient

__all__ = ["STATE_FILE", "TrlBridge", "callback", "fleet_settings", "load_state"]

log = get_logger("rollfleet.trainer")

#: Metrics kept until they are fetched; more are dropped.
METRICS = 4096
#: Of ``batch.stats``, what TRL's log is told.
_TOLD = ("staleness_mean", "staleness_max", "wait_s", "outstanding", "ready")

Rewards = npt.NDArray[np.float64]


def _standardised(rewards: Rewards) -> Rewards:
    """TRL's advantages: float64[group]."""
    standardised: Rewards = (rewards - rewards.mean()) / (rewards.std() + 1e-8)
    return standardised


@dataclass(eq=False)
class _Held:
    """A batch that TRL has, or will have."""

    batch: Batch
    #: Rows of it that TRL has not trained.
    rows: int


class TrlBridge:
    """A fleet as TRL's rollout worker and weight transfer. On rank 0 only, as TRL's own.

    Args:
        fleet: Held by this process, with settings as :func:`fleet_settings`; the caller closes it.
        args: The AsyncGRPOConfig of the trainer.
        prompts: For :meth:`Fleet.feed`; endless (:class:`rollfleet.Epochs`), as TRL never stops
            asking: it ends by `max_steps` or epochs.
        weights: A folder that the inference servers can read: versions are saved there
            (:func:`rollfleet.save_weights`), and `publish` makes the servers load them. None: TRL's
            own transfer, or another, moves the weights.
        keep: How many versions of them are kept.
        commit: "step": a group is committed once it was trained; "checkpoint": once a checkpoint
            of TRL's holds it.
        advantages: From the rewards of a group (float64[rollouts]) to one advantage a rollout.

    Raises:
        SettingsError: TRL is missing or has another seam, or its settings and the fleet's disagree.
    """

    def __init__(
        self,
        fleet: Fleet,
        args: Any,
        prompts: Iterable[Any],
        *,
        weights: str | Path | None = None,
        keep: int = 3,
        commit: Literal["step", "checkpoint"] = "step",
        advantages: Callable[[Rewards], Rewards] = _standardised,
    ) -> None:
        fleet.aio.settler(commit)  # refuses what it does not know
        self.fleet = fleet
        self.args = args
        self.prompts = prompts
        self.folder = None if weights is None else Path(weights).resolve()
        self.keep = keep
        self.commit = commit
        self.advantages = advantages
        #: TRL's queue: this object.
        self.rollout_buffer = self
        #: Drained by TRL whenever it logs.
        self.metrics_queue: queue.Queue[dict[str, float]] = queue.Queue(METRICS)
        #: Whether the callback is in place.
        self.watched = False
        self._row = row_class(self)
        self._saved = ""
        self._live = 0
        self._behind = fleet.version
        self._groups = 0
        self._ready: deque[Any] = deque()
        self._held: list[_Held] = []
        #: The batch of each row that TRL has and has not trained, in order.
        self._given: deque[_Held] = deque()
        self._came = time.monotonic()
        self._why = "nothing was asked for yet"
        agree(fleet.aio.settings, args)

    # ---- RolloutWorkerProtocol ---------------------------------------------------------------

    def start(self) -> None:
        """Begin to feed; TRL has sent its first weights by now.

        Raises:
            SettingsError: The callback is missing, without which no group would ever be settled.
        """
        if not self.watched:
            raise SettingsError(
                "give AsyncGRPOTrainer callbacks=[rollfleet.adapters.trl.callback(bridge)]: it says "
                "what was trained, without which nothing is ever committed"
            )
        self._came = time.monotonic()
        if not self.fleet.aio.feeding:
            self.fleet.feed(self.prompts)

    def stop(self) -> None:
        """TRL has ended. The fleet stays open; what TRL did not train is served again."""
        self._ready.clear()

    def update_model_version(self, model_version: int) -> None:
        """Announce the weights that TRL sent, or moved itself, as the fleet's next version."""
        self.fleet.publish(weights=self._saved)
        self._saved = ""
        self._live, self._behind = model_version, self.fleet.version - model_version

    def check_health(self, stale_after_s: float) -> None:
        """TRL found nothing to take: complain if that has lasted for too long.

        Raises:
            StarvedError: Nothing has come for `stale_after_s`; it says what the fleet waits for.
        """
        waited_s = time.monotonic() - self._came
        if waited_s > stale_after_s:
            raise StarvedError(f"nothing to train on for {waited_s:.0f} s: {self._why}")

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """The next row for TRL, a RolloutSample: of the group in hand, or of a fresh one.

        Raises:
            queue.Empty: None came within `timeout` seconds.
            SettingsError: None can come: all that may be out is in TRL's hands.
            RollfleetError: The source of prompts has ended, or a part of the fleet has failed.
        """
        limit_s = timeout if block else 0.0
        until = None if limit_s is None else time.monotonic() + limit_s
        while True:
            while self._ready:
                held, row = self._ready.popleft()
                if not (why := self._unwanted(row)):
                    row.enqueued_at = time.time()
                    self._given.append(held)
                    return row
                # TRL would drop it by itself, and our count of what it trained would be wrong.
                log.warning("row kept from TRL", why=why, tokens=len(row.input_ids))
                self._tell({f"rollfleet/{why}_rows_total": 1.0})
                held.rows -= 1
                self._finish()
            self._take(None if until is None else max(until - time.monotonic(), 0.0))

    def qsize(self) -> int:
        """Rows of the group in hand."""
        return len(self._ready)

    def _unwanted(self, row: Any) -> str:
        """Why TRL would drop a row; "" if it would not."""
        if self._live - row.model_version > self.args.max_staleness:
            return "late"
        budget = self.args.token_budget or 0
        return "oversize" if 0 < budget < len(row.input_ids) else ""

    # ---- WeightTransferProtocol --------------------------------------------------------------

    def init_weight_transfer(self) -> None:
        """Make the folder of the weights.

        Raises:
            SettingsError: There is none, so there is nothing that this transfer could do.
        """
        if self.folder is None:
            raise SettingsError(
                "TrlBridge moves weights through a folder: give it weights=..., or give "
                "AsyncGRPOTrainer another weight_transfer"
            )
        self.folder.mkdir(parents=True, exist_ok=True)

    def pause(self) -> None:
        """Nothing stops yet: servers go on while weights are saved, and pause while they load."""

    def resume(self) -> None:
        """Nothing was stopped: `update_model_version`, which TRL calls next, does it all."""

    def send_weights(self, iterator: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Save the weights; `update_model_version` has the servers load them."""
        self.init_weight_transfer()
        assert self.folder is not None  # noqa: S101 - init_weight_transfer saw to it
        # One by one to the CPU: the iterator may gather each tensor from all ranks.
        tensors = {name: tensor.detach().cpu() for name, tensor in iterator}
        fleet = self.fleet
        place = save_weights(
            self.folder, fleet.version + 1, tensors, keep=self.keep, in_use=fleet.in_use
        )
        self._saved = str(place)

    def destroy(self) -> None:
        """Nothing is held: the last weights stay, for servers that start later."""

    # ---- what was trained --------------------------------------------------------------------

    def trained(self, rows: int) -> None:
        """TRL has trained so many more rows, in the order in which it took them."""
        for _ in range(min(rows, len(self._given))):
            self._given.popleft().rows -= 1
        self._finish()

    def state_dict(self) -> dict[str, Any]:
        """As :meth:`Fleet.state_dict`; what TRL holds untrained is still due."""
        state = self.fleet.state_dict()
        held = {r.header.position for each in self._held for r in each.batch.rollouts}
        return {**state, "open": sorted({*state["open"], *(p for p in held if p >= 0)})}

    def saved(self) -> None:
        """A checkpoint that holds :meth:`state_dict` is durable."""
        if self.commit == "checkpoint":
            self.fleet.commit()

    def _finish(self) -> None:
        """Settle the batches that have no rows left."""
        settle = self.fleet.commit if self.commit == "step" else self.fleet.trained
        for held in [each for each in self._held if each.rows <= 0]:
            self._held.remove(held)
            settle(held.batch)

    # ---- groups to rows ----------------------------------------------------------------------

    def _take(self, timeout_s: float | None) -> None:
        """Have one more group handed over."""
        try:
            batch = self.fleet.next_batch(self.args.num_generations, timeout_s=timeout_s)
        except StarvedError as exc:
            self._why = str(exc)
            self._refuse_to_hang()
            raise queue.Empty from exc
        if batch is None:
            raise RollfleetError(
                f"the source of prompts has ended after {self._groups} groups, and TRL wants more: "
                "it reads ahead and never stops asking; give an endless source "
                "(rollfleet.Epochs) and let max_steps end the training"
            )
        self._came = time.monotonic()
        rows = [row for group in _groups(batch) for row in self._rows(group)]
        held = _Held(batch, len(rows))
        self._held.append(held)
        self._ready.extend((held, row) for row in rows)
        stats = {f"rollfleet/{name}": batch.stats[f"rollfleet/{name}"] for name in _TOLD}
        drops = {k: v for k, v in batch.stats.items() if k.startswith("rollfleet/dropped/")}
        self._tell({**stats, **{f"{key}_total": value for key, value in drops.items()}})
        self._finish()  # a group may have no row to train on

    def _rows(self, group: Sequence[Rollout]) -> Iterator[Any]:
        """TRL's rows of one group: one for each training sequence with a trained token."""
        rewards = np.asarray([rollout.header.reward for rollout in group], np.float64)
        self._groups += 1
        for rollout, advantage in zip(group, self.advantages(rewards), strict=True):
            for sample in rollout.samples:
                # TRL scores a token off the one before it, so a first token cannot be trained.
                if not sample.loss_mask[1:].any():
                    continue
                yield self._row(
                    prompt=[],
                    completion=[],
                    input_ids=np.asarray(sample.token_ids, np.int64),
                    completion_mask=np.asarray(sample.loss_mask, np.int64),
                    old_log_probs=np.asarray(sample.logprobs, np.float32),
                    advantage=float(advantage),
                    model_version=rollout.header.min_version - self._behind,
                    group_id=self._groups,
                    metrics={
                        "reward": rollout.header.reward,
                        "reward_std": float(rewards.std()),
                        **{f"rewards/{name}": part for name, part in sample.components.items()},
                        **{f"sample/{name}": number for name, number in sample.metrics.items()},
                    },
                )

    def _tell(self, metrics: dict[str, float]) -> None:
        with suppress(queue.Full):
            self.metrics_queue.put_nowait(metrics)

    def _refuse_to_hang(self) -> None:
        """TRL waits for rows before it trains those that it has: say so if none can come.

        Raises:
            SettingsError: With the arithmetic.
        """
        if not self._given:
            return
        try:
            books = self.fleet.books()
        except Exception as exc:
            if not is_transient(exc):
                raise
            return  # Redis is away: that is why nothing came, and it is no error of the queue
        settings = self.fleet.aio.settings
        room = (settings.depth + 1) * settings.samples_per_version
        coming = books.outstanding - sum(len(held.batch) for held in self._held)
        if coming > 0 or books.outstanding + settings.launched <= room:
            return
        raise SettingsError(
            f"TRL holds {len(self._given)} rows and waits for more before it trains them, but all "
            f"(pipeline_depth + 1) x samples_per_version = ({settings.depth} + 1) x "
            f"{settings.samples_per_version} = {room} samples that may be out are in its hands: "
            "raise samples_per_version to what TRL packs into one step and one micro-batch more, or "
            "set token_budget=0 in AsyncGRPOConfig, so that a micro-batch is a number of samples"
        )


def _groups(batch: Batch) -> Iterator[list[Rollout]]:
    for _, members in groupby(batch.rollouts, key=lambda rollout: rollout.header.group):
        yield list(members)
