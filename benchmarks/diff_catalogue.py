"""Does `lab diff` find where each fault sits, and when it began to act, from the folders of two runs alone?

    python benchmarks/diff_catalogue.py                      # every fault of the catalogue that has a site
    python benchmarks/diff_catalogue.py mask. optimizer.     # those whose ids begin so
    python benchmarks/diff_catalogue.py --explain norm.missing
    python benchmarks/diff_catalogue.py --seed 7             # in place of the scenarios' own

Each fault is run in the first scenario of the lab that uses it alone, shortened, and so is that scenario without it, at
the same seed. A fault that can begin late does, at step 2: until then nothing may differ.

A place is right by the rule of `lab matrix`: it is the one expected, holds it or is held by it, or is one of several
that were broken. What changes a value on its way from one module to the next lies between the two: the last that agrees
is right as well, and is printed with "after". A step is right when it is not before the first at which a witness saw
another bit of the training (batch, loss, gradients, weights, rate, random state, kept as they were), and not after the
first at which that was beyond rounding. Of what leaves the training as it is, it is from where it began to the first
evaluation or experiment after that. Of what only takes more work, it is the first after which that was counted; a run
is as long as its scenario where it takes that long to be sure of it.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import lab
from lab.diff import compare_folders
from lab.errors import BadInput
from lab.explain import explain
from lab.manager import discover
from lab.matrix.cells import aims
from lab.names import within
from lab.runtime.prove import scenario_of
from lab.runtime.run import find_device, run_once
from lab.runtime.start import with_start
from lab.scenario import make_faults

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lab.catalogue import Catalogue
    from lab.difference import Difference
    from lab.matrix.cells import Aim
    from lab.scenario import Scenario

STEPS, BEGINS = 6, 2
LOOKED = (0, 5)  # the steps with experiments; the last is evaluated too
BEYOND = 1e-5  # relatively: what is closer is rounding


@lab.plugin("witness", title="Keeps what a training goes through, as it is")
class Witness(lab.Plugin):
    """Keeps copies of what each step makes, to tell from which on two trainings are not the same."""

    def __init__(self) -> None:
        self.steps: list[list[list[torch.Tensor]]] = []

    def lab_before_update(self, run: lab.Run, step: lab.Step) -> None:
        """Keep what goes into the update."""
        batch = step.batch
        tensors = [] if batch is None else [x for x in (*batch.args, batch.targets) if torch.is_tensor(x)]
        rates = torch.tensor([float(group["lr"]) for group in run.optimizer.param_groups], dtype=torch.float64)
        numbers = [x for x in (step.loss, step.grad_norm, rates) if x is not None]
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in run.model.parameters()]
        made = [[x] for x in (*tensors, *numbers, torch.get_rng_state())]
        self.steps.append([[x.detach().clone() for x in each] for each in (*made, gradients)])

    def lab_step_end(self, run: lab.Run) -> None:
        """Keep what it makes."""
        if self.steps:
            self.steps[-1].append([x.detach().clone() for x in (*run.model.parameters(), *run.model.buffers())])

    def parts_from(self, other: Witness, beyond: float) -> int | None:
        """The first step at which another saw something else, by more than so much; None if it saw the same."""
        for index, (mine, others) in enumerate(zip(self.steps, other.steps, strict=True)):
            if len(mine) != len(others) or not all(_same(a, b, beyond) for a, b in zip(mine, others, strict=True)):
                return index
        return None


def _same(mine: Sequence[torch.Tensor], others: Sequence[torch.Tensor], beyond: float) -> bool:
    """Whether tensors are equal, or together no further apart than so much, relatively."""
    if all(map(torch.equal, mine, others)):
        return True
    if any(a.shape != b.shape or not a.is_floating_point() for a, b in zip(mine, others, strict=True)):
        return False
    distance = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(mine, others, strict=True))
    return distance <= beyond**2 * sum(float(a.double().square().sum()) for a in mine)


@dataclass(frozen=True)
class Found:
    """What was found of one fault.

    Attributes:
        fault: Its id.
        begun: The step from which on it was to act.
        touched: The step from which on the training has other bits; None where it never has.
        acted: The step from which on it differs beyond rounding; None where it does not.
        aim: Where it is expected.
        difference: What `lab diff` says.
    """

    fault: str
    begun: int
    touched: int | None
    acted: int | None
    aim: Aim
    difference: Difference

    @property
    def step(self) -> int | None:
        """The first step that differs: in its numbers, or else in its work."""
        return self.difference.work.step if self.difference.first is None else self.difference.first.step

    @property
    def expected(self) -> tuple[int, int] | None:
        """Between which steps the one that differs has to be; None if nothing may differ."""
        first = self.difference.first
        work = self.difference.work.amounts
        if first is None and work:
            return max(self.begun, work[0].before or 0), work[0].step
        if self.touched is not None:
            return None if self.acted is None else (self.touched, self.acted)
        if first is None:
            return None
        return self.begun, next(step for step in LOOKED if step >= self.begun)

    @property
    def place(self) -> str:
        """The place that `lab diff` tells to look at; the one before it, with "after", where only that one is right."""
        at, before = self.difference.where, self.difference.after.removesuffix(".out")
        return f"{at} after {before}" if not self._is_right(at) and self._is_right(before) else at

    @property
    def right(self) -> bool:
        """Whether both are right."""
        if self.step is None or self.expected is None:
            return False
        return self.expected[0] <= self.step <= self.expected[1] and self._is_right(self.place.split(" ")[-1])

    def _is_right(self, at: str) -> bool:
        expected = self.aim.at
        reached = bool(self.aim.reach) and within(at, self.aim.reach)
        return bool(at) and (within(at, expected) or within(expected, at) or reached)


class Twins:
    """Runs faults, each beside the healthy run of the same scenario; that of several faults is run once.

    Args:
        catalogue: Where they are found.
        folder: Where runs are kept.
        seed: In place of the scenarios' own.
    """

    def __init__(self, catalogue: Catalogue, folder: Path, seed: int | None = None) -> None:
        self.catalogue, self.folder, self.seed = catalogue, folder, seed
        self.known = aims(catalogue)
        self._healthy: dict[str, tuple[Path, Witness]] = {}
        # What no comparison reads is not measured.
        self._probes = [id for id, probe in catalogue.probes.items() if probe.info.stages]

    def compare(self, fault: str) -> Found:
        """Run a fault and its twin, for as long as it takes to act; compare their folders."""
        name, scenario = scenario_of(fault, self.catalogue)
        if self.seed is not None:
            scenario = scenario.model_copy(update={"seed": self.seed})
        found = self._compare(fault, name, with_start(scenario), STEPS)
        if found.difference.first is None and not found.difference.work.amounts:
            # So far it was as good as rounding, and acts where something is no longer finite; or it takes long to see.
            return self._compare(fault, name, with_start(scenario), scenario.steps, math.inf)
        return found

    def _compare(self, fault: str, name: str, scenario: Scenario, steps: int, beyond: float = BEYOND) -> Found:
        (section,) = scenario.fault
        late = section.model_copy(update={"from_step": BEGINS})
        scenario = scenario.model_copy(update={"steps": steps, "check": [], "probes": self._probes})
        healthy, seen = self._twin(name, scenario.model_copy(update={"fault": []}))
        try:
            begun = BEGINS
            broken, other = self._run(name, scenario.model_copy(update={"fault": [late]}))
        except BadInput as refused:
            if "from_step" not in str(refused):
                raise
            begun = 0
            broken, other = self._run(name, scenario.model_copy(update={"fault": [section]}))
        # Several processes are not witnessed: they show it from the step on from which it is to act.
        alone = scenario.train.ranks == 1
        touched, acted = (other.parts_from(seen, least) if alone else begun for least in (0.0, beyond))
        return Found(fault, begun, touched, acted, self.known[fault], compare_folders(broken, healthy).found)

    def _twin(self, name: str, scenario: Scenario) -> tuple[Path, Witness]:
        about = {"title", "about", "project", "expect", "learn"}
        key = scenario.model_dump_json(exclude=about)
        if key not in self._healthy:
            self._healthy[key] = self._run(name, scenario)
        return self._healthy[key]

    def _run(self, name: str, scenario: Scenario) -> tuple[Path, Witness]:
        folder, witness = self.folder / f"run-{len([*self.folder.iterdir()])}", Witness()
        faults = make_faults(scenario, self.catalogue, name)
        tools = [witness] if scenario.train.ranks == 1 else []
        run_once(name, scenario, self.catalogue, folder, faults, find_device("cpu"), tools)
        return folder, witness


def placed(catalogue: Catalogue) -> list[str]:
    """The faults of which a place is expected."""
    return sorted(id for id, aim in aims(catalogue).items() if aim.at and id in catalogue.faults)


def compare_all(chosen: Sequence[str], catalogue: Catalogue, seed: int | None) -> Iterator[Found]:
    """Yield what is found of each."""
    with tempfile.TemporaryDirectory(prefix="lab-diff-") as folder:
        twins = Twins(catalogue, Path(folder), seed)
        for fault in chosen:
            yield twins.compare(fault)


def main() -> int:
    """Print the table; the status is 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", help="the beginnings of ids; by default all")
    parser.add_argument("--seed", type=int, help="in place of the scenarios' own")
    parser.add_argument("--explain", action="store_true", help="print what lab diff says of each")
    options = parser.parse_args()
    torch.set_num_threads(1)
    catalogue = discover()
    chosen = [id for id in placed(catalogue) if id.startswith(tuple(options.faults) or "")]
    wrong = 0
    print(f"{'fault':<36}{'from':>5}{'acts':>5}{'found':>6}  {'site':<24}found")
    for found in compare_all(chosen, catalogue, options.seed):
        wrong += not found.right
        told = "" if found.right else "  WRONG"
        acts = "-" if found.expected is None else "-".join(str(step) for step in dict.fromkeys(found.expected))
        step = "-" if found.step is None else found.step
        line = (
            f"{found.fault:<36}{found.begun:>5}{acts:>5}{step:>6}  {found.aim.at:<24}{found.place or 'no difference'}"
        )
        print(line + told, flush=True)
        if options.explain:
            print(f"    {explain(found.difference)}")
    print(f"{len(chosen) - wrong} of {len(chosen)} at their step and place, {wrong} wrong")
    return 0 if not wrong else 1


if __name__ == "__main__":
    sys.exit(main())
