"""The trainer's side of a run, for asyncio; :class:`rollfleet.Fleet` is its twin for plain loops.

- One trainer holds a run: it opens every partition with its token before it reads any, and learns
  with :class:`SupersededError` if another one does the same after it.
- A part that fails in the background is not swallowed: the next call raises its error.
- Every wait for a batch is bounded, and says what it is waiting for.
"""

import asyncio
import os
import secrets
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import structlog

from rollfleet.batch import Batch
from rollfleet.capacity import Pacer
from rollfleet.consume import BLOCK_MS, Consumer
from rollfleet.freshness import DropStale, Policy
from rollfleet.groups import Group
from rollfleet.publish import refit
from rollfleet.recover import Plan, recover
from rollfleet.settings import TrainerSettings
from rollfleet.submit import Feeder, to_prompt
from rollfleet_common.board import Board, Shape
from rollfleet_common.codec import decode_samples
from rollfleet_common.errors import (
    BrokerSetupError,
    InvalidPromptError,
    InvalidSampleError,
    RollfleetError,
    SettingsError,
    StarvedError,
    WireError,
)
from rollfleet_common.keys import RunKeys, partition_of
from rollfleet_common.ledger import Books, read_books
from rollfleet_common.messages import NO_VERSION, Kind, Prompt, Rollout
from rollfleet_common.redis import check_server, connect, retry, safe_url
from rollfleet_common.staleness import min_useful
from rollfleet_common.streams import Streams, Submission, Submitted
from rollfleet_common.validate import check_samples

__all__ = ["AsyncFleet"]

log = structlog.get_logger("rollfleet.trainer")

#: How long a blocked feeder or a waiting trainer goes without looking at the ledger itself.
LOOK_S = 1.0
#: How often a trainer that waits says why.
SAY_S = 30.0
#: Bytes of payloads fetched in one reply.
FETCH_BYTES = 8 << 20
#: Keys deleted at once by `fresh`.
DELETE_AT_ONCE = 500
#: How often `batch_of` submits a prompt that is given up.
TRIES = 8

Accept = Callable[[Sequence[Rollout]], bool]


