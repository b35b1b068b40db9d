"""3. deliver: finished episodes onto the rollouts stream, and their prompts off, in one step.

- Many deliveries share a round trip: whatever has gathered while the last one was under way.
- While Redis is away finished rollouts wait here, up to a cap in bytes; at the cap the worker
  claims nothing new. Nothing finished is thrown away for want of Redis.
- A delivery is repeated until it is answered: the script knows its leases, so a repeat after a
  lost reply is answered GONE and changes nothing.
"""

import asyncio
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from redis.exceptions import RedisError

from rollfleet_common.errors import FailureKind, RollfleetError
from rollfleet_common.leases import AttemptFailure, Leases
from rollfleet_common.logs import get_logger
from rollfleet_common.messages import Claim
from rollfleet_common.redis import retry
from rollfleet_common.streams import Delivered, Delivery, Streams
from rollfleet_common.text import parse_json
from rollfleet_worker.metrics import Metrics
from rollfleet_worker.settings import WorkerSettings

__all__ = ["Outbox", "retry_delay_ms"]

log = get_logger("rollfleet.worker")

#: Deliveries that share one round trip.
AT_ONCE = 64
#: Round trips under way at once: one is packed while the server works on the other.
LANES = 2
#: Bytes that share one round trip, so that one large rollout does not hold up many small ones.
BYTES_AT_ONCE = 8 << 20


@dataclass(slots=True, eq=False)
class _Waiting:
    delivery: Delivery
    done: "asyncio.Future[Delivered]"


class Outbox:
    """What waits to be delivered in one partition."""

    def __init__(
        self,
        streams: Streams,
        leases: Leases,
        settings: WorkerSettings,
        metrics: Metrics,
        on_wait: Callable[[Exception, float], None],
    ) -> None:
        self.streams = streams
        self.leases = leases
        self.settings = settings
        self.metrics = metrics
        self.bytes = 0
        self._on_wait = on_wait
        self._queue: deque[_Waiting] = deque()
        self._some = asyncio.Event()
        self._shut = False

    def shut(self) -> None:
        """Send no further rollouts: who reads them now could not. What waits keeps its lease."""
        self._shut = True

    async def deliver(self, claim: Claim, outcome: Delivery | AttemptFailure) -> None:
        """Hand in an outcome; returns when Redis has taken or refused it."""
        if isinstance(outcome, AttemptFailure):
            await self._fail(claim, outcome)
            return
        waiting = _Waiting(outcome, asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        self.bytes += len(outcome.payload)
        self._some.set()
        try:
            state = await waiting.done
        except (RedisError, RollfleetError):
            raise
        except Exception as exc:
            log.exception("a rollout cannot be sent", group=outcome.header.group)
            detail = f"its rollout cannot be sent: {type(exc).__name__}: {exc}"
            await self._fail(claim, AttemptFailure(FailureKind.DATA, detail, self.leases.worker))
            return
        finally:
            self.bytes -= len(outcome.payload)
        self._account(outcome, state)

    async def give_up(self, claim: Claim, why: str) -> None:
        """End a lease that could only bring what is too stale; returns when Redis knows."""
        self.metrics.cancelled.inc()
        await retry(
            lambda: self.leases.give_up(claim, why),
            what=f"give up group {claim.prompt.group} #{claim.index}",
            deadline_s=None,
            on_wait=self._on_wait,
        )

    async def pump(self) -> None:
        """Deliver for as long as the task lives."""
        await asyncio.gather(*(self._lane() for _ in range(LANES)))

    async def _lane(self) -> None:
        while True:
            await self._some.wait()
            if self._shut:
                return
            items: list[_Waiting] = []
            size = 0
            while self._queue and len(items) < AT_ONCE and size < BYTES_AT_ONCE:
                item = self._queue.popleft()
                if not item.done.done():  # cancelled: its lease was lost
                    items.append(item)
                    size += len(item.delivery.payload)
            if not self._queue:
                self._some.clear()
            if items:
                await self._send(items)

    async def _send(self, items: list[_Waiting]) -> None:
        deliveries = [item.delivery for item in items]
        try:
            states = await retry(
                lambda: self.streams.deliver(self.leases.worker, deliveries),
                what=f"deliver {len(items)} rollouts",
                deadline_s=None,
                on_wait=self._on_wait,
            )
        except Exception as exc:  # noqa: BLE001 - each waiting episode is told, none is forgotten
            if len(items) > 1 and not isinstance(exc, RedisError | RollfleetError):
                for item in items:  # one of them cannot be sent: the others are
                    await self._send([item])
                return
            for item in items:
                if not item.done.done():
                    item.done.set_exception(exc)
            return
        for item, state in zip(items, states, strict=True):
            if item.done.done():
                continue
            if state is Delivered.NO_PAYLOAD:
                # Evicted or expired between SET and the script: the prompt is still ours.
                self._queue.append(item)
                self._some.set()
            else:
                item.done.set_result(state)

    async def _fail(self, claim: Claim, failure: AttemptFailure) -> None:
        delay_ms = retry_delay_ms(claim, failure, self.settings)
        then = "dead" if delay_ms is None else "retry"
        self.metrics.failed.labels(failure.kind.value, then).inc()
        log.warning(
            "episode failed",
            group=claim.prompt.group,
            index=claim.index,
            attempt=claim.attempt,
            kind=failure.kind.value,
            then=then if delay_ms is None else f"retry in {delay_ms} ms",
            detail=failure.detail,
        )
        await retry(
            lambda: self.leases.fail(claim, failure, delay_ms),
            what=f"record the failure of group {claim.prompt.group} #{claim.index}",
            deadline_s=None,
            on_wait=self._on_wait,
        )

    def _account(self, outcome: Delivery, state: Delivered) -> None:
        header = outcome.header
        self.metrics.delivered.labels(state.name.lower()).inc()
        if state is Delivered.YES:
            self.metrics.tokens.inc(header.tokens)
            self.metrics.payload_bytes.inc(header.payload_bytes)
        else:
            log.info(
                "delivery refused", group=header.group, index=header.index, state=state.name.lower()
            )


def retry_delay_ms(claim: Claim, failure: AttemptFailure, settings: WorkerSettings) -> int | None:
    """How long the prompt waits for its next attempt; None when its budget for this kind is spent.

    Full jitter: drawn uniformly between 0 and a bound that doubles with every failure of the kind.
    """
    budget = {
        "infra": settings.attempts_infra,
        "data": settings.attempts_data,
        "timeout": settings.attempts_timeout,
    }.get(failure.kind.value, 1)
    before = sum(_kind(line) == failure.kind.value for line in claim.history.splitlines())
    if before + 1 >= budget:
        return None
    bound_s = min(settings.retry_base_s * 2**before, settings.retry_max_s)
    return int(random.uniform(0, bound_s) * 1000)


def _kind(line: bytes) -> str:
    """The kind of one recorded failure; one that cannot be read counts for no budget."""
    try:
        return str(parse_json(line)["kind"])
    except (ValueError, KeyError, TypeError):
        return ""
