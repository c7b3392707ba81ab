"""Numbers of losses that theory knows."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from lab.projects.losses.component import cross_entropy_explicit, log_softmax, smoothed_cross_entropy
from lab.spec import measure, normal

WORDS = 50_257  # the vocabulary of GPT-2


def _largest_exponent(dtype: torch.dtype, bits: torch.dtype) -> float:
    """Halve the interval of positive numbers: read as integers, they are in the same order."""
    low, high = 0, int(torch.tensor(torch.inf, dtype=dtype).view(bits))
    while high - low > 1:
        middle = (low + high) // 2
        x = torch.tensor(middle, dtype=bits).view(dtype)
        low, high = (middle, high) if bool(torch.isfinite(x.exp())) else (low, middle)
    return float(torch.tensor(low, dtype=bits).view(dtype))


@measure("largest float32 whose exponential is finite; ln of the largest float32 = 88.72")
def largest_exponent_float32(_seed: int) -> float:
    return _largest_exponent(torch.float32, torch.int32)


@measure("largest float16 whose exponential is finite; ln of the largest float16 = 11.09, to float16's 0.008")
def largest_exponent_float16(_seed: int) -> float:
    return _largest_exponent(torch.float16, torch.int16)


def _start_gap(seed: int, sigma: float) -> float:
    logits = normal(seed, 32, WORDS, scale=sigma)
    # Smoothing of 1 weighs all targets evenly: the mean over random targets, without the noise of drawing them.
    loss = smoothed_cross_entropy(logits, torch.zeros(32, dtype=torch.long), smoothing=1.0)
    return float(loss) - (math.log(WORDS) + sigma**2 / 2)


@measure("loss at start less ln V + sigma^2/2, for V = 50257 and logits of standard deviation 1; near 0")
def start_gap(seed: int) -> float:
    return _start_gap(seed, 1.0)


@measure("loss of perfect probabilities given as logits, V = 10; ln(1 + 9/e) = 1.461, where it should be 0")
def double_softmax_floor(seed: int) -> float:
    targets = torch.randint(10, (64,), generator=torch.Generator().manual_seed(seed))
    certain = log_softmax(1e3 * F.one_hot(targets, 10).double()).exp()  # [64 10], 1 at the target
    return float(cross_entropy_explicit(certain, targets))


@measure("distance of the formula from F.cross_entropy, in float32; 0 but for rounding")
def fused_error(seed: int) -> float:
    logits = normal(seed, 512, 1000, dtype=torch.float32)
    targets = torch.randint(1000, (512,), generator=torch.Generator().manual_seed(seed))
    return float((cross_entropy_explicit(logits, targets) - F.cross_entropy(logits, targets)).abs())
