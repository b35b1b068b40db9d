"""The whole path on a real vLLM: trainer, Redis, a worker daemon, and weights published under load."""

import numpy as np
import pytest
from fixtures.real_vllm import URL, Control, needs_model

import rollfleet
from rollfleet_common.messages import VersionSpans
from rollfleet_engines.interface import Generation

pytestmark = needs_model

VERSIONS = 4
#: Of the worker: what the tests ask for travels with the prompt.
SAMPLING = {"max_tokens": 60, "extra": {"ignore_eos": True}}


def generation_of(sample):
    """What a rollout says that a server made; the prompt is before it."""
    at = int(np.argmax(sample.loss_mask))
    versions = sample.versions.expand(len(sample.token_ids))[at:]
    runs = [(1, int(version)) for version in versions]
    return sample.token_ids[:at].tolist(), Generation(
        sample.token_ids[at:], sample.logprobs[at:], VersionSpans.of(runs), "length", "?"
    )


@pytest.mark.leaves_keys("the feed is longer than the run")
def test_what_a_trainer_gets_was_made_by_the_weights_it_published(
    control_afterwards, forward, redis_url, processes
):
    worker = processes.worker(
        redis_url, "vllm", "Served", server=[URL], slots=32, max_tokens=60, lease_s=10
    )
    rollouts = []
    behind = set()
    with rollfleet.connect(
        redis_url,
        run="vllm",
        version=0,
        servers=[URL],
        samples_per_version=32,
        group_size=4,
        max_staleness=2,
        starve_s=120.0,
    ) as fleet:
        worker.event("following", version=0)
        fleet.feed({"token_ids": [3 + i % 100, 4, 5], "sampling": SAMPLING} for i in range(10_000))
        for step, batch in enumerate(fleet.batches(steps=8)):
            rollouts += [sample for one in batch.rollouts for sample in one.samples]
            behind |= set(batch.staleness)
            if step < VERSIONS - 1:
                folder = Control.folder(step + 1)
                assert fleet.publish(weights=folder) == step + 1
        books = fleet.books()
    assert books.balance == 0
    assert books.dead == 0
    assert max(behind) <= 2
    seen = set()
    for sample in rollouts:
        prompt, made = generation_of(sample)
        assert len(made.token_ids) == 60
        seen |= set(made.versions.versions.tolist())
        forward.judge(prompt, made)
    assert len(rollouts) == 8 * 32
    assert seen == set(range(VERSIONS))
    assert worker.stop() == 0


@pytest.fixture
def control_afterwards():
    """Undoes what a trainer did to the shared server, without an event loop of the test's own."""
    yield
    Control.restore_now()
