"""Losses that are right on paper, and not finite in a computer; and the causes behind them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from annotated_types import Gt, Lt

from lab import BadInput, Cause, Fault, fault, torch

from .loss import cross_entropy_of

if TYPE_CHECKING:
    from collections.abc import Generator

    from torch import Tensor

    from lab import Run, Step

IGNORED = -100  # the target that the loss leaves out, as in torch

LOG_OF_ZERO = Cause(
    id="loss.log_of_zero",
    title="The loss takes the logarithm of a probability that was rounded to 0",
    must=("loss.infinite",),
    may=("*",),  # whatever comes after it is made of it
    place="loss",
    repair="Take F.cross_entropy of the logits, or log_softmax and nll_loss: logsumexp(z) - z_target is finite for all "
    "finite logits. log(softmax(z)) is not, once a probability is below the smallest number of its format.",
    refute="The logits of that step are not finite: then look at what makes them.",
    look="A log of a softmax or of a sigmoid, and the dtype in which it is taken.",
    source="Goodfellow et al., 2016, section 4.1 (overflow and underflow); PyTorch documentation: log_softmax",
)

DIVISION_BY_ZERO = Cause(
    id="loss.division_by_zero",
    title="The loss divides 0 by 0: a mean is taken over nothing",
    must=("loss.undefined",),
    may=("*",),
    place="loss",
    repair="Add up all losses and divide once by the number of targets that count in the whole batch, at least 1: "
    "losses.sum() / mask.sum().clamp_min(1). Leave out rows whose every target is ignored, as by truncation.",
    refute="No count, norm or standard deviation that the loss divides by is 0 at that step.",
    look="Each division in the loss, on the batch of that step: a row, a class or a part that has nothing to count.",
    source="PyTorch documentation: CrossEntropyLoss, ignore_index; pytorch/pytorch#75181",
)


@fault(
    "loss.log_of_zero",
    title="The logarithm is taken of probabilities, in a format that rounds small ones to 0",
    cause="loss.log_of_zero",
    moves="loss",
    repair=LOG_OF_ZERO.repair,
)
class LogOfZero(Fault):
    """Takes -log of the target's softmax, in which what is below `smallest` has become 0: in float16 that is 2^-25."""

    smallest: Annotated[float, Gt(0), Lt(1)] = 2.0**-25

    def lab_start(self, run: Run) -> None:
        cross_entropy_of(run, self)

    def lab_loss(self, run: Run, step: Step) -> Generator[None, Tensor, Tensor]:
        loss = yield
        if not self.active(run) or step.mode != "train":
            return loss
        assert step.logits is not None
        assert step.batch is not None
        assert step.batch.targets is not None
        targets = step.batch.targets.flatten()  # [N]
        likely = step.logits.flatten(0, -2).softmax(-1)  # [N V]
        rounded = likely * (likely >= self.smallest)  # as it is where softmax underflows, 0 passes on no gradient
        picked = rounded.gather(-1, targets.clamp_min(0)[:, None]).squeeze(-1)  # [N]
        return -picked[targets != IGNORED].log().mean()


@fault(
    "loss.division_by_zero",
    title="Each row's loss is divided by its number of targets, and one row has none",
    cause="loss.division_by_zero",
    moves="loss",
    repair=DIVISION_BY_ZERO.repair,
)
class DivisionByZero(Fault):
    """Averages within each row and then over the rows. The first row has lost its targets, as by truncation."""

    def lab_start(self, run: Run) -> None:
        cross_entropy_of(run, self)
        if len(run.data.batch(0, "train").targets) < 2 * run.config.train.accumulate:
            raise BadInput("loss.division_by_zero: needs two rows in each part of a batch")

    def lab_loss(self, run: Run, step: Step) -> Generator[None, Tensor, Tensor]:
        loss = yield
        if not self.active(run) or step.mode != "train":
            return loss
        assert step.logits is not None
        assert step.batch is not None
        assert step.batch.targets is not None
        targets = step.batch.targets.clone()  # [B T]
        targets[0] = IGNORED
        losses = torch.nn.functional.cross_entropy(step.logits.movedim(-1, 1), targets, reduction="none")  # [B T]
        per_row: Tensor = losses.sum(1) / (targets != IGNORED).sum(1)  # [B]
        return per_row.mean()
