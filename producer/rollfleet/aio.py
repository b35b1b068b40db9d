"""The trainer's side of a run, for asyncio; :class:`rollfleet.Fleet` is its twin for plain loops.

- One trainer holds a run: it opens every partition with its token before it reads any, and learns
  with :class:`SupersededError` if another one does the same after it.
- A part that fails in the background is not swallowed: the next call raises its error.
- Every wait for a batch is bounded, and says what it is waiting for.
"""

import asyncio
import json
import os
import secrets
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import structlog

from rollfleet.batch import Batch
from rollfleet.bias import BiasMeter
from rollfleet.capacity import Pacer
from rollfleet.commit import Commits
from rollfleet.consume import BLOCK_MS, Consumer
from rollfleet.freshness import Policy
from rollfleet.gather import Gather
from rollfleet.guarded import Guarded, policy_named
from rollfleet.line import Line
from rollfleet.opening import REACH_S, check, seize, shape, wipe
from rollfleet.payloads import Accept, Payloads
from rollfleet.publish import refit
from rollfleet.recover import recover
from rollfleet.revive import Reviver
from rollfleet.rollback import History
from rollfleet.settings import TrainerSettings
from rollfleet.submit import Submitter
from rollfleet_common.board import Board
from rollfleet_common.errors import RollfleetError, SettingsError
from rollfleet_common.keys import RunKeys
from rollfleet_common.ledger import Books, read_books
from rollfleet_common.messages import NO_VERSION, Prompt, Rollout
from rollfleet_common.redis import connect, retry, safe_url
from rollfleet_common.streams import Streams
from rollfleet_common.tasks import cancel_all

__all__ = ["AsyncFleet"]

log = structlog.get_logger("rollfleet.trainer")

#: How often deadlines are looked at.
DEADLINE_S = 1.0


