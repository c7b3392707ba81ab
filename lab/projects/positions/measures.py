"""Numbers of positions that theory knows."""

from __future__ import annotations

import math

import torch

from lab.projects.attention.component import Attention
from lab.projects.positions.component import SinusoidalPositions, alibi_bias, rotate
from lab.spec import measure, normal, tapped

WIDTH, FAR = 64, 4000


def _shift_error(seed: int, dtype: torch.dtype) -> float:
    q, k = (normal(2 * seed + i, WIDTH, dtype=dtype).expand(1, 1, FAR, WIDTH) for i in range(2))  # [1 1 T D]
    turned_q, turned_k = rotate(q), rotate(k)
    errors = []
    for distance in (0, 1, 7, 100):
        scores = (turned_q[..., distance:, :] * turned_k[..., : FAR - distance, :]).sum(-1)  # [1 1 T]
        errors.append((scores - scores[..., :1]).abs().max())
    largest: float = torch.stack(errors).max().item()
    return largest / math.sqrt(WIDTH)


@measure("largest move of a score q k/sqrt(D) under shifts up to 4000, float32, D = 64; about 4000 x 2^-24 = 2.4e-4")
def shift_error(seed: int) -> float:
    return _shift_error(seed, torch.float32)


@measure("the same in float64; 2^29 times less")
def shift_error_float64(seed: int) -> float:
    return _shift_error(seed, torch.float64)


@measure("positions of 2048 that have an angle of their own in bfloat16; 257 + 3 x 128 = 641")
def distinct_bfloat16_angles(seed: int) -> float:  # noqa: ARG001 - nothing is drawn
    return float(len(set(torch.arange(2048).to(torch.bfloat16).tolist())))


@measure("positions of 2048 that rotate tells apart in a bfloat16 vector, angles in float32; 2048")
def distinct_positions(seed: int) -> float:
    x = normal(seed, WIDTH, dtype=torch.bfloat16).expand(1, 1, 2048, WIDTH)  # [1 1 T D]
    return float(len(set(map(tuple, rotate(x)[0, 0].float().tolist()))))


@measure("largest change of a vector's norm by rotation in float32, relative; 0 but for rounding")
def rotation_norm_error(seed: int) -> float:
    x = normal(seed, 1, 1, 2048, WIDTH, dtype=torch.float32)  # [1 1 T D]
    return float((rotate(x).double().norm(dim=-1) / x.double().norm(dim=-1) - 1).abs().max())


@measure("norm^2 of a row of sinusoids over C/2; 1")
def sinusoid_norm(seed: int) -> float:  # noqa: ARG001 - nothing is drawn
    rows = SinusoidalPositions(2048, WIDTH)(2048).double()  # [T C]
    return float(rows.square().sum(-1).mean()) / (WIDTH / 2)


@measure("largest difference of p(t) p(t + 7) from its value at t = 0, over C/2; 0 but for rounding")
def sinusoid_shift_error(seed: int) -> float:  # noqa: ARG001 - nothing is drawn
    rows = SinusoidalPositions(2048, WIDTH)(2048).double()  # [T C]
    products = (rows[:-7] * rows[7:]).sum(-1)  # [T]
    return float((products - products[0]).abs().max()) / (WIDTH / 2)


def _neighbours(head: int) -> float:
    made, zeros = Attention(), torch.zeros(1, 8, 64, 4, dtype=torch.float64)  # [1 H T D]
    bias = alibi_bias(8, 64, 64).double()
    row = tapped(made, zeros, zeros, zeros, bias, call=made.explicit)["pattern"][0, head, -1]  # [S]
    return float(row[-2] / row[-1])


@measure("weight of the position before over the own, scores all 0, first ALiBi head of 8; exp(-1/2) = 0.6065")
def alibi_first_head(seed: int) -> float:  # noqa: ARG001 - nothing is drawn
    return _neighbours(0)


@measure("the same in the last head of 8; exp(-1/256) = 0.9961")
def alibi_last_head(seed: int) -> float:  # noqa: ARG001 - nothing is drawn
    return _neighbours(7)
