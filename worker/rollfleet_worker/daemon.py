"""The worker daemon: builds the parts, lives prompts, drains on SIGTERM.

- The life of a prompt is one coroutine, :meth:`Worker.live`: claim -> episode -> deliver.
- Nothing transient ends the process: Redis away, servers away and failing episodes are waited out.
- SIGTERM or SIGINT: stop claiming, finish until the drain deadline, hand the rest back so that it
  is claimable at once, exit 0. A second signal hands back at once. Leases are renewed throughout.

Exit codes: 0 drained; 1 a defect (the traceback is logged); 2 settings or set-up refused,
or the trainer of the run speaks other schemas;
3 the drain deadline passed while Redis was away, so that what was left waits for its leases.
"""

import asyncio
import math
import os
import secrets
import signal
import socket
import time
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from redis.exceptions import RedisError

from rollfleet_common.board import Board
from rollfleet_common.clock import Clock
from rollfleet_common.embedded import resolve
from rollfleet_common.errors import BrokerSetupError, RollfleetError
from rollfleet_common.keys import RunKeys, check_name
from rollfleet_common.leases import AttemptFailure, Leases
from rollfleet_common.logs import configure_logs, get_logger
from rollfleet_common.messages import NO_VERSION, Claim, Kind, PolicyVersion
from rollfleet_common.redis import check_server, connect, retry, safe_url
from rollfleet_common.redis_errors import server_message
from rollfleet_common.schemas import RELEASE, Schemas, clash, spoken
from rollfleet_common.servers import server_name
from rollfleet_common.streams import Streams
from rollfleet_common.tasks import cancel_all
from rollfleet_engines.interface import Sampling
from rollfleet_worker.build import build_engine, build_pool, card_servers
from rollfleet_worker.claim import BLOCK_MS, Claimer
from rollfleet_worker.deliver import Outbox
from rollfleet_worker.episode import Episodes
from rollfleet_worker.follow import Follower
from rollfleet_worker.health import HealthServer
from rollfleet_worker.heartbeat import Heartbeat
from rollfleet_worker.idle import Facts, Idle, explain
from rollfleet_worker.metrics import Metrics
from rollfleet_worker.partials.progress import PartialStore
from rollfleet_worker.pool.pool import EnginePool
from rollfleet_worker.rewards.base import RewardPool
from rollfleet_worker.settings import WorkerSettings
from rollfleet_worker.slots import Slots
from rollfleet_worker.workflows.base import load_workflow

__all__ = ["Worker", "run"]

log = get_logger("rollfleet.worker")

#: Partition, route and stream entry.
_Key = tuple[int, str, str]

OK, DEFECT, REFUSED, UNDELIVERED = 0, 1, 2, 3
#: How long the last words to Redis may take when the drain deadline has passed.
LAST_WORDS_S = 5.0
#: How long what is parked may be on its way to Redis when the worker ends.
PARK_S = 1.0
#: How often a closed gate looks again.
GATE_S = 0.2
#: How long Redis counts as full after it said so.
FULL_S = 10.0


