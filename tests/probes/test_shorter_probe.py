"""A row with less padding: answered alike where attention is told of it, and silent on whatever else reads padding."""

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

TOKENS, LENGTH, WIDTH, PAD = 19, 12, 16, 0


class Reader(nn.Module):
    """An encoder that gives a class for each row: from its first token, or the mean of all."""

    def __init__(self, *, told: bool = True, mean: bool = False, named: bool = True, places: int = 0) -> None:
        super().__init__()
        self.told, self.mean = told, mean
        self.embed = nn.Embedding(TOKENS, WIDTH, padding_idx=PAD if named else None)
        self.places = nn.Parameter(0.1 * torch.randn(places, WIDTH)) if places else None
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, 0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        if self.places is not None:
            x = x + self.places  # of one length only
        x = self.encoder(x, src_key_padding_mask=tokens == PAD if self.told else None)
        logits: Tensor = self.head(x.mean(1) if self.mean else x[:, 0])
        return logits


class Convolution(nn.Module):
    """Reads padding by design."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.read = nn.Embedding(TOKENS, WIDTH, padding_idx=PAD), nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.read(self.embed(tokens).transpose(1, 2)).relu().mean(-1))
        return logits


def ends() -> Tensor:
    """How many tokens each row has."""
    return torch.randint(LENGTH // 3, LENGTH + 1, (8, 1))


def alike() -> Tensor:
    """The same in all rows, so that it may be an end that is part of each."""
    return torch.full((8, 1), LENGTH - 2)


def watched(
    folder: Path, model: nn.Module, lengths: Callable[[], Tensor] = ends, *, zeros: bool = False
) -> lab.Diagnosis:
    """Train on rows of so many tokens; with `zeros`, the token of padding stands among the others, too."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with lab.watch(model, optimizer, out=folder / "run") as watching:
        for _ in range(24):
            labels = torch.randint(2, (8,))
            tokens = torch.randint(1, 10, (8, LENGTH)) + 9 * labels[:, None]
            if zeros:
                tokens[:, 2] = PAD
            tokens = tokens.masked_fill(torch.arange(LENGTH) >= lengths(), PAD)
            optimizer.zero_grad()
            F.cross_entropy(model(tokens), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return watching.diagnosis


def test_attention_that_is_not_told_of_padding_is_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    diagnosis = watched(tmp_path, Reader(told=False))
    assert [(c.id, c.at) for c in diagnosis.causes] == [("mask.padding_seen", "encoder.layers.0.self_attn")]
    assert diagnosis.unexplained == ()


@pytest.mark.parametrize("places", [0, LENGTH])
def test_attention_that_is_told_is_silent(tmp_path: Path, places: int) -> None:
    torch.manual_seed(0)
    diagnosis = watched(tmp_path, Reader(places=places))
    assert diagnosis.verdict == "healthy"
    assert ("mixing.padding" in diagnosis.checked) == (places == 0)


@pytest.mark.parametrize(
    ("model", "lengths", "zeros"),
    [
        (lambda: Reader(mean=True), ends, False),  # the mean over padding is no attention
        (lambda: Reader(told=False, named=False), ends, False),  # nothing says that it is padding
        (lambda: Reader(told=False), ends, True),  # a token like any other
        (lambda: Reader(told=False), alike, False),
        (Convolution, ends, False),
    ],
)
def test_what_may_be_no_padding_or_may_be_read_is_not_accused(
    tmp_path: Path, model: Callable[[], nn.Module], lengths: Callable[[], Tensor], *, zeros: bool
) -> None:
    torch.manual_seed(0)
    diagnosis = watched(tmp_path, model(), lengths, zeros=zeros)
    assert [(symptom.id, symptom.text) for symptom in diagnosis.symptoms] == []
    assert diagnosis.verdict == "healthy"