class AsyncFleet:
    """A run, held by this trainer from :meth:`open` to :meth:`close`.

    Args:
        settings: Where, which run, and its shape.
        policy: Which groups may be trained on; None for the one that the settings name.
        should_accept: Told the decoded rollouts of a group that is otherwise fine; False drops it
            as ``rejected``, and another takes its place.
        state: What :meth:`state_dict` returned, to resume from that checkpoint.
        version: The policy's version now; None: wherever the run is (0 for a new one).
        collate: Options of :func:`rollfleet.collate` for ``batch.tensors``.
    """

    def __init__(
        self,
        settings: TrainerSettings,
        *,
        policy: Policy | None = None,
        should_accept: Accept | None = None,
        state: Mapping[str, Any] | None = None,
        version: int | None = None,
        collate: Mapping[str, Any] | None = None,
    ) -> None:
        self.settings = settings
        self.keys = RunKeys(settings.run)
        self.token = f"{socket.gethostname()[:40]}-{os.getpid()}-{secrets.token_hex(4)}"
        self.policy = (
            policy_named(
                settings.policy, settings.max_staleness, settings.min_group_size, settings.order
            )
            if policy is None
            else Guarded(policy)
        )
        self.meter = BiasMeter()
        self.pacer = Pacer(
            settings.depth, settings.samples_per_version, tallied=settings.partitions == 1
        )
        self.version = NO_VERSION
        self.epoch = 0
        self._weights = ""
        self._accept = should_accept
        self._state = dict(state or {})
        if self._state and self._state.get("run") != settings.run:
            raise SettingsError(
                f"the state is of run {self._state.get('run')!r}, not of {settings.run!r}"
            )
        self._want = self._state.get("version", NO_VERSION) if version is None else version
        self._collate = dict(collate or {})
        self._tasks: list[asyncio.Task[None]] = []
        self._error: RollfleetError | None = None
        self.line = Line(self._revive)
        #: Prompts of the groups that are out, oldest first.
        self._out: dict[str, Prompt] = {}

    # ---- opening and closing -----------------------------------------------------------------

    async def open(self) -> Self:
        """Take the run, and whatever an earlier trainer left unsettled in it.

        Raises:
            BrokerUnavailableError: Redis cannot be reached.
            BrokerSetupError: Redis refuses us, or cannot hold what the settings ask for.
            SettingsError: Another trainer holds the run.
        """
        s = self.settings
        self._client = connect(s.redis_url, role=f"trainer-{s.run}")
        self._readers = [
            connect(s.redis_url, role=f"consume-{s.run}", blocking=True, block_s=BLOCK_MS / 1000)
            for _ in range(s.partitions)
        ]
        self.board = Board(self._client, self.keys)
        self.streams = [Streams(self._client, self.keys.partition(p)) for p in range(s.partitions)]
        try:
            await check(self._client, s)
            if s.fresh:
                await wipe(self._client, self.keys)
            # Both may be repeated: the token is ours, and every step of them is idempotent.
            seized = await retry(
                lambda: seize(self.board, self.token, s, self._want),
                what="take the run",
                deadline_s=REACH_S,
                url=s.redis_url,
            )
            self.epoch, self.version = seized.epoch, seized.version
            await retry(self._build, what="open the run", deadline_s=REACH_S, url=s.redis_url)
        except BaseException:
            await self._disconnect()
            raise
        self._spawn(self._keep(), "keep")
        self._spawn(self._tend(), "tend")
        for partition in range(s.partitions):
            self._spawn(self.consumer.run(partition), f"consume-{partition}")
        log.info(
            "run opened",
            run=s.run,
            redis=safe_url(s.redis_url),
            epoch=self.epoch,
            version=self.version,
            outstanding=self.pacer.outstanding,
        )
        return self

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Let go of the run. Prompts and rollouts stay for the next trainer. Idempotent."""
        if self.submitter.feeder is not None:
            self.submitter.feeder.stop()
        await cancel_all(self._tasks)
        self._tasks.clear()
        await self._disconnect()

    async def _disconnect(self) -> None:
        try:
            if self.epoch:
                await self.board.release(self.token)
        except Exception as exc:  # noqa: BLE001 - the lease runs out by itself
            log.warning("could not release the run", error=str(exc))
        finally:
            for client in (self._client, *self._readers):
                await client.aclose()

    async def _build(self) -> None:
        """Fence every partition, finish what was half done, and build the parts."""
        s = self.settings
        useful = self.policy.horizon(self.version)
        cursors = [
            await streams.open(self.token, self.epoch, self.version, useful)
            for streams in self.streams
        ]
        last = int(self._state.get("batch", 0))
        replay = await recover(self.board, self.token, self.streams, last)
        history = History(await self.board.rollbacks())
        self.consumer = Consumer(
            token=self.token,
            streams=self.streams,
            readers=self._readers,
            policy=self.policy,
            version=lambda: self.version,
            history=history,
            on_rollback=s.on_rollback,
            meter=self.meter,
            settled=self._settled,
            surplus=s.surplus,
            least=self.policy.least,
            out=self._out,
            line=self.line,
        )
        self.consumer.replay = replay
        self.consumer.remember((group, index) for group, index in self._state.get("recent", ()))
        self.payloads = Payloads(
            self.streams,
            self._accept,
            self.consumer.drop,
            lambda: self.consumer.life,
            self.line,
            self.policy,
            history,
        )
        self.commits = Commits(
            board=self.board,
            token=self.token,
            streams=self.streams,
            consumer=self.consumer,
            pacer=self.pacer,
            line=self.line,
            number=max(await self.board.last_batch(), last),
            collate=self._collate,
        )
        self.submitter = Submitter(
            token=self.token,
            prefix=f"m{self.epoch}",
            streams=self.streams,
            settings=s,
            pacer=self.pacer,
            books=self.books,
            check=self._check,
            line=self.line,
            version=lambda: self.version,
            out=self._out,
            **self._feed_from(max(cursors)),
        )
        self.reviver = Reviver(
            token=self.token,
            board=self.board,
            streams=self.streams,
            consumer=self.consumer,
            out=self._out,
            max_prompt_bytes=s.max_prompt_bytes,
            partition=self.submitter.partition,
            reopen=self._reopen,
            publish=self._announce,
            version=lambda: self.version,
            done=self.commits.done,
        )
        self.gather = Gather(
            settings=s,
            consumer=self.consumer,
            payloads=self.payloads,
            commits=self.commits,
            submitter=self.submitter,
            pacer=self.pacer,
            version=lambda: self.version,
            check=self._check,
            reason=self.reason,
        )
        await self.submitter.look()

    def _feed_from(self, cursor: int) -> dict[str, Any]:
        """Where the feed goes on: where Redis says, which may be behind the checkpoint.

        A Redis that has nothing of this run has lost it: what was out at the checkpoint is sent
        again.
        """
        if cursor > NO_VERSION:
            return {"cursor": cursor, "again": frozenset()}
        position = int(self._state.get("position", 0))
        return {"cursor": position - 1, "again": frozenset(self._state.get("open", ()))}

    def _spawn(self, life: Awaitable[None], name: str) -> None:
        async def guarded() -> None:
            try:
                await life
            except asyncio.CancelledError:
                raise
            except RollfleetError as exc:
                self._fail(exc)
            except Exception as exc:  # noqa: BLE001 - told to whoever calls next
                error = RollfleetError(
                    f"{name} failed in the background: {type(exc).__name__}: {exc}"
                )
                error.__cause__ = exc
                self._fail(error)

        self._tasks.append(asyncio.create_task(guarded(), name=f"rollfleet-{name}"))

    def _fail(self, error: RollfleetError) -> None:
        log.error("the fleet failed", error=str(error))
        self._error = self._error or error
        self.consumer.news.set()
        self.submitter.credit.set()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    async def _keep(self) -> None:
        """Keep the trainer's lease."""
        while True:
            await asyncio.sleep(self.settings.lease_s / 3)
            await self.line(
                lambda: self.board.hold(self.token, int(self.settings.lease_s * 1000)),
                "renew the trainer's lease",
            )
            if self.line.suspect:
                self.line.suspect = False
                await self.line(self.reviver.reconcile, "look for what an outage lost")

    async def _tend(self) -> None:
        """Close groups that are past their deadline; keep what is worth a warning on the board."""
        shown = ""
        while True:
            await asyncio.sleep(DEADLINE_S)
            said = self.meter.warnings(self.settings.max_staleness)
            if (text := json.dumps(said)) != shown:
                for sentence in said:
                    log.warning(sentence)
                await self.line(
                    lambda text=text: self.board.publish(self.token, {"warnings": text}),  # type: ignore[misc]
                    "publish warnings",
                )
                shown = text
            now_ms = time.time() * 1000
            late = [p.group for p in self._out.values() if 0 < p.deadline_ms < now_ms]
            for group in late:
                log.info("deadline passed", group=group)
                await self.consumer.cancel(group, "deadline")

    async def _revive(self) -> bool:
        return await self.reviver.revive()

    async def _reopen(self) -> bool:
        """Take a run that Redis lost, in a new epoch; False if another trainer was faster."""
        s = self.settings
        seized = await retry(
            lambda: self.board.seize(
                self.token,
                int(s.lease_s * 1000),
                self.token,
                shape(s),
                version=self.version,
                take_over=False,
                above=self.epoch,
            ),
            what="open the run anew",
            deadline_s=None,
        )
        if seized.ok:
            self.epoch = seized.epoch
            useful = self.policy.horizon(self.version)
            for streams in self.streams:
                await retry(
                    lambda streams=streams: streams.open(  # type: ignore[misc]
                        self.token, self.epoch, self.version, useful
                    ),
                    what="fence a partition anew",
                    deadline_s=None,
                )
        return seized.ok

    async def _announce(self, weights: str | None = None) -> None:
        """Put the version on the board and into the fences."""
        if weights is not None:
            self._weights = weights
        fields: dict[str, int | str] = {"version": self.version, "weights": self._weights}
        useful = self.policy.horizon(self.version)
        fields |= {"published_ms": int(time.time() * 1000), "min_useful": useful}
        await self.line(
            lambda: self.board.publish(self.token, fields), f"publish version {self.version}"
        )
        for streams in self.streams:
            await self.line(
                lambda streams=streams: streams.advance(self.token, self.version, useful),  # type: ignore[misc]
                f"advance to version {self.version}",
            )

    def _settled(self, samples: int) -> None:
        self.pacer.settled(samples)
        self.submitter.credit.set()

    def _credit(self) -> None:
        self.pacer.release()
        self.submitter.credit.set()

    # ---- 1. submit ---------------------------------------------------------------------------

    @property
    def feeding(self) -> bool:
        """Whether an iterable is being submitted in the background."""
        return self.submitter.feeding

    def feed(self, source: Iterable[Any]) -> None:
        """Submit the prompts of an iterable in the background, as the ledger allows.

        Positions that the run has seen are passed over, so the same iterable given again resumes.

        Raises:
            SettingsError: A feed is running already.
        """
        self.submitter.begin(source)

        async def feed() -> None:
            await self.submitter.feed()
            self.consumer.news.set()

        self._spawn(feed(), "feed")

    async def submit(self, item: Any) -> str:
        """Submit one prompt now, waiting for room; returns its group's name.

        Raises:
            InvalidPromptError, OversizeError: Nothing was sent.
            StarvedError: There was no room within `starve_s`.
            SupersededError: Another trainer has opened the run.
        """
        return await self.gather.submit(item, self.settings.starve_s)

    # ---- 4. consume --------------------------------------------------------------------------

    async def next_batch(
        self, samples: int | None = None, *, timeout_s: float | None = None
    ) -> Batch | None:
        """Whole groups of `samples` rollouts, fresh at this moment; None when the feed has ended.

        Args:
            samples: How many; `batch_size` if not given. The last batch of a feed may be smaller.
            timeout_s: Longest wait; `starve_s` if not given.

        Raises:
            StarvedError: Nothing came in time; the message says what the fleet was waiting for.
            SupersededError: Another trainer has opened the run.
            RollfleetError: Whatever a part of the fleet failed with in the background.
        """
        self._credit()
        s = self.settings
        want = s.batch if samples is None else samples
        return await self.gather.next(want, s.starve_s if timeout_s is None else timeout_s)

    async def batch_of(self, items: Sequence[Any], *, timeout_s: float | None = None) -> Batch:
        """Submit `items` and hand over as many groups; what is given up is submitted again.

        Raises:
            StarvedError: They did not come in time, or one was given up too often.
            SettingsError: They could never be outstanding at once.
        """
        self._credit()
        limit_s = self.settings.starve_s if timeout_s is None else timeout_s
        return await self.gather.batch_of(items, limit_s)

    async def evaluate(
        self, items: Sequence[Any], *, timeout_s: float | None = None
    ) -> list[list[Rollout]]:
        """Run `items` as evaluation: outside of pacing, never stale; returns rollouts by item.

        A sample that died is missing from its list. Headers say which versions made them.

        Raises:
            StarvedError: They did not come in time.
        """
        limit_s = self.settings.starve_s if timeout_s is None else timeout_s
        return await self.gather.evaluate(items, limit_s)

    # ---- after training ----------------------------------------------------------------------

    async def trained(self, batch: Batch) -> None:
        """The batch was trained on: its credit returns; it is freed by :meth:`commit`.

        For trainers that commit at checkpoints: what was trained since is served again, in order,
        after a crash.
        """
        self._check()
        if batch.state == "handed":
            await self.commits.advance(batch, "trained")
            self.submitter.credit.set()

    async def commit(self, batch: Batch | None = None) -> None:
        """Free a batch (all that were trained, if none is named): it will never be served again.

        Call it after the optimizer step, or after the checkpoint that holds the step is durable.
        """
        self._check()
        trained = [each for each in self.commits.open if each.state == "trained"]
        for each in trained if batch is None else [batch]:
            if each.state != "committed":
                await self.commits.advance(each, "committed")
        self.submitter.credit.set()

    async def publish(
        self,
        version: int | None = None,
        weights: str = "",
        *,
        transfer: Callable[[int, str], Awaitable[None]] | None = None,
    ) -> int:
        """Announce a new version of the policy; returns it.

        Args:
            version: Its number; one more than the last if not given. The current one may be
                published again, with weights: a trainer that resumes refits its servers so.
            weights: Where the weights are. With `servers` set, they are made to load it first.
            transfer: Called as ``transfer(version, weights)`` in place of that, for trainers that
                move the weights themselves.

        Raises:
            RefitError: A server did not take the weights; the version is not announced.
            SettingsError: The version is below the last.
            SupersededError: Another trainer has opened the run.
        """
        self._check()
        new = self.version + 1 if version is None else version
        if new < self.version:
            raise SettingsError(
                f"version {new} is below version {self.version}; to go back, open the run anew "
                "from a checkpoint"
            )
        if transfer is not None:
            await transfer(new, weights)
        elif weights and self.settings.servers:
            await refit(self.settings.servers, new, weights)
        self.version = new
        await self._announce(weights)
        self._credit()
        return new

    async def pause(self, seconds: float) -> None:
        """Ask workers to claim nothing for `seconds`; what runs goes on. 0 resumes."""
        until = int((time.time() + seconds) * 1000) if seconds > 0 else 0
        fields: dict[str, int | str] = {"paused_until_ms": until}
        await self.line(lambda: self.board.publish(self.token, fields), "pause")

    async def batches(
        self, steps: int | None = None, *, commit: str = "step"
    ) -> AsyncIterator[Batch]:
        """Batches, until the feed ends or after `steps`; each is settled when the loop comes back.

        Args:
            steps: How many; None for all.
            commit: "step": a batch is committed when the loop comes back for the next.
                "checkpoint": it is marked as trained then; call :meth:`commit` at checkpoints.
        """
        settle = self.settler(commit)
        done = 0
        while steps is None or done < steps:
            batch = await self.next_batch()
            if batch is None:
                return
            yield batch
            await settle(batch)
            done += 1

    def settler(self, commit: str) -> Callable[[Batch], Awaitable[None]]:
        """What a loop does with a batch when it comes back for the next."""
        if commit not in ("step", "checkpoint"):
            raise SettingsError(f'commit is {commit!r}; it must be "step" or "checkpoint"')
        return self.commit if commit == "step" else self.trained

    # ---- state and reasons -------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold to resume this run; plain types only."""
        return {
            "run": self.settings.run,
            "version": self.version,
            "batch": self.commits.last_trained,
            "position": self.submitter.cursor + 1,
            "open": sorted(p.position for p in self._out.values() if p.position >= 0),
            "recent": list(self.consumer.recent),
        }

    async def books(self) -> Books:
        """The ledger of the run, as it is in Redis now."""
        return await read_books(self._client, [streams.keys for streams in self.streams])

    async def reason(self) -> str:
        """What the fleet is waiting for, in words."""
        if self.line.away_since is not None:
            return f"Redis is away since {time.monotonic() - self.line.away_since:.0f} s"
        books = await self.books()
        workers = await self._client.hlen(self.keys.workers)
        here = sum(len(group.members) for group in self.consumer.ready.values())
        parts = [
            f"{books.waiting} samples wait for a worker",
            f"{books.in_flight} are in flight",
            f"{books.delayed} wait for another attempt",
            f"{here} are ready",
            f"{books.dead} died",
        ]
        if workers == 0:
            parts.insert(0, "no worker has ever shown up for this run")
        if self.submitter.feeder is None and not books.outstanding:
            parts.insert(0, "nothing was submitted: call feed() or submit()")
        return "; ".join(parts)
