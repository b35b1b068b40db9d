"""Every instrument of the worker, in one place: name, meaning and unit.

- Labels are few and bounded: never a worker, group or prompt id.
- A registry of its own, so that two workers in one process (tests) do not collide.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

__all__ = ["Metrics"]

_SECONDS = (0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800)


class Metrics:
    """Counters and gauges of one worker."""

    def __init__(self) -> None:
        r = self.registry = CollectorRegistry()
        self.claimed = Counter("rollfleet_claimed", "Samples leased.", ["route"], registry=r)
        self.reclaimed = Counter(
            "rollfleet_reclaimed",
            "Leases taken over from workers that stopped renewing.",
            registry=r,
        )
        self.delivered = Counter(
            "rollfleet_deliveries", "Deliveries by outcome.", ["outcome"], registry=r
        )
        self.failed = Counter(
            "rollfleet_failures",
            "Failed attempts by kind and by what follows.",
            ["kind", "then"],
            registry=r,
        )
        self.lost = Counter(
            "rollfleet_leases_lost", "Leases that were no longer ours at renewal.", registry=r
        )
        self.cancelled = Counter(
            "rollfleet_cancelled", "Episodes stopped because they had become too stale.", registry=r
        )
        self.tokens = Counter("rollfleet_tokens", "Tokens in delivered rollouts.", registry=r)
        self.payload_bytes = Counter(
            "rollfleet_payload_bytes", "Bytes of delivered payloads.", registry=r
        )
        self.disruptions = Counter(
            "rollfleet_redis_disruptions", "Times that Redis could not be reached.", registry=r
        )
        self.garbage = Counter("rollfleet_garbage", "Stream entries nobody can read.", registry=r)
        self.disagreed = Counter(
            "rollfleet_version_disagreements",
            "Times that a server held other weights than it was refitted to.",
            registry=r,
        )
        self.resumed_tokens = Counter(
            "rollfleet_resumed_tokens",
            "Tokens that generations went on from instead of making them again, after a cut or parked.",
            ["after"],
            registry=r,
        )
        self.parked = Counter(
            "rollfleet_parked",
            "Generations parked in Redis and found there, by what became of them.",
            ["outcome"],
            registry=r,
        )
        self.slots = Gauge("rollfleet_slots", "Episodes that may run at once.", registry=r)
        self.busy = Gauge("rollfleet_slots_busy", "Episodes that run.", registry=r)
        self.outbox_bytes = Gauge(
            "rollfleet_outbox_bytes", "Bytes of finished rollouts that wait for Redis.", registry=r
        )
        self.version = Gauge("rollfleet_policy_version", "The board's version.", registry=r)
        self.ready = Gauge("rollfleet_ready", "1 while the worker can claim.", registry=r)
        self.queue_s = Histogram(
            "rollfleet_queue_seconds",
            "Time a sample waited to be claimed.",
            buckets=_SECONDS,
            registry=r,
        )
        self.episode_s = Histogram(
            "rollfleet_episode_seconds", "Time of an episode.", buckets=_SECONDS, registry=r
        )
        self.reward_s = Histogram(
            "rollfleet_reward_seconds", "Time of its rewards.", buckets=_SECONDS, registry=r
        )
