"""Redis's clock, which all hosts of a run share; wall clocks of two hosts are never compared.

- Deadlines that leave a process are Unix milliseconds by Redis's clock; everything else is a duration.
- The offset between Redis's clock and this process's monotonic one is measured with TIME: the reply was
  made between asking and hearing, so half a round trip bounds the error. Between two measurements the
  monotonic clock goes on, which no administrator and no NTP daemon sets.
"""

import time
from typing import Any

__all__ = ["Clock"]

#: How long a measurement is good for. Clocks drift apart by some 10 us a second.
MEASURE_S = 10.0
#: How fast two clocks may drift apart: what is allowed for the age of a measurement.
DRIFT = 200e-6


class Clock:
    """Redis's clock as this process knows it; before the first measurement, the wall clock."""

    def __init__(self) -> None:
        #: Unix milliseconds at Redis when the monotonic clock was 0, and by how much that may be off.
        self._zero_ms: float | None = None
        self._error_ms = 0.0
        self._heard_s = 0.0
        self._doubted = True

    def now_ms(self) -> float:
        """Unix time in milliseconds by Redis's clock."""
        if self._zero_ms is None:
            return time.time() * 1000
        return self._zero_ms + time.monotonic() * 1000

    def from_wall_ms(self, wall_ms: float) -> float:
        """A time by this host's wall clock, by Redis's."""
        return wall_ms + self.now_ms() - time.time() * 1000

    @property
    def error_ms(self) -> float:
        """By how much :meth:`now_ms` may be off."""
        return self._error_ms + (time.monotonic() - self._heard_s) * 1000 * DRIFT

    @property
    def due(self) -> bool:
        """Whether it is time to measure again."""
        return self._doubted or time.monotonic() - self._heard_s > MEASURE_S

    def doubt(self) -> None:
        """Redis was away: it may be another server with another clock. The next measurement counts."""
        self._doubted = True

    async def measure(self, client: Any) -> None:
        """Ask Redis for its time, once.

        Raises:
            redis.exceptions.RedisError, OSError: As redis-py said it.
        """
        asked_s = time.monotonic()
        seconds, micros = await client.time()
        self.heard(asked_s, time.monotonic(), int(seconds) * 1000 + int(micros) / 1000)

    def heard(self, asked_s: float, heard_s: float, redis_ms: float) -> None:
        """Take in one reply to TIME.

        Args:
            asked_s: When it was asked for, by the monotonic clock.
            heard_s: When the reply was there.
            redis_ms: What it said, in Unix milliseconds.
        """
        error_ms = (heard_s - asked_s) * 500
        zero_ms = redis_ms - (asked_s + heard_s) * 500
        old_ms, old_error_ms = self._zero_ms, self.error_ms
        better = error_ms <= old_error_ms
        # Further off than both may be: Redis's clock was set.
        if (
            self._doubted
            or old_ms is None
            or better
            or abs(zero_ms - old_ms) > error_ms + old_error_ms
        ):
            self._zero_ms, self._error_ms = zero_ms, error_ms
            self._heard_s = heard_s
            self._doubted = False
        else:
            # The old one is the better one: it stays, older than it was.
            self._error_ms, self._heard_s = old_error_ms, time.monotonic()