class Worker:
    """One worker. `run` is its whole life; `stop` asks it to drain."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings
        host = settings.name or socket.gethostname()[:40]
        self.id = check_name(f"{host}-{os.getpid()}-{secrets.token_hex(3)}", "worker name")
        self.keys = RunKeys(check_name(settings.run, "run"))
        self.routes = sorted(settings.workflows)
        self.metrics = Metrics()
        self.slots = Slots(settings.slots)
        self.pool: EnginePool | None = None
        self.parking: PartialStore | None = None
        #: Whether a workflow says that it does nothing without an inference server.
        self._needs_server = False
        self.follower: Follower | None = None
        self.outboxes: list[Outbox] = []
        self._alive: dict[_Key, tuple[Claim, asyncio.Task[None]]] = {}
        #: What the board said when an episode that runs now began, by entry.
        self._running: dict[_Key, PolicyVersion] = {}
        self._stopping = asyncio.Event()
        self._at_once = asyncio.Event()
        #: Why this worker cannot work for the trainer that holds the run; "" if it can.
        self._clash = ""
        #: A call failed, and none was answered since; so for a moment at least.
        self._away = False
        self._away_until = 0.0
        #: What Redis said when it last failed, and when it last was full.
        self._trouble = ""
        self._full_s = -math.inf
        #: Claims so far.
        self._claimed = 0
        self.metrics.busy.set_function(lambda: len(self._running))
        self.metrics.outbox_bytes.set_function(lambda: sum(box.bytes for box in self.outboxes))
        self.metrics.version.set_function(
            lambda: NO_VERSION if self.follower is None else self.follower.policy.version
        )
        self.clock = Clock()
        self._started = time.monotonic()
        self._counts = {"delivered": 0, "failed": 0}

    # ---- the life of a prompt ----------------------------------------------------------------

    async def live(self, claim: Claim) -> None:
        """One prompt: run its episode, free the slot, deliver what came of it."""
        policy = self._running[_key(claim)]
        progress = self.parking.episode(claim, policy) if self.parking else None
        try:
            outcome = await self.episodes.run(claim, policy, progress)
        finally:
            self._free(claim)
        self._counts["failed" if isinstance(outcome, AttemptFailure) else "delivered"] += 1
        await self.outboxes[claim.partition].deliver(claim, outcome)
        if progress is not None:
            progress.settle(outcome if isinstance(outcome, AttemptFailure) else None)

    def _spawn(self, claim: Claim) -> None:
        policy = self._follower.policy
        if claim.since > (policy.epoch, policy.version):
            # The prompt is younger than what the board told us last.
            epoch, version = claim.since
            policy = replace(policy, epoch=epoch, version=version)
        self._running[_key(claim)] = policy
        self._claimed += 1
        self._track(claim, self.live(claim))

    def _free(self, claim: Claim) -> None:
        """Give an episode's slot back, once."""
        if self._running.pop(_key(claim), None) is not None:
            self.slots.give()

    def _refuse(self, claim: Claim, failure: AttemptFailure) -> None:
        self._track(claim, self.outboxes[claim.partition].deliver(claim, failure))

    def _track(self, claim: Claim, life: Any) -> None:
        task: asyncio.Task[None] = asyncio.create_task(life, name=f"live-{claim.entry}")
        key = _key(claim)
        self._alive[key] = (claim, task)
        task.add_done_callback(lambda done: self._buried(claim, done))

    def _buried(self, claim: Claim, task: "asyncio.Task[None]") -> None:
        _, alive = self._alive.get(_key(claim), (None, None))
        if alive is task:
            del self._alive[_key(claim)]
            self._free(claim)  # cancelled before it took its first step
        if not task.cancelled() and (exc := task.exception()) is not None:
            # The lease stays and lapses: another worker will try. Only set-up errors come here.
            log.error(
                "could not deliver", group=claim.prompt.group, index=claim.index, error=str(exc)
            )

    def _cancel_hopeless(self, policy: PolicyVersion) -> None:
        """Stop what can only bring stale rollouts. It saves work; the trainer's sweep guarantees."""
        for key, (claim, task) in list(self._alive.items()):
            began = self._running.get(key)
            if (
                began is not None
                and claim.prompt.kind is Kind.TRAIN
                and began.epoch == policy.epoch
                and began.version < policy.min_useful
            ):
                why = f"begun at version {began.version}, useful from {policy.min_useful}"
                log.info("episode hopeless", group=claim.prompt.group, index=claim.index, why=why)
                task.cancel()
                self._free(claim)
                self._track(claim, self.outboxes[claim.partition].give_up(claim, why))

    def _lost(self, partition: int, route: str, entry: str) -> None:
        if (held := self._alive.get((partition, route, entry))) is not None:
            claim, task = held
            log.info("lease lost, episode cancelled", group=claim.prompt.group, index=claim.index)
            task.cancel()

    def _active(self) -> Mapping[tuple[int, str], Sequence[str]]:
        held: dict[tuple[int, str], list[str]] = defaultdict(list)
        for claim, _ in self._alive.values():
            held[claim.partition, claim.prompt.route].append(claim.entry)
        return held

    # ---- what it says of itself --------------------------------------------------------------

    @property
    def _follower(self) -> Follower:
        assert self.follower is not None, "the worker has not started"  # noqa: S101 - a defect
        return self.follower

    def _on_wait(self, exc: Exception, wait_s: float) -> None:
        if not self._away:
            log.warning("redis is away", error=server_message(exc))
            self.metrics.disruptions.inc()
        self._away = True
        self._trouble = server_message(exc)
        if "maxmemory" in self._trouble:
            self._full_s = time.monotonic()
        self.clock.doubt()
        self._away_until = time.monotonic() + max(wait_s, 1.0)

    def _on_answer(self) -> None:
        """Redis answered: it is back, unless another part has failed just now."""
        if self._away and time.monotonic() > self._away_until:
            log.info("redis is back")
            self._away = False

    def why_not(self) -> str:
        """Why this worker cannot claim now; "" if it can."""
        if self._stopping.is_set():
            return "draining"
        if self._away:
            return "no-redis"
        if self.follower is None or not self.follower.opened.is_set():
            return "no-run"
        if self.follower.paused:
            return "paused"
        if self.pool is not None and self.pool.out and self._wants_servers(self.pool):
            return "no-server"
        if sum(outbox.bytes for outbox in self.outboxes) >= self.settings.buffer_bytes:
            return "outbox-full"
        return ""

    def _wants_servers(self, pool: EnginePool) -> bool:
        """Whether prompts would wait for a server: a workflow that calls no model needs none."""
        return bool(self.settings.servers) or self._needs_server or pool.asked

    def card(self) -> dict[str, Any]:
        """What the registry shows of this worker."""
        policy = self._follower.policy
        return {
            "id": self.id,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "version": RELEASE,
            "schemas": spoken().as_dict(),
            "routes": self.routes,
            "slots": self.slots.total,
            "busy": len(self._running),
            "servers": card_servers(self.pool) if self.pool else [],
            "state": self.why_not() or "claiming",
            "policy_version": policy.version,
            "seen_ms": int(self.clock.now_ms()),
            "started_ms": int(self.clock.now_ms() - (time.monotonic() - self._started) * 1000),
            **self._counts,
        }

    def _idle_cause(self) -> tuple[str, Hashable]:
        """Why this worker does nothing, for :class:`Idle`."""
        why = self.why_not()
        if why == "draining":
            return "", None
        if time.monotonic() - self._full_s < FULL_S:
            return "redis-full", None
        if not why and not self._alive:
            return "no-prompts", self._claimed
        return why, None

    async def _explain(self, cause: str) -> tuple[str, bool]:
        follower = self.follower
        facts = Facts(
            run=self.settings.run,
            routes=self.routes,
            board=None if follower is None else follower.board,
            paused_until_ms=0 if follower is None else follower.policy.paused_until_ms,
            now_ms=self.clock.now_ms(),
            pool=self.pool,
            trouble=self._trouble,
            outbox_bytes=sum(outbox.bytes for outbox in self.outboxes),
        )
        return await explain(cause, facts)

    async def _gate(self) -> None:
        """Return once this worker may claim (or is to stop)."""
        while (why := self.why_not()) and why != "draining":
            if why == "no-redis":
                return  # claiming is how we find out that it is back
            await asyncio.sleep(GATE_S)

    # ---- its own life ------------------------------------------------------------------------

    def stop(self) -> None:
        """Drain; called again, hand back at once."""
        if self._stopping.is_set():
            self._at_once.set()
        log.info("stopping", again=self._stopping.is_set(), episodes=len(self._alive))
        self._end_claiming()

    def _refuse_run(self, why: str, trainer: Schemas) -> None:
        """Stop: the trainer that holds the run speaks other schemas than this release."""
        if self._clash:
            return
        self._clash = why
        log.error(
            "this release cannot work for the trainer of the run",
            run=self.settings.run,
            release=RELEASE,
            trainer_release=trainer.release or "unknown",
            why=why,
        )
        if clash(replace(trainer, prompt=spoken().prompt), spoken()):
            # What is under way would bring rollouts that the trainer cannot read: it is handed back.
            for outbox in self.outboxes:
                outbox.shut()
            self._at_once.set()
        self._end_claiming()

    def _end_claiming(self) -> None:
        self._stopping.set()
        self.slots.close()

    async def run(self) -> int:
        """Live until stopped; returns the exit code.

        Raises:
            RollfleetError: Settings or set-up are refused.
        """
        s = self.settings
        workflows = {route: load_workflow(path) for route, path in s.workflows.items()}
        url, _ = resolve(s.redis_url)
        client = connect(url, role=f"worker-{self.id}")
        readers: list[Any] = []
        rewards = RewardPool(s.reward_processes, s.reward_timeout_s)
        pool = self.pool = build_pool(s, self.metrics, self.clock)
        self._needs_server = any(getattr(w, "needs_server", False) for w in workflows.values())
        engine = build_engine(pool, s, self.metrics)
        if s.park:
            self.parking = PartialStore(
                client, self.keys, engine, self.metrics, s.max_rollout_bytes
            )
        health = HealthServer(self.metrics, self.why_not)
        self.metrics.slots.set(s.slots)
        self.episodes = Episodes(
            worker=self.id,
            workflows=workflows,
            engine=engine,
            text=pool,
            rewards=rewards,
            sampling=Sampling(
                max_tokens=s.max_tokens,
                temperature=s.temperature,
                top_p=s.top_p,
                stop_token_ids=tuple(s.stop_token_ids),
            ),
            timeout_s=s.episode_timeout_s,
            max_rollout_bytes=s.max_rollout_bytes,
            metrics=self.metrics,
            clock=self.clock,
            limits=s.limits,
        )
        idle = asyncio.create_task(Idle(self._idle_cause, self._explain).run(), name="idle")
        try:
            if s.health_port is not None:
                await health.start(s.health_host, s.health_port)
            checking = asyncio.create_task(
                retry(
                    lambda: check_server(client, strict=s.strict),
                    what=f"reach Redis at {safe_url(url)}",
                    deadline_s=None,
                    on_wait=self._on_wait,
                    url=url,
                )
            )
            await _first(self._stopping.wait(), checking)
            if not checking.done():
                await cancel_all([checking])
                return OK  # told to stop before Redis was ever reached
            report = checking.result()
            for warning in report.warnings:
                log.warning(warning)
            log.info(
                "worker started",
                worker=self.id,
                run=s.run,
                redis=safe_url(url),
                routes=self.routes,
                slots=s.slots,
                servers=[server_name(url) for url in s.servers],
                health_port=health.port or None,
            )
            reader = connect(url, role=f"follow-{self.id}", blocking=True, block_s=2.0)
            readers.append(reader)
            self.follower = Follower(
                Board(client, self.keys),
                reader,
                self._on_wait,
                self._on_answer,
                self._cancel_hopeless,
                pool.apply,
                self._refuse_run,
                self.clock,
            )
            return await self._work(client, url, readers)
        finally:
            await cancel_all([idle])
            await health.stop()
            if self.parking is not None:
                await self.parking.flush(PARK_S)
            await engine.close()
            await rewards.close()
            for each in (client, *readers):
                await each.aclose()

    async def _work(self, client: Any, url: str, readers: list[Any]) -> int:
        follower = self._follower
        following = asyncio.create_task(follower.run(), name="follow")
        tasks: list[asyncio.Task[Any]] = [following]
        failed: asyncio.Task[Any] | None = None
        claiming: list[asyncio.Task[None]] = []
        pulse: Heartbeat | None = None
        try:
            await _first(follower.opened.wait(), self._stopping.wait(), following)
            if following.done():  # before the run was opened: no board can be read
                failed = await self._watch(tasks)
            elif follower.shape is not None and not self._stopping.is_set():
                pulse = self._build(client, url, readers, follower.shape.partitions)
                tasks += [
                    asyncio.create_task(outbox.pump(), name="deliver") for outbox in self.outboxes
                ]
                tasks += [
                    asyncio.create_task(beat(), name=beat.__name__)
                    for beat in (pulse.renew, pulse.promote, pulse.show)
                ]
                claiming = [
                    asyncio.create_task(claimer.run(self._stopping), name="claim")
                    for claimer in self.claimers
                ]
                log.info("claiming", partitions=len(claiming), routes=self.routes)
                failed = await self._watch([*tasks, *claiming])
            return await self._drain(claiming, pulse, failed)
        finally:
            await cancel_all([*tasks, *claiming])

    def _build(self, client: Any, url: str, readers: list[Any], partitions: int) -> Heartbeat:
        self.claimers: list[Claimer] = []
        all_leases: list[Leases] = []
        for partition in range(partitions):
            keys = self.keys.partition(partition)
            streams, leases = Streams(client, keys), Leases(client, keys, self.id, self.clock)
            outbox = Outbox(streams, leases, self.settings, self.metrics, self._on_wait)
            reader = connect(url, role=f"claim-{self.id}", blocking=True, block_s=BLOCK_MS / 1000)
            readers.append(reader)
            self.outboxes.append(outbox)
            all_leases.append(leases)
            self.claimers.append(
                Claimer(
                    streams=streams,
                    leases=leases,
                    reader=reader,
                    routes=self.routes,
                    slots=self.slots,
                    settings=self.settings,
                    metrics=self.metrics,
                    gate=self._gate,
                    spawn=self._spawn,
                    refuse=self._refuse,
                    owns=lambda claim: _key(claim) in self._alive,
                    on_wait=self._on_wait,
                    alone=partitions * len(self.routes) == 1,
                    clock=self.clock,
                    paused=lambda: self._follower.paused,
                )
            )
        return Heartbeat(
            client=client,
            keys=self.keys,
            leases=all_leases,
            routes=self.routes,
            lease_s=self.settings.lease_s,
            metrics=self.metrics,
            active=self._active,
            lost=self._lost,
            card=self.card,
            on_wait=self._on_wait,
            clock=self.clock,
        )

    async def _watch(self, tasks: Sequence["asyncio.Task[Any]"]) -> "asyncio.Task[Any] | None":
        """Wait for the stop, or for a part that ended by itself, which is a defect."""
        stop = asyncio.create_task(self._stopping.wait())
        try:
            done, _ = await asyncio.wait({stop, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stop.cancel()
        ended = next((task for task in done if task is not stop and task.exception()), None)
        if ended is not None:
            log.error(
                "a part of the worker failed", part=ended.get_name(), exc_info=ended.exception()
            )
            self._end_claiming()
        return ended

    async def _drain(
        self,
        claiming: Sequence["asyncio.Task[None]"],
        pulse: Heartbeat | None,
        failed: "asyncio.Task[Any] | None",
    ) -> int:
        code = OK if failed is None else REFUSED if _is_setup(failed) else DEFECT
        if self._clash:
            code = code or REFUSED
        deadline = time.monotonic() + self.settings.drain_s
        if claiming:
            # A read that is under way may still bring leases: they are lived, or handed back.
            await asyncio.wait(claiming, timeout=BLOCK_MS / 1000 + LAST_WORDS_S)
        log.info("draining", episodes=len(self._alive), deadline_s=self.settings.drain_s)
        hurry = asyncio.create_task(self._at_once.wait())
        while self._alive and time.monotonic() < deadline and not hurry.done():
            lives = {task for _, task in self._alive.values()}
            await asyncio.wait(
                {hurry, *lives},
                timeout=deadline - time.monotonic(),
                return_when=asyncio.FIRST_COMPLETED,
            )
        hurry.cancel()
        try:
            async with asyncio.timeout(LAST_WORDS_S):
                await self._hand_back()
        except (TimeoutError, RollfleetError) as exc:
            log.error(
                "could not hand back: leases will lapse", left=len(self._alive), error=str(exc)
            )
            code = code or UNDELIVERED
        if pulse is not None:
            await self._take_down(pulse)
        log.info("worker stopped", code=code, **self._counts)
        return code

    async def _take_down(self, pulse: Heartbeat) -> None:
        """Remove the card; one that stays while Redis is away is swept by the other workers."""
        try:
            async with asyncio.timeout(1.0):
                await pulse.take_down(self.id)
        except (TimeoutError, RedisError, OSError) as exc:
            log.warning("could not take the card down", error=str(exc))

    async def _hand_back(self) -> None:
        """Give what is left to the other workers."""
        left: dict[tuple[int, str], list[tuple[str, str]]] = defaultdict(list)
        for claim, task in list(self._alive.values()):
            left[claim.partition, claim.prompt.route].append((claim.entry, claim.prompt.group))
            task.cancel()
        if self.parking is not None:
            # Before the leases: whoever takes one up reads what is parked.
            await self.parking.flush(PARK_S)
        for (partition, route), held in left.items():
            leases = self.outboxes[partition].leases
            back = await retry(
                lambda leases=leases, route=route, held=held: leases.hand_back(route, held),  # type: ignore[misc]
                what=f"hand back {len(held)} leases",
                deadline_s=LAST_WORDS_S,
            )
            log.info("handed back", route=route, leases=back)


def _key(claim: Claim) -> _Key:
    """Names a lease: entries of two routes may bear the same id."""
    return claim.partition, claim.prompt.route, claim.entry


def _is_setup(task: "asyncio.Task[Any]") -> bool:
    return isinstance(task.exception(), BrokerSetupError)


async def _first(*waits: Any) -> None:
    """Return when the first of `waits` does; the tasks we made for it are cancelled."""
    own = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(own, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task, wait in zip(own, waits, strict=True):
            if task is not wait:
                task.cancel()


def run(settings: WorkerSettings) -> int:
    """Run a worker until it is told to stop; returns the process's exit code.

    Raises:
        RollfleetError: Settings or set-up are refused; the command prints it and exits with 2.
    """
    configure_logs(settings.log_level, settings.log_format)

    async def main() -> int:
        worker = Worker(settings)
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, worker.stop)
        return await worker.run()

    try:
        import uvloop  # noqa: PLC0415 - not on every platform
    except ImportError:
        return asyncio.run(main())
    return uvloop.run(main())
