"""Every Python block of README and docs runs, on an embedded Redis with a real worker.

A block is a piece of a trainer; each has a test here that gives it what its page takes for granted.
The few that cannot run in the suite stand in `ELSEWHERE`, with the reason.
"""

import ast
import asyncio
import inspect
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CoroutineType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from fixtures.fake_vllm import FakeVllm
from fixtures.fleet_processes import Processes
from fixtures.rollouts import make_rollout
from support import wait_until
from torch.nn.functional import one_hot
from torch.utils.data import DataLoader, RandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader

import rollfleet
from rollfleet_common.codec import encode_header, encode_samples
from rollfleet_common.recording import Writer
from rollfleet_demo.model import TinyPolicy, save
from rollfleet_demo.task import decode, encode

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SHAPE: dict[str, Any] = {"samples_per_version": 8, "group_size": 4, "max_staleness": 4}

#: Page, a word that only this block of the page has: why it is not run here.
ELSEWHERE = {
    (
        "trainers.md",
        "AsyncGRPOTrainer",
    ): "needs TRL in an environment of its own; `make trl` runs it",
}
#: Page, a word that only this block of the page has. Filled by `@block`.
_tests: set[tuple[str, str]] = set()


class Block(NamedTuple):
    """A block of a page, and how to run it."""

    code: str

    def run(self, names: dict[str, Any], **instead: str) -> dict[str, Any]:
        """Run it with `names` known; returns all names afterwards.

        Args:
            names: What the page takes for granted.
            instead: By any key: "what stands in the page -> what fits on this machine".
        """
        code = self.code
        for change in instead.values():
            old, _, new = change.partition(" -> ")
            assert old in code, f"the page says {old!r} no more"
            code = code.replace(old, new)
        compiled = compile(code, "block", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        known = {"__name__": "block", **names}
        if compiled.co_flags & inspect.CO_COROUTINE:
            made = eval(compiled, known)  # noqa: S307 - it is ours
            assert isinstance(made, CoroutineType)
            asyncio.run(made)
        else:
            exec(compiled, known)  # noqa: S102 - it is ours
        return known


def blocks() -> Iterator[tuple[str, str]]:
    """Page and code of every Python block."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for code in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            yield page.name, code


def block(page: str, word: str) -> Callable[[Any], Any]:
    """Give a test the one block of `page` in which `word` stands."""
    _tests.add((page, word))

    def decorate(test: Any) -> Any:
        codes = [code for name, code in blocks() if name == page and word in code]
        assert len(codes) == 1, f"{len(codes)} blocks of {page} have {word!r}"
        return pytest.mark.parametrize("code", [Block(codes[0])], ids=[f"{page}: {word}"])(test)

    return decorate


def test_every_block_is_run_or_has_a_reason() -> None:
    for name, code in blocks():
        found = [word for page, word in {*_tests, *ELSEWHERE} if page == name and word in code]
        assert found, f"no test runs this block of {name}:\n{code}"


# ---- what the pages take for granted -------------------------------------------------------------


@contextmanager
def live(redis_url: str, processes: Processes, count: int = 4, **settings: Any) -> Iterator[Any]:
    """A fleet whose worker echoes, with `count` prompts submitted."""
    processes.worker(redis_url, "docs")
    with rollfleet.connect(redis_url, run="docs", **SHAPE, **settings) as fleet:
        for number in range(count):
            fleet.submit({"token_ids": [number, 2, 3]})
        yield fleet


def first(fleet: Any) -> Any:
    """Its next batch, which will be committed by the next call or never."""
    batch = fleet.next_batch()
    assert batch is not None
    return batch


class TinyModel(torch.nn.Module):
    """Logits of a vocabulary of 4,096, from one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, ids: Any, **_: Any) -> Any:
        return SimpleNamespace(logits=one_hot(ids, 4096).float() * self.weight)


def policy_loss(model: Any, tensors: Any, advantages: Any) -> Any:
    logits = model(tensors.input_ids).logits
    new = rollfleet.token_logprobs(logits[None], tensors.input_ids[None])[0]
    assert advantages.isfinite().all()
    return torch.exp(new - tensors.logprobs)


pytestmark = pytest.mark.leaves_keys("a page's trainer stops in mid-run", "rf:*")

# ---- README --------------------------------------------------------------------------------------


