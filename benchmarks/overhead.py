"""What watching costs: bare and watched training steps of the same model, one after the other, in one process.

    python benchmarks/overhead.py                 # both sizes, 200 steps each
    python benchmarks/overhead.py --steps 40      # quicker, noisier
    python benchmarks/overhead.py --memory        # peak memory too, each kind in a process of its own

Prints ratios, not times: the machine may be busy. `every step` compares steps without experiments in pairs; `with
experiments` compares the sums over all steps; `all probes` has those too that `lab.watch` uses only if asked for; `with
TensorBoard` adds the event files.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import history
import torch

from lab.context import Run, Step
from lab.manager import Manager, discover
from lab.projects.backprop.component import clip_gradients, learning_rate
from lab.projects.losses.component import cross_entropy
from lab.runtime.engine import Engine
from lab.runtime.schedule import make_scheduler
from lab.scenario import DataSection, ModelSection, Scenario
from lab.session import Session
from lab.sites import sites_of

if TYPE_CHECKING:
    from collections.abc import Callable

SIZES = {"6 layers x 256": (6, 256, 8), "4 layers x 64": (4, 64, 4)}
EACH = {"6 layers x 256": 1.05, "4 layers x 64": 1.15}  # the budgets of DESIGN.md: of a step without experiments
ALL = {"6 layers x 256": 1.10, "4 layers x 64": 1.25}  # with experiments, over WHOLE steps
MEMORY, WHOLE = 1.05, 200
CONTEXT, BATCH = 128, 8


def scenario_of(size: str, steps: int) -> Scenario:
    """Return a scenario of that size on real text."""
    layers, width, heads = SIZES[size]
    model = ModelSection(layers=layers, width=width, heads=heads, context=CONTEXT)
    return Scenario(title=size, project="decoder", steps=steps, model=model, data=DataSection(batch=BATCH))


def bare(scenario: Scenario) -> Callable[[int], None]:
    """Return a training step as one would write it by hand: no hooks, no session."""
    torch.manual_seed(scenario.seed)
    engine = Engine(scenario, None)  # type: ignore[arg-type]  # only its build actions are used
    run = Run(Path(), Manager(), seed=scenario.seed)
    data = run.data = engine.lab_build_data(run)
    model = run.model = engine.lab_build_model(run)
    run.attach(model, engine.lab_build_optimizer(run), sites_of(model))
    train = scenario.train

    def step(index: int) -> None:
        run.optimizer.zero_grad(set_to_none=True)
        batch = data.batch(index, "train")
        assert batch.targets is not None
        loss = cross_entropy(model(*batch.args), batch.targets)
        loss.backward()  # type: ignore[no-untyped-call]
        clip_gradients(run.parameters.values(), train.clip)
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(index, peak=train.lr, warmup=train.warmup, total=scenario.steps)
        run.optimizer.step()

    return step


def watched(
    scenario: Scenario, folder: Path, *, tools: tuple[str, ...] = (), every: bool = False
) -> Callable[[int], bool]:
    """Return a watched step, with the probes of `lab.watch` or with every one; it tells whether it was examined."""
    catalogue = discover()
    probes = [probe for probe in catalogue.probes.values() if every or not probe.info.on_request]
    folder.mkdir(parents=True)
    run = Run(folder, Manager(), seed=scenario.seed, steps=scenario.steps, config=scenario)
    session = Session(run, catalogue)
    plugins = [catalogue.plugins[name]() for name in tools]
    for plugin in (Engine(scenario, session), *plugins, *(probe() for probe in probes)):
        run.plugins.add(plugin)
    torch.manual_seed(run.seed)
    run.data = run.hook.lab_build_data(run=run)
    run.model = run.hook.lab_build_model(run=run)
    sites = sites_of(run.model)
    sites.output = "head.out"
    run.attach(run.model, run.hook.lab_build_optimizer(run=run), sites)
    run.scheduler = make_scheduler(scenario, run.optimizer)
    session.start()

    def step(index: int) -> bool:
        now = Step(index)
        session.begin_step(now)
        run.hook.lab_step(run=run, step=now)
        session.end_step(now)
        return now.examined

    return step


def compare(size: str, steps: int) -> dict[str, history.Figure]:
    """Alternate bare and watched steps; return the ratios."""
    with tempfile.TemporaryDirectory() as folder:
        plain = bare(scenario_of(size, steps))
        seen = watched(scenario_of(size, steps), Path(folder) / "seen")
        full = watched(scenario_of(size, steps), Path(folder) / "full", every=True)
        board = watched(scenario_of(size, steps), Path(folder) / "board", tools=("tensorboard",))
        times: dict[str, list[float]] = {"bare": [], "watched": [], "full": [], "board": []}
        quiet = []
        for index in range(steps):
            for name, call in (("bare", plain), ("watched", seen), ("full", full), ("board", board)):
                begun = time.perf_counter()
                examined = call(index)
                times[name].append(time.perf_counter() - begun)
                if name == "watched" and not examined and index >= 3:
                    quiet.append(index)
    each = {name: [times[name][i] / times["bare"][i] for i in quiet] for name in ("watched", "full")}
    total = {name: sum(values[3:]) for name, values in times.items()}
    whole = {name: seconds / total["bare"] for name, seconds in total.items()}
    return {
        "bare step, ms": history.figure([1e3 * seconds for seconds in times["bare"]]),
        "every step": history.figure(each["watched"], EACH[size]),
        "with experiments": history.single(whole["watched"], ALL[size] if steps == WHOLE else None),
        "every step, all probes": history.figure(each["full"]),
        "with experiments, all probes": history.single(whole["full"]),
        "with TensorBoard": history.single(whole["board"]),
    }


def peak(size: str, kind: str, steps: int) -> float:
    """Train in this process; return its peak memory in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        scenario = scenario_of(size, steps)
        step = bare(scenario) if kind == "bare" else watched(scenario, Path(folder) / "run")
        for index in range(steps):
            step(index)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def peak_in_child(size: str, kind: str) -> float:
    """Train in a process of its own; return its peak memory in bytes."""
    command = [sys.executable, __file__, "--peak", size, kind]
    return float(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--size", choices=list(SIZES))
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        size, kind = options.peak
        print(peak(size, kind, 24))
        return
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {threads} threads, batch {BATCH} x {CONTEXT}, {options.steps} steps", flush=True)
    for size in [options.size] if options.size else SIZES:
        figures = compare(size, options.steps)
        if options.memory:
            figures["peak memory"] = history.single(
                peak_in_child(size, "watched") / peak_in_child(size, "bare"), MEMORY
            )
        named = {f"{size}: {name}": figure for name, figure in figures.items()}
        history.tell("overhead", {"steps": options.steps, "size": size}, named)


if __name__ == "__main__":
    main()
