"""Servers that fell behind are found and refitted; those that stand still are resumed."""

import asyncio

import pytest
from fixtures.fake_control import ControlledVllm
from fixtures.refits import Board, Make, fakes, make, rows, states
from fixtures.rig import Rig
from support import wait_until_async

from rollfleet.weight_sync.coordinator import Refits
from rollfleet.weight_sync.repair import Repairer
from rollfleet_common.errors import SupersededError
from rollfleet_common.servers import RegisteredServer, ServerWeights, WeightState
from rollfleet_engines.control import Weights

__all__ = ["fakes", "make"]

SERVING, STALE = WeightState.SERVING, WeightState.STALE
NEW = Weights(3, "/weights/v3")


async def heal(refits: Refits, healer: Repairer | None = None) -> None:
    """One round, to its end."""
    assert refits.current is not None
    await (healer or Repairer(refits)).look(refits.current)
    await asyncio.gather(*refits.healing.values())


async def test_a_server_that_failed_is_refitted_when_it_can_be(
    make: Make, fakes: list[ControlledVllm]
):
    fakes[0].faults["/collective_rpc"] = 500
    refits = make(fakes)
    await refits.publish(NEW, Board())
    assert (await states(refits))[fakes[0].url] == (STALE, -1)
    fakes[0].faults.clear()
    await heal(refits)
    assert await states(refits) == {fake.url: (SERVING, 3) for fake in fakes}
    assert (fakes[0].weights, fakes[0].paused) == ("/weights/v3", False)
    assert fakes[1].routes.count("/pause") == 1


async def test_a_server_that_lost_its_weights_in_a_restart_is_refitted(
    make: Make, fakes: list[ControlledVllm]
):
    refits = make(fakes)
    await refits.publish(NEW, Board())
    before = (await rows(refits))[fakes[0].url]
    await fakes[0].restart()
    await heal(refits)
    assert (fakes[0].version, fakes[0].weights) == ("3", "/weights/v3")
    # A row of its own, so that workers see that something happened.
    assert (await rows(refits))[fakes[0].url].at_ms >= before.at_ms
    assert fakes[0].routes[:2] == ["/pause", "/collective_rpc"]


async def test_a_server_that_is_registered_later_is_refitted_and_its_row_goes_with_it(
    make: Make, fakes: list[ControlledVllm]
):
    refits = make(fakes[:2])
    await refits.publish(NEW, Board())
    await refits.servers.add(RegisteredServer(fakes[2].url))
    await heal(refits)
    assert fakes[2].version == "3"
    assert (await states(refits))[fakes[2].url] == (SERVING, 3)
    await refits.servers.remove(fakes[2].url)
    await heal(refits)
    assert fakes[2].url not in await rows(refits)


async def test_servers_that_are_well_are_left_alone(make: Make, fakes: list[ControlledVllm]):
    refits = make(fakes)
    await refits.publish(NEW, Board())
    before = await rows(refits), [list(fake.calls) for fake in fakes]
    await heal(refits)
    assert (await rows(refits), [fake.calls for fake in fakes]) == before


async def test_a_server_that_stands_still_is_resumed(make: Make, fakes: list[ControlledVllm]):
    refits = make(fakes)
    await refits.publish(NEW, Board())
    fakes[1].paused = True
    await heal(refits)
    assert not fakes[1].paused
    assert fakes[1].routes.count("/pause") == 1


async def test_rows_that_redis_lost_are_written_again(
    rig: Rig, make: Make, fakes: list[ControlledVllm]
):
    refits = make(fakes)
    await refits.publish(NEW, Board())
    await rig.client.delete(rig.keys.weights)
    await heal(refits)
    assert await states(refits) == {fake.url: (SERVING, 3) for fake in fakes}
    assert [fake.routes.count("/pause") for fake in fakes] == [1, 1, 1]


async def test_what_an_earlier_trainer_left_half_way_is_finished(
    rig: Rig, make: Make, fakes: list[ControlledVllm]
):
    first = make(fakes[:2])
    await first.publish(NEW, Board())
    fakes[0].paused = True
    await first.tell([ServerWeights(fakes[0].url, WeightState.REFITTING, 3, until_ms=1)])
    second = make(fakes[:2])
    await second.open(NEW)
    await heal(second)
    assert not fakes[0].paused
    assert await states(second) == {fake.url: (SERVING, 3) for fake in fakes[:2]}


@pytest.mark.parametrize("path", ["", "/weights/v3"])
async def test_without_rows_or_a_path_an_earlier_trainer_left_nothing_to_heal(
    make: Make, fakes: list[ControlledVllm], path: str
):
    refits = make(fakes)
    if not path:
        await refits.publish(NEW, Board())
        refits.current = None
    await refits.open(Weights(3, path))
    assert refits.current is None


async def test_a_transferred_version_waits_for_the_next(make: Make, fakes: list[ControlledVllm]):
    async def load(version: int, urls: object) -> None:
        pass

    refits = make(fakes)
    await refits.publish(Weights(3, ""), Board(), load)
    await fakes[0].restart()
    await heal(refits)
    row = (await rows(refits))[fakes[0].url]
    assert row.state is STALE
    assert "it waits for the next version" in row.why
    assert fakes[0].routes == []


async def test_one_that_fails_again_is_tried_less_often(make: Make, fakes: list[ControlledVllm]):
    fakes[0].faults["/collective_rpc"] = 500
    refits = make(fakes, heal_s=30.0)
    await refits.publish(NEW, Board())
    healer = Repairer(refits)
    for _ in range(3):
        await heal(refits, healer)
    assert fakes[0].routes.count("/collective_rpc") == 2


async def test_a_publish_takes_a_server_from_the_healer(make: Make, fakes: list[ControlledVllm]):
    refits = make(fakes[:2])
    await refits.publish(NEW, Board())
    await fakes[0].restart()
    gate = fakes[0].faults["/collective_rpc"] = asyncio.Event()
    assert refits.current is not None
    await Repairer(refits).look(refits.current)
    await wait_until_async(lambda: "/collective_rpc" in fakes[0].routes, "the healer's reload")
    fakes[0].faults.clear()
    await refits.publish(Weights(4, "/weights/v4"), Board())
    gate.set()
    await asyncio.wait(refits.healing.values())
    assert await states(refits) == {fake.url: (SERVING, 4) for fake in fakes[:2]}
    assert [fake.version for fake in fakes[:2]] == ["4", "4"]


async def test_a_healer_learns_that_its_trainer_was_superseded(
    rig: Rig, make: Make, fakes: list[ControlledVllm]
):
    refits = make(fakes, heal_s=0.02)
    await refits.publish(NEW, Board())
    await rig.open("trainer-2")
    await fakes[0].restart()
    with pytest.raises(SupersededError):
        await asyncio.wait_for(Repairer(refits).run(), 5)
