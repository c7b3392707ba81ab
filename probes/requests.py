"""Does a request that begins with an empty cache depend on the one before it? It must not."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from lab import LabError, NotChecked, Probe, Stage, Symptom, probe, rule, torch

from .generation import POSITIONS, Cache, alone, asked, gap

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from lab import Batch, History, Run, Step

# What a device does that adds in another order, as for evaluation.random. The two requests have the same shape.
NOISE = 1e-4


@probe(
    "requests",
    title="Does a request depend on the one before it?",
    cost="six passes over one row of at most 8 tokens",
    examines=True,
    seldom=True,
    stages={
        "requests.gap": Stage("experiment", "share", about="cache"),
        "requests.repeat": Stage("experiment", "share"),
    },
)
class Requests(Probe):
    """Passes one row with an empty cache, after itself and after a row of its first token.

    Records ``requests.gap``, the largest difference between the two answers over the largest logit, and
    ``requests.repeat``, the same of two answers without a cache: 0 unless something is random.
    """

    def lab_examine(self, run: Run, step: Step) -> None:
        batch = step.batch
        inputs = batch.inputs if batch is not None else None
        if "cache" not in inspect.signature(run.model.forward).parameters:
            raise NotChecked("the model takes no cache")
        if batch is None or inputs is None or inputs.dim() != 2 or inputs.is_floating_point() or inputs.shape[1] < 4:
            raise NotChecked("the model is not called with four tokens or more, [B T]")
        row = inputs[:1, :POSITIONS]
        run.model.eval()
        with torch.no_grad():
            without = [alone(run, batch, row) for _ in range(2)]
            try:
                after = [self._after(run, batch, row, before) for before in (row, row[:, :1].expand_as(row))]
            except (LabError, TypeError, AttributeError, ValueError, RuntimeError) as error:
                raise NotChecked(f"the model's cache is of another kind ({type(error).__name__})") from None
        step.record("requests.repeat", gap(*without))
        step.record("requests.gap", gap(*after))

    def _after(self, run: Run, batch: Batch, row: Tensor, before: Tensor) -> Tensor:
        """What a row is answered after another, each with an empty cache."""
        run.call(asked(batch, before, Cache()))
        return run.call(asked(batch, row, Cache()))


@rule(
    "requests.leaked",
    title="A request with an empty cache does not depend on the one before",
    reads=("requests.gap", "requests.repeat"),
    basis="experiment",
)
def requests_leaked(history: History) -> Iterator[Symptom]:
    """The same tokens, with a cache that holds nothing, get the same logits: 1e-4 of the largest allows for a device.

    Not judged where the model answers otherwise without any cache, too: then it is random.
    """
    series, repeat = history.series("requests.gap").finite, history.series("requests.repeat").finite
    if not len(series) or len(repeat) != len(series):
        raise NotChecked("the outputs were not finite when it was tried")
    if bool((repeat.values > NOISE).any()):
        raise NotChecked("two answers without a cache differ: the model is random, or remembers by itself")
    if found := series.first(series.values > NOISE):
        step, seen = found
        text = f"with an empty cache, a logit moves by {seen:.2g} of the largest when another row was asked before"
        yield Symptom(at="", since=step, seen=seen, expected="0", text=text)
