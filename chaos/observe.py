"""What is seen from outside while a run is under fire: deliveries, pending leases, health pages.

- Reads Redis and HTTP only; shares no code with the product, and writes nothing.
- An answer that does not come is no evidence: outages are noted by whoever made them.
"""

import contextlib
import http.client
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgpack
import redis
import redis.backoff
import redis.exceptions
import redis.retry

__all__ = ["Delivery", "Drain", "Evidence", "Kill", "Look", "Observer", "Outage", "connect"]

TICK_S = 0.05
HEALTH_S = 0.25
HEALTH_TIMEOUT_S = 1.0


@dataclass(slots=True)
class Delivery:
    """One header on the rollouts stream, as it was seen to arrive. Times are Unix seconds."""

    t: float
    group: str
    index: int
    worker: str


@dataclass(slots=True)
class Kill:
    """The death of a worker, and when the last lease it left was somebody else's."""

    t: float
    worker: str
    leases: int
    #: Seconds until none of its leases was pending under its name; None: never seen.
    recovered_s: float | None = None


@dataclass(slots=True)
class Drain:
    """A SIGTERM, and what became of it."""

    t: float
    worker: str
    deadline_s: float
    took_s: float | None = None
    code: int | None = None


@dataclass(slots=True)
class Look:
    """One look at a worker's health pages."""

    t: float
    worker: str
    live: bool
    ready: bool
    reason: str


@dataclass(slots=True)
class Outage:
    """When Redis did not answer, and why: ``down`` refuses, ``frozen`` keeps silent."""

    kind: str
    began: float
    ended: float = float("inf")


@dataclass(slots=True)
class Evidence:
    """All that was seen of one run."""

    deliveries: list[Delivery] = field(default_factory=list)
    kills: list[Kill] = field(default_factory=list)
    drains: list[Drain] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)
    outages: list[Outage] = field(default_factory=list)
    #: (worker, began, ended) of every SIGSTOP: a frozen worker cannot answer.
    frozen: list[tuple[str, float, float]] = field(default_factory=list)
    #: When connections were cut or replies lost: a worker may call Redis away for a while after it.
    disturbed: list[float] = field(default_factory=list)
    most_outstanding: int = 0
    #: Spans in which acknowledged writes may have been lost with Redis, by its fsync contract.
    excused: list[tuple[float, float]] = field(default_factory=list)
    #: Exits that nobody asked for: (worker, code).
    exits: list[tuple[str, int]] = field(default_factory=list)


def connect(url: str) -> redis.Redis:
    """A plain client: no retries, short timeouts."""
    retry = redis.retry.Retry(redis.backoff.NoBackoff(), 0)
    return redis.Redis.from_url(url, socket_timeout=2.0, socket_connect_timeout=1.0, retry=retry)


class Observer:
    """Watches one run until `stop`, from threads of its own."""

    def __init__(self, url: str, run: str) -> None:
        self.seen = Evidence()
        self.url = url
        self._prefix = f"rf:{{{run}/0}}:"
        self._client = connect(url)
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._open: list[tuple[Kill, list[str]]] = []
        self._threads = [threading.Thread(target=self._run, name="observer", daemon=True)]
        self._threads[0].start()

    def stop(self) -> Evidence:
        """Stop watching; returns what was seen."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(5)
        self._client.close()
        return self.seen

    def moved(self) -> None:
        """Redis is at `url` now."""
        self._client = connect(self.url)

    def leases(self, prefix: str) -> dict[str, list[str]]:
        """Entries pending by consumer, of consumers whose names begin with `prefix`."""
        stream = f"{self._prefix}prompts:default"
        with connect(self.url) as client:
            rows: Any = client.xpending_range(stream, "workers", "-", "+", 100_000)
        found: dict[str, list[str]] = {}
        for row in rows:
            if (name := row["consumer"].decode()).startswith(prefix):
                found.setdefault(name, []).append(row["message_id"].decode())
        return found

    def died(self, prefix: str, t: float) -> Kill | None:
        """Follow the leases of a worker that was just killed; None while Redis is away."""
        try:
            held = self.leases(prefix)
        except (redis.exceptions.RedisError, OSError):
            return None
        kill = Kill(t, prefix, sum(map(len, held.values())))
        if not kill.leases:
            kill.recovered_s = 0.0
        with self._lock:
            self.seen.kills.append(kill)
            if held:
                self._open.append((kill, list(held)))
        return kill

    def watch_health(self, worker: str, port: int, alive: Callable[[], bool]) -> None:
        """Look at a worker's pages for as long as it lives."""
        thread = threading.Thread(target=self._health, args=(worker, port, alive), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _run(self) -> None:
        last = "0-0"
        while not self._stopping.wait(TICK_S):
            with contextlib.suppress(redis.exceptions.RedisError, OSError):
                last = self._tail(last)
                self._look_at_leases()
                ledger = self._client.hmget(
                    f"{self._prefix}ledger", ["submitted:train", "settled:train"]
                )
                submitted, settled = (int(value or 0) for value in ledger)  # type: ignore[union-attr]  # pyright: ignore[reportGeneralTypeIssues]
                self.seen.most_outstanding = max(self.seen.most_outstanding, submitted - settled)

    def _tail(self, last: str) -> str:
        stream = f"{self._prefix}rollouts"
        rows: Any = self._client.xrange(stream, f"({last}", "+", count=5000)
        for entry, fields in rows:
            last = entry.decode()
            with contextlib.suppress(Exception):
                header = msgpack.unpackb(fields[b"h"])
                t = int(last.partition("-")[0]) / 1000
                self.seen.deliveries.append(Delivery(t, header[1], header[2], header[19]))
        return last

    def _look_at_leases(self) -> None:
        with self._lock:
            still = list(self._open)
        for kill, consumers in still:
            stream = f"{self._prefix}prompts:default"
            rows: Any = self._client.xpending(stream, "workers")
            held = {row["name"].decode() for row in rows["consumers"]}
            if not held.intersection(consumers):
                kill.recovered_s = time.time() - kill.t
                with self._lock:
                    self._open.remove((kill, consumers))

    def _health(self, worker: str, port: int, alive: Callable[[], bool]) -> None:
        while alive() and not self._stopping.wait(HEALTH_S):
            t = time.time()
            try:
                live, _ = _get(port, "/livez")
                ready, said = _get(port, "/readyz")
            except (OSError, http.client.HTTPException):
                live, ready, said = False, False, "no answer"
            if alive():
                self.seen.looks.append(Look(t, worker, live, ready, said))


def _get(port: int, path: str) -> tuple[bool, str]:
    page = http.client.HTTPConnection("127.0.0.1", port, timeout=HEALTH_TIMEOUT_S)
    try:
        page.request("GET", path)
        reply = page.getresponse()
        return reply.status == 200, reply.read(200).decode().strip()
    finally:
        page.close()
