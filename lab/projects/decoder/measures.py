"""Numbers of a decoder that theory knows."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from lab.projects.decoder.component import Decoder, EncoderDecoder, shift_right
from lab.spec import measure

V, WIDTH, HEADS, LENGTH, LAYERS = 64, 64, 4, 16, 2
STEPS, BATCH, LR = 50, 16, 5e-3


def _decoder(seed: int) -> Decoder:
    """Build one from this seed, and leave torch's generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Decoder(V, context=LENGTH, layers=LAYERS, width=WIDTH, heads=HEADS)


def _pair(seed: int) -> EncoderDecoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return EncoderDecoder(V, context=LENGTH, layers=LAYERS, width=WIDTH, heads=HEADS)


def _tokens(seed: int, *shape: int) -> Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


@measure("loss at start over ln V + C 0.02^2 / 2; 1")
@torch.no_grad()
def loss_at_start_over_theory(seed: int) -> float:
    logits = _decoder(seed)(_tokens(seed, 256, LENGTH))
    loss = F.cross_entropy(logits.flatten(0, 1), _tokens(seed + 1, 256, LENGTH).flatten())
    return float(loss) / (math.log(V) + WIDTH * 0.02**2 / 2)


@measure("the same of an encoder and a decoder, with teacher forcing; 1")
@torch.no_grad()
def seq2seq_loss_at_start_over_theory(seed: int) -> float:
    source, targets = _tokens(seed, 256, LENGTH), _tokens(seed + 1, 256, LENGTH)
    logits = _pair(seed)(source, shift_right(targets, 0))
    return float(F.cross_entropy(logits.flatten(0, 1), targets.flatten())) / (math.log(V) + WIDTH * 0.02**2 / 2)


@measure("largest change of a logit when a later token changes; 0")
@torch.no_grad()
def future_leak(seed: int) -> float:
    model, tokens = _decoder(seed), _tokens(seed, 2, LENGTH)
    before, worst = model(tokens), 0.0
    for place in range(1, LENGTH):
        after = tokens.clone()
        after[:, place] = (after[:, place] + 1) % V
        worst = max(worst, float((model(after) - before)[:, :place].abs().max()))
    return worst


@measure(
    "largest distance between the loss of a token in the whole text and in a text cut after it; 0 but for rounding"
)
@torch.no_grad()
def prefix_gap(seed: int) -> float:
    model, text = _decoder(seed), _tokens(seed, 2, LENGTH + 1)
    inputs, targets = text[:, :-1], text[:, 1:]
    full = F.cross_entropy(model(inputs).transpose(1, 2), targets, reduction="none")  # [2 T]
    worst = 0.0
    for length in range(1, LENGTH):
        part = F.cross_entropy(model(inputs[:, :length]).transpose(1, 2), targets[:, :length], reduction="none")
        worst = max(worst, float((part - full[:, :length]).abs().max()))
    return worst


def _sensitivity(seed: int, held: int) -> Tensor:  # [S]
    """Return how far, in standard deviations, the logits move when each source token changes, of which `held` are."""
    model, source, said = _pair(seed), _tokens(seed, 1, LENGTH), _tokens(seed + 1, 1, LENGTH)
    present = torch.arange(LENGTH)[None] < held  # [1 S]
    before = model(source, said, present)
    moved = source.repeat(LENGTH, 1)  # [S S], row s with another token at s
    moved.fill_diagonal_(0).add_(torch.diag((source[0] + 1) % V))
    after = model(moved, said.expand(LENGTH, -1), present.expand(LENGTH, -1))
    moves: Tensor = (after - before).square().mean(dim=(1, 2)).sqrt() / before.std()
    return moves


@measure("root mean square change of the logits, in their standard deviations, when a source token changes; above 0")
@torch.no_grad()
def encoder_sensitivity(seed: int) -> float:
    return float(_sensitivity(seed, LENGTH).mean())


@measure("the smallest of these over the places of the source that hold a token, over the mean; above 0")
@torch.no_grad()
def source_least_seen(seed: int) -> float:
    moved = _sensitivity(seed, 10)[:10]
    return float(moved.min() / moved.mean())


@measure("the largest of these over the padding of the source; 0 but for rounding")
@torch.no_grad()
def source_padding_leak(seed: int) -> float:
    return float(_sensitivity(seed, 10)[10:].max())


@cache
def _text(seed: int) -> Tensor:  # [STEPS + 1, B, T + 1]
    """A chain in which each token is followed by one of four, none of them itself."""
    draw = torch.Generator().manual_seed(seed)
    jump = 1 + torch.stack([torch.randperm(V - 1, generator=draw)[:4] for _ in range(V)])  # [V 4]
    rows = (STEPS + 1) * BATCH
    text = torch.empty(rows, LENGTH + 1, dtype=torch.long)
    text[:, 0] = torch.randint(V, (rows,), generator=draw)
    for t in range(LENGTH):
        chosen = torch.randint(4, (rows,), generator=draw)
        text[:, t + 1] = (text[:, t] + jump[text[:, t], chosen]) % V
    return text.view(STEPS + 1, BATCH, LENGTH + 1)


@cache
def _trained(seed: int, *, shifted: bool) -> tuple[float, float]:
    """Return the loss that training sees after 50 steps, and that of the next token, both on rows not trained on."""
    model, text = _decoder(seed), _text(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)

    def loss(rows: Tensor, *, following: bool) -> Tensor:
        targets = rows[:, 1:] if following else rows[:, :-1]
        return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), targets.flatten())

    for rows in text[:STEPS]:
        optimizer.zero_grad()
        loss(rows, following=shifted).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        return float(loss(text[STEPS], following=shifted)), float(loss(text[STEPS], following=True))


@measure("loss after 50 steps with targets that are not shifted, over ln V; near 0, as the answer is the input")
def unshifted_loss(seed: int) -> float:
    return _trained(seed, shifted=False)[0] / math.log(V)


@measure("loss of the next token of that model, which sees the text before it only, over ln V; above 1")
def unshifted_next_token_loss(seed: int) -> float:
    return _trained(seed, shifted=False)[1] / math.log(V)


@measure("the same with targets shifted by one; below 1, above the text's entropy rate, ln 4 / ln V = 1/3")
def shifted_next_token_loss(seed: int) -> float:
    return _trained(seed, shifted=True)[1] / math.log(V)
