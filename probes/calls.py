"""How often one batch passes the model in a step, and what becomes of the answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lab import NotChecked, Probe, Stage, Symptom, probe, rule, torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from lab import Batch, History, Run, Site, Step

LOOKS = 3


@dataclass
class _Call:
    """A call of the model with gradients.

    Attributes:
        key: What it was called with, and the weights: equal for calls that are given the same.
        batch: Kept until the step ends, so that its memory is not given to another.
        sums: Of the rows of its answer, [...].
        wanted: Whether a backward pass reached it.
    """

    key: Any
    batch: Batch
    sums: Tensor
    wanted: bool = False

    def note(self, grad: Tensor | None) -> None:
        """A backward pass has reached it."""
        self.wanted = self.wanted or grad is not None


@probe(
    "calls",
    title="Does a batch pass the model again, for nothing?",
    every=0,
    cost="a sum over the logits",
    stages={"calls.in_vain": Stage("work", "exact", says="answers computed again, with a graph that nothing uses")},
)
class Calls(Probe):
    """Listens to what the model gives out while it builds a graph.

    Records ``calls.in_vain``: how many answers no backward pass reached, that equal one, bit for bit, that a backward
    pass reached in the same step, from the same inputs and weights. What is computed a second time within a backward
    pass, as by activation checkpointing, is not counted.
    """

    def lab_start(self, run: Run) -> None:
        self._run = run
        self._calls: list[_Call] = []
        if not run.sites.output or not self.read(run, run.sites.output, self._see):
            raise NotChecked("this model has no output that is known")

    def _see(self, _site: Site, answer: Tensor) -> None:
        batch = self._run.step.batch
        if batch is None or not answer.requires_grad or torch._C._current_graph_task_id() != -1:  # noqa: SLF001
            return
        given = [value for value in (*batch.args, *batch.kwargs.values()) if torch.is_tensor(value)]
        key = (
            tuple((v.data_ptr(), v._version, tuple(v.shape), v.stride(), v.dtype) for v in given),
            sum(p._version for p in self._run.parameters.values()),
            answer.shape,
        )
        call = _Call(key, batch, answer.detach().float().sum(-1))
        answer.register_hook(call.note)  # type: ignore[no-untyped-call]
        self._calls.append(call)

    def lab_before_update(self, step: Step) -> None:
        calls, self._calls = self._calls, []
        if not self.due(step) or not calls:
            return
        in_vain: list[Tensor] = []
        for call in calls:
            same = [other for other in calls if other.wanted and other.key == call.key]
            if not call.wanted and same:
                in_vain.append(torch.stack([(other.sums == call.sums).all() for other in same]).any())
        step.record("calls.in_vain", torch.stack(in_vain).sum() if in_vain else 0.0)


@rule(
    "calls.in_vain",
    title="No batch passes the model again to give what it gave",
    reads=("calls.in_vain",),
    basis="experiment",
)
def calls_in_vain(history: History) -> Iterator[Symptom]:
    """In three looks in a row, and until now, an answer that was there already was computed again, with a graph for it.

    No backward pass went through the second, so its graph served nothing, and its numbers are those of the first.
    """
    series = history.series("calls.in_vain")
    begin = series.until_now(series.values > 0, LOOKS)
    if begin is not None:
        step, seen = int(series.steps[begin]), float(series.values[-1])
        many = "an answer is" if seen == 1 else f"{seen:.0f} answers are"
        text = f"in each step from {step} on {many} computed again, with a graph that nothing uses"
        yield Symptom(at="", since=step, seen=seen, expected="0", text=text)
