"""The reward pool kills what is too slow and invents no reward; the math rewards read numbers."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import pytest
from fixtures import reward_functions as rf
from hypothesis import given
from hypothesis import strategies as st
from support import wait_until, wait_until_async

from rollfleet_common.errors import (
    EpisodeCancelledError,
    EpisodeTimeoutError,
    InfraError,
    RewardError,
)
from rollfleet_worker.rewards import base, processes
from rollfleet_worker.rewards.base import Reward, RewardPool
from rollfleet_worker.rewards.math import exact_match, last_boxed, numeric_match

#: Seconds that a job may take on a loaded machine, its process's start included.
SOON = 30.0


@pytest.fixture
async def pool():
    made = RewardPool(2, SOON)
    yield made
    await made.close()


@pytest.fixture(params=["process", "inline"])
async def any_pool(request):
    made = RewardPool(1, SOON, inline=request.param == "inline")
    yield made
    await made.close()


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has reaped yet does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def read_pids(path: Path) -> list[int]:
    text = path.read_text() if path.exists() else ""
    return [int(word) for word in text.split()]


# ---- what comes back ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returned", "value", "components"),
    [
        (0.5, 0.5, {}),
        (True, 1.0, {}),
        (-3, -3.0, {}),
        ((1.0, {"format": 0, "answer": 1.5}), 1.0, {"format": 0.0, "answer": 1.5}),
        ({"reward": 2, "format": 0.5}, 2.0, {"format": 0.5}),
    ],
)
async def test_what_a_function_may_return(any_pool, returned, value, components):
    reward = await any_pool.score(rf.give, returned)
    assert (reward.value, dict(reward.components)) == (value, components)
    assert isinstance(reward.value, float)
    assert 0 <= reward.seconds < SOON


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (None, "returned None, which is no finite number"),
        ("1.0", "returned '1.0'"),
        (float("nan"), "returned nan"),
        (float("-inf"), "returned -inf"),
        (10**400, "no finite number"),
        ((1.0, 2.0), "not (number, components)"),
        ((1.0, {"format": float("nan")}), "returned nan for component 'format'"),
        ({"format": 1.0}, 'without "reward"'),
        ("x" * 1000, "xxx..."),
    ],
)
async def test_what_is_no_reward_is_an_error_with_the_function_s_name(any_pool, returned, said):
    with pytest.raises(RewardError) as caught:
        await any_pool.score(rf.give, returned)
    assert said in str(caught.value)
    assert "reward function fixtures.reward_functions.give" in str(caught.value)
    assert len(str(caught.value)) < 400


async def test_arguments_partials_and_callables(any_pool):
    assert (await any_pool.score(rf.length, "four", scale=0.5)).value == 2.0
    assert (await any_pool.score(partial(rf.length, scale=2.0), "four")).value == 8.0
    assert (await any_pool.score("abc".count, "b")).value == 1.0
    assert (await any_pool.score(rf.Grader(), "abc")).value == 3.0
    assert (await any_pool.score(partial(rf.Grader(), "ab"))).value == 2.0


async def test_rewards_run_at_once_in_as_many_processes_as_asked(pool, tmp_path):
    first = asyncio.create_task(pool.score(rf.waits_for, str(tmp_path / "a")))
    second = asyncio.create_task(pool.score(rf.waits_for, str(tmp_path / "b")))
    third = asyncio.create_task(pool.score(rf.waits_for, str(tmp_path / "c")))
    await wait_until_async((tmp_path / "a.pid").exists, "a runs", SOON)
    await wait_until_async((tmp_path / "b.pid").exists, "b runs", SOON)
    assert read_pids(tmp_path / "a.pid") != read_pids(tmp_path / "b.pid")
    assert not (tmp_path / "c.pid").exists()
    for name in "abc":
        (tmp_path / name).touch()
    assert [r.value for r in await asyncio.gather(first, second, third)] == [1.0] * 3


async def test_no_process_starts_before_the_first_job_and_none_for_async_or_inline(pool):
    await pool.score(rf.a_length, "abc")
    assert pool._processes is None
    inline = RewardPool(4, SOON, inline=True)
    assert (await inline.score(rf.pid)).value == os.getpid()
    assert (await RewardPool(0, SOON).score(rf.pid)).value == os.getpid()
    assert inline._processes is None
    assert (await pool.score(rf.pid)).value != os.getpid()
    assert pool._processes is not None


async def test_a_process_is_replaced_after_its_share_of_jobs():
    pool = RewardPool(1, SOON, max_tasks_per_process=2)
    pids = [(await pool.score(rf.pid)).value for _ in range(4)]
    await pool.close()
    assert pids[0] == pids[1] != pids[2] == pids[3]


# ---- failures ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fn", "error", "said"),
    [
        (rf.plain_error, RewardError, "plain_error raised ValueError: bad answer format"),
        (rf.odd, RewardError, "OddError: this and that"),
        (rf.exits, RewardError, "SystemExit: 3"),
        (rf.own_timeout, EpisodeTimeoutError, "the sandbox took too long"),
        (rf.judge_down, InfraError, "the judge cannot be reached"),
        (rf.my_judge_down, InfraError, "my judge cannot be reached"),
        (rf.returns_function, RewardError, "no finite number"),
        (partial(rf.give, rf.give), RewardError, "no finite number"),
        (partial(rf.give), RewardError, "TypeError"),
    ],
)
async def test_what_a_function_raises_is_named(any_pool, fn, error, said):
    with pytest.raises(error) as caught:
        await any_pool.score(fn)
    assert said in str(caught.value)
    assert caught.value.__cause__ is not None
    assert (await any_pool.score(rf.length, "ok")).value == 2.0


async def test_the_traceback_in_the_process_is_the_cause(pool):
    with pytest.raises(RewardError) as caught:
        await pool.score(rf.plain_error)
    assert 'raise ValueError("bad answer format")' in str(caught.value.__cause__)


@pytest.mark.parametrize(("fn", "said"), [(rf.dies, "exit code 7"), (rf.killed, "exit code -9")])
async def test_a_process_that_dies_is_an_error_and_the_pool_goes_on(pool, fn, said):
    assert (await pool.score(rf.length, "up")).value == 2.0
    with pytest.raises(RewardError, match=said):
        await pool.score(fn)
    assert (await pool.score(rf.length, "ok")).value == 2.0


async def test_what_cannot_be_sent_says_what_to_do(pool):
    with pytest.raises(RewardError, match=r"top level of a module.*--reward-processes 0"):
        await pool.score(lambda: 1.0)
    with pytest.raises(RewardError, match=r"arguments of .*pass plain data"):
        await pool.score(rf.give, lambda: 1.0)
    assert pool._processes is None


async def test_what_cannot_be_loaded_in_the_process_harms_nobody(pool, monkeypatch):
    monkeypatch.setenv("REWARD_TEST_PARENT", str(os.getpid()))
    with pytest.raises(RewardError, match="no module named nowhere"):
        await pool.score(rf.give, rf.Unloadable())
    assert (await pool.score(rf.length, "ok")).value == 2.0


async def test_a_pool_that_broke_while_idle_is_replaced(pool):
    pid = int((await pool.score(rf.pid)).value)
    broken = pool._processes
    os.kill(pid, signal.SIGKILL)
    # pebble gives a pool up when a process dies that had nothing to do.
    await wait_until_async(lambda: not broken._pool.active, "the pool is broken", SOON)
    assert (await pool.score(rf.length, "ok")).value == 2.0
    assert pool._processes is not broken
    await wait_until_async(broken.ended.done, "the broken pool ended", SOON)


async def test_processes_that_never_start_are_our_fault_not_the_function_s(monkeypatch):
    monkeypatch.setattr(processes, "_Context", NoContext)
    pool = RewardPool(1, SOON)
    with pytest.raises(InfraError, match=r"no more processes.*__main__"):
        await pool.score(rf.length, "ok")
    await pool.close()


class NoContext(processes._Context):
    def Process(self, *args, **kwargs):  # noqa: N802 - the name that multiprocessing gave it
        raise OSError("no more processes")


# ---- deadlines ---------------------------------------------------------------------------------


async def test_a_function_that_is_too_slow_is_killed_and_is_no_reward(pool, tmp_path):
    await pool.score(rf.length, "warm")
    path = tmp_path / "pid"
    with pytest.raises(EpisodeTimeoutError, match=r"hangs did not return within 0\.2 s"):
        await pool.score(rf.hangs, str(path), timeout_s=0.2)
    (pid,) = read_pids(path)
    await wait_until_async(lambda: not alive(pid), "the process is gone", SOON)
    assert (await pool.score(rf.length, "ok")).value == 2.0


async def test_a_function_deaf_in_c_is_killed_at_once_too(pool, tmp_path):
    await pool.score(rf.length, "warm")
    path = tmp_path / "pid"
    began = time.monotonic()
    with pytest.raises(EpisodeTimeoutError):
        await pool.score(rf.spins_in_c, str(path), timeout_s=0.2)
    assert time.monotonic() - began < 2.5  # pebble alone waits 3 s for SIGTERM to be heeded
    (pid,) = read_pids(path)
    await wait_until_async(lambda: not alive(pid), "the process is gone", SOON)


async def test_what_the_function_started_is_killed_with_it(pool, tmp_path):
    await pool.score(rf.length, "warm")
    path = tmp_path / "pids"
    with pytest.raises(EpisodeTimeoutError):
        await pool.score(rf.hangs_with_child, str(path), timeout_s=0.5)
    pids = read_pids(path)
    assert len(pids) == 2
    await wait_until_async(lambda: not any(map(alive, pids)), "both are gone", SOON)


async def test_queueing_is_not_held_against_the_deadline():
    pool = RewardPool(1, timeout_s=1.0)
    await pool.score(rf.length, "warm")
    began = time.monotonic()
    rewards = await asyncio.gather(*(pool.score(rf.naps, 0.3) for _ in range(6)))
    assert time.monotonic() - began > 1.5  # the last queued longer than its deadline
    assert [r.value for r in rewards] == [0.3] * 6
    assert all(0.3 <= r.seconds < 1.0 for r in rewards)
    await pool.close()


async def test_pebble_counts_a_deadline_from_the_start_of_the_job():
    """What we rely on: also jobs that queue in pebble itself are not on the clock."""

    pool = RewardPool(1, timeout_s=1.0)
    pool._free = asyncio.Semaphore(100)
    await pool.score(rf.length, "warm")
    rewards = await asyncio.gather(*(pool.score(rf.naps, 0.3) for _ in range(6)))
    assert [r.value for r in rewards] == [0.3] * 6

    await pool.close()


async def test_the_start_of_a_process_is_not_on_the_clock():
    pool = RewardPool(1, timeout_s=0.2)  # less than an interpreter takes to start
    assert (await pool.score(rf.length, "ok")).value == 2.0
    await pool.close()


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("inf")])
async def test_a_deadline_that_is_none_is_refused(pool, timeout_s):
    with pytest.raises(ValueError, match="positive number of seconds"):
        RewardPool(1, timeout_s)
    with pytest.raises(ValueError, match="positive number of seconds"):
        await pool.score(rf.length, "", timeout_s=timeout_s)


def test_negative_numbers_are_refused():
    with pytest.raises(ValueError, match="must not be negative"):
        RewardPool(-1, 1.0)


async def test_a_pool_that_does_not_answer_is_replaced_and_then_given_up(monkeypatch, tmp_path):
    monkeypatch.setattr(base, "_GRACE_S", -0.9)
    pool = RewardPool(1, 1.0)
    with pytest.raises(InfraError, match="no answer"):
        await pool.score(rf.hangs, str(tmp_path / "pid"))
    assert pool._processes is None
    await pool.close()


# ---- async functions ---------------------------------------------------------------------------


async def test_an_async_function_runs_in_the_loop_under_the_same_deadline(pool):
    assert (await pool.score(rf.a_length, "abc")).value == 3.0
    for fn in (rf.a_hangs, rf.a_stubborn):
        with pytest.raises(EpisodeTimeoutError, match=r"did not return within 0\.05 s"):
            await pool.score(fn, timeout_s=0.05)
    with pytest.raises(RewardError, match="ValueError: bad answer format"):
        await pool.score(rf.a_error)


async def test_an_async_function_that_is_cancelled_passes_it_on(pool):
    task = asyncio.create_task(pool.score(rf.a_hangs))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# ---- cancelling and closing --------------------------------------------------------------------


async def test_cancelling_kills_the_job(pool, tmp_path):
    path = tmp_path / "pid"
    task = asyncio.create_task(pool.score(rf.hangs, str(path)))
    (pid,) = await wait_until_async(lambda: read_pids(path), "it runs", SOON)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await wait_until_async(lambda: not alive(pid), "the process is gone", SOON)
    assert (await pool.score(rf.length, "ok")).value == 2.0


async def test_cancelling_a_job_that_queues_costs_no_process(tmp_path):
    pool = RewardPool(1, SOON)
    first = asyncio.create_task(pool.score(rf.waits_for, str(tmp_path / "go")))
    (pid,) = await wait_until_async(lambda: read_pids(tmp_path / "go.pid"), "it runs", SOON)
    queued = [asyncio.create_task(pool.score(rf.hangs, str(tmp_path / "no"))) for _ in range(5)]
    await asyncio.sleep(0)
    for task in queued:
        task.cancel()
    (tmp_path / "go").touch()
    assert (await first).value == 1.0
    assert (await pool.score(rf.pid)).value == pid
    assert not (tmp_path / "no").exists()
    await pool.close()


async def test_cancelling_before_the_processes_are_up_harms_nobody(pool):
    tasks = [asyncio.create_task(pool.score(rf.length, "x")) for _ in range(4)]
    await asyncio.sleep(0)
    for task in tasks[:3]:
        task.cancel()
    assert (await tasks[3]).value == 1.0


async def test_mass_cancelling_leaves_a_pool_that_works(pool):
    for _ in range(5):
        tasks = [asyncio.create_task(pool.score(rf.naps, 0.01)) for _ in range(6)]
        await asyncio.wait(tasks, timeout=0.03)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    assert (await pool.score(rf.length, "ok")).value == 2.0


async def test_close_is_bounded_and_ends_everyone(tmp_path):
    pool = RewardPool(1, SOON)
    path = tmp_path / "pid"
    running = asyncio.create_task(pool.score(rf.hangs, str(path)))
    (pid,) = await wait_until_async(lambda: read_pids(path), "it runs", SOON)
    queued = asyncio.create_task(pool.score(rf.length, ""))
    await asyncio.sleep(0)
    began = time.monotonic()
    await pool.close()
    assert time.monotonic() - began < 6
    for task in (running, queued):
        with pytest.raises(EpisodeCancelledError, match="pool is closed"):
            await task
    wait_until(lambda: not alive(pid), "the process is gone", SOON)
    for fn in (rf.length, rf.a_length):
        with pytest.raises(EpisodeCancelledError):
            await pool.score(fn, "")
    await pool.close()


async def test_close_returns_in_time_when_processes_do_not_end(monkeypatch):
    monkeypatch.setattr(processes._Process, "terminate", lambda _: time.sleep(1.0))
    pool = RewardPool(1, SOON)
    await pool.score(rf.length, "")
    began = time.monotonic()
    await pool.close(0.05)
    assert time.monotonic() - began < 0.9
    await asyncio.wait(pool._ending)


async def test_a_pool_never_used_closes():
    pool = RewardPool(3, SOON)
    await pool.close()


# ---- signals -----------------------------------------------------------------------------------

DAEMON = """
    import asyncio, sys
    from fixtures import reward_functions as rf
    from rollfleet_worker.rewards.base import RewardPool

    async def main(kind, path):
        pool = RewardPool(2, 60.0)
        if kind == "busy":
            await pool.score(rf.hangs, path)
        if kind == "drains":
            sys.stdout.reconfigure(line_buffering=True)
            loop = asyncio.get_running_loop()
            for number in (2, 15):
                loop.add_signal_handler(number, sys.stdout.write, "draining\\n")
            reward = await pool.score(rf.waits_for, path)
            print("reward", reward.value)
            await pool.close()
        if kind == "idle":
            pid = (await pool.score(rf.pid)).value
            open(path, "w").write(str(int(pid)))
            await asyncio.Event().wait()

    if __name__ == "__main__":
        asyncio.run(main(*sys.argv[1:]))
