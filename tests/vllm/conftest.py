"""Tests here want a real vLLM, which nobody else uses; `make vllm` brings one."""

import pytest
from fixtures.real_vllm import URL, control, forward

__all__ = ["control", "forward"]

#: A server's start takes half a minute where nothing else runs, and minutes where much does.
TIMEOUT_S = 400


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "vllm" not in item.path.parts[-2:-1]:
            continue
        item.add_marker(pytest.mark.timeout(TIMEOUT_S))
        if not URL:
            reason = "ROLLFLEET_VLLM_URL is not set: no real vLLM to test against (make vllm)"
            item.add_marker(pytest.mark.skip(reason=reason))
