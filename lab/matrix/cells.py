"""The cells of the matrix: which faults in which project, at which seed, in which configuration.

A configuration is the project's healthy scenario, made small and varied: sizes, data, rates. Those of ``develop`` may
be looked at while rules are written; those of ``held-out`` are drawn apart from them, and are for measuring only.
"""

from __future__ import annotations

import functools
import itertools
import random
import re
from dataclasses import dataclass, replace
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
STEPS = 32
FIRST_SEED = {"develop": 0, "held-out": 10_000}
# What is drawn for a configuration. The two sets share no width, no rate and no vocabulary.
CHOICES: dict[Which, dict[str, Sequence[Any]]] = {
    "develop": {"width": (32, 64), "lr": (1e-3, 3e-3), "vocabulary": (8, 16), "batch": (8, 16), "context": (24, 32)},
    "held-out": {"width": (48, 96), "lr": (5e-4, 2e-3), "vocabulary": (12, 32), "batch": (12, 24), "context": (20, 40)},
}
LAYERS, WARMUPS, SOURCES = (2, 3, 4), (0, 5, 10), ("markov", "markov", "arithmetic", "python-docs")
# Drawn for a healthy run beside these, where the project leaves it open: what an engineer may choose, and be right.
OPEN: dict[str, Sequence[Any]] = {
    "layers": (1, 1, 2, 2, 3, 4, 6, 12),
    "tied": (False, True),
    "norm": ("layer", "rms"),
    "norm_at": ("pre", "pre", "post"),
    "activation": ("gelu", "relu", "gelu-tanh", "silu", "swiglu"),
    "positions": ("learned", "sinusoidal", "rope", "alibi"),
}
OPEN_TRAINING: dict[str, Sequence[Any]] = {
    "accumulate": (1, 1, 2, 4),
    "weight_decay": (0.0, 0.01, 0.1),
    "clip": (0.5, 1.0, 1e6),
    "warmup": (0, 5, 20),
}
EARLIEST, LATEST = 3, 8  # the first step of a fault that begins late
LAYER = re.compile(r"(?<![^.])blocks\.(\d+)(?![^.])")


@dataclass(frozen=True)
class Cell:
    """One run of the matrix.

    Attributes:
        faults: Their ids; none for a healthy run.
        project: The project whose healthy scenario this is made of.
        base: That scenario.
        seed: Of the run, and of its configuration.
        which: From which of the two sets it is drawn.
        without: The cause that the diagnosis does not know in this run.
    """

    faults: tuple[str, ...]
    project: str
    base: str
    seed: int
    which: Which
    without: str = ""

    @property
    def fault(self) -> str:
        """The ids in one text; empty for a healthy run."""
        return " + ".join(self.faults)

    @property
    def key(self) -> str:
        """What tells a cell from every other."""
        without = f"/without {self.without}" if self.without else ""
        return f"{self.which}/{self.project}/{self.base}/{self.fault or 'healthy'}/{self.seed}{without}"


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

    @property
    def from_step(self) -> int:
        """The step at which it begins."""
        return int(self.section.parameters.get("from_step", 0))


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


# ---------------------------------------------------------------- which


def cells(
    catalogue: Catalogue, *, which: Which = "develop", seeds: int = 1, project: str = "", fault: str = ""
) -> Iterator[Cell]:
    """Yield the cells: for each project and seed a healthy run, then each fault.

    Several processes take seconds to start: in projects 19 and 20 only the faults of these projects are run.
    """
    known = aims(catalogue)
    for id, base in _bases().items():
        if project and id != project:
            continue
        several = _several(base)
        for seed in _seeds(which, seeds):
            yield Cell((), id, base, seed, which)
            for name, aim in known.items():
                if (not fault or name == fault) and (not several or aim.project == id):
                    yield Cell((name,), id, base, seed, which)


def drawn(cells: Sequence[Cell], share: float) -> list[Cell]:
    """Keep the healthy runs, and of the others a share, drawn at random and the same each time."""
    broken = [cell for cell in cells if cell.faults]
    draw = random.Random(f"share {len(broken)}")  # noqa: S311 - no secret
    kept = set(draw.sample(broken, round(share * len(broken))))
    return [cell for cell in cells if not cell.faults or cell in kept]


def healthy_cells(count: int, which: Which = "develop") -> Iterator[Cell]:
    """Yield so many healthy runs, of all projects in turn."""
    turns = ((id, base, seed) for seed in _seeds(which, count) for id, base in _bases().items())
    for id, base, seed in itertools.islice(turns, count):
        yield Cell((), id, base, seed, which)


