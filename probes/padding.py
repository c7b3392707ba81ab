"""Columns of a batch in which every row is padding: they could be cut off, and nothing would be another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab import NotChecked, Probe, Symptom, probe, rule, torch
from lab import numpy as np

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from torch import Tensor

    from lab import Batch, History, Run, Step

LOOKS = 3
TILE = 128  # columns: what padding to a multiple that suits a device may add


@probe("padding", title="Is there padding that no row needs?", every=0, cost="two passes over the tokens")
class Padding(Probe):
    """Looks for the columns of a batch that are padding in every row, where the model is told which tokens are there.

    Records ``padding.columns``, the share of the columns that are padding in every row and hold one and the same token
    (else the mask may mean the opposite), and ``padding.empty``, how many there are.
    """

    def lab_start(self) -> None:
        self._whole: Batch | None = None
        self._told = False

    def lab_batch(self, step: Step) -> Generator[None, Batch, Batch]:
        batch = yield
        if step.mode == "train":
            self._whole = batch  # parts of it have columns that the others need
        return batch

    def lab_before_update(self, run: Run, step: Step) -> None:
        batch, self._whole = self._whole or step.batch, None
        if batch is None or not self.due(step) or _fixed(run):
            return
        inputs, there = batch.inputs, _present(batch)
        if inputs is None or there is None:
            return
        self._told = True
        empty = ~there.any(0)  # [T]
        token = torch.where(empty, inputs, inputs.amin()).amax()  # of the padding, if it is all one
        alike = (~empty | (inputs == token).all(0)).all()
        count = empty.sum().double() * alike
        step.record("padding.columns", count / inputs.shape[1])
        step.record("padding.empty", count)

    def lab_examine(self, run: Run) -> None:
        if reason := _fixed(run):
            raise NotChecked(reason)
        if not self._told:
            raise NotChecked("the model is told of no padding")


def _present(batch: Batch) -> Tensor | None:  # -> [B T]
    """Which tokens are there, as the model is told."""
    inputs = batch.inputs
    if inputs is None or inputs.dim() != 2 or inputs.is_floating_point() or inputs.dtype is torch.bool:
        return None
    named = batch.kwargs.get("attention_mask")
    if torch.is_tensor(named):
        return named > 0 if named.shape == inputs.shape and named.dtype is not torch.float32 else None
    masks = [v for v in batch.args if torch.is_tensor(v) and v.dtype is torch.bool and v.shape == inputs.shape]
    return masks[0] if len(masks) == 1 else None


def _fixed(run: Run) -> str:
    """Say why shapes may have to stay as they are; empty where they need not."""
    compiled = hasattr(run.model, "_orig_mod") or getattr(run.model, "_compiled_call_impl", None) is not None
    if compiled or run.device.type not in ("cpu", "cuda"):
        return "padding may be meant: a model that is compiled wants one shape"
    return ""


@rule(
    "padding.unneeded",
    title="A batch is no wider than its longest row",
    reads=("padding.columns",),
    basis="experiment",
)
def padding_unneeded(history: History) -> Iterator[Symptom]:
    """In three looks in a row, and until now, most columns are padding in every row: without them nothing is another.

    Of padding to a multiple that suits a device no more than 128 columns are left. "Most" is a judgement: work is twice
    what it could be.
    """
    series, empty = history.series("padding.columns"), history.series("padding.empty").values
    width = np.divide(empty, series.values, out=np.zeros_like(empty), where=series.values > 0)
    # A whole tile may be needed for a single column; of a narrow batch on the CPU there is no such thing.
    needless = (series.values > 0.5) & ((empty > TILE) | (width < TILE))
    begin = series.until_now(needless, LOOKS)
    if begin is not None:
        step, share = int(series.steps[begin]), float(series.values[-1])
        text = f"{share:.0%} of the columns of a batch are padding in every row, from step {step} on"
        yield Symptom(at="", since=step, seen=share, expected="0", text=text)
