"""Measures some steps of a training: as they are, by place, and once operator by operator."""

from __future__ import annotations

import contextlib
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lab.catalogue import plugin
from lab.errors import NotChecked
from lab.profiling.counting import Clock, Counter
from lab.profiling.machine import cores, in_threads, measure
from lab.profiling.memory import Ledger
from lab.profiling.parts import Parts
from lab.profiling.places import UPDATE, WATCHING, Place, Places
from lab.sandbox import sandbox

if TYPE_CHECKING:
    from lab.context import Run, Step
    from lab.profiling.machine import Machine

SETTLE = 3  # steps first, in which memory is allocated, and kernels are chosen
PAIRS = 6  # of steps, one as it is and one timed by place, in turn: so that both meet the same neighbours
NEEDED = SETTLE + 3 * PAIRS + 1  # steps: before each pair goes one that fills the caches again
TRIES = 5  # passes in each number of threads
TURNS = ("settle", "plain", "timed")
FORMATS = (torch.float32, torch.float64, torch.bfloat16)  # in which products are measured


@dataclass
class Timed:
    """One step, by place: seconds, and how often each was entered."""

    spent: dict[Place, float]
    entered: dict[Place, int]

    @property
    def total(self) -> float:
        """Seconds."""
        return sum(spent for place, spent in self.spent.items() if place != WATCHING)

    @property
    def evaluates(self) -> bool:
        """Whether the model was called without gradients as well."""
        return any(place.direction == "no gradient" for place in self.spent)


@plugin("profile", title="Where a step's time and memory go")
class Recorder(Parts):
    """Measures steps that nobody examines, one after the other: some in pairs, plain and timed, then one counted.

    Args:
        settle: Steps to leave out first.
        watched: Whether others look at the training as well: then steps that they examine are none to be measured.

    Attributes:
        plain: Seconds of steps that nothing was measured in.
        timed: Steps, by place.
        counter, ledger: What one step computed, and what it kept.
        machines: What was possible, before each pair of steps.
        shape: Of the first tensor of a batch.
        output: Bytes of what the model answers.
        fair: What share of its time a pass takes in as many threads as there are cores; 1 where there are as many.
    """

    def __init__(self, settle: int = SETTLE, *, watched: bool = True) -> None:
        super().__init__()
        self.settle, self.watched = settle, watched
        self.plain: list[float] = []
        self.timed: list[Timed] = []
        self.counter: Counter | None = None
        self.ledger: Ledger | None = None
        self.machines: list[Machine] = []
        self.shape: tuple[int, ...] = ()
        self.output = 0
        self.fair = 1.0
        self._open, self._counting = contextlib.ExitStack(), contextlib.ExitStack()
        self._clock: Clock | None = None
        self._begun = 0.0
        self.aside = 0.0
        self._plain: float | None = None
        self._what = ""
        self._turn = -1
        self._seen = 0

    @property
    def done(self) -> bool:
        """Whether all is measured."""
        return self.counter is not None and not self._what

    def lab_start(self, run: Run) -> None:
        """Measure the machine."""
        import psutil  # noqa: F401 - now: what is imported while PyTorch's profiler notes stacks spoils its trace

        self._places = self._open.enter_context(Places(run.model, run.compiled))
        self._next(run)

    def lab_step_end(self, step: Step) -> None:
        """Take what the step showed, unless it was to be examined."""
        seconds = time.perf_counter() - self._begun - self.aside
        what, self._what = self._what, ""
        if self._clock is not None:
            self._clock.stop()
        self._rest()
        self._seen += 1
        good = not (self.watched and step.examined)
        if what == "plain":
            self._plain = seconds if good else None
        elif what == "timed" and good and self._plain is not None:
            assert self._clock is not None
            assert self._places is not None
            self.plain.append(self._plain)
            self.timed.append(Timed(dict(self._clock.spent), dict(self._places.entered)))
        elif what == "counted":
            assert self.ledger is not None
            self.ledger.updates()
            self.ledger.close()
            if not good:
                self.counter = self.ledger = None
        inputs = step.batch.inputs if step.batch is not None else None
        if inputs is not None:
            self.shape = tuple(inputs.shape)
        if step.logits is not None:
            self.output = step.logits.numel() * step.logits.element_size()
        self._clock = None

    def lab_metrics(self, run: Run) -> None:
        """The step is over, with all that follows it: the next begins here."""
        self._next(run)

    def begins(self) -> None:
        """A step is what the engine says it is, without the lab's own work around it."""
        self._begun = time.perf_counter()
        if self._clock is not None:
            self._clock.restart()

    def lab_end(self, run: Run) -> None:
        """Let go of what the last step opened, if it never ended; try a thread for each core."""
        self._rest()
        if run.device.type == "cpu" and torch.get_num_threads() != cores():
            self.fair = _share_in_threads(run, cores())
        self._open.close()

    def lab_error(self) -> None:
        """The same, where something raised."""
        self._rest()
        self._open.close()

    def _next(self, run: Run) -> None:
        """Begin to measure the next step, if there is something left to be measured."""
        assert self._places is not None
        self._what = self._wanted()
        self.aside = 0.0
        if self._what == "settle":
            self.machines.append(measure(run.device, FORMATS))
        if self._what == "timed":
            self._clock = Clock(run.device)
            self._places.follow(self._clock)
        elif self._what == "counted":
            self.ledger = Ledger(run.model, run.optimizer)
            self.counter = Counter(self.ledger)
            self._places.follow(self._tell)
            self._counting.enter_context(self.counter)
        self._begun = time.perf_counter()

    def _rest(self) -> None:
        self._counting.close()
        if self._places is not None:
            self._places.rest()

    def _tell(self, place: Place) -> None:
        assert self.counter is not None
        assert self.ledger is not None
        if place == UPDATE:
            self.ledger.updates()
        self.counter(place)

    def _wanted(self) -> str:
        if self._seen < self.settle:
            return ""
        if len(self.timed) < PAIRS:
            self._turn = (self._turn + 1) % len(TURNS)
            return TURNS[self._turn]
        return "counted" if self.counter is None else ""

    # ---------------------------------------------------------------- what was found

    def steps(self) -> tuple[float, list[Timed]]:
        """Seconds of a plain step, and the timed ones that did nothing but train.

        Raises:
            NotChecked: The training ended too early to tell.
        """
        if not self.plain or not self.timed or self.counter is None:
            raise NotChecked(f"too few steps: it takes {NEEDED} that are not examined")
        trained = [timed for timed in self.timed if not timed.evaluates]
        return statistics.median(self.plain), trained or self.timed


def _share_in_threads(run: Run, count: int) -> float:
    """What share of its time a pass of the newest batch takes in so many threads."""
    if run.step.batch is None:
        return 1.0
    batch = run.step.batch
    times: dict[int, list[float]] = {count: [], torch.get_num_threads(): []}
    with sandbox(run.model, run.sites), torch.no_grad():
        for _ in range(TRIES + 1):
            for threads, taken in times.items():
                with in_threads(threads):
                    begun = time.perf_counter()
                    run.call(batch)
                    taken.append(time.perf_counter() - begun)
    few, many = (statistics.median(taken[1:]) for taken in times.values())  # the first in each starts its threads
    return few / many
