"""What the trainer's row about an inference server means for a worker: may it serve, and which version?

- No rows at all: nobody refits servers in this run. Then every server may serve, and which version is
  for the server to tell.
- Otherwise a server serves only by a row that says so. No row, a refit that outlived its time, a row
  of an earlier epoch that is ahead of the board, a row that the server itself has belied: out.
- A router serves while every server behind it does, and as old weights as the oldest of them.
- Pure: rows, the board and a clock in; a verdict out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from rollfleet_common.messages import NO_VERSION, PolicyVersion
from rollfleet_common.servers import ServerWeights, WeightState
from rollfleet_worker.pool.server_states import Event

__all__ = ["UNGATED", "Eligibility", "eligibility_of", "router_stand"]


@dataclass(frozen=True, slots=True)
class Eligibility:
    """A verdict on one server's weights."""

    #: CURRENT, REFIT or OUTDATED.
    event: Event
    #: Version that the server was last refitted to; NO_VERSION if nobody knows.
    serves: int = NO_VERSION
    #: Why it may not serve; "" if it may.
    why: str = ""
    #: The row that says so; None without one.
    row: ServerWeights | None = None
    #: A refit began and had not ended when its time was over: the server may have been left paused.
    expired: bool = False

    @property
    def model(self) -> str:
        """Name of the LoRA adapter that the trainer gave the server; "" if it gave none."""
        return "" if self.row is None else self.row.model

    @property
    def unrefitted(self) -> bool:
        """Whether servers are refitted in this run, and this one never was."""
        return self.event is Event.OUTDATED and self.row is None


_IF_ROUTER = "if it is a router: rollfleet server add URL --behind URL,URL"

UNGATED = Eligibility(Event.CURRENT)


def eligibility_of(
    row: ServerWeights | None,
    *,
    gated: bool,
    policy: PolicyVersion,
    now_ms: float,
    read_ms: float | None = None,
    belied: ServerWeights | None = None,
    belied_by: str = "",
) -> Eligibility:
    """The verdict on a server.

    Args:
        row: What the trainer wrote of it; None if nothing.
        gated: Whether the trainer wrote of any server.
        policy: The board.
        now_ms: The time, in Unix milliseconds by Redis's clock.
        read_ms: When the row was asked for; None: now. A row that is older than its own time says
            nothing of how that refit ended.
        belied: A row that proved wrong: only another one counts.
        belied_by: How it proved wrong.
    """
    if not gated:
        return UNGATED
    if row is None:
        return Eligibility(Event.OUTDATED, why=f"the trainer has not refitted it ({_IF_ROUTER})")
    if row.state is WeightState.REFITTING:
        if now_ms <= row.until_ms:
            return Eligibility(Event.REFIT, row.version, "being refitted", row)
        why = "its refit did not end in time"
        expired = (now_ms if read_ms is None else read_ms) > row.until_ms
        return Eligibility(Event.OUTDATED, row.version, why, row, expired=expired)
    if row.state is WeightState.STALE:
        return Eligibility(Event.OUTDATED, row.version, row.why or "the trainer says so", row)
    if row == belied:
        return Eligibility(Event.OUTDATED, row.version, belied_by, row)
    if row.epoch < policy.epoch and row.version > policy.version:
        why = f"it holds version {row.version} of an earlier epoch; the run is at {policy.version}"
        return Eligibility(Event.OUTDATED, row.version, why, row)
    return Eligibility(Event.CURRENT, row.version, row=row)


def router_stand(stands: Mapping[str, Eligibility]) -> Eligibility:
    """The verdict on a router.

    Args:
        stands: Of the servers behind it, by URL; at least one.
    """
    for event in (Event.OUTDATED, Event.REFIT):
        for url, stand in stands.items():
            if stand.event is event:
                # Its pause is not to be ended through the router: that may reach any of them.
                return replace(stand, why=f"{url} behind it: {stand.why}", expired=False)
    return min(stands.values(), key=lambda stand: stand.serves)
