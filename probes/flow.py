"""Can every weight learn? Neurons that are copies of each other, weights that stay 0, and units that are dead."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab import NotChecked, Probe, Symptom, probe, rule, torch
from lab import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from lab import History, Run, Step

LOOKS = 3
ALIKE = 1e-4  # of a row's norm: far above what rounding parts, far below the distance of any two rows drawn at random
COLUMNS = 8  # in fewer dimensions, many rows are close to another by chance
EARLIER = "fewer than three looks: a weight that starts at 0, or rows that start alike, may part at the first update"


@probe(
    "flow",
    title="Can every weight matrix leave where it started?",
    cost="one sort of the rows of each matrix, on examined steps",
    examines=True,
)
class Flow(Probe):
    """Looks at the weights and gradients of matrices just before an update.

    Records ``flow.size`` and ``flow.slope``, the largest element of each matrix and of its gradient, and
    ``flow.twins``: the share of its rows, each the inputs of one neuron, that equal another one and are not 0.
    """

    def lab_before_update(self, run: Run, step: Step) -> None:
        if not step.examined:
            return
        held = {n: p for n, p in run.parameters.items() if p.dim() >= 2 and p.grad is not None and not p.grad.is_sparse}
        if not held:
            return
        names = tuple(held)
        step.record_all("flow.size", names, _largest([p.detach() for p in held.values()]))
        step.record_all("flow.slope", names, _largest([g for p in held.values() if (g := p.grad) is not None]))
        for name, p in held.items():
            rows = p.detach().flatten(1)
            if rows.shape[1] >= COLUMNS and len(rows) >= 2:
                step.record("flow.twins", _twins(rows.float()), name)


def _largest(tensors: list[Tensor]) -> Tensor:
    return torch.stack([t.abs().amax().float() for t in tensors])


def _twins(rows: Tensor) -> Tensor:  # [R C] -> []
    """Sort rows by their projection on one direction: those that are equal then stand side by side."""
    direction = torch.cos(torch.arange(rows.shape[1], device=rows.device, dtype=rows.dtype) ** 2)
    ordered = rows[torch.argsort(rows @ direction)]
    norms = torch.linalg.vector_norm(ordered, dim=1)
    near = torch.linalg.vector_norm(ordered[1:] - ordered[:-1], dim=1) <= ALIKE * norms[1:]
    near &= norms[1:] > 0
    none = near.new_zeros(1)
    return (torch.cat([near, none]) | torch.cat([none, near])).float().mean()


@rule(
    "flow.twins",
    title="No layer's neurons are copies of each other",
    reads=("flow.twins", "flow.size"),
    basis="experiment",
    phase="forward",
)
def flow_twins(history: History) -> Iterator[Symptom]:
    """Neurons with equal inputs and equal gradients stay equal. Those that only start alike part at an update.

    Every look has to find all rows in company, and the weights must have moved between the first and the last. In a
    table of tokens, those that never come may stay alike; those that come part from them.
    """
    judged = False
    for name, series in history.each("flow.twins"):
        size = history.series("flow.size", name).values
        if len(series) < LOOKS or size[0] == size[-1]:
            continue
        judged = True
        if np.all(series.values == 1):
            step = int(series.steps[0])
            text = f"every row of {name} equals another one, at each of {len(series)} looks, though it moves"
            yield Symptom(at=name, since=step, seen=1.0, expected="0", text=text)
    if not judged:
        raise NotChecked(EARLIER)


@rule(
    "flow.zero",
    title="No weight matrix is 0 with a gradient of 0",
    reads=("flow.size", "flow.slope"),
    basis="experiment",
    phase="update",
)
def flow_zero(history: History) -> Iterator[Symptom]:
    """A matrix that starts at 0 on purpose has a gradient. With both at 0 in each look, it stays there."""
    judged = False
    for name, series in history.each("flow.size"):
        slope = history.series("flow.slope", name).values
        if len(series) < LOOKS:
            continue
        judged = True
        if np.all(series.values == 0) and np.all(slope == 0):
            step = int(series.steps[0])
            text = f"{name} is 0, and so is its gradient, at each of {len(series)} looks"
            yield Symptom(at=name, since=step, seen=0.0, expected="above 0, or a gradient", text=text)
    if not judged:
        raise NotChecked(EARLIER)
