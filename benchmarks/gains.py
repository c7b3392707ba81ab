"""What a profile says that repairing each performance fault would save, beside what repairing it saves.

    python benchmarks/gains.py                  # every performance fault that has a scenario
    python benchmarks/gains.py float64 recompute
    python benchmarks/gains.py --repeats 9      # more pairs of runs, less noise

A fault of the forward pass is run in a decoder of one layer, wide enough that a step is more than noise; each other
one in the first of the lab's scenarios that has it alone, as wide. The profile is of that run. Beside it, the run
with the fault and the run without it are timed in turn, in one process; of what is saved, the share of a step (or of
an evaluation, or a token) is compared, by the median of the pairs. Three faults are not repaired by leaving out what
they added: a product with numbers of float64 becomes one of float32, padding is cut off, and a result is used twice.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import lab
from lab.catalogue import Catalogue
from lab.manager import discover
from lab.profiling.counting import Counter
from lab.profiling.memory import Ledger
from lab.profiling.places import LOOP, Place
from lab.runtime.profile import profile_scenario
from lab.runtime.prove import scenario_of
from lab.runtime.start import with_start
from lab.runtime.train import train
from lab.scenario import FaultSection, load_scenario, make_faults

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from torch import Tensor

    from lab.catalogue import Fault
    from lab.profiling.gains import Change
    from lab.scenario import Scenario

STEPS, FIRST = 24, 4  # of a run that is timed, and the first that counts
WIDTH = 192  # so that what a step computes is more than noise
CLOSE = 0.25


@lab.plugin("stopwatch", title="How long steps take, and what they leave in memory")
class Stopwatch(lab.Plugin):
    """Times each step, evaluation and token, and reads what the process holds."""

    def __init__(self, *, memory: bool) -> None:
        self._memory = memory
        self._ledger: Ledger | None = None
        self.step: list[float] = []
        self.evaluation: list[float] = []
        self.generation: list[float] = []
        self.held: list[int] = []
        self.peak = 0

    def lab_step(self, run: lab.Run) -> Generator[None, bool, bool]:
        """Time it, or follow its memory."""
        if self._memory:
            self._ledger = self._ledger or Ledger(run.model, run.optimizer)
            counter = Counter(self._ledger)
            counter(LOOP)
            with counter:
                return (yield)
        begun = time.perf_counter()
        done = yield
        self.step.append(time.perf_counter() - begun)
        return done

    def lab_step_end(self) -> None:
        """See what is left of the step before: of this one, the logits are still there."""
        if self._ledger is not None:
            self.held.append(self._ledger.alive)

    def lab_evaluate(self, run: lab.Run) -> Generator[None, Tensor, Tensor]:
        """Follow its memory."""
        if not self._memory:
            return (yield)
        ledger = Ledger(run.model, run.optimizer)
        before = sum(piece.size for piece in ledger.pieces)
        counter = Counter(ledger)
        counter(Place("evaluation"))
        with counter:
            loss = yield
        ledger.close()
        self.peak = max(map(sum, zip(*ledger.timeline().values(), strict=True))) - before
        return loss

    def lab_generate(self, length: int) -> Generator[None, Tensor, Tensor]:
        """Time it."""
        begun = time.perf_counter()
        tokens = yield
        self.generation.append((time.perf_counter() - begun) / length)
        return tokens

    def seconds(self, of: str) -> float:
        """Of a step, or of a token."""
        return statistics.median(self.step[FIRST:] if of == "step" else self.generation)

    def growth(self) -> float:
        """Bytes that the process takes more with each step."""
        return (self.held[-1] - self.held[FIRST]) / (len(self.held) - 1 - FIRST)


class Narrow(lab.Fault):
    """The product of `performance.float64`, in float32."""

    info = lab.catalogue.FaultInfo("benchmark.narrow", "", "", "", "")

    def lab_start(self, run: lab.Run) -> None:
        """Multiply by ones of the same format."""
        self.replace(run, f"{self.at}.out", lambda x: x * torch.ones(x.shape[-1]))


class Cut(lab.Fault):
    """The batch of `performance.padding_waste`, without the columns that are padding in every row."""

    info = lab.catalogue.FaultInfo("benchmark.cut", "", "", "", "")
    kept = 0.4

    def lab_batch(self, step: lab.Step) -> Generator[None, lab.Batch, lab.Batch]:
        """Cut it."""
        batch = yield
        if step.mode != "train" or batch.targets is None:
            return batch
        length = max(2, int(self.kept * batch.args[0].shape[1]))
        return replace(batch, args=tuple(a[:, :length] for a in batch.args), targets=batch.targets[:, :length])


class Once(lab.Fault):
    """The mean of a layer's output and of itself, as `performance.recompute` takes it, from one call of the layer."""

    info = lab.catalogue.FaultInfo("benchmark.once", "", "", "", "")

    def lab_start(self, run: lab.Run) -> None:
        """Use it twice."""
        layer = run.model.get_submodule(self.at)
        run.cleanup.callback(layer.register_forward_hook(lambda _module, _args, out: (out + out) / 2).remove)


