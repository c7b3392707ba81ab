"""Models that train in evaluation mode, or are evaluated in training mode, and the causes behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab import BadInput, Cause, Fault, fault, torch

if TYPE_CHECKING:
    from collections.abc import Generator

    from lab import Batch, Run, Step

EVALUATION_MODE = Cause(
    id="loop.evaluation_mode",
    title="Training goes on in evaluation mode",
    must=("mode.asleep",),
    place="loop",
    repair="Call model.train() at the top of each epoch, or after each evaluation that called model.eval(). Better: "
    "let the function that evaluates put back the mode that it found.",
    refute="model.training is True when the loss is propagated backward.",
    look="Where model.eval() is called, and whether model.train() follows before the next step.",
    source="PyTorch documentation: autograd mechanics, evaluation mode (nn.Module.eval)",
)

TRAINING_MODE = Cause(
    id="loop.training_mode",
    title="The model is evaluated in training mode",
    must=("mode.evaluated_awake",),
    place="evaluation",
    repair="Call model.eval() before the model is evaluated, and model.train() after it. torch.no_grad() does not do "
    "it: it turns gradients off, and leaves dropout and batch norm as they are.",
    refute="model.training is False while the loss on held-out data is taken.",
    look="The first lines of the function that evaluates.",
    source="PyTorch documentation: autograd mechanics, evaluation mode (nn.Module.eval)",
)


def two_modes(run: Run, fault: Fault) -> None:
    """Refuse a model that does the same in both modes, or training that the lab did not write.

    Raises:
        BadInput: It is such a one.
    """
    nn = torch.nn
    kinds = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)  # noqa: SLF001
    if run.config is None or not any(isinstance(module, kinds) for module in run.model.modules()):
        raise BadInput(f"{fault.info.id}: needs a model with dropout (model.dropout), trained by the lab")


@fault(
    "loop.evaluation_mode",
    title="model.train() is not called again after the first evaluation",
    cause="loop.evaluation_mode",
    moves="mode.awake",
    repair=EVALUATION_MODE.repair,
)
class EvaluationMode(Fault):
    """Calls ``model.eval()`` at the beginning of step `from_step`, as an evaluation before it would have left it."""

    at: str = "loop"

    def lab_start(self, run: Run) -> None:
        two_modes(run, self)
        if not self.from_step:
            raise BadInput("loop.evaluation_mode: needs from_step above 0: it follows an evaluation")

    def lab_zero_grad(self, run: Run) -> Generator[None, bool, bool]:
        if self.active(run) and run.model.training:
            for module in run.model.modules():
                run.cleanup.callback(setattr, module, "training", module.training)
            run.model.eval()
        return (yield)


@fault(
    "loop.training_mode",
    title="model.eval() is not called before an evaluation",
    cause="loop.training_mode",
    moves="mode.evaluated",
    repair=TRAINING_MODE.repair,
)
class TrainingMode(Fault):
    """Puts the model in training mode before each batch of an evaluation; at its end the modes are put back."""

    at: str = "evaluation"

    def lab_start(self, run: Run) -> None:
        two_modes(run, self)

    def lab_batch(self, run: Run, step: Step) -> Generator[None, Batch, Batch]:
        if step.mode == "evaluate" and self.active(run):
            run.model.train()
        return (yield)
