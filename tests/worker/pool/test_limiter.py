"""The arithmetic of limits: bounds, reaction, no collapse, and sharing without talking."""

from hypothesis import given, settings
from hypothesis import strategies as st

from rollfleet_engines.signals import Load
from rollfleet_worker.pool.limiter import REACT_S, Limiter

#: A busy machine is no property of the arithmetic.
LEISURELY = settings(deadline=None)
FULL = Load(kv_usage=0.99, running=8)
FINE = Load(kv_usage=0.5, running=8)


def loads():
    return st.builds(
        Load,
        kv_usage=st.floats(0, 1),
        running=st.floats(0, 1000),
        waiting=st.floats(0, 1000),
        preemptions=st.floats(0, 1000),
    )


@LEISURELY
@given(
    st.integers(1, 5000),
    st.lists(st.tuples(loads(), st.integers(0, 6000), st.floats(0, 100)), max_size=60),
)
def test_the_limit_stays_between_floor_and_cap(cap, seen):
    limiter = Limiter(cap)
    now_s = 0.0
    for load, in_flight, passed_s in seen:
        now_s += passed_s
        assert 1 <= limiter.floor <= limiter.observe(load, in_flight, now_s) <= cap


@LEISURELY
@given(st.integers(32, 5000), st.integers(1, 200))
def test_one_cut_until_what_runs_has_fallen_to_it(cap, looks):
    limiter = Limiter(cap)
    # Long generations: what runs stays where it was however often we look.
    for tick in range(looks):
        assert limiter.observe(FULL, cap, float(tick)) == cap // 2
    limiter.observe(FULL, cap // 2, looks + REACT_S)
    assert limiter.observe(FULL, cap // 2, looks + 2 * REACT_S) <= cap // 4 + 1


@LEISURELY
@given(st.integers(1, 5000))
def test_a_server_in_trouble_for_ever_is_left_the_floor(cap):
    limiter = Limiter(cap)
    for tick in range(50):
        limiter.observe(FULL, limiter.limit, tick * 2 * REACT_S)
    assert limiter.limit == limiter.floor


@LEISURELY
@given(st.integers(1, 5000))
def test_what_is_used_and_does_no_harm_grows_back_to_the_cap(cap):
    limiter = Limiter(cap)
    for tick in range(50):
        limiter.observe(FULL, limiter.limit, tick * 2 * REACT_S)
    for tick in range(50, 200):
        before = limiter.limit
        assert limiter.observe(FINE, limiter.limit, tick * 2 * REACT_S) >= before
    assert limiter.limit == cap


@LEISURELY
@given(st.integers(1, 600), st.integers(1, 64))
def test_calls_that_come_in_lumps_leave_no_limit_stuck(cap, lump):
    limiter = Limiter(cap, lump=lump)

    def running():
        """As many whole calls as fit, and one in any case."""
        units = min(lump, cap)
        return max(units, limiter.limit // units * units)

    for tick in range(50):
        limiter.observe(FULL, running(), tick * 2 * REACT_S)
    assert limiter.limit == limiter.floor >= min(lump, cap)
    for tick in range(50, 200):
        limiter.observe(FINE, running(), tick * 2 * REACT_S)
    assert limiter.limit == cap


def test_a_limit_that_is_not_used_does_not_grow():
    limiter = Limiter(256)
    limiter.observe(FULL, 256, 0.0)
    for tick in range(1, 100):
        limiter.observe(FINE, 40, tick * REACT_S)
    assert limiter.limit == 128


def test_each_sign_of_trouble_cuts_and_a_moment_of_queue_does_not():
    for load, cut in (
        (Load(kv_usage=0.96), True),
        (Load(kv_usage=0.93), False),
        (Load(running=100, waiting=26), True),
        (Load(running=100, waiting=20), False),
        (Load(preemptions=8), True),
        (Load(preemptions=7), False),
    ):
        limiter = Limiter(64)
        limiter.observe(Load(preemptions=7), 64, 0.0)
        assert (limiter.observe(load, 64, 1.0) == 32) is cut, load


def test_counters_of_another_life_cut_nothing():
    limiter = Limiter(64)
    limiter.observe(Load(preemptions=1), 64, 0.0)
    limiter.forget()
    assert limiter.observe(Load(preemptions=9), 64, 1.0) == 64


def test_turned_off_it_stays_at_the_cap():
    limiter = Limiter(64, adaptive=False)
    assert limiter.observe(FULL, 64, 0.0) == 64


class Simulated:
    """A server that runs so many at once, and queues the rest."""

    def __init__(self, capacity, *limiters):
        self.capacity = capacity
        self.limiters = limiters
        self.in_flight = [0.0 for _ in limiters]

    def tick(self, now_s):
        for i, limiter in enumerate(self.limiters):
            # An eighth ends every second, and there is always more to do.
            self.in_flight[i] = max(0.875 * self.in_flight[i], min(limiter.limit, 1e9))
        total = sum(self.in_flight)
        load = Load(running=min(total, self.capacity), waiting=max(total - self.capacity, 0.0))
        for limiter, mine in zip(self.limiters, self.in_flight, strict=True):
            limiter.observe(load, int(mine), now_s)


@LEISURELY
@given(st.integers(64, 400), st.integers(8, 256), st.integers(8, 256))
def test_two_that_do_not_talk_come_to_equal_shares(capacity, one, other):
    first, second = Limiter(256), Limiter(256)
    first._limit, second._limit = float(one), float(other)
    server = Simulated(capacity, first, second)
    shares, totals = [], []
    for tick in range(1200):
        server.tick(float(tick))
        if tick >= 600:
            shares.append((first.limit, second.limit))
            totals.append(sum(server.in_flight))
    mean = [sum(share[i] for share in shares) / len(shares) for i in (0, 1)]
    assert max(mean) <= 1.35 * min(mean), mean
    # The server is neither left idle nor drowned, and nobody is pushed to the floor.
    assert sum(totals) / len(totals) >= 0.6 * min(capacity, 512)
    assert min(min(share) for share in shares) > first.floor
    assert max(totals) <= 1.6 * capacity + 16