"""


@pytest.fixture
def daemon(tmp_path):
    """Starts a program with a pool in a process group of its own."""
    script = tmp_path / "daemon.py"
    script.write_text(textwrap.dedent(DAEMON))
    started = []

    def start(kind: str, path: Path) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, str(script), kind, str(path)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("kind", ["busy", "idle"])
def test_processes_end_with_a_parent_that_is_killed(daemon, tmp_path, kind):
    if kind == "busy" and sys.platform != "linux":
        pytest.skip("a busy process outlives its parent where there is no parent-death signal")
    path = tmp_path / "pid"
    process = daemon(kind, path)
    (pid,) = wait_until(lambda: read_pids(path), "a reward ran", SOON)
    assert alive(pid)
    process.kill()
    process.wait(SOON)
    wait_until(lambda: not alive(pid), "the reward process is gone", SOON)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_for_the_daemon_does_not_end_a_reward_it_still_waits_for(daemon, tmp_path, number):
    path = tmp_path / "go"
    process = daemon("drains", path)
    (pid,) = wait_until(lambda: read_pids(tmp_path / "go.pid"), "a reward runs", SOON)
    os.killpg(process.pid, number)  # Ctrl-C in a terminal
    os.kill(pid, number)  # systemd, which signals each process of a unit
    assert process.stdout.readline() == "draining\n"
    assert alive(pid)
    path.touch()
    assert process.stdout.readline() == "reward 1.0\n"
    assert process.wait(SOON) == 0
    wait_until(lambda: not alive(pid), "the reward process is gone", SOON)


# ---- rewards for mathematics -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("Paris", "Paris", 1.0),
        ("  New\n York ", "New York", 1.0),
        ("paris", "Paris", 0.0),
        (r"So it is \boxed{x^2 + 1}.", "x^2 + 1", 1.0),
        (r"\boxed{1} or rather \boxed{2}", "2", 1.0),
        ("think think\n#### Paris", "reasons #### Paris", 1.0),
        ("", "Paris", 0.0),
    ],
)
def test_exact_match(completion, answer, reward):
    assert exact_match(completion, answer) == reward


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"\boxed{42}", "42"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} \fbox {2}", "2"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{1} then \boxed{2", "1"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"} } { \boxed{3}", "3"),
        (r"\boxed 7", None),
        ("", None),
    ],
)
def test_last_boxed(text, boxed):
    assert last_boxed(text) == boxed


SAME = [
    ("The answer is 42.", "42"),
    ("It is 1,234,567 in all.", "1234567"),
    ("1234567", "1,234,567"),
    (r"\boxed{12{,}345}", "12345"),
    (r"\boxed{12\,345}", "12345"),
    ("x = -5", "-5"),
    (f"x = {chr(0x2212)}5", "-5"),
    ("a loss of -$5.50", "-5.5"),
    ("a loss of $-5.50", "-5.5"),
    ("10-5", "5"),
    ("from 3-5", "5"),
    ("3/4", "0.75"),
    (r"\boxed{\frac{3}{4}}", "3/4"),
    (r"\boxed{-\dfrac{3}{4}}", "-0.75"),
    (r"\boxed{\frac{-3}{4}}", "-0.75"),
    ("1 1/2", "1.5"),
    (r"1\frac{1}{2}", "1.5"),
    ("-1 1/2", "-1.5"),
    ("50%", "0.5"),
    ("50%", "50"),
    ("50", "50%"),
    ("0.5", "50%"),
    (r"\boxed{50\%}", "50%"),
    (".5", "0.5"),
    ("1.5e-3", "0.0015"),
    (r"2.5 \times 10^{-3}", "0.0025"),
    (r"\boxed{3 \times 10^8}", "300000000"),
    (r"\boxed{5 \text{ cm}^2}", "5"),
    (r"\boxed{90^\circ}", "90"),
    (r"\boxed{x = 3}", "3"),
    (r"\boxed{\$1,234.50}", "1234.5"),
    (r"\boxed{- 5}", "-5"),
    (r"\boxed{72 km/h}", "72"),
    ("2 apples and 3 pears\n#### 5", "because 2 + 3 = 5 #### 5"),
    ("it was 7, in 2024,", "2024"),
    ("0.33333333", "1/3"),
    ("2.99999999", "3"),
    ("3.0", "3"),
    ("0", "-0"),
    ("1,2", "2"),
    ("7 boxed as $7$", "$7$"),
    ("9" * 60, "9" * 60),
]
DIFFERENT = [
    ("", "42"),
    ("I do not know", "42"),
    ("42 is wrong, 41", "42"),
    ("5", "-5"),
    ("-5", "5"),
    ("12345679", "12345678"),  # whole numbers are equal or not, whatever the tolerance
    ("0.333", "1/3"),
    ("1234.6", "1234.5"),
    ("50%", "5"),
    ("50%", "0.5%"),
    ("1/0", "0"),
    (r"\boxed{\sqrt{5}}", "5"),
    (r"\boxed{2^{10}}", "10"),
    (r"\boxed{2^{10}}", "2"),
    (r"\boxed{2\sqrt{3}}", "2"),
    (r"\boxed{5\pi}", "5"),
    (r"\boxed{3, 5}", "5"),
    (r"\boxed{3+4}", "4"),
    (r"\boxed{x}, x being 5", "5"),
    (r"\boxed{} 5", "5"),
    ("see v1.2.3", "3"),
    ("x2", "2"),
    ("H2O", "2"),
    ("1e9999999999", "1"),
    ("1" + "e" + "9" * 5000, "1"),
    ("9" * 60, "9" * 59 + "8"),
]


@pytest.mark.parametrize(("completion", "answer"), SAME)
def test_numbers_that_are_the_same(completion, answer):
    assert numeric_match(completion, answer) == 1.0


@pytest.mark.parametrize(("completion", "answer"), DIFFERENT)
def test_numbers_that_differ(completion, answer):
    assert numeric_match(completion, answer) == 0.0


def test_the_tolerance_is_relative_and_absolute_around_zero():
    assert numeric_match("1010.5", "1000.5", tolerance=0.01) == 1.0
    assert numeric_match("1011.5", "1000.5", tolerance=0.01) == 0.0
    assert numeric_match("0.005", "0", tolerance=0.01) == 1.0
    assert numeric_match("0.0000005", "0.0000006") == 0.0


@pytest.mark.parametrize("answer", ["", "Paris", r"\sqrt{2}", "1/0", "3, 5", "3 or 5"])
def test_a_reference_without_a_number_is_no_reward(answer):
    with pytest.raises(ValueError, match="reference answer holds no plain number"):
        numeric_match("42", answer)


@given(st.integers(), st.sampled_from(["{}", "{:,}", "The answer is {:,}.", r"\boxed{{{:,}}}"]))
def test_any_integer_is_read(number, form):
    assert numeric_match(form.format(number), str(number)) == 1.0
    assert numeric_match(form.format(number), str(number + 1)) == 0.0


@given(st.text("0123456789,.-+/%$ \\boxedfrac{}^e#x\n", max_size=60))
def test_any_completion_is_right_or_wrong(completion):
    assert numeric_match(completion, "42") in (0.0, 1.0)


@pytest.mark.parametrize(
    "completion",
    [
        r"\boxed{" * 20_000,
        "1" + ",111" * 40_000 + ",1",
        "9" * 200_000 + "^2",
        r"\boxed{5 " + "a" * 100_000 + "!}",
        "1 " * 100_000,
        "1" + " " * 100_000,
        "-" * 200_000,
        r"\frac{" * 30_000,
        r"\text{" * 30_000,
    ],
    ids=lambda text: text[:12],
)
def test_a_degenerate_completion_takes_no_time(completion):
    began = time.perf_counter()
    numeric_match(completion, "42")
    assert time.perf_counter() - began < 2.0


async def test_the_math_rewards_run_in_a_pool(any_pool):
    reward = await any_pool.score(numeric_match, r"\boxed{42}", "42")
    assert reward == Reward(1.0, {}, reward.seconds)
