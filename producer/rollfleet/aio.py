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
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Self

from rollfleet.batch import Batch, check_collate
from rollfleet.consume.evaluation import Evaluation
from rollfleet.consume.payloads import Accept
from rollfleet.consume.reader import BLOCK_MS
from rollfleet.line import Line
from rollfleet.parts import Needs, Parts
from rollfleet.policy.checked import CheckedPolicy, policy_named
from rollfleet.policy.metrics import BiasMeter
from rollfleet.policy.policies import Policy
from rollfleet.run.lease import TrainerLease
from rollfleet.run.open_run import (
    REACH_S,
    State,
    check,
    check_lost,
    check_state,
    read_state,
    wipe,
)
from rollfleet.run.releases import refuse_leftovers, strangers
from rollfleet.settings import TrainerSettings
from rollfleet.state.capacity import Pacer
from rollfleet.state.causes import Cause, Evidence, diagnose, tell
from rollfleet.tasks import BackgroundTasks
from rollfleet.weight_sync.coordinator import Refits
from rollfleet.weight_sync.repair import Repairer
from rollfleet.weight_sync.update import Load
from rollfleet_common.board import Board
from rollfleet_common.errors import FailingError, SettingsError
from rollfleet_common.keys import RunKeys
from rollfleet_common.ledger import Books, read_books
from rollfleet_common.logs import get_logger
from rollfleet_common.messages import NO_VERSION, Prompt
from rollfleet_common.redis import connect, retry, safe_url
from rollfleet_common.servers import Servers
from rollfleet_common.streams import Streams
from rollfleet_common.tasks import call, is_async
from rollfleet_engines.control import Weights

__all__ = ["AsyncFleet"]

log = get_logger("rollfleet.trainer")

#: A feed has ended, and the trainer was handed nothing of it.
NO_BATCH = "the feed has ended without one batch"
#: How often deadlines are looked at.
DEADLINE_S = 1.0
#: How often the cards of the workers are looked at.
CARDS_S = 10.0


