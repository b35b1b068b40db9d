"""Fixtures that every test may ask for; they live in tests/fixtures."""

import signal
from collections.abc import Generator

import pytest
from fixtures.declared_keys import declared_keys
from fixtures.fleet_processes import processes
from fixtures.rig import rig
from fixtures.servers import make_server, redis_server, redis_url
from hypothesis import settings

__all__ = ["declared_keys", "make_server", "processes", "redis_server", "redis_url", "rig"]

# A busy machine is no finding: time is the business of benchmarks.
settings.register_profile("house", deadline=None)
settings.load_profile("house")


def pytest_configure(config: pytest.Config) -> None:
    # A shell starts what it puts into the background with SIGINT ignored, and children inherit it.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line(
        "markers",
        "leaves_keys(reason, *globs): keys without a TTL that this test may leave in Redis, and why",
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call":
        # Read by redis_url: a failed test need not fail once more for the keys it left.
        item.passed = report.passed  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    return report
