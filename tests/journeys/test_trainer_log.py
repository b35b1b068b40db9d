"""What a trainer logs: through `logging`, and no more lines than somebody can read."""

import logging

import pytest
from fixtures.by_hand import by_hand
from fixtures.rig import delivery_of
from support import wait_until_async

from rollfleet.consume.drop_log import DropLog
from rollfleet.records import Group
from rollfleet_common.messages import Kind


async def test_dropped_groups_are_summed_up(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "rollfleet")
    async with by_hand(redis_url, "drops", max_staleness=3, version=5) as run:
        for _ in range(8):
            await run.fleet.submit({"token_ids": [1], "n": 4})
        claims = await run.claim()
        epoch = run.fleet.epoch + 1  # min_useful is not checked for another epoch's versions
        await run.streams.deliver("w", [delivery_of(c, version=1, epoch=epoch) for c in claims])

        def told() -> int:
            lines = [r for r in caplog.records if vars(r).get("event") == "groups dropped"]
            assert {vars(r)["fields"]["reason"] for r in lines} <= {"stale"}
            return sum(vars(r)["fields"]["groups"] for r in lines)

        await wait_until_async(lambda: told() == 8, "8 groups are told as dropped")
        assert not [r for r in caplog.records if vars(r).get("event") == "group dropped"]


def test_the_groups_of_one_second_are_one_line_for_each_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:

    drops = DropLog()
    with caplog.at_level(logging.INFO, "rollfleet"):
        for number in range(1000):
            drops.note(Group(f"g{number}", 4, Kind.TRAIN, "t", 0, number), "torn", 3)
        drops.note(Group("other", 4, Kind.TRAIN, "t", 0, 0), "stale", 3)
        drops.tell()
        drops.tell()
    assert caplog.messages == [
        "groups dropped reason=torn groups=1000 samples=0 example=g999",
        "groups dropped reason=stale groups=1 samples=0 example=other",
    ]
