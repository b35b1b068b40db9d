"""Hunts the planted bugs: for each promise a scene in which its mutant must be caught.

- The same scene without the mutant must be judged clean, or the catch would prove nothing; the
  fault matrix and the storm are those scenes.
"""

import time
from collections.abc import Callable, Sequence

from chaos.harness import Stage
from chaos.mutants import MEND, MUTANTS
from chaos.oracle import Verdict

__all__ = ["SCENES", "catch", "hunt"]

#: How long a broken fleet may take to come to its end before it is judged as it stands.
CALM_S = 10.0


def _steady(stage: Stage) -> None:
    """Nothing happens but work."""
    stage.warm(160)


def _zombies(stage: Stage) -> None:
    """Workers are frozen past their lease, and go on."""
    stage.warm(32)
    for _ in range(3):
        frozen = stage.fleet[:1]
        for worker in frozen:
            stage.freeze_worker(worker)
        time.sleep(stage.o.lease_s + 1.5)
        for worker in frozen:
            stage.thaw_worker(worker)
        stage.warm(32)


def _resumed(stage: Stage) -> None:
    """The trainer is killed after a commit."""
    stage.warm(96)
    stage.kill_trainer()
    stage.start_trainer()
    stage.warm(96)


def _bereaved(stage: Stage) -> None:
    """A busy worker is killed."""
    stage.warm(32)
    stage.kill_worker(stage.fleet[0])
    time.sleep(stage.o.lease_s + 3.0)


def _unread(stage: Stage) -> None:
    """The trainer is away while rollouts arrive."""
    stage.warm(64)
    stage.kill_trainer()
    time.sleep(2.0)
    stage.start_trainer()
    stage.warm(32)


def _away(stage: Stage) -> None:
    """Redis is down for longer than it takes to notice."""
    stage.warm(32)
    stage.kill_redis()
    time.sleep(5.0)
    stage.restart_redis()
    stage.warm(32)


#: Scene and shape by promise.
SCENES: dict[str, tuple[Callable[[Stage], None], dict[str, object]]] = {
    "P1": (_steady, {}),
    "P2": (
        _zombies,
        {"lease_s": 1.0, "max_staleness": 8, "env": {"CHAOS_MEAN_S": "0.6"}},
    ),
    # A wide bound, or what is trained again would be too old for it.
    "P3": (_resumed, {"spv": 16, "max_staleness": 8}),
    "P4": (_steady, {"spv": 16, "max_staleness": 1, "env": {"CHAOS_MEAN_S": "0.4"}}),
    "P5": (_bereaved, {"lease_s": 1.0, "env": {"CHAOS_MEAN_S": "0.6"}}),
    "P6": (_steady, {}),
    "P7": (_steady, {"drain_s": 1.0}),
    "P8": (_unread, {}),
    "P9": (_away, {}),
    "P10": (_steady, {}),
}


def catch(promise: str, *, planted: bool = True) -> list[Verdict]:
    """Play the scene of one promise, with its mutant or without; returns all verdicts.

    Raises:
        LookupError: The product has changed so that the bug cannot be planted any more.
    """
    scene, shape = SCENES[promise]
    options = {"workers": 2, "mutant": promise if planted else "", **shape}
    with Stage(**options) as stage:
        try:
            scene(stage)
        except TimeoutError:
            if not planted:
                raise  # a broken fleet may well stand still; a sound one may not
        verdicts = stage.settle(CALM_S)
        for log in (*stage.dir.glob("*.out"), *stage.dir.glob("*.err")):
            if MEND in (text := log.read_text(errors="replace")):
                raise LookupError(text[text.index(MEND) :].splitlines()[0])
        return verdicts


def hunt(only: Sequence[str] | None = None) -> bool:
    """Hunt the mutants; whether all were caught by the promise that they break."""
    all_caught = True
    for promise in only or MUTANTS:
        verdicts = {v.promise: v for v in catch(promise)}
        caught = verdicts[promise].ok is False
        all_caught &= caught
        doc = (MUTANTS[promise].__doc__ or "").strip()
        print(f"{'caught ' if caught else 'MISSED '} {promise:>3} {doc}")
        for witness in verdicts[promise].witnesses[:1]:
            print(f"            {witness}")
    return all_caught
