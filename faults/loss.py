"""Losses that are not the cross-entropy that they are taken for, and the causes behind them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Interval

from lab import BadInput, Cause, Fault, fault, torch

if TYPE_CHECKING:
    from collections.abc import Generator

    from torch import Tensor

    from lab import Batch, Run, Step

SOFTMAX_TWICE = Cause(
    id="loss.softmax_twice",
    title="Probabilities are given to cross-entropy, which takes logits",
    must=("objective.softmax_twice",),
    place="loss",
    repair="Give cross-entropy the logits: it takes the softmax itself. Keep a softmax for sampling, out of the "
    "model's forward pass. To a loss that expects log-probabilities (NLLLoss) give log_softmax.",
    refute="The loss equals logsumexp(z) - z_target of what the model gives out, and that is below 0 somewhere.",
    look="The last layer of the model, and the line that computes the loss.",
    source="PyTorch documentation: CrossEntropyLoss, 'unnormalized logits'",
)

WRONG_SIGN = Cause(
    id="loss.wrong_sign",
    title="The loss has the wrong sign: training makes the targets less likely",
    must=("objective.sign",),
    may=("*",),  # weights that climb without a bound end anywhere
    place="loss",
    repair="Minimise minus the log-probability of the targets; or maximise the log-probability, with maximize=True in "
    "the optimiser. Not both.",
    refute="The loss that is propagated backward is above 0.",
    look="The sign before the mean of the log-probabilities, and maximize in the optimiser.",
    source="Goodfellow et al., 2016, section 5.5 (maximum likelihood)",
)

MEAN_OF_MEANS = Cause(
    id="loss.mean_of_means",
    title="The parts of a batch weigh alike, although they hold different numbers of targets",
    must=("objective.mean_of_means",),
    place="loss",
    repair="Add up the losses of all parts (reduction='sum') and divide once by the number of targets that count in "
    "the whole batch; count them before the first part passes.",
    refute="The loss of the step is the sum over all targets divided by their number.",
    look="What the loss of a part is divided by where gradients accumulate: the number of parts is not the answer.",
    source="huggingface/transformers#34191 (gradient accumulation)",
)

CLAMPED = Cause(
    id="loss.clamped",
    title="Probabilities are clamped before the logarithm: the worst tokens teach nothing",
    must=("objective.clamped",),
    may=("flow.zero", "arrival.dead"),  # what is below the bound has no gradient
    place="loss",
    repair="Use log_softmax or cross-entropy on logits: they never take the logarithm of 0, and need no clamp. Below "
    "a clamp the gradient is 0, exactly where the model is most wrong.",
    refute="The loss of a target of probability p is -log p, however small p is.",
    look="A clamp, or a maximum, between the softmax and the logarithm.",
    source="PyTorch documentation: log_softmax; torch.clamp, whose derivative is 0 outside",
)

SIGMOID_TWICE = Cause(
    id="loss.sigmoid_twice",
    title="Probabilities are given to a binary cross-entropy that takes logits",
    must=("comparison.sigmoid",),
    place="loss",
    repair="Drop the sigmoid at the end of the model: BCEWithLogitsLoss takes it itself. Or keep it there, and use "
    "BCELoss. Keep a sigmoid for predictions, outside of forward.",
    refute="What the loss is given is below 0 somewhere.",
    look="The last layer of the model, and the line that computes the loss.",
    source="PyTorch documentation: BCEWithLogitsLoss; Turoad/lanedet issue 32",
)

KL_OF_PROBABILITIES = Cause(
    id="loss.kl_of_probabilities",
    title="Probabilities are given to a divergence that takes their logarithms",
    must=("comparison.kl",),
    place="loss",
    repair="F.kl_div(F.log_softmax(student, dim=-1), F.softmax(teacher, dim=-1), reduction='batchmean'). The input is "
    "a logarithm; the target is one only with log_target=True.",
    refute="The divergence is never below 0, and is 0 where both distributions are equal.",
    look="The first argument of kl_div, and the sign of the loss.",
    source="PyTorch documentation: KLDivLoss; microsoft/ProDA issue 20",
)

BROADCAST = Cause(
    id="loss.broadcast",
    title="Each prediction is compared with the targets of all",
    must=("comparison.broadcast",),
    place="loss",
    repair="Give predictions and targets the same shape: loss_fn(prediction.squeeze(-1), target), or "
    "target.view_as(prediction). Shapes [N 1] and [N] are broadcast to [N N].",
    refute="prediction.shape == target.shape where the loss is computed.",
    look="PyTorch's warning: using a target size that is different to the input size.",
    source="pytorch/pytorch issue 16045",
)


def cross_entropy_of(run: Run, fault: Fault) -> None:
    """Refuse training whose loss is no cross-entropy, or that the lab did not write.

    Raises:
        BadInput: It is such a training.
    """
    if run.config is None or run.config.train.objective == "dpo":
        raise BadInput(f"{fault.info.id}: needs the lab's own training with a cross-entropy")


def logits_and_targets(step: Step) -> tuple[Tensor, Tensor]:
    """Return the logits [N V] and the targets [N] of a step."""
    assert step.logits is not None
    assert step.batch is not None
    assert step.batch.targets is not None
    return step.logits.flatten(0, -2), step.batch.targets.flatten()


@fault(
    "loss.softmax_twice",
    title="Cross-entropy is given probabilities",
    cause="loss.softmax_twice",
    moves="objective.unevenness",
    repair=SOFTMAX_TWICE.repair,
)
class SoftmaxTwice(Fault):
    """Takes the softmax of the logits before the cross-entropy, which takes it again."""

    def lab_start(self, run: Run) -> None:
        cross_entropy_of(run, self)

    def lab_loss(self, run: Run, step: Step) -> Generator[None, Tensor, Tensor]:
        loss = yield
        if not self.active(run):
            return loss
        logits, targets = logits_and_targets(step)
        return torch.nn.functional.cross_entropy(logits.softmax(-1), targets)


@fault(
    "loss.wrong_sign",
    title="Training climbs the cross-entropy",
    cause="loss.wrong_sign",
    moves="objective.unevenness",
    repair=WRONG_SIGN.repair,
)
class WrongSign(Fault):
    """Multiplies the loss by -1 in training."""

    def lab_start(self, run: Run) -> None:
        cross_entropy_of(run, self)

    def lab_loss(self, run: Run, step: Step) -> Generator[None, Tensor, Tensor]:
        loss = yield
        return -loss if self.active(run) and step.mode == "train" else loss


@fault(
    "loss.mean_of_means",
    title="The parts of a batch weigh alike, whatever they hold",
    cause="loss.mean_of_means",
    moves="objective.unevenness",
    repair=MEAN_OF_MEANS.repair,
)
class MeanOfMeans(Fault):
    """Weighs each part of an accumulated batch by 1 / parts, and not by its share of the targets that count."""

    def lab_start(self, run: Run) -> None:
        cross_entropy_of(run, self)
        if run.config.train.accumulate < 2 or not bool((run.data.batch(0, "train").targets < 0).any()):
            raise BadInput("loss.mean_of_means: needs train.accumulate above 1, and targets that are ignored in part")
        self.total: Tensor | None = None

    def lab_batch(self, step: Step) -> Generator[None, Batch, Batch]:
        batch = yield
        if step.mode == "train" and batch.targets is not None:
            self.total = (batch.targets >= 0).sum()
        return batch

    def lab_loss(self, run: Run, step: Step) -> Generator[None, Tensor, Tensor]:
        loss = yield
        if not self.active(run) or step.mode != "train" or self.total is None:
            return loss
        count = (logits_and_targets(step)[1] >= 0).sum()
        return loss * self.total / (count * step.parts)


@fault(
    "loss.clamped",
    title="Probabilities are clamped before the logarithm",
    cause="loss.clamped",
    moves="objective.cut",
    repair=CLAMPED.repair,
)
class Clamped(Fault):
    """Takes the logarithm of probabilities that are at least 10^-`digits`."""

    digits: Annotated[int, Interval(ge=1, le=8)] = 3

    def lab_start(self, run: Run) -> None:
        cross_entropy_of(run, self)

    def lab_loss(self, run: Run, step: Step) -> Generator[None, Tensor, Tensor]:
        loss = yield
        if not self.active(run):
            return loss
        logits, targets = logits_and_targets(step)
        likely: Any = logits.softmax(-1).clamp_min(10.0**-self.digits).log()  # [N V]
        return torch.nn.functional.nll_loss(likely, targets)