def pair_cells(catalogue: Catalogue, count: int, which: Which = "develop") -> Iterator[Cell]:
    """Yield so many pairs of faults of different causes, each after its two faults alone in the same configuration.

    The configuration is that of the sweep, in the project of the first, so that each alone need not be run again. Both
    must act in one process. Whether they are compatible is known when each was run (`lab.matrix.report.compatible`).
    """
    known = aims(catalogue)
    draw = random.Random(f"pairs {which}")  # noqa: S311 - no secret
    single = [name for name, aim in known.items() if not _several(_bases()[aim.project])]
    pairs: set[tuple[str, str]] = set()
    while len(pairs) < count:
        first, second = draw.sample(single, 2)
        if known[first].cause == known[second].cause or (first, second) in pairs:
            continue
        pairs.add((first, second))
        project = known[first].project
        for faults in ((first,), (second,), (first, second)):
            yield Cell(faults, project, _bases()[project], FIRST_SEED[which], which)


def unknown_cells(catalogue: Catalogue, count: int, which: Which = "develop") -> Iterator[Cell]:
    """Yield runs of so many faults, each in its own project, whose cause is taken out of the diagnosis."""
    known = aims(catalogue)
    draw = random.Random(f"unknown {which}")  # noqa: S311 - no secret
    single = [name for name, aim in known.items() if not _several(_bases()[aim.project])]
    for number, name in enumerate(draw.sample(single, min(count, len(single)))):
        aim = known[name]
        yield Cell((name,), aim.project, _bases()[aim.project], FIRST_SEED[which] + number, which, aim.cause)


def _seeds(which: Which, count: int) -> range:
    return range(FIRST_SEED[which], FIRST_SEED[which] + count)


@functools.cache
def _bases() -> dict[str, str]:
    """Return the first healthy scenario of each project, in the order of the projects."""
    found = find_scenarios()
    healthy = [name for name in found if not _load(name).fault]
    bases: dict[str, str] = {}
    for entry in PROJECTS:
        bases[entry.id] = next(name for name in healthy if found[name].project == entry.id)
    return bases


def _several(base: str) -> bool:
    """Whether several processes train."""
    return _load(base).train.ranks > 1


@functools.cache
def _load(name: str) -> Scenario:
    """Read a scenario once: a matrix asks for the same few thousands of times."""
    return load_scenario(name)[1]


# ---------------------------------------------------------------- how


def configured(cell: Cell, used: Sequence[Aim] = ()) -> Scenario:
    """Return the scenario of a cell: its base, small and varied, with the faults as they are used here."""
    base = _load(cell.base)
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
        if not cell.faults and _is_open(base):
            model |= {name: draw.choice(options) for name, options in OPEN.items()}
            train |= {name: draw.choice(options) for name, options in OPEN_TRAINING.items()}
    about = {"seed": cell.seed, "steps": STEPS, "fault": [aim.section for aim in used], "check": []}
    parts = {"data": type(base.data)(**data), "train": type(base.train)(**train)}
    if not base.train.start:
        parts["model"] = type(base.model)(**model)
    return with_start(base.model_copy(update={**about, **parts}))


def _is_open(base: Scenario) -> bool:
    """Whether the parts of the model are not what the project is about: a plain decoder in one process."""
    plain = base.model.model_dump(exclude_defaults=True).keys() <= {"layers", "width", "heads", "context"}
    return plain and base.train.objective == "next-token" and base.train.ranks == 1 and base.model.layers > 0


def aimed(cell: Cell, aim: Aim, *, late: bool = True) -> Aim:
    """Return how a fault is used in a cell: in a layer and from a step that are drawn, where it leaves them open.

    Args:
        cell: The run.
        aim: As its own scenario uses it.
        late: Whether it may begin later than there. A fault that acts when the run is built refuses to.
    """
    # The same alone and beside another fault.
    draw = random.Random(f"{cell.which} {cell.project} {cell.seed} {aim.section.id}")  # noqa: S311 - no secret
    begins = draw.choice((0, draw.randint(EARLIEST, LATEST)))
    layer = str(draw.randrange(max(1, configured(cell).model.layers)))
    changes: dict[str, Any] = {}
    if late and begins:
        changes["from_step"] = begins
    elif aim.from_step > LATEST:
        changes["from_step"] = LATEST
    at = aim.reach
    named = LAYER.findall(at)
    if len(named) == 1 and set(LAYER.findall(aim.at)) <= set(named):
        at = changes["at"] = LAYER.sub(f"blocks.{layer}", at)
        aim = replace(aim, at=LAYER.sub(f"blocks.{layer}", aim.at))
    return replace(aim, section=aim.section.model_copy(update=changes), reach=at)
