"""Servers are made to serve a version: which, in what order, what is written, and what may fail."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from fixtures.fake_control import ControlledSglang, ControlledVllm
from fixtures.refits import Board, Make, fakes, make, rows, states
from fixtures.rig import Rig
from support import wait_until_async

from rollfleet_common.errors import RefitError, SupersededError
from rollfleet_common.servers import RegisteredServer, WeightState
from rollfleet_engines.control import Weights

__all__ = ["fakes", "make"]

SERVING, STALE = WeightState.SERVING, WeightState.STALE
NEW = Weights(3, "/weights/v3")

# ---- a version goes out ------------------------------------------------------------------------


async def test_servers_load_between_pause_and_resume_and_are_announced_once(
    make: Make, fakes: list[ControlledVllm]
):
    refits, board = make(fakes), Board(fakes)
    await refits.publish(NEW, board)
    for fake in fakes:
        assert fake.calls == [
            ("/pause", {"mode": "keep"}),
            (
                "/collective_rpc",
                {"method": "reload_weights", "kwargs": {"weights_path": "/weights/v3"}},
            ),
            ("/update_weight_version", {"new_version": "3"}),
            ("/resume", {}),
        ]
        assert (fake.version, fake.paused) == ("3", False)
    assert await states(refits) == {fake.url: (SERVING, 3) for fake in fakes}
    assert board.said == 1


async def test_the_board_knows_a_version_before_any_server_generates_with_it(
    make: Make, fakes: list[ControlledVllm]
):
    board = Board(fakes[:1])
    await make(fakes[:1]).publish(NEW, board)
    assert board.paused == [True]


async def test_without_servers_a_version_is_only_announced(make: Make):
    refits, board = make([]), Board()
    await refits.publish(NEW, board)
    assert (board.said, await rows(refits)) == (1, {})


async def test_those_behind_a_router_are_refitted_and_the_router_is_not(
    fakes: list[ControlledVllm], make: Make
) -> None:
    router, one, two = fakes
    refits = make([router])
    await refits.servers.add(RegisteredServer(router.url, behind=(one.url, two.url)))
    await refits.publish(NEW, Board())
    assert await states(refits) == {one.url: (SERVING, 3), two.url: (SERVING, 3)}
    assert not router.calls
    # Also while the router drains: that is between it and the workers.
    await refits.servers.drain(router.url)
    assert (await refits.servers.read())[0][router.url].behind == (one.url, two.url)
    assert set((await refits.look())[0]) == {one.url, two.url}


async def test_registered_servers_are_refitted_and_those_that_drain_are_not(
    make: Make, fakes: list[ControlledVllm]
):
    static, registered, draining = fakes
    refits = make([static])
    await refits.servers.add(RegisteredServer(registered.url))
    await refits.servers.add(RegisteredServer(draining.url))
    await refits.publish(NEW, Board())
    await refits.servers.drain(draining.url)
    await refits.publish(Weights(4, "/weights/v4"), Board())
    assert [fake.version for fake in fakes] == ["4", "4", "3"]
    # Should it come back, it is behind.
    assert (await states(refits))[draining.url] == (STALE, 3)


async def test_a_rolling_refit_leaves_the_others_at_work(make: Make, fakes: list[ControlledVllm]):
    refits = make(fakes, refit_at_once=1)
    gate = fakes[1].faults["/collective_rpc"] = asyncio.Event()
    publishing = asyncio.create_task(refits.publish(NEW, board := Board()))
    await wait_until_async(lambda: "/collective_rpc" in fakes[1].routes, "the second one's turn")
    assert [(fake.version, fake.paused) for fake in fakes] == [
        ("3", False),
        ("default", True),
        ("default", False),
    ]
    assert board.said == 1
    told = await states(refits)
    assert told[fakes[0].url] == (SERVING, 3)
    assert told[fakes[1].url] == (WeightState.REFITTING, -1)
    gate.set()
    await publishing
    assert [fake.version for fake in fakes] == ["3"] * 3


@pytest.mark.parametrize("mode", ["keep", "abort", "wait"])
async def test_vllm_is_paused_as_the_setting_says(
    make: Make, fakes: list[ControlledVllm], mode: str
):
    await make(fakes[:1], refit_mode=mode).publish(NEW, Board())
    assert fakes[0].calls[0] == ("/pause", {"mode": mode})


@pytest.mark.parametrize(
    ("mode", "pause"),
    [
        ("keep", [("/pause_generation", {"mode": "retract"})]),
        ("abort", [("/pause_generation", {"mode": "abort"})]),
        ("wait", []),
    ],
)
async def test_sglang_loads_and_tags_in_one_call(make: Make, mode: str, pause: list[Any]):
    async with ControlledSglang() as fake:
        refits = make([fake], refit_mode=mode)
        await refits.publish(NEW, Board())
        body = {"model_path": "/weights/v3", "weight_version": "3"}
        body |= {"abort_all_requests": False, "flush_cache": True}
        assert fake.calls == [
            *pause,
            ("/update_weights_from_disk", body),
            ("/continue_generation", {}),
        ]
        assert await states(refits) == {fake.url: (SERVING, 3)}


# ---- adapters and transfers --------------------------------------------------------------------


async def test_an_adapter_is_replaced_under_its_name(make: Make, fakes: list[ControlledVllm]):
    refits = make(fakes[:1], adapter="policy")
    for version in (1, 2):
        await refits.publish(Weights(version, f"/lora/v{version}", "policy"), Board())
    assert fakes[0].adapters == {"policy": "/lora/v2"}
    assert fakes[0].version == "2"
    assert "/collective_rpc" not in fakes[0].routes
    # Workers ask for it by that name.
    assert (await rows(refits))[fakes[0].url].model == "policy"


async def test_an_adapter_is_not_given_to_an_engine_that_workers_cannot_ask_for_it(make: Make):
    async with ControlledSglang() as fake:
        refits = make([fake], adapter="policy")
        with pytest.raises(RefitError, match="merge the adapter"):
            await refits.publish(Weights(1, "/lora/v1", "policy"), Board())
        assert not fake.paused


async def test_a_transfer_runs_once_while_all_of_its_servers_are_paused(
    make: Make, fakes: list[ControlledVllm]
):
    fakes[2].faults["/pause"] = 500
    seen: list[Any] = []

    async def load(version: int, urls: Sequence[str]) -> None:
        seen.append((version, sorted(urls), [fake.paused for fake in fakes]))

    refits = make(fakes)
    await refits.publish(Weights(3, ""), Board(), load)
    assert seen == [(3, sorted(fake.url for fake in fakes[:2]), [True, True, False])]
    assert [fake.version for fake in fakes] == ["3", "3", "default"]
    assert not any(fake.paused for fake in fakes)


async def test_a_transfer_that_raises_is_no_version(make: Make, fakes: list[ControlledVllm]):
    async def load(version: int, urls: Sequence[str]) -> None:
        raise ConnectionError("the ring broke")

    board = Board()
    with pytest.raises(RefitError, match="ConnectionError: the ring broke"):
        await make(fakes).publish(Weights(3, ""), board, load)
    assert board.said == 0
    assert not any(fake.paused for fake in fakes)


# ---- what fails --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("route", "fault", "why"),
    [
        ("/pause", 500, "/pause answered 500"),
        ("/collective_rpc", 500, "can it read that path, and do the shapes fit"),
        ("/update_weight_version", 404, "VLLM_SERVER_DEV_MODE=1"),
    ],
)
async def test_a_server_that_fails_is_stale_resumed_and_alone(
    make: Make, fakes: list[ControlledVllm], route: str, fault: int, why: str
):
    fakes[1].faults[route] = fault
    refits, board = make(fakes), Board()
    await refits.publish(NEW, board)
    told = await rows(refits)
    assert [told[fake.url].state for fake in fakes] == [SERVING, STALE, SERVING]
    assert why in told[fakes[1].url].why
    assert why in refits.trouble()
    assert (board.said, fakes[1].paused) == (1, False)


async def test_what_a_broken_server_was_generating_is_ended_before_it_goes_on(
    make: Make, fakes: list[ControlledVllm]
):
    fakes[0].faults["/collective_rpc"] = 500
    await make(fakes).publish(NEW, Board())
    assert fakes[0].routes == ["/pause", "/collective_rpc", "/abort_requests", "/resume"]
    assert "/abort_requests" not in fakes[1].routes


async def test_a_version_that_no_server_took_is_not_announced(
    make: Make, fakes: list[ControlledVllm]
):
    refits = make(fakes)
    await refits.publish(NEW, Board())
    fakes[0].faults["/pause"] = 500
    for fake in fakes[1:]:
        fake.faults["/collective_rpc"] = 500
    board = Board()
    with pytest.raises(RefitError, match="3 of 3 inference servers did not take it, it was not"):
        await refits.publish(Weights(4, "/typo"), board)
    assert board.said == 0
    # The first was never touched, and serves what it served; nobody knows what the others hold.
    assert [(await states(refits))[fake.url] for fake in fakes] == [
        (SERVING, 3),
        (STALE, 3),
        (STALE, 3),
    ]


async def test_weights_that_break_servers_are_not_rolled_over_all_of_them(
    make: Make, fakes: list[ControlledVllm]
):
    for fake in fakes:
        fake.faults["/collective_rpc"] = 500
    with pytest.raises(RefitError, match=r"2 of 2 .* 1 were left alone"):
        await make(fakes, refit_at_once=1).publish(NEW, Board())
    assert fakes[2].calls == []


async def test_too_few_for_the_quorum_are_an_error_after_the_announcement(
    make: Make, fakes: list[ControlledVllm]
):
    fakes[0].faults["/collective_rpc"] = 500
    board = Board()
    with pytest.raises(RefitError, match=r"1 of 3 .* it is announced"):
        await make(fakes, refit_quorum=0.7).publish(NEW, board)
    assert board.said == 1
    await make(fakes, refit_quorum=0.6).publish(NEW, Board())


async def test_a_server_that_is_down_is_named(make: Make, fakes: list[ControlledVllm]):
    await fakes[0].stop()
    refits = make(fakes)
    await refits.publish(NEW, Board())
    assert "cannot be reached" in (await rows(refits))[fakes[0].url].why


async def test_a_hung_reload_is_given_up_and_resumed(make: Make, fakes: list[ControlledVllm]):
    gate = fakes[0].faults["/collective_rpc"] = asyncio.Event()
    refits = make(fakes, refit_s=2.0)
    await refits.publish(NEW, Board())
    assert (await rows(refits))[fakes[0].url].why == "it was not done within 2 s (refit_s)"
    assert not fakes[0].paused
    gate.set()


async def test_a_server_that_will_not_resume_is_said_to_be_paused(
    make: Make, fakes: list[ControlledVllm]
):
    fakes[0].faults["/resume"] = 500
    refits = make(fakes)
    await refits.publish(NEW, Board())
    row = (await rows(refits))[fakes[0].url]
    assert row.state is STALE
    assert "may be paused" in row.why
    assert fakes[0].routes.count("/resume") == 3


async def test_a_server_that_reports_another_version_did_not_take_it(
    make: Make, fakes: list[ControlledVllm], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fakes[0], "_tag", lambda _: None)
    await fakes[0].restart()
    refits = make(fakes[:1])
    with pytest.raises(RefitError, match="reports version 'default' after it was given 3"):
        await refits.publish(NEW, Board())


async def test_a_publish_that_is_interrupted_leaves_no_server_paused(
    make: Make, fakes: list[ControlledVllm]
):
    gate = fakes[0].faults["/collective_rpc"] = asyncio.Event()
    refits = make(fakes[:1])
    publishing = asyncio.create_task(refits.publish(NEW, Board()))
    await wait_until_async(lambda: "/collective_rpc" in fakes[0].routes, "the reload")
    publishing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await publishing
    await refits.close()
    assert not fakes[0].paused
    gate.set()


async def test_a_superseded_trainer_touches_no_server(
    rig: Rig, make: Make, fakes: list[ControlledVllm]
):
    refits = make(fakes)
    await rig.open("trainer-2")
    with pytest.raises(SupersededError):
        await refits.publish(NEW, Board())
    assert [fake.calls for fake in fakes] == [[], [], []]


async def test_what_is_no_engine_of_ours_is_refused_with_advice(
    make: Make, fakes: list[ControlledVllm]
):
    refits = make([])
    await refits.servers.add(RegisteredServer(fakes[0].url, "openai"))
    with pytest.raises(RefitError, match="no route that loads weights"):
        await refits.publish(NEW, Board())
