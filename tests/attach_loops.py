"""A training loop as one writes it by hand, over a model that the lab did not write."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lab

if TYPE_CHECKING:
    from pathlib import Path

    from lab.attach.watch import Watch

VOCABULARY, CONTEXT = 50, 24


class LanguageModel(nn.Module):
    """``nn.TransformerEncoder`` with a causal mask, or without one."""

    def __init__(self, *, causal: bool = True, dropout: float = 0.1, batch_first: bool = True) -> None:
        super().__init__()
        width = 48
        self.causal, self.batch_first = causal, batch_first
        self.embed = nn.Embedding(VOCABULARY, width)
        self.places = nn.Embedding(CONTEXT, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=dropout, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        x = self.embed(tokens) + self.places(torch.arange(length))
        mask = nn.Transformer.generate_square_subsequent_mask(length) if self.causal else None
        if self.batch_first:
            return self.head(self.encoder(x, mask=mask))  # type: ignore[no-any-return]
        return self.head(self.encoder(x.transpose(0, 1), mask=mask).transpose(0, 1))  # type: ignore[no-any-return]


@dataclass
class Trained:
    """What a loop ends with."""

    losses: list[float]
    weights: list[Tensor]
    watch: Watch | None


def batches(count: int, seed: int) -> list[Tensor]:
    """Counting sequences with a step of 1 or 2, [8 T+1]: they can be learned, but not from the first token."""
    draw = torch.Generator().manual_seed(seed)
    starts = torch.randint(VOCABULARY, (count, 8, 1), generator=draw)
    strides = torch.randint(1, 3, (count, 8, 1), generator=draw)
    return list((starts + torch.arange(CONTEXT + 1) * strides) % VOCABULARY)


def train(
    folder: Path | None,
    *,
    seed: int = 0,
    steps: int = 24,
    zero_grad: bool = True,
    left_out: str = "",
    evaluate: bool = False,
    sites: list[str] | None = None,
    **model_options: Any,
) -> Trained:
    """Train, watched when `folder` is given."""
    torch.manual_seed(seed)
    model = LanguageModel(**model_options)
    optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if n != left_out], lr=1e-3)
    losses = []
    watching = lab.watch(model, optimizer, out=folder, sites=sites) if folder is not None else contextlib.nullcontext()
    with watching as watch:
        for tokens in batches(steps, seed):
            logits = model(tokens[:, :-1])
            loss = F.cross_entropy(logits.reshape(-1, VOCABULARY), tokens[:, 1:].reshape(-1))
            if zero_grad:
                optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            if evaluate:
                model.eval()
                with torch.no_grad():
                    losses.append(float(model(tokens[:, :-1]).square().mean()))
                model.train()
    return Trained(losses, [p.detach().clone() for p in model.parameters()], watch)
