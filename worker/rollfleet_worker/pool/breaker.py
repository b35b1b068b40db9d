"""How servers go out and come back: the one place that moves them through their states.

- A failing server is out for a backoff with full jitter that doubles until a call succeeds there:
  a server whose health route is fine while its generations fail does not flap.
- Whoever has not answered for `dead_s` is asked seldom; it comes back all the same.
- One on TRIAL gets a share only, so that it is not met by the whole crowd that waited for it.
- A server whose refit outlived its time is told to go on: a pause never lasts for ever.
"""

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from rollfleet_common.errors import EpisodeError, OverloadedError
from rollfleet_common.logs import get_logger
from rollfleet_worker.pool.members import PooledServer
from rollfleet_worker.pool.server_states import PROBED, Event, ServerState, step

__all__ = ["Breaker", "BreakerSettings"]

log = get_logger("rollfleet.worker")

#: Pause between two tries to have a server go on.
UNPAUSE_S = 5.0
#: A dead server is asked so many times more seldom than a failing one.
DEAD_FACTOR = 2.0


@dataclass(frozen=True, slots=True)
class BreakerSettings:
    """How long things may take, in seconds."""

    #: Mean of twice the first pause of a failing server; doubles per failure.
    backoff_s: float = 0.5
    #: The longest pause.
    max_backoff_s: float = 30.0
    #: A ready() may take so long.
    probe_s: float = 5.0
    #: A recovered server is on trial so long if no call succeeds earlier.
    trial_s: float = 5.0
    #: After so long without an answer a server counts as dead.
    dead_s: float = 300.0


class Breaker:
    """Moves servers; `changed` is told of every move, `removed` of a server that was taken out."""

    def __init__(
        self,
        patience: BreakerSettings,
        changed: Callable[[], None],
        removed: Callable[[PooledServer], None],
        seed: int | None = None,
    ) -> None:
        self._patience = patience
        self._changed = changed
        self._removed = removed
        self._random = random.Random(seed)
        self.closed = False

    def move(self, member: PooledServer, *events: Event) -> bool:
        """Tell `member` what happened; returns whether that moved it.

        Several events are one move: nobody sees, or is sent to, what is passed on the way.
        """
        before = after = member.state
        for event in events:
            after = step(after, event)
        if after is before or self.closed:
            return False
        member.state = after
        if member.promotion is not None:
            member.promotion.cancel()
            member.promotion = None
        if after not in PROBED and member.revival is not None:
            # The probe itself may be what moves it, and ends then.
            if member.revival is not asyncio.current_task():
                member.revival.cancel()
            member.revival = None
        if after is ServerState.TRIAL and not member.hung:
            # One that hung answers probes, too: only a call that succeeds ends its trial.
            loop = asyncio.get_running_loop()
            member.promotion = loop.call_later(
                self._patience.trial_s, self.move, member, Event.PROVEN
            )
        if after is ServerState.STARTING:
            self.begin(member)
        if before not in (ServerState.SERVING, ServerState.TRIAL):
            member.moved_s = time.monotonic()
        # A refit comes with every version: no line for people.
        tell = log.debug if {before, after} & {ServerState.REFITTING} else log.info
        tell("server moved", server=member.name, state=after, was=before, why=member.why())
        if after is ServerState.REMOVED:
            self._removed(member)
        self._changed()
        return True

    def begin(self, member: PooledServer) -> None:
        """Ask `member` until it answers."""
        if member.revival is None and not self.closed:
            member.revival = asyncio.create_task(self._revive(member, 0.0))

    def succeed(self, member: PooledServer, life: int) -> None:
        """A call that began in `life` succeeded."""
        member.moved_s = time.monotonic()
        if life == member.life:
            member.failures = member.unusable = 0
            member.hung = False
            self.move(member, Event.PROVEN)

    def eject(self, member: PooledServer, life: int, error: Exception) -> None:
        """A call that began in `life` failed, or the server hangs."""
        member.last_error = str(error)
        if life != member.life or self.closed or not self.move(member, Event.FAILED):
            return
        member.life += 1
        member.failures += 1
        member.unusable = 0
        asked_s = error.retry_after_s if isinstance(error, OverloadedError) else 0.0
        member.revival = asyncio.create_task(self._revive(member, asked_s))

    def restand(self, member: PooledServer) -> None:
        """Apply what is known of the weights of `member`."""
        self.move(member, member.stand.event)
        if member.state is ServerState.STARTING and not member.stand.unrefitted:
            self.begin(member)
        stand = member.stand
        if stand.expired and stand.row != member.unpaused and member.unpauser is None:
            member.unpauser = asyncio.create_task(self._unpause(member))

    async def probe(self, member: PooledServer) -> str:
        """Why `member` is not ready; "" if it is."""
        try:
            async with asyncio.timeout(self._patience.probe_s):
                if await member.engine.ready():
                    return ""
                return getattr(member.engine, "not_ready", "") or "not ready"
        except Exception as exc:  # noqa: BLE001 a probe that fails in any way is a no
            return f"not ready ({type(exc).__name__}: {exc})"

    async def _revive(self, member: PooledServer, asked_s: float) -> None:
        """Ask `member` until it is ready, with pauses; let it in then."""
        began_s = time.monotonic()
        # A server that was just added has not failed: it is asked at once.
        pause_s = 0.0 if member.state is ServerState.STARTING else self._pause_s(member, asked_s)
        while True:
            if pause_s:
                await asyncio.sleep(pause_s)
            said = await self.probe(member)
            if not said:
                break
            member.last_error = member.last_error or said
            member.failures += 1
            if time.monotonic() - began_s > self._patience.dead_s:
                self.move(member, Event.GAVE_UP)
            pause_s = self._pause_s(member, 0.0)
        if member.state is ServerState.STARTING:
            member.last_error = ""
            member.failures = 0
            if member.stand.unrefitted:
                # Its first row begins this anew.
                member.revival = None
                return
        if member.monitor is not None:
            member.monitor.forget()
        member.limiter.forget()
        # It is well, but perhaps not to be used: those who wait must not get it in between.
        self.move(member, Event.ANSWERED, member.stand.event)

    def _pause_s(self, member: PooledServer, asked_s: float) -> float:
        """Full jitter below a ceiling that doubles; no less than the server asked for."""
        patience = self._patience
        if member.state is ServerState.DEAD:
            return DEAD_FACTOR * patience.max_backoff_s * self._random.uniform(0.5, 1.0)
        ceiling_s = min(
            patience.backoff_s * 2.0 ** min(member.failures, 30), patience.max_backoff_s
        )
        return max(self._random.uniform(0.0, ceiling_s), min(asked_s, patience.max_backoff_s))

    async def _unpause(self, member: PooledServer) -> None:
        """Have a server go on that a trainer left paused; once for every row that says so."""
        row = member.stand.row
        try:
            if member.monitor is None:
                return
            if await member.monitor.unpause():
                log.warning("resumed a server that was left paused", server=member.name)
            member.unpaused = row
        except EpisodeError as exc:
            member.last_error = f"it may have been left paused: {exc}"
            # Tried again after the next look at the registry that still says so.
            await asyncio.sleep(UNPAUSE_S)
        finally:
            member.unpauser = None
