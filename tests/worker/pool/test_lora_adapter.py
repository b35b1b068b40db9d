"""A LoRA adapter that the trainer gave a server is asked for by its name."""

from dataclasses import replace

import numpy as np
from fixtures.fake_vllm import FakeVllm

from rollfleet_common.messages import PolicyVersion
from rollfleet_common.servers import ServerWeights, WeightState
from rollfleet_engines.interface import Request, Sampling
from rollfleet_engines.vllm import VllmEngine
from rollfleet_worker.pool.eligibility import eligibility_of
from rollfleet_worker.pool.pool import EnginePool

REQUEST = Request(np.array([1, 2], np.int32), Sampling(max_tokens=2), "a", 1)
POLICY = PolicyVersion(version=1, epoch=1)


async def test_the_name_in_a_row_reaches_the_server():
    async with FakeVllm(model="policy", version="1") as fake:
        row = ServerWeights(fake.url, WeightState.SERVING, 1, 1, model="policy")
        assert eligibility_of(row, gated=True, policy=POLICY, now_ms=0).model == "policy"
        engine = VllmEngine(fake.url)
        pool = EnginePool([engine])
        try:
            pool.apply({}, {fake.url: row}, POLICY)
            await pool.generate(REQUEST)
        finally:
            await pool.close()
        assert fake.seen[-1].body["model"] == "policy"


async def test_without_one_the_configured_model_is_asked_for():
    async with FakeVllm(version="1") as fake:
        engine = VllmEngine(fake.url, model="tiny")
        try:
            await engine.generate(replace(REQUEST, model=""))
        finally:
            await engine.close()
        assert fake.seen[-1].body["model"] == "tiny"
