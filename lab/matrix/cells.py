"""The cells of the matrix: which fault in which project, at which seed, in which configuration.

A configuration is the project's healthy scenario, made small and varied: sizes, data, rates. Those of ``develop`` may
be looked at while rules are written; those of ``held-out`` are drawn apart from them, and are for measuring only.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lab.catalogue import parameters
from lab.projects import PROJECTS
from lab.runtime.start import with_start
from lab.scenario import FaultSection, Scenario, load_scenario
from lab.shelf import find_scenarios

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lab.catalogue import Catalogue

Which = Literal["develop", "held-out"]
STEPS = 30
FIRST_SEED = {"develop": 0, "held-out": 10_000}
# What is drawn for a configuration. The two sets share no width, no rate and no vocabulary.
CHOICES: dict[Which, dict[str, Sequence[Any]]] = {
    "develop": {"width": (32, 64), "lr": (1e-3, 3e-3), "vocabulary": (8, 16), "batch": (8, 16), "context": (24, 32)},
    "held-out": {"width": (48, 96), "lr": (5e-4, 2e-3), "vocabulary": (12, 32), "batch": (12, 24), "context": (20, 40)},
}
LAYERS, WARMUPS, SOURCES = (2, 3, 4), (0, 5, 10), ("markov", "markov", "arithmetic", "python-docs")


@dataclass(frozen=True)
class Cell:
    """One run of the matrix.

    Attributes:
        fault: Its id; empty for a healthy run.
        project: The project whose healthy scenario this is made of.
        base: That scenario.
        seed: Of the run, and of its configuration.
        which: From which of the two sets it is drawn.
    """

    fault: str
    project: str
    base: str
    seed: int
    which: Which

    @property
    def key(self) -> str:
        """What tells a cell from every other."""
        return f"{self.which}/{self.project}/{self.base}/{self.fault or 'healthy'}/{self.seed}"


@dataclass(frozen=True)
class Aim:
    """How a fault is used: its parameters, and where and as what it should be found, as its own scenario says.

    Attributes:
        reach: The pattern of all that it breaks.
    """

    section: FaultSection
    project: str
    cause: str
    at: str
    reach: str = ""


def aims(catalogue: Catalogue) -> dict[str, Aim]:
    """Return how each fault is used, from the first scenario that uses it alone."""
    found: dict[str, Aim] = {}
    for name in find_scenarios():
        scenario = load_scenario(name)[1]
        if len(scenario.fault) == 1 and scenario.fault[0].id in catalogue.faults:
            section = scenario.fault[0]
            fault = catalogue.faults[section.id]
            reach = section.parameters.get("at", parameters(fault)["at"].default)
            reach = reach if isinstance(reach, str) else ""
            found.setdefault(section.id, Aim(section, scenario.project, fault.info.cause, scenario.expect.at, reach))
    return found


def cells(
    catalogue: Catalogue, *, which: Which = "develop", seeds: int = 1, project: str = "", fault: str = ""
) -> Iterator[Cell]:
    """Yield the cells: for each project and seed a healthy run, then each fault.

    Several processes take seconds to start: in projects 19 and 20 only the faults of these projects are run.
    """
    known = aims(catalogue)
    for entry in PROJECTS:
        if project and entry.id != project:
            continue
        bases = [name for name, found in find_scenarios().items() if found.project == entry.id and _healthy(name)]
        for base in bases[:1]:
            several = load_scenario(base)[1].train.ranks > 1
            for number in range(seeds):
                seed = FIRST_SEED[which] + number
                yield Cell("", entry.id, base, seed, which)
                for id, aim in known.items():
                    if (not fault or id == fault) and (not several or aim.project == entry.id):
                        yield Cell(id, entry.id, base, seed, which)


def _healthy(name: str) -> bool:
    return not load_scenario(name)[1].fault


def configured(cell: Cell, aim: Aim | None) -> Scenario:
    """Return the scenario of a cell: its base, small and varied, with the fault."""
    base = load_scenario(cell.base)[1]
    draw = random.Random(f"{cell.which} {cell.project} {cell.base} {cell.seed}")  # noqa: S311 - no secret
    chosen = {name: draw.choice(options) for name, options in CHOICES[cell.which].items()}
    layers, warmup, source = draw.choice(LAYERS), draw.choice(WARMUPS), draw.choice(SOURCES)
    data, train = base.data.model_dump(), base.train.model_dump()
    train |= {"lr": chosen["lr"], "warmup": warmup, "evaluate_every": 0, "checkpoint_every": 0, "quantize": []}
    data["batch"] = chosen["batch"]
    model = base.model.model_dump()
    if not base.train.start:
        model |= {"width": chosen["width"], "context": chosen["context"]}
        model["layers"] = min(layers, 2 * base.model.layers) if base.model.layers else 0
        if base.data.tokenizer == "characters":
            data |= {"source": source, "vocabulary": chosen["vocabulary"], "order": 1}
    fault = [] if aim is None else [_begun_in_time(aim.section)]
    about = {"seed": cell.seed, "steps": STEPS, "fault": fault, "check": []}
    parts = {"data": type(base.data)(**data), "train": type(base.train)(**train)}
    if not base.train.start:
        parts["model"] = type(base.model)(**model)
    return with_start(base.model_copy(update={**about, **parts}))


def _begun_in_time(section: FaultSection) -> FaultSection:
    """Let a fault that begins late begin by the middle of these shorter runs."""
    late = section.parameters.get("from_step", 0)
    return section.model_copy(update={"from_step": min(late, STEPS // 2)}) if late else section
