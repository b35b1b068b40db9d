"""How many requests at once one server gets: additive increase, multiplicative decrease.

- The server's own signals decide: preemptions, a queue that stays, a KV cache that is full halve the
  limit. A limit that is really used and does no harm grows by a little every tick.
- One cut, then wait for what it brings: the next one comes only when what runs has fallen to the limit
  and the signals had time to follow. Long generations would else be answered by cut after cut, down to
  the floor, before the first had any effect.
- Nobody tells the others. All who share a server see the same signals, halve alike and grow alike,
  and so come to equal shares whatever they began with (Chiu and Jain, 1989).
- Pure arithmetic: no clock, no socket.
"""

from rollfleet_engines.signals import Load

__all__ = ["Limiter"]

#: KV cache in use, as a part of 1: from here on no growth, from there on a cut.
KV_HOLD = 0.90
KV_CUT = 0.95
#: Requests that wait at the server: a burst waits for a moment, and harms nobody.
QUEUE_MIN = 8
QUEUE_PART = 0.25
#: A limit counts as used from this part on.
USED = 0.9
#: From the floor to the cap in about so many ticks.
CLIMB_TICKS = 64
#: How long a server's numbers lag behind what it does.
REACT_S = 2.0


class Limiter:
    """The limit for one server.

    Args:
        cap: The most; also where it begins.
        lump: Requests that come as one, at most. No limit is below it, or what runs could never fall
            to the limit; and one that does not leave room for another lump counts as used.
        adaptive: False: it stays at the cap.
    """

    def __init__(self, cap: int, *, lump: int = 1, adaptive: bool = True) -> None:
        self.cap = cap
        self.floor = min(cap, max(1, cap // 32, lump))
        self._lump = lump
        self._adaptive = adaptive
        self._limit = float(cap)
        self._step = max(1.0, cap / CLIMB_TICKS)
        self._preemptions: float | None = None
        self._cut_s = float("-inf")
        self._settling = False

    @property
    def limit(self) -> int:
        """Requests at once, between floor and cap."""
        return int(self._limit)

    def forget(self) -> None:
        """The server came back, perhaps as another one: its counters begin anew."""
        self._preemptions = None

    def observe(self, load: Load, in_flight: int, now_s: float) -> int:
        """Take in what the server says while `in_flight` requests of ours are there.

        Returns:
            The limit from now on.
        """
        if not self._adaptive:
            return self.limit
        before, self._preemptions = self._preemptions, load.preemptions
        preempted = before is not None and load.preemptions > before
        queued = load.waiting > max(QUEUE_MIN, QUEUE_PART * load.running)
        if self._settling and in_flight <= self._limit and now_s - self._cut_s >= REACT_S:
            self._settling = False
        if preempted or queued or load.kv_usage > KV_CUT:
            self._cut(now_s)
        elif load.kv_usage < KV_HOLD and self._used(in_flight) and not self._settling:
            self._limit = min(self._limit + self._step, float(self.cap))
        return self.limit

    def _used(self, in_flight: int) -> bool:
        return in_flight >= USED * self.limit or in_flight + self._lump > self.limit

    def _cut(self, now_s: float) -> None:
        if not self._settling:
            self._limit = max(self._limit / 2, float(self.floor))
            self._cut_s = now_s
            self._settling = True
