"""Project 5: convolution, causal in one dimension and plain in two.

LeCun et al., 1989 (weights shared over places); van den Oord et al., 2016 (causal); Dauphin et al., 2017 (gated).
"""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab.errors import BadInput
from lab.projects.linear.component import Linear
from lab.sites import Component


class CausalConv1d(Component):
    """Each position is a linear function of the last `kernel` positions, itself among them; the same one everywhere.

    Two paths, equal within float tolerance. The fused one never holds the windows in memory. The explicit one is
    taken where a fault replaces them; for a probe they are computed aside, for the first row of the batch.

    Args:
        inputs, outputs: The widths. ``weight`` is [outputs inputs kernel], its last entry for the position itself.
        kernel: K; position t sees t - K + 1 .. t, and zeros before the beginning.
        gain: The weights are normal with standard deviation ``gain / sqrt(inputs kernel)``.
    """

    SITES = MappingProxyType({"windows": "B T F", "out": "B T C"})

    def __init__(self, inputs: int, outputs: int, kernel: int, *, gain: float = 1.0) -> None:
        super().__init__()
        self.kernel = kernel
        self.weight = nn.Parameter(torch.empty(outputs, inputs, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs))
        nn.init.normal_(self.weight, std=gain * (inputs * kernel) ** -0.5)

    def pad(self, x: Tensor) -> Tensor:  # [B T C] -> [B T+K-1 C]
        """Put zeros before the beginning, and none after the end: so the last window ends at the last position."""
        return F.pad(x, (0, 0, self.kernel - 1, 0))

    def forward(self, x: Tensor) -> Tensor:  # [B T inputs] -> [B T outputs]
        """Convolve."""
        # The padded sequence of an empty one is shorter than the kernel, which torch's operator refuses.
        if self.replaced("windows") or x.shape[1] == 0:
            return self.tap("out", self.explicit(x))
        if self.wanted("windows"):
            with torch.no_grad():
                self.explicit(x[:1].detach())
        rows = self.pad(x).transpose(1, 2)  # [B inputs T+K-1]
        return self.tap("out", F.conv1d(rows, self.weight, self.bias).transpose(1, 2))

    def explicit(self, x: Tensor) -> Tensor:  # [B T inputs] -> [B T outputs]
        """The sum over the kernel as one matmul: the positions of a window side by side, the oldest first."""
        t = x.shape[1]
        padded = self.pad(x)  # [B T+K-1 inputs]
        windows = torch.cat([padded[:, i : i + t] for i in range(self.kernel)], dim=-1)  # [B T K*inputs]
        windows = self.tap("windows", windows)
        matrix = self.weight.permute(2, 1, 0).flatten(0, 1)  # [K*inputs outputs]
        return windows @ matrix + self.bias


def output_size(n: int, kernel: int, stride: int = 1, padding: int = 0) -> int:
    """Return at how many places a kernel fits along `n` entries with `padding` zeros at both ends.

    Raises:
        BadInput: It fits nowhere.
    """
    if n + 2 * padding < kernel:
        raise BadInput(f"kernel = {kernel} is larger than the {n} + 2 x {padding} entries it runs over")
    return (n + 2 * padding - kernel) // stride + 1


def conv2d_loops(x: Tensor, weight: Tensor, bias: Tensor, *, stride: int = 1, padding: int = 0) -> Tensor:
    """Convolve one place of the output at a time: the definition. [B C H W] -> [B outputs Y X]."""
    kernel = weight.shape[-1]
    rows, columns = (output_size(n, kernel, stride, padding) for n in x.shape[2:])
    padded = F.pad(x, (padding,) * 4)  # [B C H+2p W+2p]
    places = []
    for i in range(rows):
        for j in range(columns):
            top, left = i * stride, j * stride
            patch = padded[:, :, top : top + kernel, left : left + kernel]  # [B C K K]
            places.append((patch[:, None] * weight).sum(dim=(2, 3, 4)) + bias)  # [B outputs]
    return torch.stack(places, dim=-1).view(len(x), len(weight), rows, columns)


