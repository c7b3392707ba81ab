"""Memory: of the process, of the tensors that training keeps, and of what it should have let go."""

from __future__ import annotations

import gc
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any

from lab import NotChecked, Probe, Stage, Symptom, probe, rule, torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from lab import History, Run, Step

# A step that is over needs neither its graph nor its logits. Some are left for a while by a variable that still names
# them, or by a short window of the last losses; those of this many steps together are left by a list that grows.
KEPT = 16


@probe(
    "memory",
    title="Bytes held by the process and by weights, gradients and optimiser",
    every=10,
    cost="none",
    stages={
        "memory.weights": Stage("work", "exact", about="model", says="bytes of weights"),
        "memory.gradients": Stage("work", "exact", about="gradients", says="bytes of gradients"),
        "memory.optimizer": Stage("work", "exact", about="optimizer", says="bytes that the optimiser keeps"),
    },
)
class Memory(Probe):
    """Adds up what is held.

    Records ``memory.process`` (resident bytes), ``memory.weights``, ``memory.gradients``, ``memory.optimizer``,
    and on CUDA ``memory.device`` (bytes allocated) and ``memory.device_peak``.
    """

    def lab_start(self) -> None:
        import psutil

        self._process = psutil.Process()

    def lab_step_end(self, run: Run, step: Step) -> None:
        if not self.due(step):
            return
        params = list(run.parameters.values())
        state = (value for kept in run.optimizer.state.values() for value in kept.values())
        step.record("memory.process", self._process.memory_info().rss)
        step.record("memory.weights", _bytes(params))
        step.record("memory.gradients", _bytes([p.grad for p in params if p.grad is not None]))
        step.record("memory.optimizer", _bytes([value for value in state if torch.is_tensor(value)]))
        if run.device.type == "cuda":
            step.record("memory.device", torch.cuda.memory_allocated(run.device))
            step.record("memory.device_peak", torch.cuda.max_memory_allocated(run.device))


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


class _Token:
    """Lives as long as the graph that it is laid into."""


@probe(
    "kept",
    title="How many earlier steps still have their graph, or their logits, in memory?",
    cost="none",
    stages={
        "memory.graphs": Stage("work", "growing", says="earlier steps whose graph is kept"),
        "memory.logits": Stage("work", "growing", says="earlier steps whose logits are kept"),
    },
)
class Kept(Probe):
    """Notes each step's logits without holding them, and asks later which are still there.

    Records ``memory.graphs``, of how many of the last 32 steps the graph lives on; and where each token has logits
    ``memory.logits``, of how many of them these do.
    """

    def lab_start(self) -> None:
        self._graphs: deque[weakref.ref[_Token]] = deque(maxlen=2 * KEPT)
        self._values: deque[Any] = deque(maxlen=2 * KEPT)
        self._swept = False

    def lab_step_end(self, step: Step) -> None:
        if step.logits is None:
            return
        self._forget()
        if max(len(self._graphs), len(self._values)) >= KEPT and not self._swept:
            gc.collect()  # what only a cycle holds is garbage that nobody has fetched yet; asked for once in a run
            self._swept = True
            self._forget()
        if step.logits.grad_fn is not None:
            step.record("memory.graphs", len(self._graphs))
            self._graphs.append(_laid_into(step.logits))
        if step.logits.dim() > 2:
            step.record("memory.logits", len(self._values))
            storage = step.logits.untyped_storage()
            self._values.append(torch.multiprocessing.reductions.StorageWeakRef(storage))  # type: ignore[no-untyped-call]

    def _forget(self) -> None:
        self._graphs = deque((ref for ref in self._graphs if ref() is not None), maxlen=2 * KEPT)
        self._values = deque((ref for ref in self._values if not ref.expired()), maxlen=2 * KEPT)


def _laid_into(value: Tensor) -> weakref.ref[_Token]:
    """Lay a token into the graph of a tensor, with which it dies; return a reference that does not hold it."""
    token = _Token()
    assert value.grad_fn is not None
    notes: Any = value.grad_fn.metadata
    notes["lab.kept"] = token
    return weakref.ref(token)


@rule(
    "memory.graphs",
    title="The graph of a step is gone when the next has ended",
    reads=("memory.graphs",),
    basis="experiment",
)
def memory_graphs(history: History) -> Iterator[Symptom]:
    """After its backward pass a graph is of no more use; 16 of earlier steps at a time are held by something."""
    series = history.series("memory.graphs")
    if found := series.first(series.values >= KEPT):
        step, seen = found
        text = f"at step {step} the graphs of {seen:.0f} earlier steps are still in memory"
        yield Symptom(at="", since=step, seen=seen, expected="0 or 1", text=text)
    elif not len(series) or series.steps[-1] - series.steps[0] < KEPT:
        raise NotChecked(f"too few steps: it takes {KEPT} to see memory grow")


@rule(
    "memory.logits",
    title="The logits of a step are gone when the next has ended",
    reads=("memory.logits",),
    basis="experiment",
)
def memory_logits(history: History) -> Iterator[Symptom]:
    """Scores for every token are of no use after the update that they led to; those of 16 steps are kept by something.

    Where a step has one row of scores for each example, they may be gathered on purpose, and this is not asked.
    """
    series = history.series("memory.logits")
    if found := series.first(series.values >= KEPT):
        step, seen = found
        text = f"at step {step} the logits of {seen:.0f} earlier steps are still in memory"
        yield Symptom(at="", since=step, seen=seen, expected="0 or 1", text=text)
    elif not len(series) or series.steps[-1] - series.steps[0] < KEPT:
        raise NotChecked(f"too few steps: it takes {KEPT} to see memory grow")
