"""Thread time of what a trainer does in its event loop, for a run that is large in every direction.

    python -m benchmarks.turns

Everything runs in one process, without Redis: what is measured holds up the loop that keeps the
lease. Thread time, so that a busy machine changes little; the best of several rounds, in ms.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import numpy as np

from rollfleet.consume.reader import RolloutReader
from rollfleet.policy.checked import policy_named
from rollfleet.policy.metrics import BiasMeter
from rollfleet.policy.version_history import VersionHistory
from rollfleet.records import Group, Member
from rollfleet.state.deadlines import Deadlines
from rollfleet_common.messages import Header, Kind, Prompt

TASKS, PROMPTS, READY, MEMBERS = 10_000, 100_000, 2_000, 8
ROUNDS = 5


def header_of(group: str, index: int, task: str) -> Header:
    """The header of one rollout."""
    return Header(
        group=group,
        index=index,
        n=MEMBERS,
        attempt=1,
        kind=Kind.TRAIN,
        route="default",
        task=task,
        position=0,
        entry="1-0",
        payload="1-0:n",
        payload_bytes=1000,
        epoch=1,
        min_version=5,
        max_version=5,
        samples=1,
        tokens=500,
        trained_tokens=400,
        reward=float(index),
        worker="w",
        server="s",
        queue_ms=1,
        generate_ms=1000,
        reward_ms=1,
    )


def group_of(at: int) -> Group:
    """A whole group of a task of its own."""
    name, task = f"p{at}", f"task-{at % TASKS}"
    group = Group(name, MEMBERS, Kind.TRAIN, task, 0, at)
    group.members = {i: Member("1-0", header_of(name, i, task), 5, 5) for i in range(MEMBERS)}
    return group


def best_ms(call: Callable[[], object]) -> float:
    """Thread time of one call."""
    times: list[float] = []
    for _ in range(ROUNDS):
        began = time.thread_time()
        call()
        times.append(time.thread_time() - began)
    return min(times) * 1000


def main() -> None:
    """Measure, and print a table."""
    meter, groups = BiasMeter(), [group_of(at) for at in range(TASKS)]
    for group in groups:
        meter.kept(group, 5)
    base = Prompt("p", MEMBERS, np.zeros(1, np.int32), {})
    far = int(time.time() * 1000) + 3_600_000
    out = {f"p{i}": replace(base, group=f"p{i}", deadline_ms=far) for i in range(PROMPTS)}
    deadlines = Deadlines(out)
    deadlines.add(out.values())
    rest: dict[str, Any] = dict.fromkeys(("settled", "line"))
    consumer = RolloutReader(
        token="t",  # noqa: S106 - no password
        streams=[],
        readers=[],
        policy=policy_named("drop", 2),
        version=lambda: 5,
        history=VersionHistory([(1, 0)]),
        on_rollback="replay",
        meter=meter,
        surplus=lambda _: 0,
        least=lambda group: group.need,
        out=out,
        **cast("Any", rest),
    )
    consumer.ready = {group.name: group for group in groups[:READY]}
    rows: dict[str, Callable[[], object]] = {
        f"warnings, {TASKS:,} tasks": lambda: meter.warnings(2),
        f"one verdict, {TASKS:,} tasks": lambda: meter.kept(groups[0], 5),
        f"snapshot of the meter, {TASKS:,} tasks": meter.snapshot,
        f"deadlines, {PROMPTS:,} prompts out": lambda: deadlines.late(time.time() * 1000),
        f"choose a batch of 256, {READY:,} groups ready": lambda: consumer.choose(256),
        f"state_dict's open prompts, {PROMPTS:,} out": lambda: sorted(
            p.position for p in out.values() if p.position >= 0
        ),
        "remember 256 trained": lambda: consumer.remember(
            (f"g{time.perf_counter_ns()}", i) for i in range(256)
        ),
    }
    for name, call in rows.items():
        print(f"{name:52} {best_ms(call):8.3f} ms")


if __name__ == "__main__":
    main()