@pytest.mark.slow
@block("README.md", "GrpoTrainer")
def test_the_trainer_of_the_readme_trains(
    code: Block,
    redis_url: str,
    processes: Processes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    start = tmp_path / "v0.safetensors"
    save(TinyPolicy(seed=0), start, 0)
    server = processes.start(
        *("-m", "rollfleet_demo.server", "--version=0", f"--weights={start}"), name="server"
    )
    url = wait_until(
        lambda: re.findall(r'"url": "([^"]+)"', server.text), "the server to serve", 60.0
    )[0]
    processes.worker(redis_url, "sort", "rollfleet_demo.workflow:Sort", server=url, stop_token_id=1)
    code.run(
        {},
        redis=f"embedded:///tmp/sort -> {redis_url}",
        server=f"http://127.0.0.1:8000 -> {url}",
        steps="steps=300 -> steps=2",
        samples="samples_per_version=256 -> samples_per_version=32",
        warm="steps=20 -> steps=1",
    )
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["1", "2"]
    assert (tmp_path / "weights" / "v2.safetensors").exists()


@pytest.mark.parametrize(("rights", "temperatures"), [([1.0], [0.7]), ([0.0, 1.0], [0.7, 1.0])])
@block("README.md", "class TwoTries")
async def test_the_workflow_of_the_readme_tries_twice(
    code: Block, rights: list[float], temperatures: list[float]
) -> None:
    names = code.run({})
    rewards, asked = iter(rights), []

    class Stub:
        async def generate(self, token_ids: Any, **sampling: Any) -> Any:
            asked.append(sampling["temperature"])
            return SimpleNamespace(token_ids=encode("12|"))

        async def score(self, fn: Any, completion: Any, answer: str) -> Any:
            assert fn(completion, decode(completion)) == 1.0
            return SimpleNamespace(value=next(rewards))

        def sample(self, prompt: Any, generation: Any, reward: Any) -> Any:
            return reward.value

    prompt = SimpleNamespace(token_ids=encode("21"), data={"answer": "12|"})
    assert await names["TwoTries"]().run(prompt, Stub()) == rights[-1]
    assert asked == temperatures


# ---- batches -------------------------------------------------------------------------------------


@block("batches.md", 'form="packed"')
def test_the_three_forms_of_a_batch(code: Block, redis_url: str, processes: Processes) -> None:
    with live(redis_url, processes) as fleet:
        names = code.run({"batch": first(fleet), "rollfleet": rollfleet})
        assert names["p"].input_ids.dim() == 1
        assert names["t"].input_ids.dim() == 2
        assert names["m"].totals.trained_rows == 8


@block("batches.md", "p.input_ids[None]")
def test_log_probabilities_of_a_packed_batch(code: Block) -> None:
    rollouts = [make_rollout([0, 0], group="g", index=i, n=4) for i in range(4)]
    p = rollfleet.collate(rollouts, form="packed")
    token_logprobs = rollfleet.token_logprobs
    names = code.run({"p": p, "model": TinyModel(), "token_logprobs": token_logprobs})
    assert names["logprobs"].shape == p.input_ids.shape
    assert names["loss_mask"].sum() == p.loss_mask.sum()


@block("batches.md", "group_stats(micros)")
def test_the_loop_over_micro_batches(code: Block, redis_url: str, processes: Processes) -> None:
    model = TinyModel()
    names: dict[str, Any] = {
        "rollfleet": rollfleet,
        "Cost": rollfleet.Cost,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "policy_loss": policy_loss,
    }
    with live(redis_url, processes) as fleet:
        code.run({**names, "batch": first(fleet)})
    assert model.weight.grad is not None


@block("batches.md", "all_gather_object")
def test_micro_batches_of_several_ranks_are_as_many(code: Block, tmp_path: Path) -> None:
    rollouts = [make_rollout([0, 0], group="g", index=i, n=4) for i in range(4)]
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        micros = rollfleet.micro_batches(rollouts, budget_tokens=8)
        known = {"micros": micros, "dist": dist, "world": 1, "StepTotals": rollfleet.StepTotals}
        assert code.run(known)["micros"].totals == micros.totals
    finally:
        dist.destroy_process_group()


@block("batches.md", "prefetch=1")
def test_batches_ahead_on_a_device(code: Block, redis_url: str, processes: Processes) -> None:
    processes.worker(redis_url, "default")
    known = {"rollfleet": rollfleet, "url": redis_url}
    fleet = code.run(known, device='"cuda" -> "cpu"')["fleet"]
    with fleet:
        fleet.submit({"token_ids": [1, 2]})
        batch = fleet.next_batch(8)
        assert batch.tensors.input_ids.device.type == "cpu"


@block("batches.md", "connect_ranks")
def test_the_loop_of_a_rank(
    code: Block, redis_url: str, processes: Processes, tmp_path: Path
) -> None:
    processes.worker(redis_url, "math")
    trained: list[Any] = []
    known = {
        "rollfleet": rollfleet,
        "url": redis_url,
        "prompts": ({"token_ids": [n, 2]} for n in range(1000)),
        "train_on": trained.append,
        "save": lambda _: str(tmp_path),
        "model": None,
    }
    code.run(
        known,
        steps="steps=1000 -> steps=2",
        samples="samples_per_version=256 -> samples_per_version=8",
    )
    assert [len(batch.rollouts) for batch in trained] == [8, 8]


# ---- inference, policies, recording, runner, staleness, trainers ---------------------------------


@block("inference.md", "make_engine")
async def test_a_judge_is_asked(code: Block) -> None:
    async with FakeVllm() as fake:
        known = await asyncio.to_thread(code.run, {}, url=f"http://judge:8000 -> {fake.url}")
    assert known["said"].text
    assert known["said"].finish_reason in ("stop", "length")


@block("inference.md", "save_weights")
def test_weights_are_saved_and_published(
    code: Block, redis_url: str, processes: Processes, tmp_path: Path
) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    with live(redis_url, processes) as fleet:
        code.run(
            {"rollfleet": rollfleet, "fleet": fleet, "model": TinyModel()},
            shared=f"/shared/weights -> {tmp_path}/weights",
            base=f"/models/base -> {tmp_path}/base",
        )
        assert fleet.version == 1
    (folder,) = (tmp_path / "weights").glob("v*")
    assert {p.name for p in folder.iterdir()} >= {"config.json", "model.safetensors"}


@block("policies.md", "Windowed")
def test_a_policy_with_an_order(code: Block, redis_url: str) -> None:
    with code.run({"rollfleet": rollfleet, "url": redis_url})["fleet"] as fleet:
        assert fleet.books().submitted == 0


@block("policies.md", "proximal_logprobs")
def test_proximal_log_probabilities(code: Block, redis_url: str, processes: Processes) -> None:
    from rollfleet import proximal_logprobs, token_logprobs  # noqa: PLC0415

    with live(redis_url, processes) as fleet:
        names = code.run(
            {
                "batch": first(fleet),
                "model": TinyModel(),
                "token_logprobs": token_logprobs,
                "proximal_logprobs": proximal_logprobs,
            }
        )
        assert names["proximal"].shape == names["batch"].tensors.input_ids.shape


@block("policies.md", "NoOverlong")
def test_a_policy_of_ones_own(code: Block, redis_url: str, processes: Processes) -> None:
    policy = code.run({"DropStale": rollfleet.DropStale}, cap="30_000 -> 3")["NoOverlong"](4)
    with live(redis_url, processes, count=0, policy=policy) as fleet:
        fleet.feed([{"token_ids": [number, 2, 3]} for number in range(4)])
        with pytest.raises(rollfleet.FailingError, match="16 overlong"):
            list(fleet.batches())
        assert fleet.books().dropped == {"overlong": 16}


@block("recording.md", "rollfleet.replay")
def test_a_recording_is_trained_on(
    code: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with Writer(tmp_path / "run.rec", "docs") as writer:
        for number in (1, 2):
            rollout = make_rollout([number], group=f"g{number}", index=0)
            packed = encode_samples(rollout.samples)
            writer.write(f"commit:{number}:{number}", encode_header(rollout.header), packed)
        writer.flush()
    trained: list[Any] = []
    code.run({"train_on": trained.append})
    assert len(trained) == 2


@block("runner.md", "TaskRunner")
def test_the_task_runner(code: Block, capsys: pytest.CaptureFixture[str]) -> None:
    code.run({"urls": ["a", "b", "c"]})
    assert len(capsys.readouterr().out.splitlines()) == 3


@block("staleness.md", "json.dumps(row)")
def test_lengths_are_written_for_the_simulator(
    code: Block, redis_url: str, processes: Processes, tmp_path: Path
) -> None:
    path = tmp_path / "lengths.jsonl"
    with live(redis_url, processes) as fleet, path.open("w") as lengths:
        code.run({"batch": first(fleet), "json": json, "lengths": lengths})
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 8
    assert all(row.keys() == {"duration_s", "tokens", "group"} for row in rows)


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata calls it
@block("trainers.md", "StatefulDataLoader")
def test_prompts_of_a_stateful_loader(code: Block, redis_url: str, processes: Processes) -> None:
    data = [{"token_ids": [number, 2]} for number in range(64)]
    known = {
        "rollfleet": rollfleet,
        "torch": torch,
        "RandomSampler": RandomSampler,
        "StatefulDataLoader": StatefulDataLoader,
        "data": data,
    }
    with live(redis_url, processes, count=0) as fleet:
        code.run({**known, "fleet": fleet})
        assert len(first(fleet).rollouts) == 8


@block("trainers.md", "RolloutDataset")
def test_batches_of_a_data_loader(code: Block, redis_url: str, processes: Processes) -> None:
    with live(redis_url, processes) as fleet:
        known = {"DataLoader": DataLoader, "fleet": fleet}
        names = code.run(known, steps="steps=300 -> steps=2")
        assert names["batch"].input_ids.shape[0] == 8
