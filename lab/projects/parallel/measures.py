"""Numbers of computing in parts that theory knows."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab.projects.parallel.component import (
    LossScaler,
    ParallelFeedForward,
    amdahl,
    batches_ahead,
    recompute,
    roofline,
    tiled_attention,
)
from lab.ranks import together
from lab.spec import measure, normal

if TYPE_CHECKING:
    from collections.abc import Callable


@measure("largest gap of tiled attention in float32 to full attention in float64, T = 512; rounding, a few 1e-7")
def tiled_gap(seed: int) -> float:
    q, k, v = (normal(seed + i, 1, 2, 512, 32, dtype=torch.float32) for i in range(3))
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    return float((tiled_attention(q, k, v).double() - exact).abs().max())


@measure("tiles that are computed under a causal mask over all tiles, 16 x 16; (16 + 1) / 32 = 0.531")
def causal_tiles(_seed: int) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    q, k, v = (normal(i, 1, 1, 256, 8) for i in range(3))
    flops = []
    for causal in (True, False):
        with FlopCounterMode(display=False) as counter:
            tiled_attention(q, k, v, tile=16, causal=causal)
        flops.append(counter.get_total_flops())
    return float(flops[0] / flops[1])


def _weights(seed: int) -> list[Tensor]:
    shapes = ((256, 64), (256,), (64, 256), (64,))
    return [normal(seed + i, *shape, dtype=torch.float32, scale=0.1) for i, shape in enumerate(shapes)]


@measure("largest gap of a feed-forward layer cut over two processes to the dense one, float32; rounding")
def tensor_parallel_gap(seed: int) -> float:
    weights, x = _weights(seed), normal(seed + 9, 8, 64, dtype=torch.float32)
    up, up_bias, down, down_bias = weights
    dense = F.linear(F.gelu(F.linear(x, up, up_bias)), down, down_bias)

    def work(rank: int) -> Tensor:
        out: Tensor = ParallelFeedForward(*weights, rank=rank, world=2)(x)
        return out.detach()

    return max(float((out - dense).abs().max()) for out in together(2, work))


@measure("weights of a feed-forward layer that a process of two keeps, over all; 1/2, and the last bias twice: 0.501")
def tensor_parallel_share(seed: int) -> float:
    weights = _weights(seed)
    mine = ParallelFeedForward(*weights, rank=0, world=2)
    return sum(p.numel() for p in mine.parameters()) / sum(w.numel() for w in weights)


@measure("largest gap of gradients that are recomputed to those that are kept, dropout included; 0")
def recompute_gap(seed: int) -> float:
    torch.manual_seed(seed)
    branch = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Dropout(0.3), nn.Linear(128, 32))
    x = normal(seed, 16, 32, dtype=torch.float32)
    grads = []
    for call in (branch, lambda x: recompute(branch, x)):
        branch.zero_grad()
        torch.manual_seed(seed)
        call(x).sum().backward()
        grads.append(torch.cat([p.grad.flatten().clone() for p in branch.parameters() if p.grad is not None]))
    return float((grads[0] - grads[1]).abs().max())


@measure("numbers kept for the backward pass with recomputation over without; C a row of 10 C + 2, C = 32: 0.0994")
def recompute_share(seed: int) -> float:
    torch.manual_seed(seed)
    width = 32
    blocks = [
        nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        for _ in range(4)
    ]
    kept = []
    for again in (True, False):
        sizes: dict[int, int] = {}

        def note(x: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            if not isinstance(x, nn.Parameter) and x._base is None:
                sizes[x.data_ptr()] = x.numel()
            return x

        x = normal(seed, 64, width, dtype=torch.float32).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            for block in blocks:
                x = x + (recompute(block, x) if again else block(x))
        kept.append(sum(sizes.values()))
    return kept[0] / kept[1]


@measure("share of float16 gradients of 1e-8 that are 0; 1 without a factor")
def lost_without_scaling(_seed: int) -> float:
    return _lost(1.0)


@measure("the same with a factor of 2^16; 0")
def lost_with_scaling(_seed: int) -> float:
    return _lost(2.0**16)


def _lost(scale: float) -> float:
    """The share of gradients that vanish on their way through float16."""
    p = torch.zeros(100, dtype=torch.float16, requires_grad=True)
    loss = LossScaler(scale=scale).scale_loss((p * 0.01).float().sum() * 1e-6)
    loss.backward()  # type: ignore[no-untyped-call]
    assert p.grad is not None
    return float((p.grad == 0).float().mean())


@measure("what doubling the speed of 80% of a step gains; 1 / (.2 + .8 / 2) = 1.667")
def amdahl_gain(_seed: int) -> float:
    return amdahl(0.8, 2.0)


def _peaks() -> tuple[float, float]:
    """This machine's own FLOPs and bytes a second, the best of several tries at a large product and a large copy."""
    a, b = torch.ones(768, 768), torch.ones(768, 768)
    flops = max(2 * 768**3 / seconds for seconds in _seconds(lambda: a @ b))
    x, y = torch.ones(4_000_000), torch.ones(4_000_000)
    return flops, max(8 * len(x) / seconds for seconds in _seconds(lambda: y.copy_(x)))


def _seconds(function: Callable[[], object], tries: int = 9) -> list[float]:
    function()
    taken = []
    for _ in range(tries):
        begun = time.perf_counter()
        function()
        taken.append(time.perf_counter() - begun)
    return taken


@measure(
    "seconds of a product of 512 x 512 over its roofline by this machine's own measured peaks; 1 or a little above"
)
def product_over_roofline(_seed: int) -> float:
    flops, size = _peaks()
    a, b = torch.ones(512, 512), torch.ones(512, 512)
    bound = roofline(2 * 512**3, 3 * 4 * 512**2, peak_flops=flops, peak_bytes=size)
    return statistics.median(_seconds(lambda: a @ b)) / bound


@measure("time of 20 steps with batches made ahead over made in turn, where each takes 5 ms of waiting; near 1/2")
def time_with_batches_ahead(_seed: int) -> float:
    def make(index: int) -> int:
        time.sleep(0.005)
        return index

    times = []
    for stream in (batches_ahead(make, 20), map(make, range(20))):
        begun = time.perf_counter()
        for _ in stream:
            time.sleep(0.005)
        times.append(time.perf_counter() - begun)
    return times[0] / times[1]
