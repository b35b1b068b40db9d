"""What a pool knows of one server, and the little that follows from it."""

import asyncio
from dataclasses import dataclass, field
from hashlib import blake2b

from rollfleet_common.messages import NO_VERSION
from rollfleet_common.servers import ServerWeights
from rollfleet_engines.interface import NamedEngine
from rollfleet_engines.signals import Monitor
from rollfleet_worker.pool.eligibility import UNGATED, Eligibility
from rollfleet_worker.pool.limiter import Limiter
from rollfleet_worker.pool.server_states import IN, ServerState

__all__ = ["PooledServer", "ServerStatus"]

_SILENT = IN | {ServerState.DRAINING, ServerState.REMOVED}


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """What a pool knows of one server, for people."""

    name: str
    state: ServerState
    #: Completions in flight.
    in_flight: int
    #: The last failure, in one line; "" if there was none.
    last_error: str
    #: Version that it was last seen to serve, or else last refitted to; NO_VERSION if unknown.
    version: int = NO_VERSION
    #: Completions that it is sent at once at most, as its own signals allow.
    limit: int = 0
    #: Why it is out; "" if it is not.
    why: str = ""


@dataclass(slots=True, eq=False)
class PooledServer:
    """One server of a pool."""

    engine: NamedEngine
    limiter: Limiter
    monitor: Monitor | None = None
    #: Known from the settings: it stays, registered or not.
    static: bool = True
    #: Which client was asked for when it was registered.
    kind: str = "auto"
    #: A router: the servers behind it, whose rows count in place of its own.
    behind: tuple[str, ...] = ()
    state: ServerState = ServerState.STARTING
    stand: Eligibility = UNGATED
    #: The row that the server itself proved wrong, and how.
    belied: ServerWeights | None = None
    belied_by: str = ""
    #: The row of a refit that never ended, whose pause is over.
    unpaused: ServerWeights | None = None
    in_flight: int = 0
    last_error: str = ""
    #: It went out because it hung, and nothing has succeeded since.
    hung: bool = False
    #: Ejections since the last success: the exponent of the backoff.
    failures: int = 0
    #: Unusable answers in a row.
    unusable: int = 0
    #: Grows with every ejection, so that calls begun before it cannot eject a recovered server.
    life: int = 0
    #: When it last did something, on the monotonic clock.
    moved_s: float = 0.0
    progress: tuple[float, ...] = ()
    #: Deadlines of the calls in flight, by which all of them can be ended at once.
    calls: "set[asyncio.Timeout]" = field(default_factory=set)
    revival: "asyncio.Task[None] | None" = None
    watcher: "asyncio.Task[None] | None" = None
    unpauser: "asyncio.Task[None] | None" = None
    promotion: asyncio.TimerHandle | None = None
    recheck: asyncio.TimerHandle | None = None
    digest: bytes = b""

    def __post_init__(self) -> None:
        self.digest = blake2b(self.engine.name.encode(), digest_size=16).digest()

    @property
    def name(self) -> str:
        """The server's URL, without credentials."""
        return self.engine.name

    @property
    def limit(self) -> int:
        """Completions at once that it may have now."""
        if self.state not in IN:
            return 0
        limit = self.limiter.limit
        return max(limit // 8, 1) if self.state is ServerState.TRIAL else limit

    def has_room(self, units: int) -> bool:
        """Whether `units` more completions may go there now."""
        if self.state not in IN:
            return False
        # A call larger than the limit goes when nothing else is in flight.
        return not self.in_flight or self.in_flight + units <= self.limit

    def weight(self, affinity: str) -> bytes:
        """Rendezvous hashing: the server with the highest weight is the key's favourite.

        Thaler and Ravishankar, 1998. When a server goes, only its own keys move.
        """
        return blake2b(affinity.encode(), key=self.digest, digest_size=8).digest()

    def why(self) -> str:
        """Why it is out; "" if it is not."""
        if self.state in _SILENT:
            return ""
        if self.state in (ServerState.REFITTING, ServerState.STALE) or self.stand.unrefitted:
            return self.stand.why
        return self.last_error or "it has not answered yet"

    def status(self) -> ServerStatus:
        """As of now."""
        seen = self.engine.version
        return ServerStatus(
            name=self.name,
            state=self.state,
            in_flight=self.in_flight,
            last_error=self.last_error,
            version=self.stand.serves if seen == NO_VERSION else seen,
            limit=self.limit,
            why=self.why(),
        )

    def timers(self, *, watched: bool = False) -> "list[asyncio.Task[None]]":
        """Cancel what is due to happen to it; returns the tasks that still have to end.

        `watched`: what runs there is still looked after.
        """
        for handle in (self.promotion, self.recheck):
            if handle is not None:
                handle.cancel()
        due = (self.revival, self.unpauser, None if watched else self.watcher)
        tasks = [task for task in due if task is not None]
        for task in tasks:
            task.cancel()
        return tasks
