"""What a loss was given, beside what the model was: which target belongs to which token, and where classes stand."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lab.context import IGNORED

if TYPE_CHECKING:
    from torch import Tensor


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
