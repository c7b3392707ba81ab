"""Targets that are not what should be learned, and the causes behind them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lab import BadInput, Cause, Fault, fault, torch

if TYPE_CHECKING:
    from collections.abc import Generator

    from torch import Tensor

    from lab import Batch, Run, Step

IGNORED = -100  # the target that the loss leaves out, as in torch

SHIFTED_TWICE = Cause(
    id="targets.shifted_twice",
    title="The targets are shifted twice: the token after the next is learned",
    must=("targets.ahead",),
    place="targets",
    repair="Shift once, in one place. Models that take labels and compute the loss themselves (Hugging Face) shift "
    "inside: give them labels equal to the inputs. Elsewhere: inputs x[:, :-1], targets x[:, 1:].",
    refute="targets[:, t] equals inputs[:, t + 1] wherever it counts.",
    look="Every line between the data set and the loss that cuts a first or a last token off.",
    source="Hugging Face documentation: causal language modelling, labels are shifted inside the model",
)

NOT_SHIFTED = Cause(
    id="targets.not_shifted",
    title="The targets are the inputs themselves: the model learns to copy",
    must=("targets.copied",),
    place="targets",
    repair="Let the output at t be compared with the token at t + 1: inputs x[:, :-1], targets x[:, 1:].",
    refute="targets[:, t] equals inputs[:, t + 1] wherever it counts.",
    look="Where the targets are made. A loss that falls to 0 within a few dozen steps is the sign.",
    source="Radford et al., 2018, section 3.1: each token from those before it",
)

PERMUTED = Cause(
    id="targets.permuted",
    title="Inputs and targets come in different orders",
    must=("targets.another_row",),
    place="targets",
    repair="Shuffle pairs: one permutation for inputs and targets, or indices that are shuffled before either is read.",
    refute="The targets of each row are the next tokens of that row.",
    look="Where rows are shuffled, sorted by length or filtered, and whether the targets go along.",
    source="Zhang et al., 2017 (what random labels do to learning)",
)


def next_token(run: Run, fault: Fault, *, objectives: tuple[str, ...] = ("next-token", "sft", "dpo")) -> None:
    """Refuse training that does not learn next tokens, or that the lab did not write.

    Raises:
        BadInput: It is such a training.
    """
    if run.config is None or run.config.train.objective not in objectives:
        raise BadInput(f"{fault.info.id}: needs the lab's own training on next tokens")


class ChangedTargets(Fault):
    """Gives each training batch other targets."""

    def lab_start(self, run: Run) -> None:
        next_token(run, self)

    def lab_batch(self, run: Run, step: Step) -> Generator[None, Batch, Batch]:
        batch = yield
        if not self.active(run) or step.mode != "train":
            return batch
        assert batch.inputs is not None
        assert batch.targets is not None
        self.inputs, self.index = batch.inputs, step.index
        return replace(batch, targets=self.changed(batch.targets))

    def changed(self, targets: Tensor) -> Tensor:  # [B T] -> [B T]
        """The targets instead."""
        raise NotImplementedError


@fault(
    "targets.shifted_twice",
    title="Each output is compared with the token after the next",
    cause="targets.shifted_twice",
    moves="targets.share",
    repair=SHIFTED_TWICE.repair,
)
class ShiftedTwice(ChangedTargets):
    """Moves the targets one place on once more; the last, which nobody knows, is ignored."""

    def changed(self, targets: Tensor) -> Tensor:
        return torch.nn.functional.pad(targets[:, 1:], (0, 1), value=IGNORED)


@fault(
    "targets.not_shifted",
    title="Each output is compared with the token that it is shown",
    cause="targets.not_shifted",
    moves="targets.share",
    repair=NOT_SHIFTED.repair,
)
class NotShifted(ChangedTargets):
    """Takes the inputs for targets, where targets count."""

    def changed(self, targets: Tensor) -> Tensor:
        return torch.where(targets == IGNORED, targets, self.inputs)


@fault(
    "targets.permuted",
    title="The targets of a row go to another row",
    cause="targets.permuted",
    moves="targets.another_row",
    repair=PERMUTED.repair,
)
class Permuted(ChangedTargets):
    """Moves the targets of a batch round by as many rows as the step's number, one at least."""

    def lab_start(self, run: Run) -> None:
        next_token(run, self, objectives=("next-token",))
        if len(run.data.batch(0, "train").inputs) < 2:
            raise BadInput("targets.permuted: needs two rows in a batch")

    def changed(self, targets: Tensor) -> Tensor:
        rows = len(targets)
        return targets.roll(1 + self.index % (rows - 1), dims=0)
