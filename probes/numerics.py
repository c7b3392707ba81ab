"""Is a loss finite whose logits are? It can always be computed so."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab import NotChecked, Probe, Symptom, probe, rule, torch
from lab import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from torch import Tensor

    from lab import History, Run, Site, Step


@probe(
    "numerics",
    title="Is the loss of finite logits finite?",
    every=10,
    cost="one pass over the logits, on measured steps",
)
class Numerics(Probe):
    """Compares the loss of a classifier with what goes into it.

    In the first three steps, each tenth and those that are examined, and in those whose loss is not finite; on a GPU,
    which is not waited for, in each step.

    Records ``logits.spread``, the largest logit less the smallest (not finite where a logit is not),
    ``logits.targets``, how many targets count, and ``logits.loss``, the loss that was propagated backward.
    """

    def lab_start(self, run: Run) -> None:
        self._run = run
        self._spreads: list[Tensor] = []
        if run.sites.output:
            self.read(run, run.sites.output, self._see, always=True)

    def _see(self, _site: Site, logits: Tensor) -> None:
        if self._run.step.parts > 1:  # of several parts only the last one's logits are left at the end
            self._spreads.append(_spread(logits))

    def lab_before_update(self, step: Step) -> None:
        spreads, self._spreads = self._spreads, []
        targets = step.batch.targets if step.batch is not None else None
        if step.loss is None or step.logits is None or targets is None or targets.is_floating_point():
            return
        if self.is_finite(step.loss.sum()) and not self.due(step):
            return
        if step.loss.numel() != 1 or step.loss.dtype not in (torch.float32, torch.float64):
            return
        if step.logits.dim() < 2 or step.logits[..., 0].numel() != targets.numel():
            return
        if step.parts == 1:
            spreads = [_spread(step.logits)]
        if len(spreads) == step.parts:
            step.record("logits.spread", torch.stack(spreads).amax())
            step.record("logits.targets", (targets >= 0).sum())
            step.record("logits.loss", step.loss.reshape(()))


def _spread(logits: Tensor) -> Tensor:
    least, most = torch.aminmax(logits.detach())
    return (most - least).float()


def _broken(history: History, kind: NDArray[np.bool_]) -> tuple[int, float] | None:
    """Return the first step whose loss is not finite, and the spread of its logits, if it is of a kind.

    Only the first: a step later the weights are not finite either.
    """
    spread, loss = history.series("logits.spread"), history.series("logits.loss").values
    if not np.any(history.series("logits.targets").values > 0):
        raise NotChecked("no target counts")
    where = np.flatnonzero(~np.isfinite(loss))
    if not len(where):
        return None
    first = int(where[0])
    if not np.isfinite(spread.values[first]) or not history.series("logits.targets").values[first] > 0:
        return None
    return (int(spread.steps[first]), float(spread.values[first])) if kind[first] else None


@rule(
    "loss.infinite",
    title="The loss of finite logits is no logarithm of 0",
    reads=("logits.spread", "logits.loss"),
    basis="theory",
    phase="loss",
)
def loss_infinite(history: History) -> Iterator[Symptom]:
    """The loss is infinite, the logits are finite, and targets count.

    ``logsumexp(z) - z_target`` is at most the spread of a row's logits plus ln V: finite. The logarithm of a
    probability that was rounded to 0, or of a sum of exponentials that overflowed, is not.
    """
    if found := _broken(history, np.isinf(history.series("logits.loss").values)):
        step, spread = found
        yield Symptom(
            at="",
            since=step,
            seen=float("inf"),
            expected=f"at most {spread:.3g} + ln V",
            text=f"the loss is infinite at step {step}, where all logits are finite: no two differ by more than "
            f"{spread:.3g}, and the cross-entropy is at most that plus ln V",
        )


@rule(
    "loss.undefined",
    title="The loss of finite logits is a number",
    reads=("logits.spread", "logits.loss"),
    basis="theory",
    phase="loss",
)
def loss_undefined(history: History) -> Iterator[Symptom]:
    """The loss is NaN, the logits are finite, and targets count.

    The cross-entropy of finite logits is finite. NaN comes of 0 / 0, of 0 times infinity, or of infinity less infinity.
    """
    if found := _broken(history, np.isnan(history.series("logits.loss").values)):
        step, _ = found
        text = f"the loss is NaN at step {step}, where all logits are finite and targets count"
        yield Symptom(at="", since=step, seen=float("nan"), expected="a number", text=text)