REPAIRED: dict[str, type[Narrow | Cut | Once]] = {
    "performance.float64": Narrow,
    "performance.padding_waste": Cut,
    "performance.recompute": Once,
}


def timed(scenario: Scenario, faults: Sequence[Fault], *, memory: bool) -> Stopwatch:
    """Run a training, unwatched."""
    watch = Stopwatch(memory=memory)
    bare = scenario.model_copy(update={"steps": STEPS, "probes": []})
    with tempfile.TemporaryDirectory() as folder:
        train(bare, Catalogue(), Path(folder), faults, [watch])
    return watch


def measured(scenario: Scenario, catalogue: Catalogue, change: Change, repeats: int) -> tuple[float, float, float]:
    """The share of the time that is saved, or the bytes: predicted, measured, half the range of the middle half."""
    pairs = []
    for _ in range(repeats):
        faults = make_faults(scenario, catalogue, "gains")
        broken = timed(scenario, faults, memory=bool(change.bytes))
        repair, at = REPAIRED.get(change.cause), getattr(faults[0], "at", "")
        right = timed(scenario, [repair(at=at)] if repair else [], memory=bool(change.bytes))
        if change.bytes:
            of = "peak" if change.of == "evaluation" else "growth"
            pairs.append(broken.peak - right.peak if of == "peak" else broken.growth() - right.growth())
        else:
            pairs.append(1 - right.seconds(change.of) / broken.seconds(change.of))
    predicted = change.bytes or 1 - 1 / change.gain
    low, _, high = statistics.quantiles(pairs, n=4)
    return predicted, statistics.median(pairs), (high - low) / 2


def main() -> None:
    """Print both for each fault, and whether they are close."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", help="the last part of their ids")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    catalogue = discover()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.repeats} pairs of runs", flush=True)
    close = 0
    for fault in catalogue.faults:
        family, _, name = fault.partition(".")
        if family != "performance" or (options.faults and name not in options.faults):
            continue
        with contextlib.suppress(lab.NotChecked, lab.BadInput):
            close += _line(fault, catalogue, options.repeats)
    print(f"within {CLOSE:.0%}: {close}")


def _scenario(fault: str, catalogue: Catalogue) -> Scenario:
    """The training in which a fault is priced."""
    if not hasattr(catalogue.faults[fault], "at") or not catalogue.faults[fault].at.startswith("blocks."):
        scenario = scenario_of(fault, catalogue)[1]
        wide = scenario.model.model_copy(update={"width": WIDTH})
        return scenario if scenario.train.start else scenario.model_copy(update={"model": wide})
    decoder = load_scenario("healthy-decoder")[1]
    model = decoder.model.model_copy(update={"layers": 1, "width": WIDTH})
    return decoder.model_copy(update={"model": model, "fault": [FaultSection(id=fault)], "check": []})


def _line(fault: str, catalogue: Catalogue, repeats: int) -> bool:
    """Print a line; whether both are close."""
    scenario = with_start(_scenario(fault, catalogue))
    with tempfile.TemporaryDirectory() as folder:
        found = profile_scenario(fault, scenario, catalogue, Path(folder) / "run")
    change = next((change for change in found.changes if change.cause == fault), None)
    if change is None:
        print(f"{fault:<40} nothing is predicted", flush=True)
        return False
    predicted, seen, noise = measured(scenario, catalogue, change, repeats)
    near = abs(predicted - seen) <= CLOSE * abs(seen)
    small = abs(seen) <= noise
    verdict = "less than noise" if small else "close" if near else "NOT close"
    gains = "" if change.bytes else f"  gain {change.gain:.2f}x, {1 / (1 - seen):.2f}x"
    said = f"saves {_shown(predicted, change)} predicted, {_shown(seen, change)} measured"
    print(f"{fault:<40} {change.of:<10} {said}  {verdict}{gains}", flush=True)
    return near and not small


def _shown(saved: float, change: Change) -> str:
    return f"{saved / 2**20:8.3f} MiB" if change.bytes else f"{saved:8.1%}    "


if __name__ == "__main__":
    main()
