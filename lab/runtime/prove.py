"""Whether a fault does something: the metric that it names, with it and without, at matched seeds."""

from __future__ import annotations

import dataclasses
import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lab.errors import BadInput, nearest
from lab.runtime.run import find_device, run_once, value_of
from lab.runtime.start import with_start
from lab.scenario import CheckSection, Scenario, load_scenario, make_faults
from lab.shelf import find_scenarios

if TYPE_CHECKING:
    from pathlib import Path

    from lab.catalogue import Catalogue

SPREADS = 3.0  # a shift counts when it is larger than this many standard deviations of the healthy seeds


@dataclass(frozen=True)
class Proof:
    """What a fault moved.

    Attributes:
        fault, scenario: Ids.
        metric, at: What it names, and where that is read.
        healthy, broken: The value by seed, without the fault and with it; NaN where there is none.
    """

    fault: str
    scenario: str
    metric: str
    at: str
    healthy: tuple[float, ...]
    broken: tuple[float, ...]

    @property
    def spread(self) -> float:
        """The standard deviation of the healthy values over the seeds."""
        finite = [value for value in self.healthy if math.isfinite(value)]
        return statistics.stdev(finite) if len(finite) > 1 else 0.0

    @property
    def shifts(self) -> tuple[float, ...]:
        """Broken less healthy, by seed."""
        return tuple(broken - healthy for healthy, broken in zip(self.healthy, self.broken, strict=True))

    @property
    def holds(self) -> bool:
        """Whether it moved at every seed: beyond the spread, or from a finite value to one that is not."""
        if not all(map(math.isfinite, self.healthy)):
            return False  # nothing to compare with
        scale = max(map(abs, self.healthy))
        least = max(SPREADS * self.spread, 1e-6 * scale)  # what rounding does is no effect
        return all(not math.isfinite(shift) or abs(shift) > least for shift in self.shifts)

    def to_dict(self) -> dict[str, Any]:
        """Give this as JSON types."""
        names = {"fault": self.fault, "scenario": self.scenario, "metric": self.metric, "at": self.at}
        return {
            **names,
            "healthy": [*self.healthy],
            "broken": [*self.broken],
            "spread": self.spread,
            "holds": self.holds,
        }


def scenario_of(fault: str, catalogue: Catalogue) -> tuple[str, Scenario]:
    """Return the first scenario that ships with the lab and uses a fault alone, with its name.

    Raises:
        BadInput: There is no such fault, or no scenario for it.
    """
    if fault not in catalogue.faults:
        raise BadInput(f"no fault {fault!r}{nearest(fault, catalogue.faults)}")
    for name in find_scenarios():
        scenario = load_scenario(name)[1]
        if [section.id for section in scenario.fault] == [fault]:
            return name, scenario
    raise BadInput(f"{fault}: no scenario of the lab uses it; give the path of one that does with --scenario")


def prove(
    fault: str, catalogue: Catalogue, folder: Path, *, seeds: int = 3, steps: int | None = None, scenario: str = ""
) -> Proof:
    """Run a fault and its healthy twin at several seeds, and compare the metric that the fault names.

    Args:
        fault: Its id.
        catalogue: Where it is found.
        folder: Where to keep the runs.
        seeds: How many, from 0.
        steps: In place of the scenario's own.
        scenario: A scenario that uses the fault; the lab's own if empty.

    Raises:
        BadInput: There is no such fault or scenario, or the scenario does not check the fault's metric.
    """
    name, chosen = load_scenario(scenario) if scenario else scenario_of(fault, catalogue)
    chosen = with_start(chosen)
    check = check_of(fault, chosen, catalogue, name)
    if steps is not None:
        chosen = shortened(chosen, steps)
    values: dict[bool, list[float]] = {True: [], False: []}
    # Only the metric is asked about: what measures nothing else is left out.
    chosen = chosen.model_copy(update={"probes": catalogue.measuring(check.metric)})
    unjudged = dataclasses.replace(catalogue, rules={}, causes={})
    for seed in range(seeds):
        for broken in (True, False):
            asked = chosen.model_copy(update={"seed": seed} if broken else {"seed": seed, "fault": []})
            faults = make_faults(asked, catalogue, name)
            kept = folder / f"{seed}-{'broken' if broken else 'healthy'}"
            _, history = run_once(name, asked, unjudged, kept, faults, find_device("cpu"), [])
            found = value_of(check, history)
            values[broken].append(math.nan if found is None else found)
    return Proof(fault, name, check.metric, check.at, tuple(values[False]), tuple(values[True]))


def check_of(fault: str, scenario: Scenario, catalogue: Catalogue, where: str) -> CheckSection:
    """Return the check of the metric that a fault moves.

    Raises:
        BadInput: There is none, or the scenario does not use the fault.
    """
    moves = catalogue.faults[fault].info.moves
    if fault not in [section.id for section in scenario.fault]:
        raise BadInput(f"{where}: does not use {fault}")
    found = [check for check in scenario.check if check.metric == moves]
    if not found:
        raise BadInput(f"{where}: no [[check]] of {moves}, which {fault} moves")
    return found[0]


def shortened(scenario: Scenario, steps: int) -> Scenario:
    """Return a scenario of fewer steps, in which each fault begins before the last."""
    faults = [
        section.model_copy(update={"from_step": min(section.parameters["from_step"], steps // 2)})
        if "from_step" in section.parameters
        else section
        for section in scenario.fault
    ]
    return scenario.model_copy(update={"steps": min(steps, scenario.steps), "fault": faults})
