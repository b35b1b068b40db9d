"""Two ranks train under torchrun; one is killed with -9, the job is started again, the books balance."""

import json
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.fleet_processes import Process, Processes, lines
from fixtures.ranks import ThreadWorker
from fixtures.servers import MakeServer
from support import wait_until

from rollfleet_common.keys import RunKeys
from rollfleet_common.ledger import Books, read_books
from rollfleet_common.redis import connect

EXAMPLE = Path(__file__).parents[2] / "examples" / "ddp_sort.py"
BATCH = 32

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


class Job:
    """The example under torchrun, any number of times."""

    def __init__(self, url: str, folder: Path, processes: Processes) -> None:
        self.url = url
        self.weights = folder / "weights"
        self.folder = folder
        self.processes = processes
        self.starts = 0

    def start(self, ranks: int, steps: int, *flags: str) -> Process:
        """A job whose ranks write what they trained into a folder of its own."""
        self.starts += 1
        self.members(self.starts).mkdir()
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        options = ["--redis-url", self.url, "--weights", self.weights, "--steps", steps]
        options += [
            "--batch",
            BATCH,
            "--every",
            3,
            "--warm-steps",
            0,
            "--members",
            self.members(self.starts),
        ]
        return self.processes.start(
            *torchrun,
            str(EXAMPLE),
            *map(str, options),
            *flags,
            name="job",
            env={"OMP_NUM_THREADS": "1"},
        )

    def members(self, start: int) -> Path:
        return self.folder / f"members-{start}"

    def trained(self, start: int) -> dict[int, list[tuple[str, int]]]:
        """Members by batch, over all ranks."""
        found: dict[int, list[tuple[str, int]]] = {}
        for path in sorted(self.members(start).glob("rank*.jsonl")):
            for line in lines(path):
                found.setdefault(line["batch"], []).extend((g, i) for g, i in line["seen"])
        return found

    def checkpoint(self) -> dict[str, Any]:
        state: dict[str, Any] = torch.load(self.weights / "checkpoint.pt")["fleet"]
        return state


@pytest.fixture
def job(make_server: MakeServer, tmp_path: Path, processes: Processes) -> Iterator[Job]:
    url = make_server(appendonly="no").url
    with ThreadWorker(url, "sort"):
        yield Job(url, tmp_path, processes)
        processes.close()


def ranks_of(process: Process) -> list[int]:
    """Process ids of the ranks that a torchrun has started."""
    found = []
    for task in Path(f"/proc/{process.pid}/task").iterdir():
        found += [int(pid) for pid in (task / "children").read_text().split()]
    return sorted(found)


async def books_of(url: str) -> Books:
    async with connect(url, role="test") as client:
        return await read_books(client, [RunKeys("sort").partition(0)])


def once(members: list[tuple[str, int]]) -> None:
    twice = {member: count for member, count in Counter(members).items() if count > 1}
    assert not twice


@pytest.mark.parametrize("flags", [[], ["--fsdp"]], ids=["ddp", "fsdp"])
async def test_two_ranks_train_each_rollout_once(job: Job, flags: list[str]) -> None:
    process = job.start(2, 4, *flags)
    assert process.wait(180) == 0, process.text
    trained = job.trained(1)
    assert [len(trained[number]) for number in sorted(trained)] == [BATCH] * 4
    once([member for batch in trained.values() for member in batch])
    assert json.dumps(job.checkpoint())  # plain types
    books = await books_of(job.url)
    assert (books.balance, books.committed) == (0, 4 * BATCH)


async def test_a_rank_is_killed_and_the_job_goes_on_from_its_checkpoint(job: Job) -> None:
    process = job.start(2, 40)
    wait_until(lambda: 5 in job.trained(1), "five batches are trained", 180)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    assert process.wait(60) != 0  # the others learn of it, and end
    state = job.checkpoint()
    first = job.trained(1)
    assert 3 <= state["batch"] < max(first)
    steps = state["version"] + 6

    # With one rank more: the state knows no number of ranks.
    process = job.start(3, steps)
    assert process.wait(240) == 0, process.text
    second = job.trained(2)
    kept = {number: members for number, members in first.items() if number <= state["batch"]}
    survived = [m for batch in (*kept.values(), *second.values()) for m in batch]
    once(survived)
    books = await books_of(job.url)
    assert books.balance == 0
    assert books.committed == len(survived) == steps * BATCH
    # What the checkpoint did not hold was served again, first, unless it had become stale.
    lost = [m for number, members in first.items() if number not in kept for m in members]
    again = {m for number in sorted(second) for m in second[number]}
    missing = [member for member in lost if member not in again]
    assert len(missing) <= sum(books.dropped.values())
    # Every group that was fed is somewhere: trained, dropped for a reason, or still out.
    assert books.submitted == books.committed + sum(books.dropped.values()) + books.outstanding
