"""Trainings as people write them, of many kinds and right: watched by every probe, none may be called faulty."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from trainings_beside import BESIDE
from trainings_language import LANGUAGE

import lab
from lab.manager import discover

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from trainings_language import Training


def plain(training: Training, steps: int) -> Iterator[None]:
    _, loss, optimizer = training
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        yield


def careful(training: Training, steps: int) -> Iterator[None]:
    """Parts of a batch, clipping, a schedule, an average of the weights and an evaluation now and then."""
    model, loss, optimizer = training
    average = copy.deepcopy(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 8) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
    )
    for step in range(steps):
        for _ in range(2):
            (loss() / 2).backward()  # type: ignore[no-untyped-call]
        if not any(p.grad is not None and p.grad.is_sparse for p in model.parameters()):
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for mine, theirs in zip(average.parameters(), model.parameters(), strict=True):
                mine.lerp_(theirs, 0.1)
        if step % 10 == 9:
            model.eval()
            with torch.no_grad():
                loss()
            model.train()
        yield


@pytest.mark.parametrize("loop", [plain, careful])
@pytest.mark.parametrize("training", [*LANGUAGE, *BESIDE])
def test_a_right_training_of_anybodys_is_called_healthy(
    tmp_path: Path, training: Callable[[], Training], loop: Callable[[Training, int], Iterator[None]]
) -> None:
    torch.manual_seed(0)
    made = training()
    with lab.watch(made[0], made[2], out=tmp_path / "run", probes=[*discover().probes]) as watching:
        for _ in loop(made, 36):
            pass
    found = [(symptom.id, symptom.text) for symptom in watching.diagnosis.symptoms]
    assert found == []
    assert watching.diagnosis.verdict == "healthy", watching.diagnosis.not_checked
