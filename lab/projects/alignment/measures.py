"""Numbers of alignment that theory knows."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lab.projects.alignment.component import (
    dpo_loss,
    dpo_margin,
    frozen_copy,
    group_advantages,
    kl_estimate,
    policy_loss,
    preference_loss,
    sequence_log_probability,
)
from lab.projects.decoder.component import Decoder
from lab.spec import measure, normal

BETA = 0.1


def _model(seed: int) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(11, context=8, layers=1, width=16, heads=2)


def _rows(seed: int, count: int, off: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Inputs and targets [2 count 6] in pairs: a count upward, and the same with a last token that is off by `off`."""
    draw = torch.Generator().manual_seed(seed)
    right = (torch.randint(5, (count, 1), generator=draw) + torch.arange(7)) % 11
    wrong = right.clone()
    wrong[:, -1] = (wrong[:, -1] + torch.randint(*off, (count,), generator=draw)) % 11
    rows = torch.stack([right, wrong], dim=1).flatten(0, 1)
    return rows[:, :-1], rows[:, 1:]


def _pairs(
    model: torch.nn.Module, reference: torch.nn.Module, seed: int, count: int = 16, off: tuple[int, int] = (1, 9)
) -> tuple[Tensor, ...]:
    rows, targets = _rows(seed, count, off)
    policy = sequence_log_probability(model(rows), targets)
    with torch.no_grad():
        before = sequence_log_probability(reference(rows), targets)
    return policy[0::2], policy[1::2], before[0::2], before[1::2]


def _trained(seed: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A model after 40 steps of DPO, and its reference."""
    model = _model(seed)
    reference = frozen_copy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(40):
        optimizer.zero_grad()
        dpo_loss(*_pairs(model, reference, 1000 * seed + step), beta=BETA).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model, reference


@measure("DPO's loss before the first step over ln 2; 1")
def dpo_loss_at_start(seed: int) -> float:
    model = _model(seed)
    return float(dpo_loss(*_pairs(model, frozen_copy(model), seed), beta=BETA).detach()) / math.log(2)


@measure("largest margin before the first step; 0")
def margin_at_start(seed: int) -> float:
    model = _model(seed)
    return float(dpo_margin(*_pairs(model, frozen_copy(model), seed), beta=BETA).detach().abs().max())


@measure("parameters of the reference that have a gradient or have moved after 40 steps; 0")
def reference_moved(seed: int) -> float:
    _, reference = _trained(seed)
    start = _model(seed).state_dict()
    moved = sum(not torch.equal(tensor, start[name]) for name, tensor in reference.state_dict().items())
    return float(moved + sum(p.grad is not None for p in reference.parameters()))


@measure("mean margin after 40 steps of DPO on pairs with mistakes that were in none of the training's; above 0")
def held_out_margin(seed: int) -> float:
    pairs = _pairs(*_trained(seed), seed=seed, count=64, off=(9, 11))
    return float(dpo_margin(*pairs, beta=BETA).detach().mean())


@measure("mean of the KL estimate over every token that can be drawn, over KL(policy, reference); 1")
def kl_over_closed_form(seed: int) -> float:
    policy, reference = (F.log_softmax(normal(seed + i, 32), dim=-1) for i in range(2))
    exact = (policy.exp() * (policy - reference)).sum()
    return float((policy.exp() * kl_estimate(policy, reference)).sum() / exact)


@measure("the smallest of 10,000 KL estimates; 0 or above")
def smallest_kl(seed: int) -> float:
    return float(kl_estimate(normal(seed, 100, 100), normal(seed + 1, 100, 100)).min())


@measure("the smallest of 10,000 plain estimates, log(policy / reference), for comparison; far below 0")
def smallest_plain_kl(seed: int) -> float:
    return float((normal(seed, 100, 100) - normal(seed + 1, 100, 100)).min())


@measure("mean of a group's advantages; 0 but for rounding")
def advantages_mean(seed: int) -> float:
    return float(group_advantages(normal(seed, 1, 64, scale=7.0)).mean())


@measure("standard deviation of a group's advantages; 1")
def advantages_std(seed: int) -> float:
    return float(group_advantages(normal(seed, 1, 64, scale=7.0)).std(correction=0))


@measure("preference loss of equal rewards over ln 2; 1")
def preference_loss_at_start(seed: int) -> float:
    rewards = normal(seed, 16)
    return float(preference_loss(rewards, rewards)) / math.log(2)


@measure("share of PPO's gradient that is left for a good token whose ratio is e, beyond the clip of 1.2; 0")
def gradient_beyond_the_clip(_seed: int) -> float:
    new = torch.ones(1, 1, requires_grad=True)
    present = torch.ones(1, 1, dtype=torch.bool)
    (grad,) = torch.autograd.grad(policy_loss(new, torch.zeros(1, 1), torch.ones(1), present), new)
    return float(grad.abs()) / math.e
