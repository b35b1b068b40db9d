"""What a fleet looks like at one moment, as plain data."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rollfleet_common.board import Shape
from rollfleet_common.ledger import Books
from rollfleet_common.messages import PolicyVersion
from rollfleet_common.schemas import Schemas

__all__ = ["LOST_AFTER_S", "FleetServer", "Route", "Snapshot", "WorkerCard", "WorkerServer"]

#: A card is written every 10 s; three that never came mean that the worker is gone.
LOST_AFTER_S = 30.0


@dataclass(frozen=True, slots=True)
class WorkerServer:
    """An inference server as one worker sees it."""

    name: str
    state: str
    in_flight: int
    #: Policy version that it serves; None if it does not say.
    version: int | None
    #: What it did wrong last; "" if nothing.
    error: str = ""
    #: Requests at once that it is sent at most.
    limit: int = 0
    #: Why it is sent nothing; "" if it is.
    why: str = ""

    @property
    def up(self) -> bool:
        """Whether requests are sent to it."""
        return self.state == "serving"


@dataclass(frozen=True, slots=True)
class FleetServer:
    """An inference server as everyone together knows it."""

    name: str
    #: Whether, and as what, an operator registered it.
    registered: bool
    engine: str
    draining: bool
    #: What the trainer last did to its weights, and to which version; "" and None if nothing.
    weights: str
    version: int | None
    #: Why it is not used, by the trainer or else by a worker.
    why: str
    #: Live workers by the state that they see it in.
    states: Mapping[str, int]
    in_flight: int
    #: Requests at once that all of them together send it at most.
    limit: int
    #: Versions that workers have seen it serve.
    seen_versions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WorkerCard:
    """What one worker said of itself, and when."""

    id: str
    host: str
    pid: int
    #: Release of rollfleet.
    version: str
    routes: tuple[str, ...]
    slots: int
    busy: int
    servers: tuple[WorkerServer, ...]
    #: claiming, draining, paused, no-redis, no-run, no-server or outbox-full; "lost" if it has not
    #: been seen lately.
    state: str
    policy_version: int
    delivered: int
    failed: int
    seen_s: float
    up_s: float
    #: Leases in its name, as Redis counts them.
    pending: int
    #: Seconds that its clock is ahead of Redis'.
    ahead_s: float = 0.0
    #: What its release speaks.
    schemas: Schemas = field(default_factory=Schemas)

    @property
    def lost(self) -> bool:
        """Whether it has not been seen for three of its reports."""
        return self.state == "lost"


@dataclass(frozen=True, slots=True)
class Route:
    """The prompts of one route, over all partitions."""

    name: str
    waiting: int
    delayed: int
    in_flight: int
    #: Live workers that read it.
    served_by: int
    #: Seconds since the oldest unread, and the oldest leased, prompt went on the stream.
    oldest_waiting_s: float | None
    oldest_pending_s: float | None
    #: Seconds until the first delayed prompt is due.
    next_due_s: float | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A run at one moment."""

    run: str
    taken_ms: int
    #: None before any trainer opened the run.
    policy: PolicyVersion | None
    shape: Shape | None
    #: Who holds the run now ("" if nobody), who held it last, and seconds left of the lease.
    trainer: str
    last_trainer: str
    trainer_left_s: float
    books: Books
    workers: tuple[WorkerCard, ...]
    routes: tuple[Route, ...]
    #: Leases of consumers that have no card, by name.
    strangers: Mapping[str, int]
    #: Cards that could not be read.
    unreadable: tuple[str, ...] = ()
    servers: tuple[FleetServer, ...] = ()
    reasons: list[str] = field(default_factory=list)

    @property
    def limit(self) -> int | None:
        """Training samples that may be outstanding; None before the run has a shape."""
        if self.shape is None:
            return None
        return (self.shape.pipeline_depth + 1) * self.shape.samples_per_version

    @property
    def paused_s(self) -> float:
        """Seconds that workers will not claim yet."""
        until_ms = self.policy.paused_until_ms if self.policy else 0
        return max(0.0, (until_ms - self.taken_ms) / 1000)

    def to_json(self) -> dict[str, Any]:
        """Everything, in types that JSON knows."""
        tree = asdict(self)
        tree["books"]["balance"] = self.books.balance
        tree["limit"] = self.limit
        return tree
