"""Every policy that has a name, with a real worker: it trains, keeps its promise, and balances."""

from typing import Any

import pytest
from fixtures.fleet_processes import Processes

import rollfleet

SHAPE: dict[str, Any] = {"samples_per_version": 16, "group_size": 4, "starve_s": 30.0}
STEPS = 8


@pytest.mark.leaves_keys("the feed is longer than the test")
@pytest.mark.parametrize("order", ["oldest", "freshest"])
@pytest.mark.parametrize(
    "policy", ["drop", "mask", "wait", "standard", "segment", "segment-recomputed"]
)
def test_a_named_policy_trains_and_balances(
    policy: str, order: str, redis_url: str, processes: Processes
) -> None:
    if (policy, order) == ("wait", "freshest"):
        with pytest.raises(rollfleet.SettingsError, match="oldest"):
            rollfleet.connect(redis_url, run="none", policy=policy, order=order, **SHAPE)
        return
    worker = processes.worker(redis_url, policy, "Slow")
    with rollfleet.connect(redis_url, run=policy, policy=policy, order=order, **SHAPE) as fleet:
        fleet.feed({"token_ids": [1, 2, 3], "seconds": 0.002 * (i % 5)} for i in range(400))
        seen: set[tuple[str, int]] = set()
        for batch in fleet.batches(STEPS):
            members = [(r.header.group, r.header.index) for r in batch.rollouts]
            assert len(batch) == 16
            assert not seen & set(members)
            seen |= set(members)
            if policy in ("drop", "mask"):
                t = batch.tensors
                stale = (batch.version - t.versions) * t.loss_mask
                assert int(stale.max()) <= 2, "nothing over the bound is trained on"
            assert batch.stats["rollfleet/bias/kept/samples"] >= 16
            fleet.publish()
        assert worker.stop() == 0
        books = fleet.books()
        assert (books.balance, books.committed) == (0, 16 * STEPS)
        if policy in ("standard", "segment-recomputed"):
            assert "masked" not in books.dropped
