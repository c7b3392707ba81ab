"""Trains several runs in rounds, to compare what they cost: in each round each run once, in turn, step by step.

Each training has a process of its own, a new one in each round. In one process a run's peak of memory would hide the
next one's, memory that one left would be the other's, threads and settings are shared, and a learner's component
stands for the lab's in all that is imported. And a process keeps for its life what it was given by chance, such as
where its memory lies, which can weigh as much as what is compared (Mytkowicz and others, 2009, "Producing wrong data
without doing anything obviously wrong"). What else the machine does changes within seconds, so the processes of a round
are there together, and take each step in turn, in an order that is drawn anew: whatever slows one slows the other.
"""

from __future__ import annotations

import multiprocessing
import random
from dataclasses import replace
from typing import TYPE_CHECKING

from lab.comparison import Trained
from lab.errors import BadInput, LabError
from lab.runtime.turns import READY, Failed, Job, take_turns

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lab.comparison import Round

SEEDS = 2**31


def train_rounds(jobs: Sequence[Job], repeats: int) -> Iterator[Round]:
    """Yield a round at a time; each has every job once, with its scenario's seed plus the number of the round.

    Raises:
        BadInput: A job names what is not there, or is for several processes.
        LabError: A process failed otherwise.
    """
    for job in jobs:
        ranks = job.scenario.train.ranks
        if ranks > 1:
            raise BadInput(f"{job.name}: train.ranks = {ranks}; only trainings of one process are compared")
    prepared: list[object] = []
    for job in jobs:
        start = job.scenario.train.start, job.uses
        if start[0] and start not in prepared:
            prepared.append(start)
            _round([replace(job, prepares=True)], random.Random(0))  # noqa: S311 - an order, not a secret
    for number in range(repeats):
        seeded = [
            replace(job, scenario=job.scenario.model_copy(update={"seed": (job.scenario.seed + number) % SEEDS}))
            for job in jobs
        ]
        yield _round(seeded, random.Random(number))  # noqa: S311 - an order, not a secret


def _round(jobs: Sequence[Job], chance: random.Random) -> Round:
    """Train each job once, in turn."""
    trainees: list[Trainee] = []
    try:
        trainees.extend(Trainee(job) for job in jobs)  # one at a time, so that what was started is ended
        waiting = [each for each in trainees if each.hear()]
        while waiting:
            chance.shuffle(waiting)
            waiting = [each for each in waiting if each.turn()]
        return [each.trained for each in trainees]
    finally:
        for each in trainees:
            each.end()


class Trainee:
    """A training in a process of its own, which is at work only in its turn.

    Attributes:
        told: What it said last: that it is ready for its turn, or what came of it.
    """

    def __init__(self, job: Job) -> None:
        context = multiprocessing.get_context("spawn")  # a new interpreter: a fork would share what this one holds
        self.job = job
        self.told: object = None
        self._connection, there = context.Pipe()
        self._process = context.Process(target=take_turns, args=(job, there), daemon=True)
        self._process.start()
        there.close()

    def turn(self) -> bool:
        """Let it work up to where it asks for its next turn; whether it does."""
        self._connection.send(None)
        return self.hear()

    def hear(self) -> bool:
        """Wait for what it says next; whether it asks for a turn.

        Raises:
            BadInput: What it was given cannot be used.
            LabError: It failed otherwise.
        """
        try:
            self.told = self._connection.recv()
        except (EOFError, OSError):
            raise LabError(f"{self.job.name}: its process ended without a word") from None
        if isinstance(self.told, Failed):
            raise (BadInput if self.told.bad else LabError)(f"{self.job.name}: {self.told.text}")
        return self.told == READY

    @property
    def trained(self) -> Trained:
        """What came of it."""
        assert isinstance(self.told, Trained)
        return self.told

    def end(self) -> None:
        """End its process, also in the middle of its work."""
        self._connection.close()
        self._process.kill()
        self._process.join()
        self._process.close()
