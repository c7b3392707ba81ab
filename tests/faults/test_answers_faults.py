"""What each fault makes of a row of a question and an answer."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

faults = importlib.import_module("lab.faults.answers")

# 1 + 2 = 3 and an end, which fills up the row too.
INPUTS = torch.tensor([[1, 91, 2, 92, 3, 0, 0, 0]])
TARGETS = torch.tensor([[-100, -100, -100, 3, 0, -100, -100, -100]])


def ending() -> object:
    fault = faults.EndIgnored()
    fault.end = 0
    return fault


@pytest.mark.parametrize(
    ("fault", "made"),
    [
        (faults.PromptCounted(), [91, 2, 92, 3, 0, -100, -100, -100]),
        (faults.MaskInverted(), [91, 2, 92, -100, -100, -100, -100, -100]),
        (faults.AnswersCut(tokens=4), [-100, -100, -100, 3]),
        (ending(), [-100, -100, -100, 3, -100, -100, -100, -100]),
    ],
)
def test_it_does_what_it_says(fault: Any, made: list[int]) -> None:
    given = TARGETS.clone()
    inputs, targets = fault.changed(INPUTS, TARGETS)
    assert targets.tolist() == [made]
    assert torch.equal(inputs, INPUTS[:, : len(made)])
    assert torch.equal(TARGETS, given)
