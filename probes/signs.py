"""Numbers that stand for tensors: sums with signs that are the same in every run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lab import torch

if TYPE_CHECKING:
    from torch import Tensor

    from lab import Batch

FLOATS = {"torch.float16", "torch.bfloat16", "torch.float32", "torch.float64"}
LARGE = 2**20  # elements that are copied at a time


class Signs:
    """Signs without a pattern, the same in every run, and as many of them as are asked for."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}

    def get(self, which: int, begin: int, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:  # -> [count]
        """Signs of the sequence `which`, from the place `begin` on."""
        key = which, device, dtype
        known = self._known.get(key)
        if known is None or known.shape[0] < begin + count:
            length = max(1024, 2 * (begin + count))
            known = self._known[key] = (1 - 2 * (mixed(length, which, device) >> 63 & 1)).to(dtype)
        return known[begin : begin + count]

    def sums(self, x: Tensor, offset: int = 0) -> tuple[Tensor, Tensor]:  # [... C] -> [], []
        """The sum of the squares of the elements, and that of the elements, each with its sign; both in float64.

        A sign is that of the last index times that of the others together, counted from `offset`. A product by a matrix
        kernel would be quicker, but its last bit may depend on where in memory a tensor lies.
        """
        x = x.detach()
        rows = x.reshape(-1, x.shape[-1]) if x.dim() > 1 else x.reshape(-1, 1)  # [N C]
        across = self.get(0, 0, rows.shape[1], rows.dtype, x.device)
        along = self.get(1, offset, rows.shape[0], torch.float64, x.device)
        squares, signed = [], []
        step = max(1, LARGE // rows.shape[1])
        for begin in range(0, rows.shape[0], step):
            part = rows if rows.numel() <= LARGE else rows[begin : begin + step]
            part = part if part.element_size() > 2 else part.float()
            squares.append((part * part).sum(-1).double().sum())
            signed.append(((part * across).sum(-1) * along[begin : begin + step]).sum())
        return (squares[0], signed[0]) if len(squares) == 1 else (torch.stack(squares).sum(), torch.stack(signed).sum())


class Sum:
    """The fingerprint of what passes in parts."""

    def __init__(self) -> None:
        self.rows = self.count = 0
        self.partial = False  # whether it is not that of the whole
        self.batch: Batch | None = None  # the newest part of which it is
        self.square: Any = 0.0
        self.signed: Any = 0.0

    def add(self, x: Tensor, signs: Signs) -> None:
        """Add a part, whose rows follow those before it."""
        square, signed = signs.sums(x, self.rows)
        self.square, self.signed = self.square + square, self.signed + signed
        self.rows += x.numel() // x.shape[-1] if x.dim() > 1 else x.numel()
        self.count += x.numel()

    def scale(self, by: Tensor) -> None:
        """Undo a scale."""
        self.square, self.signed = self.square / by.square(), self.signed / by


def mixed(count: int, which: int, device: torch.device) -> Tensor:  # -> [count]
    """Whole numbers of 64 bits without a pattern: counted up, and mixed by splitmix64."""
    x = torch.arange(1 + (which << 40), 1 + (which << 40) + count, device=device) * -0x61C8864680B583EB
    x = (x ^ (x >> 30 & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27 & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ (x >> 31 & 0x1FFFFFFFF)


def plain(x: Tensor) -> bool:
    """Whether it holds floating-point numbers in the usual way."""
    usual = x.layout == torch.strided and not x.is_nested and x.device.type != "meta"
    return usual and str(x.dtype) in FLOATS and x.numel() > 0
