"""One simulated run, and what it is compared with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollfleet_console.simulate.clock import Clock
from rollfleet_console.simulate.lengths import Lengths, Lognormal, Recorded
from rollfleet_console.simulate.result import Meter, Result
from rollfleet_console.simulate.scenario import Scenario
from rollfleet_console.simulate.trainer import SimulatedTrainer

__all__ = ["Comparison", "compare", "lengths_of", "simulate"]


def lengths_of(scenario: Scenario, recorded: Path | None = None) -> Lengths:
    """Recorded lengths if a file is given, else the scenario's lognormal."""
    s = scenario
    if recorded is not None:
        return Recorded(recorded, s.tokens_per_s)
    return Lognormal(s.median_s, s.sigma, s.tokens_per_s, s.group_correlation, s.max_tokens)


def simulate(scenario: Scenario, lengths: Lengths | None = None) -> Result:
    """Run a scenario to its end.

    Raises:
        SettingsError: The scenario can not be run.
        StarvedError: A batch never came.
    """
    scenario.check()
    clock = Clock()
    meter = Meter(clock, scenario)
    meter.trainer = SimulatedTrainer(clock, scenario, lengths or lengths_of(scenario), meter)
    meter.trainer.start()
    clock.run()
    return meter.result()


@dataclass(frozen=True, slots=True)
class Comparison:
    """A run, and the same fleet training synchronously."""

    scenario: Scenario
    result: Result
    synchronous: Result
    #: Synchronous on all accelerators by turns: what publications compare with.
    colocated: Result

    @property
    def speedup(self) -> float:
        """Trained samples per hour over synchronous, with as many slots."""
        return self.result.samples_per_h / self.synchronous.samples_per_h

    @property
    def speedup_colocated(self) -> float:
        """Trained samples per hour over synchronous on all accelerators by turns."""
        return self.result.samples_per_h / self.colocated.samples_per_h

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        return {
            "scenario": self.scenario.to_json(),
            "result": self.result.to_json(),
            "synchronous": self.synchronous.to_json(),
            "colocated": self.colocated.to_json(),
            "speedup": self.speedup,
            "speedup_colocated": self.speedup_colocated,
        }


def compare(scenario: Scenario, lengths: Lengths | None = None) -> Comparison:
    """Run a scenario and its two synchronous twins."""
    return Comparison(
        scenario,
        simulate(scenario, lengths),
        simulate(scenario.synchronous(), lengths),
        simulate(scenario.colocated(), lengths),
    )
