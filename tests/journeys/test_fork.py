"""A forked child has none of our threads: calls say so at once, and leaving it harms nobody."""

import subprocess
import sys
from pathlib import Path

import pytest

#: Run in an interpreter of its own: a fork beside threads is what is tested, and Python warns of it.
PROGRAM = """
import asyncio, os, signal, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import rollfleet
from rollfleet_common.errors import BrokerSetupError, ForkedError
from rollfleet_common.recording import Writer
from rollfleet_common.redis import connect_sync
from rollfleet_common.runner import TaskRunner

def refused(call):
    try:
        call()
    except (ForkedError, BrokerSetupError) as exc:
        return str(exc)
    raise SystemExit(f"{call} was not refused")

def in_child(work):
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)  # whatever hangs is killed
        work()
        sys.exit(0)  # with atexit handlers, as a child of a careless program
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""

FLEET = """
with rollfleet.connect("embedded://", run="fork", group_size=4, samples_per_version=8) as fleet:
    client = connect_sync(fleet.redis_url, role="test")
    def child():
        with fleet:
            for call in (
                lambda: fleet.submit({"token_ids": [1]}), fleet.next_batch, fleet.publish,
                lambda: fleet.feed([]), fleet.state_dict, fleet.books, lambda: fleet.pause(1),
                lambda: fleet.evaluate([{"token_ids": [1]}]), lambda: fleet.wait(1),
                fleet.commit, lambda: next(fleet.batches()), lambda: asyncio.run(fleet.aio.books()),
            ):
                assert "spawn" in refused(call)
        asyncio.run(fleet.aio.close())
        refused(fleet._server.kill)
        refused(fleet._server.restart)
        fleet._server.stop()
    assert in_child(child) == 0
    assert client.ping(), "the server went with the child"
    assert client.exists("rf:{fork}:trainer"), "the child let go of the run"
    fleet.submit({"token_ids": [1]})
    assert fleet.books().waiting == 4
    client.close()
"""

RANKS = """
with rollfleet.connect_ranks(
    "embedded://", run="fork", collective="solo", group_size=4, samples_per_version=8
) as fleet:
    def child():
        with fleet:
            for call in (fleet.next_batch, fleet.publish, fleet.commit, lambda: fleet.feed([])):
                assert "spawn" in refused(call)
    assert in_child(child) == 0
    assert fleet.publish() == 1
"""

RUNNER = """
async def one():
    return 1

with TaskRunner(2) as runner:
    def child():
        with_lock = runner._changed.acquire(blocking=False)
        for call in (
            lambda: runner.submit(one), lambda: runner.wait(1), runner.pause, runner.resume,
            runner.sizes, runner.start,
        ):
            assert "spawn" in refused(call)
        assert not runner.healthy()
        assert runner.stop()
    assert in_child(child) == 0
    runner.submit(one)
    assert runner.wait(1, 10)[0].value == 1
"""

REWARDS = """
from rollfleet_worker.rewards.processes import RewardProcesses

async def main():
    pool = RewardProcesses(1, 0, [])
    assert await asyncio.wait_for(asyncio.shield(pool.started), 20) is None
    def child():
        pool.end()
        coroutine = pool.run(b"", 1.0)
        refused(lambda: coroutine.send(None))
        os._exit(0)
    assert in_child(child) == 0
    assert not pool.over
    pool.end()
    await pool.ended

asyncio.run(main())
"""

RECORDER = """
path = Path(sys.argv[1]) / "run.rec"
with Writer(path, "fork") as writer:
    size = path.stat().st_size
    assert size == writer.bytes
    assert in_child(lambda: None) == 0
    writer.write("drop:stale", b"h", None)
    assert path.stat().st_size == writer.bytes
"""


@pytest.mark.parametrize("part", ["FLEET", "RANKS", "RUNNER", "REWARDS", "RECORDER"])
def test_a_forked_child_is_refused_and_harms_nobody(part: str, tmp_path: Path) -> None:
    program = PROGRAM + globals()[part]
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
