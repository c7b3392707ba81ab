"""What any tiled attention, tensor parallel layer, recomputation, loss scaler and loader of batches ahead must do."""

from __future__ import annotations

import math
import threading
import time
from typing import TYPE_CHECKING, Any, Self

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lab.ranks import together
from lab.spec import Built, equal, explicit_taps, floats, gradients, holds, near, normal, prop, seeds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

tiles = st.sampled_from([1, 3, 4, 7, 64])
lengths = st.integers(1, 9)


def _refuses(call: Callable[[], object], what: str) -> None:
    """Raise `Mismatch` unless the call raises; what is not written yet refuses nothing."""
    try:
        call()
    except NotImplementedError:
        raise
    except Exception:  # noqa: BLE001 - which error it is, the component may choose
        return
    holds(condition=False, text=f"{what} raised nothing")


def _full(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """Attention by its formula; the queries stand at the last of the keys' positions."""
    scores = q @ k.mT * q.shape[-1] ** -0.5  # [B H T S]
    if causal:
        t, s = scores.shape[-2:]
        scores = scores.masked_fill(torch.ones(t, s, dtype=torch.bool).triu(s - t + 1), -math.inf)
    pattern: Tensor = scores.softmax(-1).nan_to_num(0.0)  # a row that sees nothing
    return pattern @ v


def _qkv(seed: int, t: int, s: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> list[Tensor]:
    return [normal(seed + i, 2, 3, n, 4, dtype=dtype, scale=scale) for i, n in enumerate((t, s, s))]


@prop(
    "Tiles do not give what full attention gives: scale down both sums when a larger score appears, and mask by place.",
    seed=seeds,
    t=lengths,
    ahead=st.integers(0, 5),
    tile=tiles,
    causal=st.booleans(),
)
def tiled_equals_full(built: Built, seed: int, t: int, ahead: int, tile: int, causal: bool) -> None:
    q, k, v = _qkv(seed, t, t + ahead)
    expected = _full(q, k, v, causal=causal)
    equal(built.tiled_attention(q, k, v, tile=tile, causal=causal), expected, "tiled attention")
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    equal(built.tiled_attention(*strided, tile=tile, causal=causal), expected, "the same of strided input")
    if not ahead:
        equal(expected, F.scaled_dot_product_attention(q, k, v, is_causal=causal), "the formula and torch's kernel")


@prop(
    "Scores that rise from tile to tile, or are huge, break it: subtract the largest so far before the exponential.",
    seed=seeds,
    size=st.sampled_from([1e2, 1e4]),
    tile=tiles,
)
def huge_scores_stay_finite(built: Built, seed: int, size: float, tile: int) -> None:
    q, k, v = _qkv(seed, 8, 8)
    rising = k * torch.linspace(0, size, 8, dtype=k.dtype)[:, None]
    for causal in (True, False):
        expected = _full(q, rising, v, causal=causal)
        equal(built.tiled_attention(q, rising, v, tile=tile, causal=causal), expected, "attention with rising keys")
    leaf = (q * size).requires_grad_()
    built.tiled_attention(leaf, k, v, tile=tile).sum().backward()
    holds(leaf.grad is not None and torch.isfinite(leaf.grad).all(), "the gradient of huge queries is not finite")


@prop(
    "The result has another dtype than q, or is further from exact than that dtype rounds: keep the sums in float32.",
    seed=seeds,
    dtype=floats,
    tile=st.sampled_from([2, 5]),
)
def tiles_keep_the_dtype(built: Built, seed: int, dtype: torch.dtype, tile: int) -> None:
    q, k, v = _qkv(seed, 2, 600, dtype)  # a sum of 600 weights near 1 stops growing at 256 in bfloat16
    v = 1 + v / 10  # so that what is summed does not cancel
    got = built.tiled_attention(q, k, v, tile=tile)
    holds(got.dtype == dtype, f"the output is {got.dtype}, q is {dtype}")
    expected = _full(q.double(), k.double(), v.double(), causal=True)
    slack = torch.finfo(dtype).eps if dtype.itemsize == 2 else 64 * torch.finfo(dtype).eps  # one rounding, at the end
    equal(got.double(), expected, "tiled attention", rtol=slack, atol=0.0)


@prop(
    "The gradient through the tiles is not that of attention: each tile gives its part to q, and all of k's and v's.",
    seed=seeds,
    tile=st.sampled_from([1, 2, 3]),
    causal=st.booleans(),
    examples=6,
)
def gradients_pass_the_tiles(built: Built, seed: int, tile: int, causal: bool) -> None:
    q, k, v = [x[:1, :1, :, :2] for x in _qkv(seed, 5, 5)]
    gradients(lambda *given: built.tiled_attention(*given, tile=tile, causal=causal), q, k, v)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    ours = torch.autograd.grad(built.tiled_attention(*leaves, tile=tile, causal=causal).sum(), leaves)
    theirs = torch.autograd.grad(_full(*leaves, causal=causal).sum(), leaves)
    for name, mine, other in zip("qkv", ours, theirs, strict=True):
        equal(mine, other, f"the gradient at {name}")


class _Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the largest tensor that any operation makes, and how many numbers all matrix products make."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.largest = max(self.largest, made.numel())
            if "bmm" in str(func):
                self.products += made.numel()
        return made


@prop("All scores exist at once, or hidden tiles are computed: make nothing larger than q and a tile of scores.")
def no_tensor_holds_all_scores(built: Built) -> None:
    t, d, tile = 256, 8, 32
    q, k, v = (normal(i, 1, 1, t, d) for i in range(3))
    with _Largest() as full:
        built.tiled_attention(q, k, v, tile=tile, causal=False)
    most = t * max(d, tile)
    holds(full.largest <= most, f"a tensor of {full.largest} numbers is made, expected at most {most}: a tile of keys")
    with _Largest() as half:
        built.tiled_attention(q, k, v, tile=tile, causal=True)
    count = t // tile
    visible = (count + 1) / (2 * count)  # tiles on and below the diagonal
    near(half.products / max(1, full.products), visible, 1e-9, "the matrix products with a mask over those without")
    _refuses(lambda: built.tiled_attention(q, k, v, tile=0), "a tile of 0")


@prop(
    "The weights of all tiles are kept for the backward pass: keep the log-sum-exp of each row, and compute them again."
)
def the_backward_pass_keeps_no_tile(built: Built) -> None:
    t, d, tile = 256, 8, 32
    q, k, v = (normal(i, 1, 1, t, d).requires_grad_() for i in range(3))
    sizes: dict[int, int] = {}

    def pack(kept: Tensor) -> Tensor:
        sizes[kept.untyped_storage().data_ptr()] = kept.untyped_storage().nbytes() // kept.element_size()
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
        out = built.tiled_attention(q, k, v, tile=tile)
    most = 4 * t * d + 2 * t
    holds(
        sum(sizes.values()) <= most,
        f"{sum(sizes.values())} numbers are kept, expected {most}: q, k, v, out and a row's two",
    )
    with _Largest() as back:
        out.sum().backward()
    holds(back.largest <= t * max(d, tile), f"the backward pass makes a tensor of {back.largest} numbers")


class _Counter:
    """Counts the calls of `torch.distributed.all_reduce` in this process while in the block."""

    def __enter__(self) -> Self:
        self.count, self.real = 0, dist.all_reduce

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return self.real(*args, **kwargs)

        dist.all_reduce = counted
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_reduce = self.real


def _feed_forward(seed: int) -> list[Tensor]:
    """Weights of a layer of widths 6 and 12: up [12 6], [12], down [6 12], [6]."""
    return [normal(seed + i, *shape) for i, shape in enumerate(((12, 6), (12,), (6, 12), (6,)))]


def _dense(x: Tensor, weights: list[Tensor]) -> Tensor:
    up, up_bias, down, down_bias = weights
    return F.linear(F.gelu(F.linear(x, up, up_bias)), down, down_bias)


def _upstream() -> Tensor:
    return normal(77, 2, 5, 6)


@prop(
    "Cut over ranks, the feed-forward layer is not the dense one: rows of up, columns of down, the last bias once.",
    seed=seeds,
    world=st.sampled_from([1, 2, 3]),
    examples=6,
)
def column_then_row_equals_dense(built: Built, seed: int, world: int) -> None:
    weights = _feed_forward(seed)
    leaves = [w.clone().requires_grad_() for w in weights]
    x = normal(seed + 9, 2, 5, 6).requires_grad_()
    expected = _dense(x, leaves)
    x_grad, *w_grads = torch.autograd.grad(expected, [x, *leaves], _upstream())

    def work(rank: int) -> list[Tensor]:
        layer = built.ParallelFeedForward(*weights, rank=rank, world=world)
        mine = x.detach().clone().requires_grad_()
        out = layer(mine)
        got = torch.autograd.grad(out, [mine, *layer.parameters()], _upstream())
        holds(len(got) == 5, f"a rank has {len(got) - 1} parameters, expected 4: two weights and two biases")
        return [out.detach(), got[0], *layer.parameters(), *got[1:]]

    for rank, (out, grad, *rest) in enumerate(together(world, work)):
        here = f"on rank {rank} of {world}"
        equal(out, expected.detach(), f"the output {here}")
        equal(grad, x_grad, f"the gradient of the input {here}")
        rows = slice(12 * rank // world, 12 * (rank + 1) // world)
        cut = [lambda w: w[rows], lambda b: b[rows], lambda w: w[:, rows], lambda b: b]  # noqa: B023 - used here
        for part, whole, got_p, whole_grad, got_grad in zip(cut, weights, rest[:4], w_grads, rest[4:], strict=True):
            equal(got_p.detach(), part(whole), f"a share of a weight {here}")  # type: ignore[no-untyped-call]
            equal(got_grad, part(whole_grad), f"its gradient {here}")  # type: ignore[no-untyped-call]


@prop("Each pass must talk once: one sum of the outputs forward, one sum of the input's gradients backward.")
def one_sum_forward_and_one_backward(built: Built) -> None:
    weights = _feed_forward(3)

    def work(rank: int) -> tuple[int, int]:
        layer = built.ParallelFeedForward(*weights, rank=rank, world=2)
        x = normal(9, 2, 5, 6).requires_grad_()
        with _Counter() as forward:
            out = layer(x)
        with _Counter() as backward:
            out.backward(_upstream())
        return forward.count, backward.count

    for rank, (forward, backward) in enumerate(together(2, work)):
        holds(forward == 1, f"{forward} sums over the ranks forward on rank {rank}, expected 1")
        holds(backward == 1, f"{backward} sums over the ranks backward on rank {rank}, expected 1")


@prop("The conjugate operators are exchanged: copy is the identity forward and a sum backward; sum is the other way.")
def copy_and_sum_are_conjugate(built: Built) -> None:
    def work(rank: int) -> list[Tensor]:
        x = torch.full((3,), rank + 1.0, requires_grad=True)
        results = []
        for operator in (built.copy_to_ranks, built.sum_over_ranks):
            out = operator(x)
            (grad,) = torch.autograd.grad(out, x, torch.full((3,), 10.0 * (rank + 1)))
            results += [out.detach(), grad]
        return [*results, x.detach()]

    for rank, (copied, copied_grad, summed, summed_grad, x) in enumerate(together(2, work)):
        mine = torch.full((3,), rank + 1.0)
        equal(copied, mine, f"copy_to_ranks on rank {rank}")
        equal(copied_grad, torch.full((3,), 30.0), f"its gradient on rank {rank}")
        equal(summed, torch.full((3,), 3.0), f"sum_over_ranks on rank {rank}")
        equal(summed_grad, 10 * mine, f"its gradient on rank {rank}")
        equal(x, mine, f"the input on rank {rank} afterwards: it must not be written to")


@prop("With one process nothing may be sent, and a width that the ranks cannot share must be refused.")
def alone_it_is_an_ordinary_layer(built: Built) -> None:
    weights = _feed_forward(1)
    layer = built.ParallelFeedForward(*weights, rank=0, world=1)
    x = normal(2, 2, 5, 6)
    equal(layer(x).detach(), _dense(x, weights), "the output of one rank of one")
    explicit_taps(layer, ("up.out", "hidden", "down.out", "out"), x)
    storages = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    holds(not storages & {w.untyped_storage().data_ptr() for w in weights}, "a share is a view of the whole weight")
    equal(built.copy_to_ranks(x), x, "copy_to_ranks alone")
    equal(built.sum_over_ranks(x), x, "sum_over_ranks alone")
    without = built.ParallelFeedForward(weights[0], None, weights[2], None, rank=0, world=1)
    zeros = [weights[0], torch.zeros_like(weights[1]), weights[2], torch.zeros_like(weights[3])]
    equal(without(x).detach(), _dense(x, zeros), "the output without biases")
    _refuses(lambda: built.ParallelFeedForward(*weights, rank=0, world=5), "a hidden width of 12 over 5 ranks")


def _branch(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 24), nn.GELU(), nn.Dropout(0.5), nn.Linear(24, 6)).double()


@prop(
    "What is recomputed differs from what was kept: the same dropout, the gradients of inputs and of parameters.",
    seed=seeds,
    needs=st.booleans(),
)
def recomputing_changes_nothing(built: Built, seed: int, needs: bool) -> None:
    branch = _branch(seed)
    calls: list[bool] = []

    def function(x: Tensor, y: Tensor) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return branch(x) * y  # type: ignore[no-any-return]

    x, y = normal(seed, 3, 6).requires_grad_(needs), normal(seed + 1, 3, 6)
    results = []
    for call in (function, lambda *given: built.recompute(function, *given)):
        branch.zero_grad()
        x.grad = None
        torch.manual_seed(seed)
        out = call(x, y)
        after = torch.rand(2)
        out.sum().backward()
        between = torch.rand(2)
        grads = [p.grad.clone() for p in branch.parameters() if p.grad is not None]
        results.append([out.detach(), after, between, *([x.grad.clone()] if x.grad is not None else []), *grads])
    kept, again = results
    names = [
        "the output",
        "the next random numbers",
        "those after backward",
        *(["the input's gradient"] if needs else []),
    ]
    names += [f"the gradient of parameter {i}" for i in range(4)]
    holds(len(again) == len(names), "an input or a parameter has no gradient")
    for name, one, other in zip(names, again, kept, strict=True):
        equal(one, other, name)
    holds(calls == [True, False, True], f"called with gradients on: {calls[1:]}, expected [False, True]: once each way")


@prop("The values between input and output are kept after all: only the inputs may be saved for the backward pass.")
def recomputing_keeps_the_inputs_only(built: Built) -> None:
    branch, x = _branch(0), normal(0, 50, 6).requires_grad_()
    sizes: list[int] = []

    def pack(kept: Tensor) -> Tensor:
        sizes.append(kept.numel())
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
        out = built.recompute(branch, x)
    holds(sum(sizes) <= x.numel(), f"{sum(sizes)} numbers are saved, expected the {x.numel()} of the input")
    out.sum().backward()
    holds(x.grad is not None, "the input has no gradient")


def _scaled(scaler: Any, gradient: float) -> tuple[bool, Tensor, Tensor]:
    """One step of SGD with rate 1 from 0: whether it stepped, the parameter and its gradient."""
    p = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.SGD([p], lr=1.0)
    scaler.scale_loss((p * gradient).sum()).backward()
    return scaler.step(optimizer), p.detach(), p.grad  # type: ignore[return-value]


@prop(
    "Gradients must be divided by the factor before the step; one with inf or NaN is left out, and the factor lowered.",
    scale=st.sampled_from([1.0, 8.0, 2.0**16]),
    backoff=st.sampled_from([0.5, 0.25]),
)
def scaling_changes_no_step(built: Built, scale: float, backoff: float) -> None:
    scaler = built.LossScaler(scale=scale, backoff=backoff)
    stepped, p, grad = _scaled(scaler, 3.0)
    holds(stepped is True, "step did not return True for finite gradients")
    equal(p, torch.full((2,), -3.0), "the parameter after a step of rate 1 along a gradient of 3")
    equal(grad, torch.full((2,), 3.0), "the gradient after the step")
    near(scaler.scale, scale, 0.0, "the factor after one good step")
    for bad in (math.inf, math.nan):
        before = scaler.scale
        stepped, p, _ = _scaled(scaler, bad)
        holds(stepped is False, f"step did not return False for a gradient of {bad}")
        equal(p, torch.zeros(2), f"the parameter after a gradient of {bad}")
        near(scaler.scale, before * backoff, 0.0, f"the factor after a gradient of {bad}")


@prop(
    "The factor must grow after just so many good steps in a row; a bad one starts the count again.",
    every=st.integers(1, 5),
    growth=st.sampled_from([2.0, 4.0]),
)
def the_factor_grows_after_good_steps(built: Built, every: int, growth: float) -> None:
    scaler = built.LossScaler(scale=4.0, growth=growth, every=every)
    for turn in range(1, 3):
        for good in range(every):
            near(scaler.scale, 4.0 * growth ** (turn - 1), 0.0, f"the factor after {good} good steps of {every}")
            _scaled(scaler, 1.0)
    for _ in range(every - 1):
        _scaled(scaler, 1.0)
    before = scaler.scale
    _scaled(scaler, math.nan)
    for _ in range(every - 1):
        _scaled(scaler, 1.0)
    near(scaler.scale, before / 2, 0.0, f"the factor {every - 1} good steps after a bad one")
    _scaled(scaler, 1.0)
    near(scaler.scale, before / 2 * growth, 0.0, f"the factor {every} good steps after a bad one")


@prop(
    "Amdahl's law or the roofline is wrong at a limit: the part that is not sped up, and the slower of two peaks.",
    share=st.floats(0.0, 1.0),
    speedup=st.floats(1.0, 1e6),
    flops=st.floats(1.0, 1e15),
    size=st.floats(1.0, 1e12),
)
def laws_have_their_closed_forms(built: Built, share: float, speedup: float, flops: float, size: float) -> None:
    expected = 1 / (1 - share + share / speedup)
    near(built.amdahl(share, speedup) / expected, 1.0, 1e-9, "Amdahl's gain over its formula")
    near(built.amdahl(0.0, speedup), 1.0, 1e-12, "the gain when nothing of the time is sped up")
    near(built.amdahl(1.0, speedup) / speedup, 1.0, 1e-9, "the gain when all of it is, over the speed-up")
    peaks = {"peak_flops": 1e12, "peak_bytes": 1e10}
    seconds = built.roofline(flops, size, **peaks)
    near(seconds / max(flops / 1e12, size / 1e10), 1.0, 1e-9, "the roofline's seconds over the slower of the two")
    near(built.intensity(flops, size) / (flops / size), 1.0, 1e-9, "FLOPs a byte over their quotient")
    bound = built.intensity(flops, size) >= 1e12 / 1e10
    holds(bound == (seconds <= flops / 1e12), "what lies right of the ridge must be bound by FLOPs")


@prop(
    "Batches come out of order, twice, or not at all: hand them on by their index, however long each of them took.",
    count=st.integers(0, 12),
    workers=st.integers(1, 4),
    ahead=st.integers(1, 5),
    examples=12,
)
def batches_come_in_order(built: Built, count: int, workers: int, ahead: int) -> None:
    def make(index: int) -> int:
        time.sleep(0.001 * ((index * 7) % 3))
        return index

    got = list(built.batches_ahead(make, count, workers=workers, ahead=ahead))
    holds(got == list(range(count)), f"the batches come as {got}, expected 0 to {count - 1}")


@prop(
    "Too many batches are made before they are asked for (memory), or none while the taker computes (time).",
    workers=st.integers(1, 3),
    ahead=st.integers(1, 4),
    examples=6,
)
def just_enough_is_made_ahead(built: Built, workers: int, ahead: int) -> None:
    begun: list[int] = []

    def make(index: int) -> int:
        begun.append(index)
        return index

    stream: Iterator[int] = iter(built.batches_ahead(make, 20, workers=workers, ahead=ahead))
    for taken in range(1, 4):
        next(stream)
        most = taken + workers + ahead
        _settle(lambda taken=taken: len(begun) > taken)  # type: ignore[misc]
        holds(len(begun) > taken, f"after {taken} batches were taken, nothing is prepared")
        said = f"after {taken} taken, with {workers} workers and {ahead} ahead"
        holds(len(begun) <= most, f"{len(begun)} batches are begun {said}, expected at most {most}")
    stream.close()  # type: ignore[attr-defined]


def _settle(done: Callable[[], bool]) -> None:
    """Give threads a moment, and no more than they need."""
    deadline = time.monotonic() + 1.0
    while not done() and time.monotonic() < deadline:
        time.sleep(0.001)


@prop("An error in a worker is lost or comes at another place, or threads stay behind when the taker stops early.")
def errors_and_early_stops_are_clean(built: Built) -> None:
    def make(index: int) -> int:
        if index == 3:
            raise ZeroDivisionError("batch 3")
        return index

    stream, got, before = built.batches_ahead(make, 10, workers=2, ahead=2), [], threading.active_count()
    try:
        got.extend(stream)
    except ZeroDivisionError:
        pass
    else:
        holds(condition=False, text="the error of batch 3 was not raised")
    holds(got == [0, 1, 2], f"before the error of batch 3 came {got}, expected 0, 1, 2")
    early = built.batches_ahead(lambda index: index, 1000, workers=2, ahead=2)
    next(early)
    early.close()
    _settle(lambda: threading.active_count() <= before)
    holds(threading.active_count() <= before, "threads are left when the taker stops early")
    _refuses(lambda: list(built.batches_ahead(make, 2, workers=0)), "no worker")
    _refuses(lambda: list(built.batches_ahead(make, 2, ahead=-1)), "less than nothing ahead")
