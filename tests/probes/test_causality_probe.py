"""Does the past depend on the future? Asked where there is something to predict, and nowhere else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lab

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TOKENS, LENGTH, QUESTION, WIDTH = 23, 16, 6, 16


def causal() -> Tensor:
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()


def prefix() -> Tensor:
    """The question sees all of itself, as in a language model with a prefix."""
    seen = causal()
    seen[:QUESTION, :QUESTION] = True
    return seen


def answer() -> Tensor:
    """One place in the answer sees the next."""
    seen = causal()
    seen[QUESTION + 2 : -1] |= torch.eye(LENGTH, dtype=torch.bool)[QUESTION + 3 :]
    return seen


class Model(nn.Module):
    """Averages over what each position may see, [T T]."""

    def __init__(self, seen: Tensor) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(TOKENS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, TOKENS)
        self.register_buffer("weights", seen.float() / seen.sum(1, keepdim=True))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.places.weight
        x = x + torch.tanh(self.mix(self.get_buffer("weights") @ x))
        logits: Tensor = self.head(x)
        return logits


def watched(folder: Path, seen: Tensor, begin: int, ignored: int = 0) -> lab.Diagnosis:
    """Train on rows of which the targets count from a position on; in the first ones, not at all."""
    torch.manual_seed(0)
    model = Model(seen)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with lab.watch(model, optimizer, out=folder / "run") as watching:
        for _ in range(24):
            tokens = torch.randint(TOKENS, (8, 1)) + torch.arange(LENGTH + 1) * torch.randint(1, 3, (8, 1))
            tokens %= TOKENS
            targets = tokens[:, 1:].masked_fill(torch.arange(LENGTH) < begin, -100)
            targets[:ignored] = -100
            optimizer.zero_grad()
            loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), targets.flatten())
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return watching.diagnosis


@pytest.mark.parametrize(
    ("seen", "begin", "leaks"),
    [
        (causal, 0, False),
        (causal, QUESTION, False),
        (prefix, QUESTION, False),  # nothing is learned at the question
        (prefix, 0, True),
        (answer, 0, True),
        (answer, QUESTION, True),
    ],
)
def test_what_sees_the_future_where_nothing_is_predicted_is_no_leak(
    tmp_path: Path, seen: Callable[[], Tensor], begin: int, *, leaks: bool
) -> None:
    diagnosis = watched(tmp_path, seen(), begin)
    assert "causality.future" in diagnosis.checked
    assert bool([s for s in diagnosis.symptoms if s.id == "causality.future"]) == leaks
    assert (diagnosis.verdict == "faulty") == leaks


def test_where_the_rows_that_are_asked_have_no_target_it_is_not_checked(tmp_path: Path) -> None:
    diagnosis = watched(tmp_path, prefix(), 0, ignored=4)
    assert "has a target" in diagnosis.not_checked["causality.future"]
    assert diagnosis.verdict == "healthy"
