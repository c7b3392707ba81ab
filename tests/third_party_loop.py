"""How models of other libraries are trained: the data, and the loop that their users write."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn

import lab

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    Batch = dict[str, Any]

V, T, C = 64, 24, 32  # tokens, positions, width
PAD, START, END, MASK, FIRST = 0, 1, 2, 3, 4  # the tokens that are none of the text, and the first that is
ROWS, STEPS = 8, 30


def labelled(model: nn.Module, batch: Batch) -> Tensor:
    """The loss as a model of `transformers` computes it, from the labels in the call."""
    loss: Tensor = model(**batch).loss
    return loss


def everything(model: nn.Module) -> Iterable[nn.Parameter]:
    """All parameters."""
    return model.parameters()


def trainable(model: nn.Module) -> Iterable[nn.Parameter]:
    """Those that are not frozen."""
    return [p for p in model.parameters() if p.requires_grad]


def nothing(_step: int) -> None:
    """What a loop does beside training: nothing."""


@dataclass
class Training:
    """A model, its data, and what is particular to its loop.

    Attributes:
        batch: Makes the next batch.
        rate: Of AdamW, after the warmup.
        loss: Of the model on a batch.
        params: Of the model that are given to the optimiser, or groups of them.
        before: Called when a step begins.
        clears, clips_late: Whether gradients are cleared, and whether they are clipped when the update is made already.
    """

    model: nn.Module
    batch: Callable[[], Batch]
    rate: float = 1e-3
    loss: Callable[[nn.Module, Batch], Tensor] = labelled
    params: Callable[[nn.Module], Iterable[Any]] = everything
    before: Callable[[int], None] = nothing
    clears: bool = True
    clips_late: bool = False
    losses: list[float] = field(default_factory=list)

    def changed(self, change: Callable[[Batch], Batch]) -> None:
        """Change every batch."""
        plain = self.batch
        self.batch = lambda: change(plain())


def train(
    make: Callable[[], Training],
    folder: Path | None = None,
    probes: Iterable[str] | None = None,
    change: Callable[[Training], None] | None = None,
) -> tuple[list[float], lab.Diagnosis | None]:
    """Train as users do, watched when a `folder` is given; return the losses and the diagnosis.

    AdamW with a linear schedule after a warmup, as in the examples of `transformers`; gradients clipped at 1.
    """
    transformers.set_seed(0)
    training = make()
    if change is not None:
        change(training)
    model = training.model
    optimizer = torch.optim.AdamW(training.params(model), lr=training.rate)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 5, STEPS + 20)
    model.train()
    watching = contextlib.nullcontext() if folder is None else lab.watch(model, optimizer, out=folder, probes=probes)
    with watching as watch:
        for step in range(STEPS):
            training.before(step)
            loss = training.loss(model, training.batch())
            loss.backward()  # type: ignore[no-untyped-call]
            if not training.clips_late:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if training.clips_late:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            schedule.step()
            if training.clears:
                optimizer.zero_grad()
            training.losses.append(loss.item())
    return training.losses, watch.diagnosis if watch is not None else None


# ---------------------------------------------------------------- data that can be learned


def text(length: int = T) -> Tensor:
    """Rows that count on from anywhere, by one or by two, which now and then is the other, [B T]."""
    count = V - FIRST
    starts, strides = torch.randint(count, (ROWS, 1)), torch.randint(1, 3, (ROWS, 1))
    steps = torch.where(torch.rand(ROWS, length) < 0.9, strides, 3 - strides)
    return (starts + steps.cumsum(1)) % count + FIRST


def present(length: int = T) -> Tensor:
    """Which positions are no padding, in rows of at least half the length, [B T]; the first row is full."""
    lengths = torch.randint(length // 2, length + 1, (ROWS, 1))
    lengths[0] = length
    return (torch.arange(length) < lengths).long()


def next_tokens() -> Batch:
    """For a causal language model, which shifts its labels by itself."""
    ids = text()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def next_tokens_padded() -> Batch:
    """The same of rows of different lengths."""
    mask = present()
    ids = text().masked_fill(mask == 0, PAD)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def hidden_tokens() -> Batch:
    """For a masked language model: 15% of the tokens, of these 8 in 10 hidden and 1 in 10 exchanged."""
    batch = next_tokens_padded()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    chosen = (torch.rand(ids.shape) < 0.15) & (mask == 1)
    chosen[:, 3] = True
    draw = torch.rand(ids.shape)
    shown = torch.where(chosen & (draw < 0.8), MASK, ids)
    shown = torch.where(chosen & (draw > 0.9), torch.randint(FIRST, V, ids.shape), shown)
    return {"input_ids": shown, "attention_mask": mask, "labels": ids.masked_fill(~chosen, -100)}


def classes() -> Batch:
    """A row begins with a token of its own, and its class is whether the tokens are small or large."""
    mask, labels = present(), torch.randint(2, (ROWS,))
    half = (V - FIRST) // 2
    ids = torch.randint(FIRST, FIRST + half, (ROWS, T)) + half * labels[:, None]
    ids[:, 0] = START
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask, "labels": labels}


def tags() -> Batch:
    """A class for each token."""
    ids = text()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids % 3}


def turned_round() -> Batch:
    """For an encoder and a decoder: the row from its end to its beginning, and an end token, padded with -100."""
    length = 16
    source, mask = text(length), present(length)
    labels = torch.full((ROWS, length + 1), -100)
    for row, count in enumerate(mask.sum(1).tolist()):
        labels[row, :count], labels[row, count] = source[row, :count].flip(0), END
    return {"input_ids": source.masked_fill(mask == 0, PAD), "attention_mask": mask, "labels": labels}


def images(size: int = 16) -> Batch:
    """One of four corners is bright, [B 3 H W]."""
    labels = torch.randint(4, (ROWS,))
    pixels, half = 0.3 * torch.randn(ROWS, 3, size, size), size // 2
    for image, corner in zip(pixels, labels.tolist(), strict=True):
        top, left = corner // 2 * half, corner % 2 * half
        image[:, top : top + half, left : left + half] += 1.0
    return {"pixel_values": pixels, "labels": labels}


def captions() -> Batch:
    """Images with one bright patch of one colour, and a text that says which."""
    kinds = torch.randperm(ROWS)
    pixels = 0.2 * torch.randn(ROWS, 3, 16, 16)
    for image, kind in zip(pixels, kinds.tolist(), strict=True):
        top, left = kind // 4 * 8, kind % 4 * 4
        image[kind % 3, top : top + 8, left : left + 4] += 2.0
    ids = torch.randint(20, 60, (ROWS, 6))
    ids[:, 0], ids[:, -1], ids[:, 2], ids[:, 3] = START, V - 1, FIRST + kinds, FIRST + 8 + kinds
    return {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids), "return_loss": True}


def speech() -> Batch:
    """A spectrum [B mel T] in which each token sounds for four frames, and the tokens."""
    ids = text(12)
    tones = torch.randn(V, 16, generator=torch.Generator().manual_seed(1))
    spectrum = 0.1 * torch.randn(ROWS, 16, 48) + tones[ids.repeat_interleave(4, 1)].transpose(1, 2)
    return {"input_features": spectrum, "labels": torch.cat([ids, torch.full((ROWS, 1), END)], 1)}


def waves() -> Batch:
    """Waves of one of three pitches, [B T]."""
    labels = torch.randint(3, (ROWS,))
    at = torch.arange(800) / 16.0
    return {"input_values": torch.sin(at * (1 + labels[:, None])) + 0.1 * torch.randn(ROWS, 800), "labels": labels}