class AsyncFleet:
    """A run, held by this trainer from :meth:`open` to :meth:`close`.

    Args:
        settings: Where, which run, and its shape.
        policy: Which groups may be trained on; None for :class:`DropStale` by `max_staleness`.
        should_accept: Told the decoded rollouts of a group that is otherwise fine; False drops it
            as ``rejected``, and another takes its place.
        state: What :meth:`state_dict` returned, to resume from that checkpoint.
        version: The policy's version now; None: wherever the run is (0 for a new one).
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
        self.policy = policy or DropStale(settings.max_staleness, settings.min_group_size)
        self.should_accept = should_accept
        self.pacer = Pacer(settings.depth, settings.samples_per_version)
        self.version = NO_VERSION
        self.epoch = 0
        self._state = dict(state or {})
        if self._state and self._state.get("run") != settings.run:
            raise SettingsError(
                f"the state is of run {self._state.get('run')!r}, not of {settings.run!r}"
            )
        self._want = self._state.get("version", NO_VERSION) if version is None else version
        self._collate = dict(collate or {})
        self._tasks: list[asyncio.Task[None]] = []
        self._error: RollfleetError | None = None
        self._feeder: Feeder | None = None
        self._fed = asyncio.Event()
        self._credit = asyncio.Event()
        self._cursor = NO_VERSION
        self._number = 0
        self._uncommitted: list[Batch] = []
        self._away_since: float | None = None
        self._manual = 0

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
        try:
            await self._check()
            if s.fresh:
                await self._wipe()
            await self._seize()
            await self._prepare()
        except BaseException:
            await self._disconnect()
            raise
        self._spawn(self._keep(), "keep")
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
        if self._feeder is not None:
            self._feeder.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        await self._disconnect(release=True)

    async def _disconnect(self, *, release: bool = False) -> None:
        try:
            if release and self.epoch:
                await self.board.release(self.token)
        except Exception as exc:  # noqa: BLE001 - the lease runs out by itself
            log.warning("could not release the run", error=str(exc))
        finally:
            for client in (self._client, *self._readers):
                await client.aclose()

    async def _check(self) -> None:
        s = self.settings
        report = await retry(
            lambda: check_server(self._client, strict=s.strict),
            what=f"reach Redis at {safe_url(s.redis_url)}",
            deadline_s=10.0,
            url=s.redis_url,
        )
        for warning in report.warnings:
            log.warning(warning)
        room = (s.depth + 1) * s.samples_per_version
        need = room * s.reserve_bytes
        if report.maxmemory_bytes and need > report.maxmemory_bytes:
            raise BrokerSetupError(
                f"Redis may hold {report.maxmemory_bytes:,} bytes (maxmemory), but "
                f"(pipeline_depth + 1) x samples_per_version x reserve_bytes = ({s.depth} + 1) x "
                f"{s.samples_per_version} x {s.reserve_bytes:,} = {need:,} bytes of rollouts may be "
                "outstanding: raise maxmemory, or lower one of the three"
            )

    async def _wipe(self) -> None:
        """Delete every key of the run."""
        for pattern in (f"{self.keys.prefix}*", f"rf:{{{self.settings.run}/*"):
            names = [name async for name in self._client.scan_iter(match=pattern, count=1000)]
            for at in range(0, len(names), DELETE_AT_ONCE):
                await self._client.unlink(*names[at : at + DELETE_AT_ONCE])

    async def _seize(self) -> None:
        """Wait out the lease of a trainer that died; refuse if it is alive."""
        s = self.settings
        shape = Shape(s.partitions, s.samples_per_version, s.max_staleness, s.depth)
        self.board = Board(self._client, self.keys)
        deadline = time.monotonic() + s.lease_s + 2
        while True:
            seized = await self.board.seize(
                self.token,
                int(s.lease_s * 1000),
                self.token,
                shape,
                version=self._want,
                take_over=s.take_over,
            )
            if seized.ok:
                self.epoch, self.version = seized.epoch, seized.version
                return
            if time.monotonic() > deadline:
                raise SettingsError(
                    f"run {s.run!r} is held by trainer {seized.holder}, which renewed its lease "
                    f"{s.lease_s - seized.left_ms / 1000:.1f} s ago: two trainers on one run would "
                    "train on each other's rollouts. Choose another run name, stop the other "
                    "trainer, or pass take_over=True to supersede it"
                )
            log.info("waiting for the run", holder=seized.holder, left_ms=seized.left_ms)
            await asyncio.sleep(min(seized.left_ms / 1000 + 0.05, 1.0))

    async def _prepare(self) -> None:
        s = self.settings
        self.streams = [Streams(self._client, self.keys.partition(p)) for p in range(s.partitions)]
        useful = min_useful(self.version, s.max_staleness)
        for streams in self.streams:
            cursor = await streams.open(self.token, self.epoch, self.version, useful)
            self._cursor = max(self._cursor, cursor)
        replay = await recover(
            self.board, self.token, self.streams, int(self._state.get("batch", 0))
        )
        self._number = max(await self.board.last_batch(), int(self._state.get("batch", 0)))
        self.consumer = Consumer(
            token=self.token,
            streams=self.streams,
            readers=self._readers,
            policy=self.policy,
            version=lambda: self.version,
            rollbacks=await self.board.rollbacks(),
            settled=self._settled,
            on_wait=self._on_wait,
        )
        self.consumer.replay = replay
        self.consumer.remember((group, index) for group, index in self._state.get("recent", ()))
        self.pacer.outstanding = (await self.books()).outstanding

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
        self._credit.set()

    def _check_alive(self) -> None:
        if self._error is not None:
            raise self._error

    async def _keep(self) -> None:
        """Keep the trainer's lease."""
        while True:
            await asyncio.sleep(self.settings.lease_s / 3)
            await retry(
                lambda: self.board.hold(self.token, int(self.settings.lease_s * 1000)),
                what="renew the trainer's lease",
                deadline_s=None,
                on_wait=self._on_wait,
            )
            self._away_since = None

    def _on_wait(self, exc: Exception, wait_s: float) -> None:
        if self._away_since is None:
            self._away_since = time.monotonic()
            log.warning("redis is away", error=str(exc))

    def _settled(self, samples: int) -> None:
        self.pacer.settled(samples)
        self._credit.set()

    # ---- 1. submit ---------------------------------------------------------------------------

    def feed(self, source: Iterable[Any]) -> None:
        """Submit the prompts of an iterable in the background, as the ledger allows.

        Positions that the run has seen are passed over, so the same iterable given again resumes.

        Raises:
            SettingsError: A feed is running already.
        """
        if self.feeding:
            raise SettingsError("a feed is running; one run is fed from one iterable at a time")
        skip = max(self._cursor + 1, int(self._state.get("position", 0)))
        if skip:
            log.info("resuming the feed", skip=skip)
        self._fed.clear()
        loop = asyncio.get_running_loop()
        self._feeder = Feeder(source, skip, self.settings.group_size, loop)
        self._feeder.start()
        self._spawn(self._feed(self._feeder), "feed")

    @property
    def feeding(self) -> bool:
        """Whether an iterable is being submitted in the background."""
        return self._feeder is not None and not self._fed.is_set()

    async def _feed(self, feeder: Feeder) -> None:
        try:
            while (prompt := await feeder.peek()) is not None:
                self._fits(prompt)
                await self._room(prompt.n)
                batch = feeder.more(max(self.pacer.room, prompt.n))
                await self._submit([Submission(f"@{p.position}", p) for p in batch])
                self._cursor = batch[-1].position
                feeder.took(len(batch))
        finally:
            self._fed.set()
            self.consumer.news.set()

    async def _room(self, samples: int) -> None:
        """Wait until the ledger has room for `samples`; its truth is read when nothing happens."""
        while self.pacer.room < samples:
            self._credit.clear()
            try:
                async with asyncio.timeout(LOOK_S):
                    await self._credit.wait()
            except TimeoutError:
                self.pacer.outstanding = (await self.books()).outstanding
            self._check_alive()

    async def submit(self, item: Any) -> str:
        """Submit one prompt now, waiting for room; returns its group's name.

        Raises:
            InvalidPromptError, OversizeError: Nothing was sent.
            SupersededError: Another trainer has opened the run.
        """
        self._check_alive()
        group = f"m{self.epoch}-{self._manual}-{secrets.token_hex(3)}"
        self._manual += 1
        prompt = to_prompt(item, group=group, group_size=self.settings.group_size)
        if prompt.kind is Kind.TRAIN:
            self._fits(prompt)
            await self._room(prompt.n)
        await self._submit([Submission(group, prompt)])
        return group

    def _fits(self, prompt: Prompt) -> None:
        s = self.settings
        room = (s.depth + 1) * s.samples_per_version
        if prompt.n > room:
            raise InvalidPromptError(
                f"prompt of group {prompt.group} asks for n = {prompt.n} samples, but only "
                f"(pipeline_depth + 1) x samples_per_version = ({s.depth} + 1) x "
                f"{s.samples_per_version} = {room} may be outstanding: it could never be submitted"
            )

    async def _submit(self, groups: Sequence[Submission]) -> None:
        """Submit in order, all of them; each script call takes those of one partition in a row."""
        left = list(groups)
        while left:
            partition = self._partition(left[0].prompt)
            row = [g for g in left if self._partition(g.prompt) == partition]
            if len(self.streams) > 1:  # in order over partitions: only the leading run of one
                row = row[: next((i for i, g in enumerate(row) if g is not left[i]), len(row))]
            # Partitions know their own part only: with several, the sum is ours to watch.
            limit = self.pacer.limit if len(self.streams) == 1 else -1
            states, outstanding = await retry(
                lambda row=row, partition=partition, limit=limit: self.streams[partition].submit(  # type: ignore[misc]
                    self.token, limit, row, self.settings.max_prompt_bytes
                ),
                what=f"submit {len(row)} prompts",
                deadline_s=None,
                on_wait=self._on_wait,
            )
            taken = sum(state is not Submitted.FULL for state in states)
            if len(self.streams) == 1:
                self.pacer.outstanding = outstanding
            else:
                self.pacer.outstanding += sum(
                    g.prompt.n
                    for g, state in zip(row, states, strict=True)
                    if state is Submitted.YES and g.prompt.kind is Kind.TRAIN
                )
            del left[:taken]
            if left and taken < len(row):
                await self._room(left[0].prompt.n)

    def _partition(self, prompt: Prompt) -> int:
        return partition_of(prompt.group, len(self.streams))

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
        want = self.settings.batch if samples is None else samples
        limit_s = self.settings.starve_s if timeout_s is None else timeout_s
        began = time.monotonic()
        self.pacer.release()
        self._credit.set()
        while True:
            version = self.version
            groups = await self._gather(want, began, limit_s)
            if not groups:
                return None
            rollouts = await self._load(groups)
            fresh = [group for group in groups if group.name in rollouts]
            enough = sum(len(group.members) for group in fresh) >= want
            if version != self.version or not (enough or (fresh and self._ended())):
                continue  # published meanwhile, or some fell out: choose again
            return await self._hand_over(fresh, rollouts, time.monotonic() - began)

    async def _gather(self, want: int, began: float, limit_s: float) -> list[Group]:
        """Wait for `want` fresh samples; fewer (or none) when the feed has ended."""
        say_at = began + SAY_S
        while True:
            self._check_alive()
            self.consumer.news.clear()
            groups = await self.consumer.sweep(self.consumer.choose(want))
            if sum(len(group.members) for group in groups) >= want or (
                self._ended() and len(groups) == len(self.consumer.choose(want))
            ):
                return groups
            now = time.monotonic()
            if now - began >= limit_s:
                raise StarvedError(
                    f"no batch of {want} samples within {limit_s:g} s: {await self.reason()}"
                )
            if now >= say_at:
                say_at = now + SAY_S
                log.warning(
                    "waiting for a batch", for_s=round(now - began), why=await self.reason()
                )
            await self._news(limit_s - (now - began))

    async def batch_of(self, items: Sequence[Any], *, timeout_s: float | None = None) -> Batch:
        """Submit `items` and hand over as many groups; what is given up is submitted again.

        Raises:
            StarvedError: They did not come in time, or one was given up :data:`TRIES` times.
            SettingsError: They could never be outstanding at once.
        """
        s = self.settings
        room = (s.depth + 1) * s.samples_per_version
        if len(items) * s.group_size > room:
            raise SettingsError(
                f"{len(items)} prompts x group_size = {len(items)} x {s.group_size} = "
                f"{len(items) * s.group_size} samples cannot be outstanding at once; only "
                f"(pipeline_depth + 1) x samples_per_version = ({s.depth} + 1) x "
                f"{s.samples_per_version} = {room} may"
            )
        limit_s = s.starve_s if timeout_s is None else timeout_s
        began = time.monotonic()
        self.pacer.release()
        tries: dict[str, tuple[Any, int]] = {}
        for item in items:
            tries[await self.submit(item)] = (item, 1)
        try:
            while True:
                self._check_alive()
                self.consumer.news.clear()
                self.consumer.reserved = set(tries)
                here = [self.consumer.ready[name] for name in tries if name in self.consumer.ready]
                fresh = await self.consumer.sweep(here)
                rollouts = await self._load(fresh) if len(fresh) == len(tries) else {}
                if len(rollouts) == len(tries):
                    return await self._hand_over(fresh, rollouts, time.monotonic() - began)
                for name in self.consumer.given_up & set(tries):
                    self.consumer.given_up.discard(name)
                    item, tried = tries.pop(name)
                    if tried >= TRIES:
                        raise StarvedError(f"prompt {item!r:.200} was given up {tried} times")
                    tries[await self.submit(item)] = (item, tried + 1)
                left_s = limit_s - (time.monotonic() - began)
                if left_s <= 0:
                    raise StarvedError(
                        f"{len(tries) - len(fresh)} of {len(tries)} groups did not come within "
                        f"{limit_s:g} s: {await self.reason()}"
                    )
                await self._news(left_s)
        finally:
            self.consumer.reserved = set()

    async def _news(self, left_s: float) -> None:
        """Wait for an arrival, a moment at most; then look at the ledger's truth."""
        try:
            async with asyncio.timeout(min(LOOK_S, left_s)):
                await self.consumer.news.wait()
        except TimeoutError:
            self.pacer.outstanding = (await self.books()).outstanding

    def _ended(self) -> bool:
        """Whether nothing more will come: the feed is exhausted and all it sent is here."""
        if self._feeder is None or not self._fed.is_set() or self.consumer.groups.open:
            return False
        here = sum(len(group.members) for group in self.consumer.ready.values())
        out = sum(len(b) for b in self._uncommitted if b.state == "handed")
        return self.pacer.outstanding <= here + out

    async def _load(self, groups: Sequence[Group]) -> dict[str, list[Rollout]]:
        """Payloads of groups, decoded and validated; groups that fail are dropped with a reason."""
        loaded: dict[str, list[Rollout]] = {}
        for partition in {group.partition for group in groups}:
            here = [group for group in groups if group.partition == partition]
            payloads = await self._fetch(partition, here)
            for group in here:
                reason = self._decode(group, payloads, loaded)
                if reason:
                    await self.consumer.drop([group], reason)
        return loaded

    async def _fetch(self, partition: int, groups: Sequence[Group]) -> dict[str, bytes | None]:
        headers = [m.header for g in groups for _, m in sorted(g.members.items())]
        payloads: dict[str, bytes | None] = {}
        at = 0
        while at < len(headers):
            end, size = at, 0
            while end < len(headers) and (end == at or size < FETCH_BYTES):
                size += headers[end].payload_bytes
                end += 1
            names = [header.payload for header in headers[at:end]]
            values = await retry(
                lambda names=names: self.streams[partition].fetch(names),  # type: ignore[misc]
                what=f"fetch {len(names)} payloads",
                deadline_s=None,
                on_wait=self._on_wait,
            )
            payloads.update(zip(names, values, strict=True))
            at = end
        return payloads

    def _decode(
        self,
        group: Group,
        payloads: Mapping[str, bytes | None],
        loaded: dict[str, list[Rollout]],
    ) -> str:
        """Decode one group into `loaded`; returns why it cannot be used, or ""."""
        rollouts: list[Rollout] = []
        for index, member in sorted(group.members.items()):
            header = member.header
            packed = payloads.get(header.payload)
            if packed is None:
                log.error("payload missing", group=group.name, index=index, payload=header.payload)
                return "lost"
            where = f"group {group.name} #{index} from {header.worker}"
            try:
                samples = decode_samples(packed)
                check_samples(samples, where=where)
            except (WireError, InvalidSampleError) as exc:
                log.error("payload refused", group=group.name, index=index, error=str(exc))
                return "corrupt"
            rollouts.append(Rollout(header, samples))
        if self.should_accept is not None and not self.should_accept(rollouts):
            return "rejected"
        loaded[group.name] = rollouts
        return ""

    async def _hand_over(
        self, groups: list[Group], rollouts: Mapping[str, list[Rollout]], waited_s: float
    ) -> Batch:
        self._number += 1
        number = self._number
        plan = Plan.of(number, "handed", groups)
        await self._planned(number, plan.dumps())
        for group in groups:
            self.consumer.ready.pop(group.name, None)
        batch = Batch(
            number=number,
            version=self.version,
            rollouts=[rollout for group in groups for rollout in rollouts[group.name]],
            stats={},
            groups=groups,
            collate=self._collate,
        )
        batch.stats = self._stats(batch, waited_s)
        self._uncommitted.append(batch)
        return batch

    def _stats(self, batch: Batch, waited_s: float) -> dict[str, float]:
        headers = [rollout.header for rollout in batch.rollouts]
        stale = batch.staleness
        stats = {
            "rollfleet/wait_s": waited_s,
            "rollfleet/samples": len(headers),
            "rollfleet/tokens": sum(h.tokens for h in headers),
            "rollfleet/reward_mean": sum(h.reward for h in headers) / len(headers),
            "rollfleet/staleness_mean": sum(stale) / len(stale),
            "rollfleet/staleness_max": max(stale),
            "rollfleet/outstanding": self.pacer.outstanding,
            "rollfleet/ready": sum(len(g.members) for g in self.consumer.ready.values()),
        }
        drops, self.consumer.drops = self.consumer.drops, {}
        return stats | {f"rollfleet/dropped/{reason}": n for reason, n in drops.items()}

    # ---- after training ----------------------------------------------------------------------

    async def trained(self, batch: Batch) -> None:
        """The batch was trained on: its credit returns; it is freed by :meth:`commit`.

        For trainers that commit at checkpoints: what was trained since is served again, in order,
        after a crash.
        """
        if batch.state == "handed":
            await self._advance(batch, "trained")

    async def commit(self, batch: Batch | None = None) -> None:
        """Free a batch (all that were trained, if none is named): it will never be served again.

        Call it after the optimizer step, or after the checkpoint that holds the step is durable.
        """
        for each in (
            [b for b in self._uncommitted if b.state == "trained"] if batch is None else [batch]
        ):
            if each.state != "committed":
                await self._advance(each, "committed")

    async def _advance(self, batch: Batch, state: str) -> None:
        self._check_alive()
        if batch not in self._uncommitted:
            raise RollfleetError(f"batch {batch.number} was not handed out by this trainer")
        plan = Plan.of(batch.number, state, batch.groups)
        await self._planned(batch.number, plan.dumps())  # THE commit point
        verb = "train" if state == "trained" else "commit"
        await self._durably(
            lambda: plan.settle(verb, self.token, self.streams), f"{verb} batch {batch.number}"
        )
        if batch.state == "handed":
            self.pacer.settled(len(batch), hold=True)
            self.consumer.remember((g.name, i) for g in batch.groups for i in g.members)
        batch.state = state
        if state == "committed":
            self._uncommitted.remove(batch)
            for group in batch.groups:
                self.consumer.forget(group)
            await self._planned(batch.number, None)
        self._credit.set()

    async def _planned(self, number: int, plan: bytes | None) -> None:
        await self._durably(
            lambda: self.board.plan(self.token, number, plan), f"plan batch {number}"
        )

    async def _durably(self, call: Callable[[], Awaitable[Any]], what: str) -> None:
        await retry(call, what=what, deadline_s=None, on_wait=self._on_wait)

    async def publish(
        self,
        version: int | None = None,
        weights: str = "",
        *,
        transfer: Callable[[int, str], Awaitable[None]] | None = None,
    ) -> int:
        """Announce a new version of the policy; returns it.

        Args:
            version: Its number; one more than the last if not given.
            weights: Where the weights are. With `servers` set, they are made to load it first.
            transfer: Called as ``transfer(version, weights)`` in place of that, for trainers that
                move the weights themselves.

        Raises:
            RefitError: A server did not take the weights; the version is not announced.
            SettingsError: The version is not above the last.
            SupersededError: Another trainer has opened the run.
        """
        self._check_alive()
        new = self.version + 1 if version is None else version
        if new <= self.version and not (new == self.version and weights):
            raise SettingsError(
                f"version {new} is not above version {self.version}; to go back, open the run anew "
                "from a checkpoint"
            )
        if transfer is not None:
            await transfer(new, weights)
        elif weights and self.settings.servers:
            await refit(self.settings.servers, new, weights)
        fields: dict[str, int | str] = {
            "version": new,
            "weights": weights,
            "published_ms": int(time.time() * 1000),
        }
        await self._durably(
            lambda: self.board.publish(self.token, fields), f"publish version {new}"
        )
        self.version = new
        useful = min_useful(new, self.settings.max_staleness)
        for streams in self.streams:
            await self._durably(
                lambda streams=streams: streams.advance(self.token, new, useful),  # type: ignore[misc]
                f"advance to version {new}",
            )
        self.pacer.release()
        self._credit.set()
        return new

    async def pause(self, seconds: float) -> None:
        """Ask workers to claim nothing for `seconds`; what runs goes on. 0 resumes."""
        until = int((time.time() + seconds) * 1000) if seconds > 0 else 0
        fields = {"paused_until_ms": until}
        await self._durably(lambda: self.board.publish(self.token, fields), "pause")

    async def batches(
        self, steps: int | None = None, *, commit: str = "step"
    ) -> AsyncIterator[Batch]:
        """Batches, until the feed ends or after `steps`. Each is settled when the next is asked for.

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
        trained = [b.number for b in self._uncommitted if b.state == "trained"]
        handed = [b.number for b in self._uncommitted if b.state == "handed"]
        last = max(trained) if trained else min(handed, default=self._number + 1) - 1
        return {
            "run": self.settings.run,
            "version": self.version,
            "batch": last,
            "position": self._cursor + 1,
            "recent": list(self.consumer.recent),
        }

    async def books(self) -> Books:
        """The ledger of the run, as it is in Redis now."""
        return await read_books(self._client, [streams.keys for streams in self.streams])

    async def reason(self) -> str:
        """What the fleet is waiting for, in words."""
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
        if self._feeder is None and not books.outstanding:
            parts.insert(0, "nothing was submitted: call feed() or submit()")
        if self._away_since is not None:
            parts.insert(0, f"Redis is away since {time.monotonic() - self._away_since:.0f} s")
        return "; ".join(parts)
