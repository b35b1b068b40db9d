"""The inference side of a worker, built from its settings: clients, pool, and what is told of them."""

from collections.abc import Iterator
from typing import Any, cast

from prometheus_client.core import GaugeMetricFamily, Metric

from rollfleet_common.clock import Clock
from rollfleet_common.servers import server_name
from rollfleet_engines.detect import EngineKind, make_engine
from rollfleet_engines.interface import NamedEngine
from rollfleet_engines.signals import Monitor
from rollfleet_worker.metrics import Metrics
from rollfleet_worker.pool.breaker import BreakerSettings
from rollfleet_worker.pool.coalesce import CoalescingEngine
from rollfleet_worker.pool.pool import EnginePool
from rollfleet_worker.pool.resuming import Resumer
from rollfleet_worker.pool.server_states import IN
from rollfleet_worker.settings import WorkerSettings

__all__ = ["ServerGauges", "build_engine", "build_pool", "card_servers"]

#: Connections beside the requests in flight: a full server is still asked whether it is well.
SPARE = 8


def build_pool(s: WorkerSettings, metrics: Metrics, clock: Clock | None = None) -> EnginePool:
    """A pool of the servers in the settings, to which registered ones may come.

    Raises:
        SettingsError: A server cannot be used as it is set.
    """
    api_key = s.api_key.get_secret_value() if s.api_key else None
    urls = {server_name(url): url for url in s.servers}

    def make(url: str, engine: str) -> NamedEngine:
        return make_engine(
            url,
            engine=cast("EngineKind", engine),
            model=s.model,
            api_key=api_key,
            timeout_s=s.request_timeout_s,
            max_connections=s.server_cap + SPARE,
            logprobs=s.logprobs,
        )

    pool = EnginePool(
        [make(url, s.engine) for url in s.servers],
        s.server_cap,
        make=make,
        monitor=lambda name: Monitor(urls.get(name, name), api_key=api_key),
        adaptive=s.adaptive,
        lump=s.max_siblings,
        stall_s=s.stall_s,
        patience=BreakerSettings(dead_s=s.dead_s),
        disagreed=metrics.disagreed.inc,
        clock=clock,
    )
    metrics.registry.register(ServerGauges(pool))
    return pool


def build_engine(pool: EnginePool, s: WorkerSettings, metrics: Metrics) -> Resumer:
    """What episodes talk to: whole completions, above merged calls of siblings, above the pool."""
    # Siblings below: the first segments of a group are equal, and still travel as one request.
    engine = CoalescingEngine(pool, max_merge=s.max_siblings) if s.max_siblings > 1 else pool
    return Resumer(
        engine,
        segment_tokens=s.segment_tokens,
        version=lambda: pool.version,
        saved=metrics.resumed_tokens.labels("cut").inc,
    )


def card_servers(pool: EnginePool) -> list[dict[str, Any]]:
    """What a worker's card says of its servers."""
    return [
        {
            "name": one.name,
            "state": one.state.value,
            "in_flight": one.in_flight,
            "limit": one.limit,
            "version": one.version,
            "error": one.last_error,
            "why": one.why,
        }
        for one in pool.states()
    ]


class ServerGauges:
    """Gauges per server, for those that there are when they are asked for."""

    def __init__(self, pool: EnginePool) -> None:
        self._pool = pool

    def collect(self) -> Iterator[Metric]:
        """As prometheus_client wants it."""
        limit = GaugeMetricFamily(
            "rollfleet_server_limit",
            "Completions at once that a server is sent at most.",
            labels=["server"],
        )
        in_flight = GaugeMetricFamily(
            "rollfleet_server_in_flight", "Completions in flight at a server.", labels=["server"]
        )
        up = GaugeMetricFamily(
            "rollfleet_server_up", "1 while a server is sent requests.", labels=["server"]
        )
        for one in self._pool.states():
            limit.add_metric([one.name], one.limit)
            in_flight.add_metric([one.name], one.in_flight)
            up.add_metric([one.name], float(one.state in IN))
        yield from (limit, in_flight, up)
