"""What a loss was given, beside what the model was: which target belongs to which token, and where classes stand."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lab.attach.intercept import maker
from lab.context import IGNORED

if TYPE_CHECKING:
    from torch import Tensor

    from lab.context import Run


class Losses:
    """Takes what the losses of a loop are given, where that comes from a call of the model for training."""

    def __init__(self, run: Run) -> None:
        self._run = run

    @property
    def _training(self) -> bool:
        return self._run.sites.mode == "train"

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> None:
        """Take the targets of a classifier, in the shape of the model's tokens where they are one for each."""
        step = self._run.step
        if not self._training or step.batch is None or not logits.requires_grad:
            return
        inputs = step.batch.inputs
        if logits.dim() == 2 and not last_left_out(targets, inputs):
            step.logits = logits
        elif inputs is not None and logits.dim() == inputs.dim() + 1:
            self._run.classes_second = step.logits is not None and same(step.logits, logits)
            step.logits = logits.movedim(1, -1)  # cross_entropy takes classes second
        step.batch.targets = beside(targets, inputs)

    def distance(self, outputs: Tensor, targets: Tensor) -> None:
        """Take the shapes of what a regression compares."""
        if self._training and torch.is_grad_enabled() and (outputs.requires_grad or targets.requires_grad):
            self._run.step.compared.append((outputs.shape, targets.shape))

    def scores(self, loss: str, given: Tensor) -> None:
        """Take what made the input of a loss that wants logits, or logarithms of probabilities."""
        if self._training and torch.is_grad_enabled() and given.requires_grad:
            self._run.step.scored.append((loss, maker(given)))


def same(answer: Tensor, logits: Tensor) -> bool:
    """Whether a loss was given a model's answer as it lies; of [N N] nobody knows, but where it is the same memory."""
    if answer.shape != logits.shape or len({*logits.shape[1:]}) > 1:
        return answer.shape == logits.shape
    return answer.data_ptr() == logits.data_ptr() and answer.stride() == logits.stride()


def last_left_out(targets: Tensor, inputs: Tensor | None) -> bool:
    """Whether there is a target for each token but the last of a row, as where a model shifts its labels itself."""
    return inputs is not None and inputs.dim() == 2 and targets.numel() == inputs.numel() - len(inputs)


def beside(targets: Tensor, inputs: Tensor | None) -> Tensor:
    """Give targets the shape of the tokens to which they belong, where that is known; the last ones may be ignored."""
    if inputs is not None and inputs.numel() == targets.numel():
        return targets.reshape(inputs.shape)
    if inputs is not None and last_left_out(targets, inputs):
        return torch.nn.functional.pad(targets.reshape(len(inputs), -1), (0, 1), value=IGNORED)
    return targets
