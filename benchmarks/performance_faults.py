"""Is each fault of performance named first, with its place, and is its healthy twin silent, on a busy machine too?

    python benchmarks/performance_faults.py                     # 5 seeds, with the other cores idle and busy
    python benchmarks/performance_faults.py --seeds 1 --only loader_bound
    python benchmarks/performance_faults.py --every             # all scenarios of each fault, and not one of them

Each fault is run as a scenario of its own has it, for 24 steps from its first on, beside the same training without it.
Busy means: for each core that the process may run on but one, a process that multiplies matrices without end. All rules
rest on counts and on shares within a run, so both tables should be the same.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lab.manager import discover
from lab.runtime.run import find_device, run_once
from lab.runtime.start import with_start
from lab.scenario import load_scenario, make_faults
from lab.shelf import find_scenarios

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.synchronize import Event

    from lab.catalogue import Catalogue

FAMILY = "performance."
STEPS = 24  # waiting for batches is told after 21


@dataclass(frozen=True)
class Shown:
    """Whether a fault was named first, at its place, and alone; whether its twin was silent; and the step it began."""

    named: bool
    placed: bool
    alone: bool
    silent: bool
    since: int | None

    @property
    def right(self) -> bool:
        """Whether all is as it should be."""
        return self.named and self.placed and self.alone and self.silent


def scenarios(*, every: bool = False) -> Iterator[tuple[str, str]]:
    """Yield each fault of the family with a scenario of its own: one, in one process if there is such; or all."""
    found: dict[str, list[str]] = {}
    for name in find_scenarios():
        scenario = load_scenario(name)[1]
        if len(scenario.fault) == 1 and scenario.fault[0].id.startswith(FAMILY):
            names = found.setdefault(scenario.fault[0].id, [])
            names.insert(0 if scenario.train.ranks == 1 else len(names), name)
    for fault, names in sorted(found.items()):
        yield from ((fault, name) for name in (sorted(names) if every else names[:1]))


def show(name: str, seed: int, catalogue: Catalogue, steps: int = STEPS) -> Shown:
    """Run a scenario and its healthy twin, for so many steps from that on at which the fault begins."""
    scenario = load_scenario(name)[1]
    steps += int(scenario.fault[0].parameters.get("from_step", 0))
    scenario = with_start(scenario.model_copy(update={"seed": seed, "steps": steps}))
    cause, device = catalogue.faults[scenario.fault[0].id].info.cause, find_device("cpu")
    with tempfile.TemporaryDirectory(prefix="lab-performance-") as folder:
        faults = make_faults(scenario, catalogue, name)
        broken, _ = run_once(name, scenario, catalogue, Path(folder) / "broken", faults, device, [])
        healthy = scenario.model_copy(update={"fault": []})
        twin, _ = run_once(name, healthy, catalogue, Path(folder) / "twin", [], device, [])
    first = broken.causes[0] if broken.causes else None
    named = first is not None and first.id == cause
    return Shown(
        named,
        named and first is not None and first.at == scenario.expect.at,
        len(broken.causes) == 1 and not broken.unexplained,
        twin.verdict == "healthy" and not twin.symptoms,
        first.since_step if first is not None else None,
    )


def _multiply(begun: Event) -> None:
    torch.set_num_threads(1)
    x, parent = torch.rand(512, 512), os.getppid()
    begun.set()
    while os.getppid() == parent:  # it ends with who started it, however that ended
        x = (x @ x).clamp(0, 1)


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Have so many processes multiply while in the block."""
    context = multiprocessing.get_context("spawn")
    begun = [context.Event() for _ in range(count)]
    processes = [context.Process(target=_multiply, args=(each,), daemon=True) for each in begun]
    for process in processes:
        process.start()
    try:
        for each in begun:
            each.wait(60)
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def main() -> int:
    """Print a line for each fault, with the other cores idle and busy; the status is 1 if anything is not right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds, from 0 on")
    parser.add_argument("--only", default="", help="faults whose name contains this")
    parser.add_argument("--every", action="store_true", help="all scenarios of each fault")
    parser.add_argument("--busy", choices=("no", "yes", "both"), default="both", help="what the other cores do")
    options = parser.parse_args()
    torch.set_num_threads(1)
    catalogue = discover()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
    chosen = [pair for pair in scenarios(every=options.every) if options.only in pair[0]]
    wrong = 0
    for others in [0] * (options.busy != "yes") + [max(1, cores - 1)] * (options.busy != "no"):
        print(f"\n{others} busy processes beside this one, on {cores} cores; {options.seeds} seeds")
        print(f"{'fault':38}{'named':>7}{'placed':>7}{'alone':>7}{'silent':>7}  since")
        total = [0, 0, 0, 0]
        with busy(others):
            for fault, name in chosen:
                seen = [show(name, seed, catalogue) for seed in range(options.seeds)]
                counts = [sum(getattr(each, what) for each in seen) for what in ("named", "placed", "alone", "silent")]
                total = [a + b for a, b in zip(total, counts, strict=True)]
                wrong += sum(not each.right for each in seen)
                steps = sorted({-1 if each.since is None else each.since for each in seen})
                told = f"{fault:38}" + "".join(f"{count:>7}" for count in counts)
                print(f"{told}  {', '.join(map(str, steps))}", flush=True)
        print(f"{f'of {len(chosen) * options.seeds}':38}" + "".join(f"{count:>7}" for count in total))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
