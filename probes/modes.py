"""Training and evaluation mode: in which of the two is what depends on it, when weights change and when they do not?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab import NotChecked, Probe, Stage, Symptom, probe, rule, torch
from lab import numpy as np

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from torch import Tensor, nn

    from lab import History, Run, Step

UPDATES = 3  # in a row and up to now: one or two may be a lesson of another kind
NONE = "no module of this model depends on its mode"


@probe(
    "modes",
    title="Is the model in training mode when it trains, and in evaluation mode when it is evaluated?",
    stages={
        "mode.model": Stage("mode", "exact"),
        "mode.awake": Stage("mode", "exact"),
        "mode.evaluated": Stage("evaluation", "exact"),
    },
)
class Modes(Probe):
    """Asks the modules that do something else in evaluation than in training: dropout, and norms over the batch.

    Records how many there are (``mode.dependent``) and how many are in training mode when the weights are about to
    change (``mode.awake``); ``mode.model``, whether the model or a part of it is; and for each evaluation by the lab
    ``mode.evaluated``: the most that were in training mode when it called the model without gradients.
    """

    def lab_start(self, run: Run) -> None:
        self._dependent = [module for module in run.model.modules() if depends_on_mode(module)]
        self._evaluated = -1

    def _awake(self) -> int:
        return sum(module.training for module in self._dependent)

    def lab_before_update(self, run: Run, step: Step) -> None:
        step.record("mode.dependent", len(self._dependent))
        step.record("mode.awake", self._awake())
        parts = (run.model, *run.model.children())
        step.record("mode.model", float(any(part.training for part in parts)))

    def lab_forward(self, step: Step) -> Generator[None, Tensor, Tensor]:
        logits = yield
        if step.mode == "evaluate" and not torch.is_grad_enabled():
            self._evaluated = max(self._evaluated, self._awake())
        return logits

    def lab_evaluate(self, run: Run) -> Generator[None, Tensor, Tensor]:
        self._evaluated = -1
        loss = yield
        if self._evaluated >= 0:
            run.step.record("mode.evaluated", self._evaluated)
        return loss


def depends_on_mode(module: nn.Module) -> bool:
    """Whether a module of torch's own computes something else in evaluation than in training."""
    nn = torch.nn
    if isinstance(module, nn.modules.dropout._DropoutNd):  # noqa: SLF001 - the one class that all kinds of it share
        return module.p > 0
    if isinstance(module, nn.modules.batchnorm._NormBase):  # noqa: SLF001 - batch norm, and instance norm
        return module.running_mean is not None
    return isinstance(module, (nn.RNNBase, nn.MultiheadAttention)) and module.dropout > 0


@rule(
    "mode.asleep",
    title="After an evaluation, training goes on in training mode",
    reads=("mode.awake", "mode.model"),
    basis="history",
    phase="forward",
)
def mode_asleep(history: History) -> Iterator[Symptom]:
    """The model was in training mode when weights changed; then, as a whole and up to now, it is in evaluation mode.

    All modules that were in training mode have to be out of it, and the model itself too, in three updates at least.
    Batch norms that are frozen are a part of the model. A model that was never in training mode may be meant to be in
    evaluation mode, as in reinforcement learning, where one policy has to act and to learn.
    """
    awake, model = history.series("mode.awake"), history.series("mode.model").values
    if not history.last("mode.dependent") > 0:
        raise NotChecked(NONE)
    asleep = (awake.values == 0) & (model == 0)
    if np.all(asleep):
        raise NotChecked("the model is in evaluation mode from the first step on: it may be meant to be")
    up = np.flatnonzero(~asleep)
    begin = int(up[-1]) + 1
    if not awake.values[begin - 1] > 0 or len(awake) - begin < UPDATES:
        return
    step, count = int(awake.steps[begin]), int(awake.values[begin - 1])
    yield Symptom(
        at="",
        since=step,
        seen=0.0,
        expected=f"{count}",
        text=f"from step {step} on the weights change while the model is in evaluation mode; {count} modules that "
        "depend on the mode (dropout, batch norm) were in training mode until then",
    )


@rule(
    "mode.evaluated_awake",
    title="Evaluation is done in evaluation mode",
    reads=("mode.awake",),
    basis="experiment",
    phase="run",
)
def mode_evaluated_awake(history: History) -> Iterator[Symptom]:
    """Dropout or a norm over the batch is in training mode while the loss on held-out data is taken.

    Only where the lab itself evaluates: elsewhere a call without gradients may be meant to draw (Monte Carlo dropout),
    or to gather a batch norm's statistics.
    """
    if not history.last("mode.dependent") > 0:
        raise NotChecked(NONE)
    series = history.series("mode.evaluated")
    if not len(series):
        raise NotChecked("no evaluation by the lab was seen; another's may be meant to draw")
    if found := series.first(series.values > 0):
        step, count = found
        text = f"in the evaluation after step {step}, {count:.0f} modules that depend on the mode were in training mode"
        yield Symptom(at="", since=step, seen=count, expected="0", text=text)
