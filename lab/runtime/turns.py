"""One training of several that are compared: in a process of its own, and at work only when it is its turn.

Before each step, evaluation and generation the process says that it is ready, and waits. So whoever compares lets the
trainings take a step each, in any order, and no two compute at the same time.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.catalogue import Catalogue, Plugin
from lab.comparison import Trained
from lab.errors import BadInput, LabError, one_line
from lab.manager import discover
from lab.projects import PROJECTS

if TYPE_CHECKING:
    from collections.abc import Generator
    from multiprocessing.connection import Connection

    import torch
    from torch import Tensor

    from lab.context import Run, Step
    from lab.scenario import Scenario

READY = "ready"
TINY = {
    "title": "warm up",
    "project": "decoder",
    "steps": 2,
    "probes": [],
    "model": {"layers": 1, "width": 8, "heads": 1, "context": 8},
    "data": {"source": "markov", "batch": 2},
}


@dataclass(frozen=True)
class Job:
    """What a process is to train.

    Attributes:
        name: What to call it where something is wrong with it.
        scenario: What to train.
        plugins: Files and modules of plugins.
        uses: The learner's files, by the id of the project.
        device: Where the model lives.
        prepares: Whether only the model that the scenario starts from is trained, if none is kept. A process that has
            done so has memory at hand that others have to ask for.
    """

    name: str
    scenario: Scenario
    plugins: tuple[str, ...] = ()
    uses: dict[str, str] = field(default_factory=dict)
    device: str = "cpu"
    prepares: bool = False


@dataclass(frozen=True)
class Failed:
    """Why a process could not train; `bad` where what it was given is wrong."""

    text: str
    bad: bool


def take_turns(job: Job, connection: Connection) -> None:
    """Train, and send what was measured, or why it failed; the body of the process."""
    sys.stdout = sys.stderr  # what is printed here is no part of what is printed there
    try:
        connection.send(trained(job, connection))
    except LabError as error:
        connection.send(Failed(str(error), isinstance(error, BadInput)))
    except KeyboardInterrupt:
        os._exit(1)  # whoever compares says it
    except Exception as error:  # noqa: BLE001 - a plugin, or a learner's component, may raise anything
        room = "allocate" in str(error)  # torch has no error of its own for this on a CPU
        connection.send(Failed("does not fit in the memory" if room else one_line(error), room))


def trained(job: Job, connection: Connection) -> Trained:
    """Train without probes, rules and causes, turn by turn.

    Raises:
        BadInput: What the job names is not there.
        FaultFailed: A fault raised.
    """
    from lab.learn.component import use

    for project in PROJECTS:  # before the runtime is imported, which holds the components
        if project.id in job.uses:
            use(project, job.uses[project.id])
    import torch

    from lab.runtime.run import check_rows, find_device
    from lab.runtime.start import find_start, with_start
    from lab.runtime.train import train, train_start
    from lab.scenario import Scenario, make_faults

    device = find_device(job.device)
    scenario = with_start(job.scenario).model_copy(update={"probes": []})
    check_rows(scenario)
    if job.prepares:
        find_start(scenario, train_start)
        return Trained((), ())
    faults = make_faults(scenario, discover(job.plugins, Path.cwd()), job.name)
    turns = Turns(connection)
    with tempfile.TemporaryDirectory(prefix="lab-") as folder:
        warm, main = Path(folder) / "warm", Path(folder) / "main"
        warm.mkdir()
        main.mkdir()
        # What PyTorch loads when it is first used takes more memory than a small model, and is no part of it.
        train(Scenario.model_validate(TINY), Catalogue(), warm, device=device)
        before = _memory(device, begin=True)
        train(scenario, Catalogue(), main, faults, [turns], device=device)
    memory = _memory(device) - before
    times = turns.seconds
    return Trained(
        steps=times["step"],
        evaluations=times["evaluate"],
        generations=times["generate"],
        losses=turns.losses,
        held_out=turns.held_out,
        memory=memory,
        threads=torch.get_num_threads(),
    )


class Turns(Plugin):
    """Waits for the turn of each step, evaluation and generation, and takes its time."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.seconds: dict[str, list[float]] = {"step": [], "evaluate": [], "generate": []}
        self.losses: list[float] = []
        self.held_out = float("nan")

    def lab_step(self, run: Run, step: Step) -> Generator[None, bool, bool]:
        """A step of training."""
        begun = self._begin(run)
        done = yield
        self._end(run, "step", begun)
        self.losses.append(float("nan") if step.loss is None else float(step.loss.detach().mean()))
        return done

    def lab_evaluate(self, run: Run) -> Generator[None, Tensor, Tensor]:
        """An evaluation on held-out batches."""
        begun = self._begin(run)
        loss = yield
        self._end(run, "evaluate", begun)
        self.held_out = float(loss)
        return loss

    def lab_generate(self, run: Run) -> Generator[None, Tensor, Tensor]:
        """The sample that a run writes at its end."""
        begun = self._begin(run)
        tokens = yield
        self._end(run, "generate", begun)
        return tokens

    def _begin(self, run: Run) -> float:
        try:
            self.connection.send(READY)
            self.connection.recv()
        except (EOFError, OSError):
            sys.exit(1)  # whoever compares is gone
        _wait_for(run.device)
        return time.perf_counter()

    def _end(self, run: Run, kind: str, begun: float) -> None:
        _wait_for(run.device)
        self.seconds[kind].append(time.perf_counter() - begun)


def _wait_for(device: torch.device) -> None:
    """Let a device finish what it was given: it works on while the host goes on."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def _memory(device: torch.device, *, begin: bool = False) -> int:
    """Return the most bytes that were held at a time: by the process; on CUDA, by tensors there.

    With `begin`, those that are held now, from where the most is counted anew.
    """
    if device.type == "cuda":
        import torch

        if begin:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if not status.exists():
        return _memory_elsewhere(begin=begin)
    if begin:
        with contextlib.suppress(OSError):  # where that is not allowed, importing counts as well, in all alike
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew: proc(5)
    return next(1024 * int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))


def _memory_elsewhere(*, begin: bool) -> int:
    """Do the same where there is no /proc: the peak of the whole process, from which only what is held now is taken."""
    import psutil

    held: Any = psutil.Process().memory_info()
    if begin:
        return int(held.rss)
    if hasattr(held, "peak_wset"):  # Windows
        return int(held.peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
