"""`/livez`, `/readyz` and `/metrics`, from real state.

- Live: the event loop turns. It answers from the loop itself, so a loop that hangs does not answer.
  A Redis outage does not make a worker unlive: restarting it would only lose what it is doing.
- Ready: it can claim now; the body says why not.
"""

from collections.abc import Callable

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from rollfleet_common.errors import SettingsError
from rollfleet_worker.metrics import Metrics

__all__ = ["HealthServer"]


class HealthServer:
    """The three pages. `why_not()` gives the reason a worker cannot claim, or ""."""

    def __init__(self, metrics: Metrics, why_not: Callable[[], str]) -> None:
        self.metrics = metrics
        self.why_not = why_not
        self.port = 0
        self._runner: web.AppRunner | None = None

    async def start(self, host: str, port: int) -> None:
        """Listen.

        Raises:
            SettingsError: The address cannot be had.
        """
        app = web.Application()
        app.router.add_get("/livez", self._livez)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/metrics", self._metrics)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, host, port).start()
        except OSError as exc:
            await self._runner.cleanup()
            raise SettingsError(
                f"health_host:health_port {host}:{port} cannot be had: {exc}"
            ) from exc
        self.port = int(self._runner.addresses[0][1])

    async def stop(self) -> None:
        """Stop listening. Idempotent."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _livez(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readyz(self, _: web.Request) -> web.Response:
        reason = self.why_not()
        self.metrics.ready.set(0 if reason else 1)
        return web.Response(text=f"{reason or 'ok'}\n", status=503 if reason else 200)

    async def _metrics(self, _: web.Request) -> web.Response:
        self.metrics.ready.set(0 if self.why_not() else 1)
        return web.Response(
            body=generate_latest(self.metrics.registry),
            headers={"Content-Type": CONTENT_TYPE_LATEST},
        )
