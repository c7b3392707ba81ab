"""Runs a scenario and its healthy twin, and compares both with what the file expects."""

from __future__ import annotations

import importlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from lab.catalogue import plugin_id
from lab.diagnosis.diagnose import diagnose
from lab.errors import BadInput, nearest
from lab.files import METRICS, new_folder, write_run_file
from lab.learn.component import used
from lab.projects import PROJECTS
from lab.runtime.launch import launch
from lab.runtime.start import find_start, with_start
from lab.runtime.train import train, train_start
from lab.scenario import CheckSection, Scenario, check_names, holds, make_faults
from lab.spec import measures
from lab.store import read_history

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from lab.catalogue import Catalogue, Fault, Plugin
    from lab.diagnosis.model import Diagnosis
    from lab.spec import Measure
    from lab.store import History

TWIN = "twin"
MEASURE = "measure."  # a metric of the project's own: a number that theory knows, measured on the component


@dataclass(frozen=True)
class Check:
    """A metric that was checked: what a scenario asked for, what was seen, and whether that is as it should be."""

    metric: str
    at: str
    is_: str
    on: str
    value: float | None
    twin_value: float | None
    passed: bool

    def to_dict(self) -> dict[str, Any]:
        """Give this as JSON types."""
        names = {"metric": self.metric, "at": self.at, "is": self.is_, "on": self.on}
        return {**names, "value": self.value, "twin_value": self.twin_value, "passed": self.passed}


@dataclass(frozen=True)
class Outcome:
    """A scenario that was run."""

    folder: Path
    scenario_id: str
    scenario: Scenario
    diagnosis: Diagnosis
    checks: tuple[Check, ...]
    as_expected: bool
    differences: tuple[str, ...]
    seconds: float
    facts: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Give this as JSON types: the object that ``lab run --json`` prints."""
        return {
            "run": str(self.folder),
            "scenario": self.scenario_id,
            **self.diagnosis.to_dict(),
            "checks": [check.to_dict() for check in self.checks],
            "as_expected": self.as_expected,
            "differences": list(self.differences),
            "seconds": round(self.seconds, 3),
        }


def run_scenario(
    scenario_id: str,
    scenario: Scenario,
    catalogue: Catalogue,
    folder: Path,
    *,
    device: str = "cpu",
    twin: bool = True,
    tools: Callable[[], Sequence[Plugin | type[Plugin]]] = list,
    resume: bool = False,
) -> Outcome:
    """Run a scenario in `folder`, then its healthy twin: the same file and seed without the faults.

    Args:
        scenario_id: What the run is called.
        scenario: The file, read.
        catalogue: Where faults, probes, rules and causes are found.
        folder: Where to keep the run. It must not hold one already.
        device: Any that torch knows.
        twin: Whether to run the twin too, where there are faults.
        tools: Gives the links to other tools, or their classes, anew for each of the two.
        resume: Whether to go on with the run in `folder`, from its last checkpoint.

    Raises:
        BadInput: Something that the scenario names is not there.
        FaultFailed: A fault raised.
    """
    begun = time.monotonic()
    scenario = with_start(scenario)
    check_names(scenario, catalogue, scenario_id)
    check_measures(scenario, scenario_id)
    check_rows(scenario)
    faults = make_faults(scenario, catalogue, scenario_id)
    place = find_device(device)
    if faults and twin and not resume and (folder / TWIN / METRICS).exists():
        raise BadInput(f"{folder / TWIN}: holds a run already; choose another --out")  # before the first of the two
    diagnosis, history = run_once(scenario_id, scenario, catalogue, folder, faults, place, tools(), resume=resume)
    twin_history = None
    if faults and twin:
        twin_scenario = scenario.model_copy(update={"fault": []})
        twin_name = f"{scenario_id} (twin)"
        _, twin_history = run_once(
            twin_name, twin_scenario, catalogue, folder / TWIN, [], place, tools(), resume=resume
        )
    checks = tuple(_check(section, scenario, history, twin_history) for section in scenario.check)
    differences = tuple(_differences(scenario, diagnosis, checks))
    seconds = time.monotonic() - begun
    facts = dict(history.facts)
    return Outcome(folder, scenario_id, scenario, diagnosis, checks, not differences, differences, seconds, facts)


def run_once(
    name: str,
    scenario: Scenario,
    catalogue: Catalogue,
    folder: Path,
    faults: list[Fault],
    device: torch.device,
    tools: Sequence[Plugin | type[Plugin]],
    *,
    resume: bool = False,
    shown: Scenario | None = None,
) -> tuple[Diagnosis, History]:
    """Run one training, watched, in this process or in several; see `run_scenario`.

    `shown` is what may be written down of it, where its faults are to stay hidden.
    """
    resume = resume and (folder / METRICS).exists()
    if resume and "ended" in (history := read_history(folder / METRICS)).facts:
        return diagnose(history, catalogue), history
    if not resume:
        new_folder(folder)
        dumped = (shown or scenario).model_dump(by_alias=True, exclude_none=True)
        write_run_file(folder, name, dumped, scenario.seed, plugins=catalogue.asked, use=used())
    if scenario.train.ranks == 1:
        diagnosis, run = train(scenario, catalogue, folder, faults, tools, device=device, resume=resume, shown=shown)
        return diagnosis, run.history
    find_start(scenario, train_start)  # once, before several processes look for it
    launch(scenario, catalogue, folder, device=str(device), tools=[*map(plugin_id, tools)], resume=resume)
    history = read_history(folder / METRICS)
    return diagnose(history, catalogue), history


def find_device(name: str) -> torch.device:
    """Return the device, after having used it once.

    Raises:
        BadInput: torch does not know it, or this machine does not have it.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()  # the way that every metric takes
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        text = str(error).strip().splitlines()[0].split(". ")[0]
        raise BadInput(f"--device {name}: not a device that can be used here ({text}); cpu always can") from None
    return device


