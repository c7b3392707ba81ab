"""What the lab's own runtime says of itself: the parts of its loop, and what happens beside the steps."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lab.catalogue import Plugin
from lab.profiling.places import DATA, LOSS, WATCHING, Place, Places

if TYPE_CHECKING:
    from collections.abc import Generator

    from torch import Tensor

    from lab.context import Batch, Step

CLEAR, CLIP, SCHEDULE = Place("zero_grad"), Place("clip"), Place("schedule")


@dataclass
class Scope:
    """What happens beside the steps.

    Attributes:
        times: How long each took, in seconds.
        tokens: How many were made in them.
        passes: Of each call of the model, how many positions passed, and seconds.
    """

    times: list[float] = field(default_factory=list)
    tokens: int = 0
    passes: list[tuple[int, float]] = field(default_factory=list)

    @property
    def slope(self) -> float:
        """Seconds that a position more takes in a pass; 0 where all passes are of one length.

        The median over all pairs of passes (Theil, 1950; Sen, 1968): a pass that was interrupted moves it little.
        """
        pairs = itertools.combinations(self.passes, 2)
        return statistics.median([(b - a) / (m - n) for (n, a), (m, b) in pairs if m != n] or [0.0])


class Parts(Plugin):
    """Tells `places` which part of the loop the engine is in. In a loop that the lab did not write, it is silent.

    Attributes:
        scopes: What happened beside the steps: ``evaluation`` and ``generation``.
        aside: Seconds of this step that were beside it.
    """

    def __init__(self) -> None:
        self.scopes = {"evaluation": Scope(), "generation": Scope()}
        self.aside = 0.0
        self._places: Places | None = None

    def begins(self) -> None:
        """A step begins, as the engine counts it."""

    def _in(self, place: Place) -> contextlib.AbstractContextManager[None]:
        follows = self._places is not None and self._places.following
        return self._places.within(place) if self._places is not None and follows else contextlib.nullcontext()

    def lab_step(self) -> Generator[None, bool, bool]:
        """A step is what the engine says it is, without the lab's own work around it."""
        self.begins()
        return (yield)

    def lab_zero_grad(self) -> Generator[None, bool, bool]:
        """Clearing the gradients."""
        with self._in(CLEAR):
            return (yield)

    def lab_batch(self, step: Step) -> Generator[None, Batch, Batch]:
        """Making the batch."""
        with self._in(DATA if step.mode == "train" else WATCHING):
            return (yield)

    def lab_loss(self, step: Step) -> Generator[None, Tensor, Tensor]:
        """The loss, on its way forward."""
        with self._in(LOSS if step.mode == "train" else WATCHING):
            return (yield)

    def lab_schedule(self) -> Generator[None, float, float]:
        """The learning rate."""
        with self._in(SCHEDULE):
            return (yield)

    def lab_clip(self) -> Generator[None, Tensor, Tensor]:
        """Clipping."""
        with self._in(CLIP):
            return (yield)

    def lab_evaluate(self) -> Generator[None, Tensor, Tensor]:
        """Beside the steps."""
        begun = time.perf_counter()
        with self._in(WATCHING), self._without():
            loss = yield
        self.aside += time.perf_counter() - begun
        self.scopes["evaluation"].times.append(time.perf_counter() - begun)
        return loss

    def lab_forward(self, step: Step) -> Generator[None, Tensor, Tensor]:
        """In generation, how long a pass takes by its length."""
        begun = time.perf_counter()
        logits = yield
        if step.mode == "generate" and step.batch is not None and step.batch.inputs is not None:
            passed = step.batch.inputs.shape[-1], time.perf_counter() - begun
            self.scopes["generation"].passes.append(passed)
        return logits

    def lab_generate(self, length: int) -> Generator[None, Tensor, Tensor]:
        """Beside the steps."""
        begun = time.perf_counter()
        tokens = yield
        self.scopes["generation"].times.append(time.perf_counter() - begun)
        self.scopes["generation"].tokens += length
        return tokens

    def _without(self) -> contextlib.AbstractContextManager[Any]:
        """Nothing is followed inside: what an evaluation takes is no part of a step."""
        return contextlib.nullcontext() if self._places is None else self._places.looking_away()