class AsyncFleet:
    """A run, held by this trainer from :meth:`open` to :meth:`close`.

    Args:
        settings: Where, which run, and its shape.
        policy: Which groups may be trained on; None for the one that the settings name.
        should_accept: Told the decoded rollouts of a group that is otherwise fine; False drops it
            as ``rejected``, and another takes its place.
        state: What :meth:`state_dict` returned, to resume from that checkpoint; or a function,
            plain or async, that returns it (or None), called once this trainer holds the run: what
            it reads cannot be older than what the trainer before it saved last.
        version: The policy's version now; None: wherever the run is (0 for a new one).
        collate: Options of :func:`rollfleet.collate` for ``batch.tensors``; and `device`, where these
            are to be: ``"cuda"``, ``"cuda:1"``, or ``"auto"`` for CUDA where there is any.
    """

    def __init__(
        self,
        settings: TrainerSettings,
        *,
        policy: Policy | None = None,
        should_accept: Accept | None = None,
        state: State = None,
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
            else CheckedPolicy(policy)
        )
        self.line = Line(self._revive)
        self.meter = BiasMeter(clock=lambda: self.line.clock.now_ms() / 1000)
        self.pacer = Pacer(
            settings.depth, settings.samples_per_version, tallied=settings.partitions == 1
        )
        if should_accept is not None and (not callable(should_accept) or is_async(should_accept)):
            raise SettingsError(
                "should_accept must be a plain function of a group's rollouts that returns True or "
                "False: an async one would never be awaited. Judge slowly in the workflow instead"
            )
        self._accept = should_accept
        if isinstance(state, Mapping):
            check_state(state, settings.run)
        self._given = state
        self._state: dict[str, Any] = {}
        self._at = version
        #: Batches that were committed after the checkpoint that was resumed, and so are in no
        #: model; an upper bound, 0 unless ``lost_batches="accept"``.
        self.lost_batches = 0
        self._collate = dict(collate or {})
        check_collate(self._collate)
        #: Decodes and collates, so that the loop goes on.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollfleet-load")
        self._background = BackgroundTasks(self._wake)
        #: Prompts of the groups that are out, oldest first.
        self._out: dict[str, Prompt] = {}
        #: Batch by group of what an earlier trainer owes.
        self._owed: dict[str, int] = {}

    @property
    def version(self) -> int:
        """The version last published."""
        return self._tenure.version

    @property
    def epoch(self) -> int:
        """Which incarnation of the run's history this is."""
        return self._tenure.epoch

    # ---- opening and closing -----------------------------------------------------------------

    async def open(self) -> Self:
        """Take the run, and whatever an earlier trainer left unsettled in it.

        Raises:
            BrokerUnavailableError: Redis cannot be reached.
            BrokerSetupError: Redis refuses us, or cannot hold what the settings ask for.
            SettingsError: Another trainer holds the run.
            LostBatchesError: Batches were committed after `state` was saved; nothing has changed.
        """
        s = self.settings
        self._client = connect(s.redis_url, role=f"trainer-{s.run}")
        self._readers = [
            connect(s.redis_url, role=f"consume-{s.run}", blocking=True, block_s=BLOCK_MS / 1000)
            for _ in range(s.partitions)
        ]
        self.board = Board(self._client, self.keys)
        self.streams = [Streams(self._client, self.keys.partition(p)) for p in range(s.partitions)]
        registry = Servers(self._client, self.keys)
        self.refits = Refits(s, registry, self.token, lambda: self.epoch, self.line)
        self._tenure = TrainerLease(
            s,
            self.token,
            self.board,
            self.streams,
            self.line,
            self.policy.horizon,
            lambda: self.refits.current is not None,
        )
        try:
            await check(self._client, s)
            await retry(self._set_clock, what="ask Redis for its time", deadline_s=REACH_S)
            if s.fresh:
                # First: nothing is deleted of a run that a living trainer holds, and one that is
                # taken over must not believe that Redis lost its run.
                await self._tenure.claim()
                await self._tenure.while_held(wipe(self._client, self.keys))
                await self._client.unlink(self.keys.board)
            await retry(
                lambda: refuse_leftovers(self._client, self.keys, s.partitions),
                what="look for prompts of an earlier release",
                deadline_s=REACH_S,
                url=s.redis_url,
            )
            await self._take()
            # It may be repeated: every step of it is idempotent.
            await retry(self._build, what="open the run", deadline_s=REACH_S, url=s.redis_url)
            await self.refits.open(Weights(self.version, self._tenure.weights, s.adapter))
        except BaseException:
            await self._disconnect()
            raise
        spawn = self._background.spawn
        spawn(self._tenure.keep(self.reviver.reconcile), "keep")
        spawn(self._tend(), "tend")
        spawn(self.watch.run(), "watch")
        spawn(Repairer(self.refits).run(), "heal")
        for partition in range(s.partitions):
            spawn(self.consumer.run(partition), f"consume-{partition}")
        if s.prefetch:
            spawn(self.gather.ahead.run(), "prefetch")
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
        """Let go of the run. Prompts and rollouts stay for the next trainer. Idempotent.

        In a forked child of the process that opened the fleet it does nothing.
        """
        if self._background.home.left:
            return
        if self.submitter.feeder is not None:
            self.submitter.feeder.stop()
        await self._background.close()
        await self.consumer.close()
        await self.commits.close()
        self._thread.shutdown(wait=False, cancel_futures=True)
        await self.refits.close()
        await self._disconnect()

    async def _disconnect(self) -> None:
        try:
            await self._tenure.release()
        except Exception as exc:  # noqa: BLE001 - the lease runs out by itself
            log.warning("could not release the run", error=str(exc))
        finally:
            for client in (self._client, *self._readers):
                await client.aclose()

    async def _take(self) -> None:
        """Take the run, at the version of the state."""
        last_committed = await self._tenure.claim()
        reading = read_state(self._given, self.settings.run)
        self._state = await self._tenure.while_held(reading)
        self.lost_batches = check_lost(self._state, last_committed, self.settings)
        want = self._state.get("version", NO_VERSION) if self._at is None else self._at
        await self._tenure.take(want)

    async def _build(self) -> None:
        """Build the parts on the run that was taken."""
        parts = await Parts.build(
            Needs(
                settings=self.settings,
                tenure=self._tenure,
                policy=self.policy,
                meter=self.meter,
                pacer=self.pacer,
                readers=self._readers,
                thread=self._thread,
                accept=self._accept,
                state=self._state,
                collate=self._collate,
                check=self._background.check,
                reason=self.reason,
                books=self.books,
                announce=self._announce,
                moving=lambda: self.refits.moving,
                out=self._out,
                owed=self._owed,
                lost=self.lost_batches,
            )
        )
        self.consumer, self.payloads = parts.consumer, parts.payloads
        self.commits, self.submitter = parts.commits, parts.submitter
        self.reviver, self.gather = parts.reviver, parts.gather
        self.watch = parts.watch

    async def _set_clock(self) -> None:
        await self.line.clock.measure(self._client)

    def _wake(self) -> None:
        """Have everyone who waits look again."""
        self.consumer.news.set()
        self.submitter.credit.set()

    async def _revive(self) -> bool:
        return await self.reviver.revive()

    async def _tend(self) -> None:
        """Close groups that are past their deadline; keep what is worth a warning on the board."""
        shown = ""
        foreign: list[str] = []
        look_at = 0.0
        while True:
            await asyncio.sleep(DEADLINE_S)
            self.consumer.drop_log.tell()
            if self.line.clock.due:
                await self.line(self._set_clock, "ask Redis for its time")
            if time.monotonic() >= look_at:
                look_at = time.monotonic() + CARDS_S
                cards = await self.line(
                    lambda: self._client.hgetall(self.keys.workers), "look at the workers"
                )
                foreign = strangers(cards)
            said = self.meter.warnings(self.settings.max_staleness) + foreign
            if (text := json.dumps(said)) != shown:
                for sentence in said:
                    log.warning(sentence)
                await self._tenure.say("publish warnings", warnings=text)
                shown = text
            for group in self.submitter.deadlines.late(self.line.clock.now_ms()):
                log.debug("deadline passed", group=group)
                await self.consumer.cancel(group, "deadline")

    async def _announce(self) -> None:
        self.consumer.news.set()  # what was prepared may have been for another version
        await self._tenure.announce()

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

        An item is a mapping, a :class:`Prompt`, or token ids alone. In a mapping ``token_ids``, ``n``,
        ``kind``, ``route``, ``task``, ``sampling`` and ``deadline_ms`` are reserved: they are fields
        of the prompt, and None stands for what is not given. Other keys are the workflow's, in
        ``prompt.data``. Where columns of a data set have reserved names, put all that is meant for
        the workflow into one mapping, ``{"token_ids": [...], "data": {"task": ..., "n": ...}}``: it
        is taken whole.

        Positions that the run has seen are passed over, so the same iterable given again resumes. A
        source with `state_dict` and `load_state_dict` (torchdata's StatefulDataLoader) is put back
        where it stood at the checkpoint that `state` is from: no pass over all that went before.

        Raises:
            SettingsError: A feed is running already.
        """
        self._background.check()
        self.submitter.begin(source)

        async def feed() -> None:
            await self.submitter.feed()
            self.consumer.news.set()

        self._background.spawn(feed(), "feed")

    async def submit(self, item: Any) -> str:
        """Submit one prompt now, waiting for room; returns its group's name.

        `item` is what :meth:`feed` takes from its source.

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
        batch = await self.gather.next(want, s.starve_s if timeout_s is None else timeout_s)
        if batch is None and (why := await self.why_no_batch()):
            log.error(NO_BATCH, why=why)
        return batch

    async def batch_of(self, items: Sequence[Any], *, timeout_s: float | None = None) -> Batch:
        """Submit `items` and hand over as many groups; what is given up is submitted again.

        Raises:
            StarvedError: They did not come in time, or one was given up too often.
            SettingsError: They could never be outstanding at once.
        """
        self._credit()
        limit_s = self.settings.starve_s if timeout_s is None else timeout_s
        return await self.gather.batch_of(items, limit_s)

    async def evaluate(self, items: Sequence[Any], *, timeout_s: float | None = None) -> Evaluation:
        """Run `items` as evaluation: outside of pacing, never stale; returns rollouts by item.

        A sample that died is missing from its list: ``failures[item]`` of what is returned has its
        index and why. Headers say which versions made them.

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
        self._background.check()
        if batch.state == "handed":
            await self.commits.advance(batch, "trained")
            self.submitter.credit.set()

    async def commit(self, batch: Batch | None = None) -> None:
        """Free a batch (all that were trained, if none is named): it will never be served again.

        Call it after the optimizer step, or after the checkpoint that holds the step is durable.
        """
        self._background.check()
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
        transfer: Callable[[int, str], object] | None = None,
        load: Callable[[int, Sequence[str]], object] | None = None,
    ) -> int:
        """Announce a new version of the policy; returns it.

        Args:
            version: Its number; one more than the last if not given. The current one may be
                published again, with weights: a trainer that resumes refits its servers so.
            weights: Where the weights are, as the servers can read it: those of `servers` and those
                that are registered are made to load it, as the settings say.
            transfer: Called as ``transfer(version, weights)`` in place of that, for trainers that
                move the weights themselves; no server is touched, and none is healed meanwhile.
            load: Called as ``load(version, urls)`` while the servers at `urls` are paused, in place
                of their reading `weights`: for a broadcast. They are tagged and resumed after it.

        `transfer` and `load` may be plain or async. A plain function is called in a thread of its
        own (where CUDA's current device is the default one), an async one in the fleet's event loop;
        what they return is not looked at. What `transfer` raises, this raises, and the version is
        not announced.

        Raises:
            RefitError: No server took the weights, and the version is not announced; or fewer did
                than `refit_quorum` asks for. One that did not is out until it does.
            SettingsError: The version is below the last.
            SupersededError: Another trainer has opened the run.
        """
        self._background.check()
        for name, given in (("transfer", transfer), ("load", load)):
            if given is not None and not callable(given):
                raise SettingsError(f"{name} is {type(given).__name__}; it must be a function")
        new = self.version + 1 if version is None else version
        if new < self.version:
            raise SettingsError(
                f"version {new} is below version {self.version}; to go back, open the run anew "
                "from a checkpoint"
            )

        async def announce() -> None:
            self._tenure.version, self._tenure.weights = new, weights
            await self._announce()

        if transfer is not None:
            move, self.watch.by_itself = transfer, True
            await self.refits.hands_off(lambda: call(move, new, weights))
            await announce()
        elif weights or load is not None:
            moved: Load | None = None if load is None else partial(call, load)
            await self.refits.publish(Weights(new, weights, self.settings.adapter), announce, moved)
        else:
            await announce()
        self._credit()
        return new

    @property
    def in_use(self) -> frozenset[int]:
        """Versions whose weights some server holds or may be given: :func:`save_weights` keeps them."""
        return self.refits.versions() | {self.version}

    async def pause(self, seconds: float) -> None:
        """Ask workers to claim nothing for `seconds`; what runs goes on. 0 resumes.

        Workers learn of it within milliseconds, and within a second if a wake-up was lost. A prompt
        that a read brings after that goes back untouched.
        """
        self._background.check()
        until = int(self.line.clock.now_ms() + seconds * 1000) if seconds > 0 else 0
        await self._tenure.say("pause", paused_until_ms=until)

    async def batches(
        self, steps: int | None = None, *, commit: str = "step"
    ) -> AsyncIterator[Batch]:
        """Batches, until the feed ends or after `steps`; each is settled when the loop comes back.

        Args:
            steps: How many; None for all.
            commit: "step": a batch is committed when the loop comes back for the next.
                "checkpoint": it is marked as trained then; call :meth:`commit` at checkpoints.

        Raises:
            FailingError: The feed has ended, and all that it submitted died or was dropped.
        """
        settle = self.settler(commit)
        done = 0
        while steps is None or done < steps:
            batch = await self.next_batch()
            if batch is None:
                await self.fed_something()
                return
            yield batch
            await settle(batch)
            done += 1

    async def why_no_batch(self) -> str:
        """Why not one batch came of what this trainer submitted; "" if it submitted nothing, or one did."""
        if not self.submitter.sent or self.commits.number != self.commits.first:
            return ""
        return tell(await self._evidence())

    async def fed_something(self) -> None:
        """Raise if a feed of this trainer has ended, and not one batch came of it.

        Raises:
            FailingError: The message counts the outcomes of the samples.
        """
        if why := await self.why_no_batch():
            raise FailingError(f"{NO_BATCH}: {why}")

    def settler(self, commit: str) -> Callable[[Batch], Awaitable[None]]:
        """What a loop does with a batch when it comes back for the next."""
        if commit not in ("step", "checkpoint"):
            raise SettingsError(f'commit is {commit!r}; it must be "step" or "checkpoint"')
        return self.commit if commit == "step" else self.trained

    # ---- state and reasons -------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold to resume this run.

        Plain types only, but for `source`: a stateful feed's own state, as that gives it.
        """
        source = self.submitter.source_state
        return {
            **({} if source is None else {"source": source}),
            "run": self.settings.run,
            "version": self.version,
            "batch": self.commits.last_trained,
            **({"beyond": beyond} if (beyond := self.commits.beyond) else {}),
            "position": self.submitter.cursor + 1,
            "open": sorted(p.position for p in self._out.values() if p.position >= 0),
            "recent": list(self.consumer.recent),
        }

    async def books(self) -> Books:
        """The ledger of the run, as it is in Redis now."""
        self._background.home.check()
        return await read_books(self._client, [streams.keys for streams in self.streams])

    async def reason(self) -> str:
        """What the fleet is waiting for, in words: the causes that were found, then the counts."""
        if self.line.away_since is not None:
            away = f"Redis is away since {time.monotonic() - self.line.away_since:.0f} s"
            return f"{away} ({self.line.error})"
        return tell(await self._evidence())

    async def causes(self) -> list[Cause]:
        """Why no batch comes, as :func:`rollfleet.state.causes.diagnose` finds it; empty if nothing is wrong.

        Raises:
            redis.exceptions.RedisError: Redis cannot be reached.
        """
        return diagnose(await self._evidence())

    async def _evidence(self) -> Evidence:
        feeder, s = self.submitter.feeder, self.settings
        found = Evidence(
            books=await self.books(),
            here=sum(len(group.members) for group in self.consumer.ready.values()),
            handed=self.commits.handed,
            limit=(s.depth + 1) * s.samples_per_version,
            version=self.version,
            fed=feeder is not None,
            feed_ended=self.submitter.fed,
            source_silent=feeder is not None and feeder.silent,
            refits=self.refits.trouble(),
        )
        return await self.watch.evidence(found)