# ---------------------------------------------------------------- what was expected


def _measures(project: str) -> dict[str, Measure]:
    """Return the numbers that a project's theory knows, by name."""
    found = next(p for p in PROJECTS if p.id == project)
    if not found.ready:
        return {}
    return {each.name: each for each in measures(importlib.import_module(f"{found.module}.measures"))}


def check_measures(scenario: Scenario, where: str) -> None:
    """Check that each ``measure.NAME`` that a scenario checks is one of its project.

    Raises:
        BadInput: One is not.
    """
    wanted = [s.metric.removeprefix(MEASURE) for s in scenario.check if s.metric.startswith(MEASURE)]
    known = _measures(scenario.project) if wanted else {}
    for name in wanted:
        if name not in known:
            raise BadInput(f"{where}: check: {scenario.project} has no measure {name!r}{nearest(name, known)}")


def check_rows(scenario: Scenario) -> None:
    """Check that a batch can be shared out as the scenario asks.

    Raises:
        BadInput: Its rows are no multiple of the processes or parts, or a pair would be parted.
    """
    rows, train = scenario.data.batch, scenario.train
    ranks = train.ranks if train.parallel == "data" else 1
    for key, count in (("ranks", ranks), ("accumulate", train.accumulate)):
        if rows % count:
            whole = f"data.batch = {scenario.data.batch}"
            raise BadInput(
                f"{whole} is no multiple of train.{key} = {count}" + (f" x {ranks}" if key != "ranks" else "")
            )
        rows //= count
    if train.objective == "dpo" and rows % 2:
        raise BadInput(f"data.batch = {scenario.data.batch}: a share of {rows} rows would part a pair of answers")


def _measured(section: CheckSection, scenario: Scenario) -> float:
    """Measure on the component itself, with a random state of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(scenario.seed)
        return _measures(scenario.project)[section.metric.removeprefix(MEASURE)](scenario.seed)


def value_of(section: CheckSection, history: History | None) -> float | None:
    """The number that a check is about; None where it was never recorded."""
    if history is None:
        return None
    values = history.series(section.metric, section.at).values
    if not len(values):
        return None
    if section.take in ("first", "last"):
        return float(values[0 if section.take == "first" else -1])
    return float(getattr(values, section.take)())


def _check(section: CheckSection, scenario: Scenario, history: History, twin: History | None) -> Check:
    """Check a metric. Where there is a twin, it must show the opposite (or the same, ``on = "both"``)."""
    broken = bool(scenario.fault)
    if section.metric.startswith(MEASURE):  # of the component, whatever happens to the run
        measured = _measured(section, scenario)
        return Check(section.metric, "", section.is_, section.on, measured, None, holds(section.is_, measured))
    value, twin_value = value_of(section, history), value_of(section, twin)
    held = value is not None and holds(section.is_, value)
    held_by_twin = twin_value is not None and holds(section.is_, twin_value)
    if not broken:
        passed = held
    elif section.on == "both":
        passed = held and (twin is None or held_by_twin)
    else:
        wanted = section.on == "broken"
        passed = held == wanted and (twin is None or held_by_twin != wanted)
    return Check(section.metric, section.at, section.is_, section.on, value, twin_value, passed)


def _differences(scenario: Scenario, diagnosis: Diagnosis, checks: tuple[Check, ...]) -> list[str]:
    """Say in what the outcome is not what the scenario expects."""
    expect = scenario.expect
    wanted = "faulty" if scenario.fault and "expect" not in scenario.model_fields_set else expect.verdict
    found = []
    if diagnosis.verdict != wanted:
        found.append(f"the verdict is {diagnosis.verdict}, expected {wanted}")
    first = diagnosis.causes[0] if diagnosis.causes else None
    if expect.cause and (first is None or first.id != expect.cause):
        found.append(f"the first cause is {first.id if first else 'unknown'}, expected {expect.cause}")
    if expect.at and (first is None or first.at != expect.at):
        found.append(f"the site blamed is {first.at if first else 'none'}, expected {expect.at}")
    if expect.by_step is not None and (first is None or first.since_step > expect.by_step):
        found.append(f"found since step {first.since_step if first else 'never'}, expected by {expect.by_step}")
    for check in checks:
        if not check.passed:
            where = f" at {check.at}" if check.at else ""
            found.append(f"{check.metric}{where} is {check.value} (twin {check.twin_value}); check: {check.is_}")
    return found
