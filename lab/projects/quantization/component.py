"""Project 15: quantization of weights to int8 and int4, per tensor, per row and per group.

Jacob et al., 2018 (integers times a scale); Dettmers et al., 2022 (outliers, a scale a row); Frantar et al., 2023
(groups of int4).
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab.errors import BadInput
from lab.projects.linear.component import Linear
from lab.sites import Component

if TYPE_CHECKING:
    from collections.abc import Mapping

Group = Literal["tensor", "row"] | int

# Name of a scheme to its bits and to what shares a scale.
SCHEMES: Mapping[str, tuple[int, Group]] = MappingProxyType(
    {
        "int8-tensor": (8, "tensor"),
        "int8-row": (8, "row"),
        "int4-tensor": (4, "tensor"),
        "int4-row": (4, "row"),
        "int4-group32": (4, 32),
    }
)


@dataclass(frozen=True, eq=False)
class Quantized:
    """A tensor as small integers times a scale that neighbours share.

    Attributes:
        codes: int8, of the tensor's shape; from ``-(2^(bits-1) - 1)`` to ``2^(bits-1) - 1``.
        scale: [N G], for N rows of G groups each; N is 1 where the whole tensor shares one scale.
        shape: Of the tensor.
        bits: Of a code.
        each: Entries that share a scale; the last group of a row may have fewer.
    """

    codes: Tensor
    scale: Tensor
    shape: torch.Size
    bits: int
    each: int

    def dequantize(self) -> Tensor:
        """Multiply each code by its scale, in the dtype of the scale: float32, or float64 of a float64 tensor."""
        if not self.codes.numel():
            return self.scale.new_zeros(self.shape)
        width = self.codes.numel() // len(self.scale)
        rows = self.codes.reshape(len(self.scale), width)  # [N W]
        groups = _grouped(rows, self.each) * self.scale[..., None]  # [N G each]
        return groups.flatten(1)[:, :width].reshape(self.shape)

    @property
    def bytes(self) -> int:
        """What it takes to keep: codes of up to 4 bits two a byte, others one, and the scales."""
        codes = self.codes.numel()
        return (codes if self.bits > 4 else (codes + 1) // 2) + self.scale.nbytes


@torch.no_grad()
def quantize(x: Tensor, bits: int = 8, *, group: Group = "row") -> Quantized:
    """Round to the nearest multiple of a scale, ties to even; the largest entry of a group gets the largest code.

    The scale is ``max |x| / (2^(bits-1) - 1)``: 0 stays 0, and codes are symmetric about it. It is computed in float32,
    or in float64 where x is, and is the smallest normal number of these at least: never 0, even for zeros.

    Args:
        x: [... W], finite.
        bits: 2 to 8.
        group: What shares a scale: the whole ``tensor``, each ``row`` (the last axis), or so many neighbours in a row.

    Raises:
        BadInput: An entry is infinite or NaN, x holds no floats, or `bits` or `group` is none of these.
    """
    if not 2 <= bits <= 8:
        raise BadInput(f"bits: found {bits}; 2 to 8 can be kept in an int8")
    if not x.is_floating_point():
        raise BadInput(f"a tensor of {x.dtype} holds no floats to quantize")
    rows = _rows(x, group)  # [N W]
    each = group if isinstance(group, int) else max(1, rows.shape[1])
    exact = torch.promote_types(x.dtype, torch.float32)
    groups = _grouped(rows.to(exact), each)  # [N G each]
    largest = groups.abs().amax(dim=-1)  # [N G]
    if not torch.isfinite(largest).all():
        raise BadInput("a tensor that holds inf or NaN cannot be quantized: there is no scale for it")
    # A group of zeros needs a scale other than 0, and one of denormal numbers a scale that is not rounded.
    scale = (largest / (2 ** (bits - 1) - 1)).clamp_min(torch.finfo(exact).tiny)
    codes = (groups / scale[..., None]).round().to(torch.int8)  # [N G each]
    return Quantized(codes.flatten(1)[:, : rows.shape[1]].reshape(x.shape), scale, x.shape, bits, each)


def _rows(x: Tensor, group: Group) -> Tensor:  # [... W] -> [N W], or [1 numel] for the whole tensor
    if group == "tensor":
        return x.reshape(1, x.numel())
    if group != "row" and not (isinstance(group, int) and group >= 1):
        raise BadInput(f"group: found {group!r}; known: 'tensor', 'row', or how many neighbours share a scale")
    *lead, width = x.shape or (1,)
    return x.reshape(math.prod(lead), width)


def _grouped(rows: Tensor, each: int) -> Tensor:  # [N W] -> [N G each], the last group filled up with zeros
    count, width = rows.shape
    groups = -(-width // each)
    return F.pad(rows, (0, groups * each - width)).view(count, groups, each)


def pack_int4(codes: Tensor) -> Tensor:  # [...] int8 -> [ceil(n / 2)] uint8
    """Put two codes of 4 bits into a byte, as two's complement, the first of them in the low half.

    Raises:
        BadInput: A code is below -8 or above 7.
    """
    flat = codes.reshape(-1)
    if ((flat < -8) | (flat > 7)).any():
        raise BadInput("a code below -8 or above 7 does not fit into 4 bits")
    nibbles = F.pad(flat, (0, len(flat) % 2)).view(torch.uint8) & 15  # [n or n + 1]
    return nibbles[0::2] | nibbles[1::2] << 4


def unpack_int4(packed: Tensor, count: int) -> Tensor:  # [ceil(n / 2)] uint8 -> [n] int8
    """Undo `pack_int4` for `count` codes; the fourth bit is the sign."""
    nibbles = torch.stack([packed & 15, packed >> 4], dim=-1).flatten()[:count].to(torch.int8)
    return (nibbles ^ 8) - 8


class QuantizedLinear(Component):
    """A linear layer that keeps its weight as codes, and makes it anew at each call; the bias is kept as it is.

    The codes are buffers: the layer is for inference, and only its bias could be trained. Gradients reach the input.

    Args:
        weight: [outputs inputs].
        bias: [outputs].
    """

    SITES = MappingProxyType({"out": "B T C"})
    codes: Tensor
    scale: Tensor

    def __init__(self, weight: Quantized, bias: Tensor | None = None) -> None:
        super().__init__()
        self.shape, self.bits, self.each = weight.shape, weight.bits, weight.each
        self.register_buffer("codes", pack_int4(weight.codes) if weight.bits <= 4 else weight.codes)
        self.register_buffer("scale", weight.scale)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    @classmethod
    def of(cls, linear: Linear, bits: int = 8, group: Group = "row") -> QuantizedLinear:
        """Quantize the weight of a linear layer. Errors are those of `quantize`."""
        return cls(quantize(linear.weight, bits, group=group), linear.bias)

    @property
    def weight(self) -> Tensor:
        """What the codes stand for, [outputs inputs]."""
        codes = unpack_int4(self.codes, self.shape.numel()) if self.bits <= 4 else self.codes
        return Quantized(codes, self.scale, self.shape, self.bits, self.each).dequantize()

    def forward(self, x: Tensor) -> Tensor:  # [... inputs] -> [... outputs]
        """Dequantize, multiply and add."""
        rows = x.reshape(-1, x.shape[-1])  # [N inputs]
        weight = self.weight.to(x.dtype).t()  # [inputs outputs]
        y = rows @ weight if self.bias is None else torch.addmm(self.bias, rows, weight)  # [N outputs]
        return self.tap("out", y.view(*x.shape[:-1], self.shape[0]))


def quantize_model(model: nn.Module, bits: int = 8, group: Group = "row") -> nn.Module:
    """Return a copy of a model in which each `Linear` is a `QuantizedLinear`; the model itself stays as it is.

    Embeddings and norms are kept as they are. So is a `Linear` whose weight another module shares: a head tied to the
    embedding, whose table is looked up and not multiplied, would then be kept twice. Errors are those of `quantize`.
    """
    made = copy.deepcopy(model)
    if isinstance(made, Linear):
        return QuantizedLinear.of(made, bits, group)
    owners = Counter(id(p) for module in made.modules() for p in module.parameters(recurse=False))
    for module in list(made.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Linear) and owners[id(child.weight)] == 1:
                setattr(module, name, QuantizedLinear.of(child, bits, group))
    return made


def weight_bytes(model: nn.Module) -> int:
    """What the weights of a model take: its parameters, each counted once, and the codes and scales in it."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    return sum(p.nbytes for p in model.parameters()) + sum(x.codes.nbytes + x.scale.nbytes for x in layers)


def signal_to_noise(x: Tensor, y: Tensor) -> float:
    """Compare a tensor with what became of it, in dB: ``10 log10(sum x^2 / sum (x - y)^2)``; inf if they are equal."""
    signal = x.detach().double()
    power, error = float(signal.square().sum()), float((signal - y.detach().double()).square().sum())
    if error == 0:
        return math.inf
    return 10 * math.log10(power / error) if power else -math.inf
