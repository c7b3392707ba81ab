"""Does evaluation give the same answer twice?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab import NotChecked, Probe, Symptom, probe, rule, torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab import History, Run, Step


@probe(
    "determinism",
    title="Does evaluation give the same answer twice?",
    cost="two forward passes on two rows, on examined steps",
    examines=True,
)
class Determinism(Probe):
    """Calls the model twice in evaluation mode on the same rows, with random numbers running on between the calls.

    Records ``determinism.difference``: the largest difference of the outputs relative to their largest value.
    """

    def lab_examine(self, run: Run, step: Step) -> None:
        if step.batch is None or step.batch.inputs is None:
            raise NotChecked("the batch is not known")
        rows = step.batch.rows(2)
        run.model.eval()
        with torch.no_grad():
            first = run.call(rows)
            second = run.call(rows)
        scale = first.abs().amax().clamp_min(1e-30)
        step.record("determinism.difference", (first - second).abs().amax() / scale)


@rule(
    "evaluation.random",
    title="Evaluation gives the same answer twice",
    reads=("determinism.difference",),
    basis="experiment",
    phase="forward",
)
def evaluation_random(history: History) -> Iterator[Symptom]:
    """In evaluation mode nothing is drawn: two calls agree but for the order in which a device adds."""
    series = history.series("determinism.difference").finite
    if not len(series):
        raise NotChecked("the outputs were not finite when it was tried")
    if found := series.first(series.values > 1e-4):
        step, difference = found
        text = f"two evaluations of the same batch differ by {difference:.2g} of the largest output, at step {step}"
        yield Symptom(at="", since=step, seen=difference, expected="0", text=text)
