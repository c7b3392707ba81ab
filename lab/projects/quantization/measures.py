"""Numbers of quantization that theory knows."""

from __future__ import annotations

import torch
from torch import Tensor

from lab.projects.decoder.component import Decoder
from lab.projects.linear.component import Linear
from lab.projects.quantization.component import (
    SCHEMES,
    Group,
    QuantizedLinear,
    quantize,
    quantize_model,
    signal_to_noise,
)
from lab.spec import measure, normal

SIZE = 2048  # rows and columns of a weight of normal numbers


def _weight(seed: int, *, outlier: bool = False) -> Tensor:
    x = normal(seed, SIZE, SIZE, dtype=torch.float32)
    if outlier:
        x[0, 0] = 100.0
    return x


def _errors(seed: int) -> Tensor:
    """In steps of the scale, one for the whole tensor."""
    x = _weight(seed)
    made = quantize(x, 8, group="tensor")
    return (made.dequantize() - x).double() / made.scale.double()  # [N W]


def _decibels(x: Tensor, bits: int, group: Group) -> float:
    return signal_to_noise(x, quantize(x, bits, group=group).dequantize())


@measure("mean squared error over s^2/12, int8 per tensor; 1")
def squared_error_ratio(seed: int) -> float:
    return float(12 * _errors(seed).square().mean())


@measure("largest error in steps, int8 per tensor; at most 0.5 but for rounding")
def largest_error(seed: int) -> float:
    return float(_errors(seed).abs().max())


def _truncated(seed: int) -> Tensor:
    steps = _weight(seed).double() / quantize(_weight(seed), 8, group="tensor").scale.double()
    return steps.trunc() - steps  # [N W]


@measure("the same if the fraction is cut off; near 1")
def largest_error_truncated(seed: int) -> float:
    return float(_truncated(seed).abs().max())


@measure("mean squared error over s^2/12 if the fraction is cut off; just below 4")
def squared_error_ratio_truncated(seed: int) -> float:
    return float(12 * _truncated(seed).square().mean())


@measure("signal to noise in dB, int8 per tensor; 10 log10(12 (127/a)^2) = 38.5 with the largest of 2048^2, a = 5.2")
def decibels_tensor(seed: int) -> float:
    return _decibels(_weight(seed), 8, "tensor")


@measure("the same with one entry of 100 standard deviations; a = 100 gives 12.9")
def decibels_tensor_outlier(seed: int) -> float:
    return _decibels(_weight(seed, outlier=True), 8, "tensor")


@measure("int8 per row, without it; a = 3.64, the largest of 2048, gives 41.65")
def decibels_row(seed: int) -> float:
    return _decibels(_weight(seed), 8, "row")


@measure("int8 per row, with it; its own row alone has a = 100: 40.3")
def decibels_row_outlier(seed: int) -> float:
    return _decibels(_weight(seed, outlier=True), 8, "row")


@measure("what the eighth bit gains, in dB; 20 log10(127/63) = 6.09")
def decibels_of_a_bit(seed: int) -> float:
    x = _weight(seed)
    return _decibels(x, 8, "tensor") - _decibels(x, 7, "tensor")


@measure("what groups of 32 gain over rows, int4, in dB; 20 log10(3.64/2.39) = 3.7, and 0.1 as the largest is exact")
def decibels_of_groups(seed: int) -> float:
    x = _weight(seed)
    return _decibels(x, *SCHEMES["int4-group32"]) - _decibels(x, *SCHEMES["int4-row"])


@measure("bits a weight in int4 with groups of 32; 4 + 32/32 = 5")
def bits_a_weight(seed: int) -> float:
    x = normal(seed, 256, 256, dtype=torch.float32)
    bits, group = SCHEMES["int4-group32"]
    return 8 * quantize(x, bits, group=group).bytes / x.numel()


@measure("signal to noise of a layer's output less that of its weight, int8 per row, in dB; near 0")
def decibels_from_weight_to_output(seed: int) -> float:
    linear, x = Linear(512, 512, bias=False), normal(seed, 256, 512, dtype=torch.float32)
    with torch.no_grad():
        linear.weight.copy_(normal(seed + 1, 512, 512))
        made = QuantizedLinear.of(linear, *SCHEMES["int8-row"])
        return signal_to_noise(linear(x), made(x)) - signal_to_noise(linear.weight, made.weight)


@measure(
    "signal to noise of a decoder's logits, int8 per row, in dB; 43 of a weight, less 8 to 10 for products in series"
)
def decibels_logits(seed: int) -> float:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = Decoder(64, context=32, layers=4, width=128, heads=4)
        tokens = torch.randint(64, (4, 32))
        return signal_to_noise(model(tokens), quantize_model(model)(tokens))
