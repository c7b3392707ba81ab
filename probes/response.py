"""Do the first logits shrink with the weights, as what theory says of a start takes for granted? An experiment."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lab import NotChecked, Probe, probe, torch

if TYPE_CHECKING:
    from torch import Tensor

    from lab import Batch, History, Run, Step

ROWS, POSITIONS = 4, 128  # so many positions are enough
# Half the weights make at most half the logits where these are of degree 1 or more in them, and the same where they are
# of degree 0, as between vectors that are normalised. The bound lies midway, in octaves.
FOLLOWS = 0.5**0.5


@probe(
    "response",
    title="Do the first logits become smaller with the weights?",
    cost="two forward passes on four rows, or on one that is long, at step 0 only",
    examines=True,
)
class Response(Probe):
    """At step 0, calls a classifier with its weights, and with all its matrices halved; then puts them back.

    Records ``start.response``: the spread of the logits over the classes in the second call, relative to the first. Of
    a model that answers with its loss alone, it is that of what the loss has above ln V.
    """

    def lab_start(self) -> None:
        self._classes = 0

    def lab_before_update(self, step: Step) -> None:
        targets = step.batch.targets if step.batch is not None else None
        if step.index == 0 and step.logits is not None and targets is not None and not targets.is_floating_point():
            self._classes = step.logits.shape[-1] if step.logits.dim() else 0

    def lab_examine(self, run: Run, step: Step) -> None:
        if step.index or self._classes < 2 or step.batch is None:
            return
        rows = step.batch.rows(ROWS, enough=POSITIONS)
        # A table or matrix of one number is a temperature.
        matrices = [p for p in run.model.parameters() if p.dim() >= 2 and p.numel() > 1 and p.is_floating_point()]
        whole = _size(run, rows, self._classes)
        with torch.no_grad():
            for p in matrices:
                p.mul_(0.5)
        half = _size(run, rows, self._classes)
        with torch.no_grad():
            for p in matrices:
                p.mul_(2)
        if whole is not None and half is not None:
            step.record("start.response", half / whole)


def _size(run: Run, rows: Batch, classes: int) -> Tensor | None:
    """How large the logits are, as far as the loss depends on it; None where the model answers something else."""
    devices = [run.device] if run.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices):  # the same dropout in each call
        out = run.call(rows).double()
    if out.numel() == 1:
        return out.reshape(()) - math.log(classes)
    axes = [axis for axis in (-1, 1) if out.dim() >= 2 and out.shape[axis] == classes]
    return out.std(axes[0], correction=0).square().mean().sqrt() if axes else None


def need_response(history: History) -> None:
    """Require that the logits follow the weights, where a start is to be judged by how large they are.

    Raises:
        NotChecked: They do not, or nobody knows.
    """
    response = history.last("start.response")
    if not math.isfinite(response):
        raise NotChecked("the loss starts high, but whether the logits follow the size of the weights is not known")
    if response > FOLLOWS:
        raise NotChecked(
            f"with all matrices halved the logits keep {response:.0%} of their spread at step 0: they do not depend on "
            "the size of the weights as theory has it, as where vectors are normalised"
        )
