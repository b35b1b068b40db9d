"""A workflow whose judge is the fleet's own servers, in words."""

from fixtures.fake_control import ControlledVllm
from fixtures.fake_vllm import CHAT
from fixtures.fleet_processes import Processes

import rollfleet


async def test_a_workflow_asks_the_fleets_servers_for_a_verdict(
    redis_url: str, processes: Processes
) -> None:
    async with ControlledVllm() as fake:
        processes.worker(redis_url, "judged", "Judged", server=fake.url, max_tokens=3)
        settings = rollfleet.TrainerSettings(
            redis_url=redis_url, run="judged", samples_per_version=4, group_size=2, starve_s=20.0
        )
        async with rollfleet.AsyncFleet(settings) as fleet:
            await fleet.submit({"token_ids": [1, 2]})
            batch = await fleet.next_batch(2)
            assert batch is not None
            (sample,) = batch.rollouts[0].samples
            assert sample.reward == len("good?")
            assert sample.metrics["judge_tokens"] == 3.0
            assert sample.finish_reason == "length"
            await fleet.commit(batch)
        asked = [seen.body for seen in fake.seen if seen.path == CHAT]
        assert [body["max_tokens"] for body in asked] == [8, 8]