def im2col(x: Tensor, kernel: int, *, stride: int = 1, padding: int = 0) -> Tensor:
    """Lay the patch under each place of the output out as a row. [B C H W] -> [B Y*X C*K*K]."""
    rows, columns = (output_size(n, kernel, stride, padding) for n in x.shape[2:])
    padded = F.pad(x, (padding,) * 4)  # [B C H+2p W+2p]
    patches = padded.unfold(2, kernel, stride).unfold(3, kernel, stride)  # [B C Y X K K], a view
    # Channel, row, column: the order in which the weight is laid out. Here the numbers are copied, K^2 times over.
    return patches.permute(0, 2, 3, 1, 4, 5).reshape(len(x), rows * columns, x.shape[1] * kernel * kernel)


def conv2d_im2col(x: Tensor, weight: Tensor, bias: Tensor, *, stride: int = 1, padding: int = 0) -> Tensor:
    """Convolve with one matmul over unfolded patches. [B C H W] -> [B outputs Y X]."""
    patches = im2col(x, weight.shape[-1], stride=stride, padding=padding)  # [B Y*X C*K*K]
    return _multiply(patches, weight, bias, output_size(x.shape[2], weight.shape[-1], stride, padding))


def _multiply(patches: Tensor, weight: Tensor, bias: Tensor, rows: int) -> Tensor:
    """Multiply each patch by the weight. [B Y*X C*K*K] -> [B outputs Y X]."""
    out = patches @ weight.flatten(1).t() + bias  # [B Y*X outputs]
    return out.transpose(1, 2).reshape(len(out), len(weight), rows, out.shape[1] // rows)


class Conv2d(Component):
    """Each place of the output is a linear function of the square patch of the input beneath it.

    Args:
        inputs, outputs: How many channels. ``weight`` is [outputs inputs kernel kernel].
        kernel: K, the side of the patch.
        stride: How far the patch moves from one place to the next.
        padding: How many zeros stand at each of the four edges.
    """

    SITES = MappingProxyType({"patches": "B T F", "out": "B C Y X"})

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, padding: int = 0) -> None:
        super().__init__()
        self.kernel, self.stride, self.padding = kernel, stride, padding
        self.weight = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs))
        nn.init.normal_(self.weight, std=(inputs * kernel**2) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:  # [B inputs H W] -> [B outputs Y X]
        """Convolve."""
        if self.replaced("patches"):
            return self.tap("out", self.explicit(x))
        if self.wanted("patches"):
            with torch.no_grad():
                self.explicit(x[:1].detach())
        return self.tap("out", F.conv2d(x, self.weight, self.bias, self.stride, self.padding))

    def explicit(self, x: Tensor) -> Tensor:  # [B inputs H W] -> [B outputs Y X]
        """The same by `im2col`, whose patches a fault can replace."""
        patches = self.tap("patches", im2col(x, self.kernel, stride=self.stride, padding=self.padding))
        return _multiply(
            patches, self.weight, self.bias, output_size(x.shape[2], self.kernel, self.stride, self.padding)
        )


class ConvMixer(Component):
    """A gated causal convolution that can stand where an attention layer stands: it mixes positions, near ones only.

    Args:
        width: C.
        kernel: How many positions each position sees, itself among them.
        gain: Of the output projection, whose output is added to the residual stream.
    """

    SITES = MappingProxyType({"gate": "B T C", "gated": "B T C", "out": "B T C"})

    def __init__(self, width: int, *, kernel: int = 4, gain: float = 1.0) -> None:
        super().__init__()
        self.conv = CausalConv1d(width, width, kernel)
        self.gates = Linear(width, width)
        self.proj = Linear(width, width, gain=gain)

    def forward(self, x: Tensor) -> Tensor:  # [B T C] -> [B T C]
        """Convolve, let through what the gate of each position opens, project."""
        mixed = self.conv(x)  # [B T C]
        gate = self.tap("gate", torch.sigmoid(self.gates(x)))  # [B T C], each in 0..1
        gated = self.tap("gated", mixed * gate)  # [B T C]
        return self.tap("out", self.proj(gated))  # [B T C]
