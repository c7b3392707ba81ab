"""Work in vain: graphs that are built where no gradient is wanted, and positions that pass more than once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab import NotChecked, Probe, Stage, Symptom, probe, rule

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from torch import Tensor

    from lab import History, Run, Step


@probe(
    "waste",
    title="What evaluation and generation compute in vain",
    cost="none",
    stages={
        "evaluation.graphs": Stage("work", "exact", about="evaluation", says="answers of an evaluation with a graph"),
        "generation.repeated": Stage("work", "exact", about="generation", says="positions passed again for each token"),
    },
)
class Waste(Probe):
    """Listens to the calls of the model in evaluation and generation.

    Records ``evaluation.graphs``, how many answers of an evaluation require a gradient; and for each token that is
    generated ``generation.repeated``: how many positions passed that had passed in the call before, as the same text
    with one token less.
    """

    def lab_start(self) -> None:
        self._graphs = self._calls = self._before = self._repeated = 0

    def lab_evaluate(self, run: Run) -> Generator[None, Tensor, Tensor]:
        self._graphs = 0
        loss = yield
        run.step.record("evaluation.graphs", self._graphs)
        return loss

    def lab_before_update(self, step: Step) -> None:
        if step.graphs:  # in a loop that the lab did not write
            step.record("evaluation.graphs", step.graphs)

    def lab_generate(self, run: Run) -> Generator[None, Tensor, Tensor]:
        self._calls = self._before = self._repeated = 0
        tokens = yield
        if self._calls:
            run.step.record("generation.repeated", self._repeated / self._calls)
        return tokens

    def lab_forward(self, step: Step) -> Generator[None, Tensor, Tensor]:
        logits = yield
        if step.mode == "evaluate":
            self._graphs += int(logits.requires_grad)
        elif step.mode == "generate":
            inputs = step.batch.inputs if step.batch is not None else None
            length = inputs.shape[1] if inputs is not None and inputs.dim() > 1 else 0
            # By its length alone: to compare the tokens would make the device wait.
            if step.batch is not None and not step.batch.kwargs and self._before and length == self._before + 1:
                self._repeated += self._before
            self._before, self._calls = length, self._calls + 1
        return logits


@rule(
    "evaluation.graphs",
    title="Evaluation builds no graph",
    reads=("evaluation.graphs",),
    basis="experiment",
)
def evaluation_graphs(history: History) -> Iterator[Symptom]:
    """No backward pass follows an evaluation, so none of its answers needs a graph."""
    series = history.series("evaluation.graphs")
    if found := series.first(series.values > 0):
        step, seen = found
        text = f"{seen:.0f} answers of the evaluation at step {step} carry a graph for gradients"
        yield Symptom(at="", since=step, seen=seen, expected="0", text=text)


@rule(
    "generation.repeated",
    title="Each position passes once while a text is generated",
    reads=("generation.repeated",),
    basis="experiment",
)
def generation_repeated(history: History) -> Iterator[Symptom]:
    """A model that takes a cache, and gives with it what it gives without, need not see a position a second time.

    Once the context is full the window slides: every position is another one than before, and has to pass again.
    """
    series = history.series("generation.repeated")
    if found := series.first(series.values > 0):
        if not history.sites("generation.cached_gap"):
            raise NotChecked("no cache was found to work with this model")
        step, seen = found
        text = f"for each new token {seen:.1f} positions passed the model again, although it takes a cache"
        yield Symptom(at="", since=step, seen=seen, expected="0", text=text)
