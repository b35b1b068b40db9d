"""A virtual clock: what is to happen, in order of time, and at equal times in order of asking."""

import heapq
from collections.abc import Callable
from typing import Any

__all__ = ["Clock"]


class Clock:
    """Calls back at points of simulated time."""

    def __init__(self) -> None:
        #: Simulated seconds since the start.
        self.now = 0.0
        self.stopped = False
        self._events: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._asked = 0

    def at(self, when_s: float, call: Callable[[Any], None], arg: Any = None) -> None:
        """Have ``call(arg)`` called at `when_s`."""
        self._asked += 1
        heapq.heappush(self._events, (when_s, self._asked, call, arg))

    def run(self) -> None:
        """Until :meth:`stop`, or until nothing is left that could happen."""
        events = self._events
        while events and not self.stopped:
            self.now, _, call, arg = heapq.heappop(events)
            call(arg)

    def stop(self) -> None:
        """Let nothing more happen."""
        self.stopped = True
