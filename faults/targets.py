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
NEXT_TOKEN = ("next-token", "sft", "dpo")

SHIFTED_TWICE = Cause(
    id="targets.shifted_twice",
    title="The targets are shifted twice: the token after the next is learned",
    must=("targets.ahead",),
    place="targets",
    repair="Shift once, in one place. Models that take labels and compute the loss themselves (Hugging Face) shift "
    "inside: give them labels equal to the inputs. Elsewhere: inputs x[:, :-1], targets x[:, 1:]. "
    "Tell a decoder the target before: told[:, t + 1] = targets[:, t].",
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

ALL_IGNORED = Cause(
    id="targets.all_ignored",
    title="No target counts: nothing is learned",
    must=("targets.none",),
    may=(
        "value.nonfinite",
        "loss.nonfinite",
        "gradient.nonfinite",
        "weight.nonfinite",
    ),  # a mean over nothing is NaN, and whatever comes after it is made of it
    place="targets",
    repair="Count the targets that are not ignored, in each batch. Prompts longer than the context leave no answer; a "
    "mask with its two values exchanged, or an ignore_index that is a token, leaves nothing.",
    refute="Some target in the batch is not ignore_index.",
    look="Where targets are set to -100, and the mask or the length that decides it.",
    source="PyTorch documentation: CrossEntropyLoss, ignore_index",
)

PADDING_COUNTED = Cause(
    id="targets.padding_counted",
    title="The loss counts padding",
    must=("targets.padding",),
    place="targets",
    repair="Set targets to ignore_index (-100) wherever the input is padding, by the mask that attention is given; not "
    "by the padding's token where that token is also a word or the end of the text.",
    refute="No target counts at a position that the mask calls padding.",
    look="How the targets are filled up where rows are made equally long.",
    source="PyTorch documentation: CrossEntropyLoss, ignore_index",
)


def mixing(run: Run, fault: Fault) -> None:
    """Refuse a model of each token by itself: nothing in it says which token is to come next.

    Raises:
        BadInput: It is such a model.
    """
    if run.config.model.layers == 0:
        raise BadInput(f"{fault.info.id}: needs model.layers above 0; without, no token is before another")


def own(run: Run, fault: Fault, *objectives: str) -> None:
    """Refuse training that the lab did not write, or that has none of these objectives; without any, all will do.

    Raises:
        BadInput: It is such a training.
    """
    if run.config is None or (objectives and run.config.train.objective not in objectives):
        what = f" with train.objective = {' or '.join(map(repr, objectives))}" if objectives else ""
        raise BadInput(f"{fault.info.id}: needs the lab's own training{what}")


class ChangedTargets(Fault):
    """Gives each training batch other targets."""

    def lab_batch(self, run: Run, step: Step) -> Generator[None, Batch, Batch]:
        batch = yield
        if not self.active(run) or step.mode != "train" or batch.targets is None:
            return batch
        return replace(batch, targets=self.changed(batch, batch.targets))

    def changed(self, batch: Batch, targets: Tensor) -> Tensor:  # [B T] -> [B T]
        """What a batch is to be compared with instead of its targets."""
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

    def lab_start(self, run: Run) -> None:
        own(run, self, *NEXT_TOKEN)
        mixing(run, self)

    def changed(self, _batch: Batch, targets: Tensor) -> Tensor:
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

    def lab_start(self, run: Run) -> None:
        own(run, self, *NEXT_TOKEN)
        mixing(run, self)

    def changed(self, batch: Batch, targets: Tensor) -> Tensor:
        assert batch.inputs is not None
        return torch.where(targets == IGNORED, targets, batch.inputs)


@fault(
    "targets.permuted",
    title="The targets of a row go to the row after it",
    cause="targets.permuted",
    moves="targets.another_row",
    repair=PERMUTED.repair,
)
class Permuted(ChangedTargets):
    """Moves the targets of a batch round by one row."""

    def lab_start(self, run: Run) -> None:
        own(run, self, "next-token")
        if len(run.data.batch(0, "train").inputs) < 2:
            raise BadInput("targets.permuted: needs two rows in a batch")

    def changed(self, _batch: Batch, targets: Tensor) -> Tensor:
        return targets.roll(1, dims=0)


@fault(
    "targets.all_ignored",
    title="No target counts",
    cause="targets.all_ignored",
    moves="targets.counted",
    repair=ALL_IGNORED.repair,
)
class AllIgnored(ChangedTargets):
    """Gives every target the number that the loss leaves out."""

    def lab_start(self, run: Run) -> None:
        own(run, self)

    def changed(self, _batch: Batch, targets: Tensor) -> Tensor:
        return torch.full_like(targets, IGNORED)


@fault(
    "targets.padding_counted",
    title="Targets in the padding count",
    cause="targets.padding_counted",
    moves="targets.padding",
    repair=PADDING_COUNTED.repair,
)
class PaddingCounted(ChangedTargets):
    """Makes what fills up a row a target; for batches that say which positions are tokens."""

    def lab_start(self, run: Run) -> None:
        own(run, self, "masked")

    def changed(self, batch: Batch, targets: Tensor) -> Tensor:
        tokens, present = batch.args
        filler: Tensor = torch.where(present, targets, tokens)
        return filler
