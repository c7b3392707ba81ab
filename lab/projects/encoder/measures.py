"""Numbers of an encoder that theory knows."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab.context import IGNORED
from lab.projects.encoder.component import Encoder, EncoderBlock, SelfAttention, mask_tokens, present_mask
from lab.sites import sites_of
from lab.spec import measure, normal

V, WIDTH, HEADS, LENGTH = 64, 32, 4, 16


def _encoder(seed: int) -> Encoder:
    """Build one from this seed, and leave torch's generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Encoder(V, context=LENGTH, layers=2, width=WIDTH, heads=HEADS)


def _tokens(seed: int, *shape: int) -> Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


@measure("largest change of a logit at a token when the tokens in the padding change; 0")
@torch.no_grad()
def padding_leak(seed: int) -> float:
    model, present = _encoder(seed), present_mask(torch.tensor([16, 11, 5, 1]), LENGTH)
    tokens = _tokens(seed, 4, LENGTH)
    other = torch.where(present, tokens, (tokens + 1) % V)
    return float((model(tokens, present) - model(other, present))[present].abs().max())


@measure("largest change of a logit of a row that is padded and batched with longer ones; 0 but for rounding")
@torch.no_grad()
def padding_amount_gap(seed: int) -> float:
    model, lengths = _encoder(seed), [16, 11, 5, 1]
    tokens = _tokens(seed, 4, LENGTH)
    together = model(tokens, present_mask(torch.tensor(lengths), LENGTH))
    gaps = [(model(tokens[b : b + 1, :n]) - together[b, :n]).abs().max() for b, n in enumerate(lengths)]
    return float(torch.stack(gaps).max())


@measure("largest |d output of the first row / d input of another row|; 0")
def neighbour_leak(seed: int) -> float:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        block = EncoderBlock(WIDTH, HEADS, 1)
    x = normal(seed, 4, LENGTH, WIDTH, dtype=torch.float32).requires_grad_()
    out = block(x, present_mask(torch.tensor([9, 16, 5, 1]), LENGTH))
    (grad,) = torch.autograd.grad(out[0].sum(), x)
    return float(grad[1:].abs().max())


def _permuted(seed: int, model: Encoder) -> float:
    order = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(seed))
    tokens = _tokens(seed, 4, LENGTH)
    with torch.no_grad():
        gap = model(tokens[:, order]) - model(tokens)[:, order]
        return float(gap.abs().max() / model(tokens).std())


@measure("largest change of a logit, permuted back, when a row is permuted, without positions; 0 but for rounding")
def permutation_gap(seed: int) -> float:
    model = _encoder(seed)
    nn.init.zeros_(model.positions.weight)
    return _permuted(seed, model)


@measure("the same with positions, in standard deviations of a logit: order is seen; above 0")
def permutation_gap_with_positions(seed: int) -> float:
    return _permuted(seed, _encoder(seed))


@measure("share of the pairs of positions, tokens both, in which one moves the other's output; 1")
def receptive_field_share(seed: int) -> float:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = SelfAttention(WIDTH, HEADS).double()
    x, held = normal(seed, 1, LENGTH, WIDTH).requires_grad_(), 12
    out = made(x, present_mask(torch.tensor([held]), LENGTH))
    moved = [torch.autograd.grad(out[0, t].sum(), x, retain_graph=True)[0][0].abs().amax(-1) for t in range(held)]
    return float((torch.stack(moved)[:, :held] > 0).double().mean())


@measure("largest distance between the fused kernel and the formula, with padding, in float32; 0 but for rounding")
@torch.no_grad()
def fused_error(seed: int) -> float:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = SelfAttention(WIDTH, HEADS)
    x = normal(seed, 4, LENGTH, WIDTH, dtype=torch.float32)
    present = present_mask(torch.tensor([16, 11, 5, 0]), LENGTH)
    fused = made(x, present)
    sites_of(made).replace("scores", lambda scores: scores)
    return float((made(x, present) - fused).abs().max())


@measure("loss at start over ln V + C 0.02^2 / 2; 1")
@torch.no_grad()
def loss_at_start_over_theory(seed: int) -> float:
    logits = _encoder(seed)(_tokens(seed, 256, LENGTH))
    loss = F.cross_entropy(logits.flatten(0, 1), _tokens(seed + 1, 256, LENGTH).flatten())
    return float(loss) / (math.log(V) + WIDTH * 0.02**2 / 2)


def _hidden(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return tokens, inputs, targets and where tokens are, for rows of 20 to 400 tokens."""
    draw = torch.Generator().manual_seed(seed)
    present = present_mask(torch.randint(20, 401, (512,), generator=draw), 400)
    tokens = torch.randint(1000, (512, 400), generator=draw)
    inputs, targets = mask_tokens(tokens, mask_token=1000, vocabulary=1000, present=present, generator=draw)
    return tokens, inputs, targets, present


@measure("share of the tokens that are to be predicted; 0.15")
def chosen_share(seed: int) -> float:
    _, _, targets, present = _hidden(seed)
    return float((targets != IGNORED).sum() / present.sum())


@measure("share of these that the mask token hides; 0.8")
def mask_share(seed: int) -> float:
    _, inputs, targets, _ = _hidden(seed)
    return float((inputs == 1000)[targets != IGNORED].double().mean())


@measure("share of these that stay as they are; 0.1 + 0.1 / V = 0.1001, as a random token may be the token itself")
def kept_share(seed: int) -> float:
    tokens, inputs, targets, _ = _hidden(seed)
    return float((inputs == tokens)[targets != IGNORED].double().mean())
