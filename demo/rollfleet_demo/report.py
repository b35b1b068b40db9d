"""What a run of the demo comes to: the report, what is wrong with it, and a picture.

- Places and totals of prompts are the books' own, as read once from Redis; duplicates and ages are
  the audit's, from the server's and the trainer's logs. No number is computed from the others.
- What is wrong is decided here, on the report as written, and nowhere else.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from rollfleet import Books
from rollfleet_demo.audit import Audit
from rollfleet_demo.trainer import Step

__all__ = ["DemoOutcome", "Kill", "ServerKill", "draw", "make_report", "problems", "write"]

#: Steps at each end that the reward is averaged over.
EDGE_STEPS = 5
#: The reward that runs are compared by, and over how many steps it is averaged.
TARGET = 0.7
SMOOTH_STEPS = 10
#: Of the tokens whose log-probability is the evidence of who made them.
MIN_APART = 0.5


@dataclass(frozen=True, slots=True)
class Kill:
    """A worker that was killed with -9."""

    step: int
    killed: str
    started: str
    #: Leases that it held, just before.
    leases: int


@dataclass(frozen=True, slots=True)
class ServerKill:
    """An inference server that was killed with -9, and the one that was registered for it."""

    step: int
    killed: str
    started: str
    #: From the kill to the new one's registration.
    seconds: float


@dataclass(frozen=True, slots=True)
class DemoOutcome:
    """All that a run leaves."""

    seed: int
    workers: int
    staleness_bound: int
    #: The staleness policy, and whether it keeps the bound or only reports.
    policy: str
    bounded: bool
    steps: Sequence[Step]
    books: Books
    audit: Audit
    kills: Sequence[Kill]
    exit_codes: Mapping[str, int | None]
    #: Name and version.
    redis: str
    #: From the start of the warm start on.
    seconds_total: float
    #: None: as many as it took.
    wanted_steps: int | None
    #: "tiny" or "vllm".
    engine: str = "tiny"
    server_kills: Sequence[ServerKill] = ()
    #: Tokens that each server has made by its own count; -1: it was killed.
    server_tokens: Mapping[str, int] = field(default_factory=dict)


def make_report(outcome: DemoOutcome) -> dict[str, Any]:
    """The report, in types that JSON knows."""
    steps, books, found = outcome.steps, outcome.books, outcome.audit
    rewards = [step.reward for step in steps]
    return {
        "reward_first": fmean(rewards[:EDGE_STEPS]),
        "reward_last": fmean(rewards[-EDGE_STEPS:]),
        "steps": len(steps),
        "submitted": books.submitted,
        "committed": books.committed,
        "dropped": books.dropped,
        "dead": books.dead,
        "waiting": books.waiting,
        "in_flight": books.in_flight,
        "ready": books.ready,
        "delayed": books.delayed,
        "handed_out": books.handed_out,
        "trained": books.trained,
        "duplicates_trained": found.duplicates,
        "max_staleness_trained": found.max_staleness,
        "staleness_bound": outcome.staleness_bound,
        "policy": outcome.policy,
        "bounded": outcome.bounded,
        "tokens": sum(step.tokens for step in steps),
        "seconds": steps[-1].at_s,
        "workers": outcome.workers,
        "raw": {**books.raw, "counters": books.counters},
        # Beyond what is asked for.
        "seed": outcome.seed,
        "wanted_steps": outcome.wanted_steps,
        "samples_trained": found.rows,
        "fabricated_trained": found.fabricated,
        "mislabelled_tokens": found.mislabelled_tokens,
        "wrong_rewards": found.wrong_rewards,
        "mixed_version_samples": found.mixed,
        "ambiguous_samples": found.ambiguous,
        "worst_staleness": found.worst_staleness,
        "tokens_made": found.tokens_made,
        "staleness": _histogram(found.staleness),
        "to_target": _to_target(steps),
        "seconds_total": outcome.seconds_total,
        "seconds_of_a_step": {
            part: fmean(getattr(step, f"{part}_s") for step in steps)
            for part in ("wait", "train", "publish")
        },
        "kills": [asdict(kill) for kill in outcome.kills],
        "engine": outcome.engine,
        "server_kills": [asdict(kill) for kill in outcome.server_kills],
        "server_tokens": dict(outcome.server_tokens),
        "witness": found.witness,
        "largest_gap": found.largest_gap,
        "told_apart": found.told_apart,
        "worker_exit_codes": dict(outcome.exit_codes),
        "redis": outcome.redis,
        "curve": [
            {
                "step": step.number,
                "version": step.version,
                "reward": step.reward,
                "staleness": _histogram(found.by_step.get(step.number, Counter())),
                "seconds": step.at_s,
            }
            for step in steps
        ],
    }


def _histogram(counts: Mapping[int, int]) -> dict[str, int]:
    return {str(age): counts[age] for age in sorted(counts)}


def _to_target(steps: Sequence[Step]) -> dict[str, float] | None:
    """When the reward, averaged over some steps, first reached the target; None if never."""
    for end in range(SMOOTH_STEPS, len(steps) + 1):
        if fmean(step.reward for step in steps[end - SMOOTH_STEPS : end]) >= TARGET:
            samples = sum(step.samples for step in steps[:end])
            return {
                "reward": TARGET,
                "step": end,
                "seconds": steps[end - 1].at_s,
                "samples": samples,
            }
    return None


def problems(report: Mapping[str, Any]) -> list[str]:
    """What is wrong, in words; nothing if all is well."""
    places = ("waiting", "delayed", "in_flight", "ready", "handed_out", "trained", "committed")
    placed = sum(report[name] for name in places) + sum(report["dropped"].values()) + report["dead"]
    wrong = []
    if placed != report["submitted"]:
        wrong.append(f"the books do not balance: {report['submitted']} submitted, {placed} placed")
    for name, what in (
        ("duplicates_trained", "rows were trained on twice"),
        ("fabricated_trained", "rows were trained on that the server never made"),
        ("mislabelled_tokens", "tokens bear a version that did not make them"),
        ("wrong_rewards", "rewards are not what the task gives"),
    ):
        if report[name]:
            wrong.append(f"{report[name]} {what}")
    if report["bounded"] and report["max_staleness_trained"] > report["staleness_bound"]:
        wrong.append(
            f"trained on a sample {report['max_staleness_trained']} versions old, over the bound "
            f"of {report['staleness_bound']}"
        )
    if report["wanted_steps"] not in (None, report["steps"]):
        wrong.append(f"{report['steps']} steps of {report['wanted_steps']} were made")
    if report["told_apart"] < MIN_APART:
        wrong.append(
            f"only {report['told_apart']:.0%} of the tokens could be told from those of the next "
            f"weights: the audit of versions says little"
        )
    if bad := {name: code for name, code in report["worker_exit_codes"].items() if code}:
        killed = {kill["killed"] for kill in report["kills"]}
        if unexpected := {name: code for name, code in bad.items() if name not in killed}:
            wrong.append(f"workers did not end well: {unexpected}")
    if not report["reward_last"] > report["reward_first"]:
        wrong.append(
            f"the reward has not risen: {report['reward_first']:.3f} in the first steps, "
            f"{report['reward_last']:.3f} in the last"
        )
    return wrong


def write(report: Mapping[str, Any], path: Path) -> None:
    """Write the report; the file appears whole or not.

    Raises:
        OSError: The folder is not writable.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Draw the learning curve and the ages of what was trained on, as a PNG."""
    # Not by pyplot, which has global state and may look for a window system.
    from matplotlib.figure import Figure  # noqa: PLC0415  # heavy

    curve = report["curve"]
    numbers = [point["step"] for point in curve]
    rewards = [point["reward"] for point in curve]
    smooth = [fmean(rewards[max(0, at - SMOOTH_STEPS + 1) : at + 1]) for at in range(len(rewards))]
    figure = Figure(figsize=(10, 4.2), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2.2, 1))
    left.plot(numbers, rewards, color="#9db8d9", linewidth=0.8, label="a step")
    left.plot(numbers, smooth, color="#1f4e9c", linewidth=2, label=f"mean of {SMOOTH_STEPS}")
    for at, kill in enumerate(report["kills"]):
        label = None if at else "worker killed"
        left.axvline(kill["step"], color="#c0392b", linestyle="--", linewidth=1, label=label)
    left.set(xlabel="step (= version)", ylabel="reward", ylim=(0, 1), title="Reward")
    left.grid(alpha=0.3)
    left.legend(loc="upper left", frameon=False)
    ages = {int(age): count for age, count in report["staleness"].items()}
    total = sum(ages.values()) or 1
    shown = range(max([*ages, report["staleness_bound"]]) + 1)
    bars = right.bar(shown, [100 * ages.get(age, 0) / total for age in shown], color="#1f4e9c")
    right.bar_label(bars, fmt="%.1f", padding=2)
    bound = report["staleness_bound"] + 0.5
    right.axvline(bound, color="#c0392b", linestyle="--", linewidth=1, label="bound")
    right.legend(loc="upper left", frameon=False)
    right.set(
        xlabel="versions behind, oldest token",
        ylabel="% of samples",
        title="Staleness",
        xticks=shown,
    )
    right.set_ylim(top=112)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"rollfleet demo: seed {report['seed']}, {report['workers']} workers, max staleness "
        f"{report['staleness_bound']}: {report['samples_trained']:,} samples in "
        f"{report['seconds']:.0f} s",
        fontsize=11,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
