"""What any tiled attention, tensor parallel layer, recomputation, loss scaler and loader of batches ahead must do."""

from __future__ import annotations

import math
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import backward, grad
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lab.ranks import together
from lab.spec import Built, equal, explicit_taps, floats, gradients, holds, near, normal, prop, seeds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

tiles, lengths = st.sampled_from([1, 3, 4, 7, 64]), st.integers(1, 9)


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
        blind = max(0, t - s)  # queries that see nothing
        seen = scores[..., blind:, :].softmax(-1) @ v
        return torch.cat([torch.zeros_like(q[..., :blind, :]), seen], dim=-2)
    pattern: Tensor = scores.softmax(-1)
    return pattern @ v


def _qkv(seed: int, t: int, s: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> list[Tensor]:
    return [normal(seed + i, 2, 3, n, 4, dtype=dtype, scale=scale) for i, n in enumerate((t, s, s))]


@prop(
    "Tiles do not give what full attention gives: scale down both sums when a larger score appears, and mask by place.",
    seed=seeds,
    queries=lengths,
    count=st.integers(0, 12),
    tile=tiles,
    causal=st.booleans(),
    examples=60,
)
def tiled_equals_full(built: Built, seed: int, queries: int, count: int, tile: int, causal: bool) -> None:
    q, k, v = _qkv(seed, queries, count)
    expected = _full(q, k, v, causal=causal)
    if queries <= count:
        mask = torch.ones(queries, count, dtype=torch.bool).tril(count - queries) if causal else None
        equal(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), expected, "torch's own operator")
    equal(built.tiled_attention(q, k, v, tile=tile, causal=causal), expected, "tiled attention")
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    equal(built.tiled_attention(*strided, tile=tile, causal=causal), expected, "the same of strided input")


@prop(
    "The gradient through the tiles is not that of attention: weigh by the row's total, and take its mean off.",
    seed=seeds,
    queries=st.integers(1, 6),
    count=st.integers(0, 8),
    tile=st.sampled_from([1, 2, 3, 64]),
    causal=st.booleans(),
    examples=15,
)
def gradients_pass_the_tiles(built: Built, seed: int, queries: int, count: int, tile: int, causal: bool) -> None:
    leaves = [x.requires_grad_() for x in _qkv(seed, queries, count)]
    upstream = normal(seed + 5, *leaves[0].shape)
    ours = grad(built.tiled_attention(*leaves, tile=tile, causal=causal), leaves, upstream)
    theirs = grad(_full(*leaves, causal=causal), leaves, upstream)
    for name, mine, other in zip("qkv", ours, theirs, strict=True):
        equal(mine, other, f"the gradient of {name}")
    small = [x[:1, :1, :3, :2] for x in leaves]
    gradients(lambda *given: built.tiled_attention(*given, tile=tile, causal=causal), *small)


@prop(
    "Scores that rise from tile to tile, or are huge, break it: subtract the largest so far before the exponential.",
    seed=seeds,
    size=st.sampled_from([1e2, 1e4]),
    tile=tiles,
    dtype=floats,
)
def huge_scores_stay_finite(built: Built, seed: int, size: float, tile: int, dtype: torch.dtype) -> None:
    q, k, v = _qkv(seed, 8, 8)
    rising = k * torch.linspace(0, size, 8, dtype=k.dtype)[:, None]
    for causal in (True, False):
        expected = _full(q, rising, v, causal=causal)
        equal(built.tiled_attention(q, rising, v, tile=tile, causal=causal), expected, "attention with rising keys")
    leaves = [x.to(dtype).requires_grad_() for x in (q * size, k * 50, v)]  # their products overflow in float16
    out = built.tiled_attention(*leaves, tile=tile)
    holds(out.isfinite().all(), f"the output of huge queries in {dtype} is not finite")
    for name, each in zip("qkv", grad(out.float().sum(), leaves), strict=True):
        holds(each.isfinite().all(), f"the gradient of {name} for huge queries in {dtype} is not finite")


@prop(
    "The result has another dtype than q, or is further from exact than that dtype rounds: keep the sums in float32.",
    seed=seeds,
    dtype=floats,
    tile=st.sampled_from([2, 5]),
    examples=8,
)
def tiles_keep_the_dtype(built: Built, seed: int, dtype: torch.dtype, tile: int) -> None:
    q, k, v = _qkv(seed, 2, 600, dtype, scale=0.1)  # a sum of weights near 1 stops growing at 256 in bfloat16
    v = v + torch.arange(600)[:, None] / 600  # and what it missed shows in a mean that moves
    leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    out, expected = built.tiled_attention(*leaves, tile=tile), _full(*exact, causal=True)
    holds(out.dtype == dtype, f"the output is {out.dtype}, q is {dtype}")
    slack = 4 * torch.finfo(dtype).eps
    equal(out.double(), expected, "tiled attention", rtol=slack, atol=slack)
    for name, mine, other in zip("qkv", grad(out.sum(), leaves), grad(expected.sum(), exact), strict=True):
        holds(mine.dtype == dtype, f"the gradient of {name} is {mine.dtype}, {name} is {dtype}")
        equal(mine.double(), other, f"the gradient of {name}", rtol=slack, atol=8 * slack)


class _Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes how many numbers the largest tensor has that any operation makes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.largest = max(self.largest, made.numel())
        return made


@prop("All scores exist at once, or are kept for the backward pass: make nothing larger than T x tile or T x D.")
def no_tensor_holds_all_scores(built: Built) -> None:
    t, width, tile, heads = 128, 8, 16, 6
    leaves = [normal(i, 2, 3, t, width).requires_grad_() for i in range(3)]
    for causal in (True, False):
        kept: dict[int, int] = {}

        def pack(x: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[x.untyped_storage().data_ptr()] = x.numel()
            return x

        with _Largest() as forward, saved_tensors_hooks(pack, lambda x: x):
            out = built.tiled_attention(*leaves, tile=tile, causal=causal)
        with _Largest() as behind:
            backward(out, torch.ones_like(out))
        for name, seen in (("forward", forward.largest), ("backward", behind.largest)):
            most = heads * t * max(tile, width)
            holds(seen <= most, f"{name} makes a tensor of {seen} numbers, expected at most B H T tile = {most}")
        total, most = sum(kept.values()), heads * t * (6 * width + 4)
        holds(
            total <= most, f"{total} numbers are kept for the backward pass; q, k, v, the output and a little: {most}"
        )


@prop("Tiles that the mask hides are computed: causal attention over 8 tiles needs (8 + 1) / 16 of the products.")
def hidden_tiles_are_skipped(built: Built) -> None:
    leaves = [normal(i, 1, 2, 64, 4).requires_grad_() for i in range(3)]
    flops = []
    for causal in (True, False):
        with FlopCounterMode(display=False) as counter:
            out = built.tiled_attention(*leaves, tile=8, causal=causal)
            backward(out, torch.ones_like(out))
        flops.append(counter.get_total_flops())
    holds(flops[1] > 0, "no matrix product was seen")
    holds(flops[0] <= 0.57 * flops[1], f"with the mask {flops[0]} FLOPs, without {flops[1]}: expected 0.5625 of them")
    q, k, v = _qkv(0, 3, 5)
    _refuses(lambda: built.tiled_attention(q, k, v, tile=0), "a tile of 0")
    _refuses(lambda: built.tiled_attention(q, k, v[:, :, :4]), "5 keys and 4 values")


def _feed_forward(seed: int) -> list[Tensor]:
    """Weights of a layer of widths 6 and 12: up [12 6], [12], down [6 12], [6]."""
    return [normal(seed + i, *shape) for i, shape in enumerate(((12, 6), (12,), (6, 12), (6,)))]


def _dense(x: Tensor, weights: list[Tensor]) -> Tensor:
    up, up_bias, down, down_bias = weights
    return F.linear(F.gelu(F.linear(x, up, up_bias)), down, down_bias)


def _upstream() -> Tensor:
    return normal(77, 2, 5, 6)


@prop("Cut over ranks, the layer is not the dense one: rows of up, columns of down, the last bias once.")
def column_then_row_equals_dense(built: Built) -> None:
    weights, x = _feed_forward(1), normal(9, 2, 5, 6)
    leaves = [w.clone().requires_grad_() for w in (x, *weights)]
    expected = _dense(leaves[0], leaves[1:])
    wanted = grad(expected, leaves, _upstream())

    def work(rank: int, world: int) -> list[Tensor]:
        layer = built.ParallelFeedForward(*weights, rank=rank, world=world)
        mine = x.clone().requires_grad_()
        out, params = layer(mine), [layer.up.weight, layer.up.bias, layer.down.weight, layer.down.bias]
        return [out.detach(), *grad(out, [mine, *params], _upstream())]

    for world in (1, 2, 3):
        for rank, (out, *grads) in enumerate(together(world, lambda rank, n=world: work(rank, n))):  # type: ignore[misc]
            here = f"on rank {rank} of {world}"
            mine = slice(12 * rank // world, 12 * (rank + 1) // world)
            up, up_bias, down, down_bias = wanted[1:]
            expected_grads = (wanted[0], up[mine], up_bias[mine], down[:, mine], down_bias)
            equal(out, expected.detach(), f"the output {here}")
            names = ("input", "weight of up", "bias of up", "weight of down", "bias of down")
            for name, got, part in zip(names, grads, expected_grads, strict=True):
                equal(got, part, f"the gradient of the {name} {here}")


@prop("Each pass must talk once: one all_reduce of the outputs forward, one of the input's gradients backward.")
def one_sum_forward_and_one_backward(built: Built) -> None:
    weights = _feed_forward(3)

    def work(rank: int) -> None:
        for world, expected in ((2, 1), (1, 0)):  # a whole layer in a group of two has nothing to add
            layer = built.ParallelFeedForward(*weights, rank=rank % world, world=world)
            x = normal(9, 2, 5, 6).requires_grad_()
            with patch.object(dist, "all_reduce", wraps=dist.all_reduce) as sent:
                out = layer(x)
                forward = sent.call_count
                backward(out, _upstream())
            back = sent.call_count - forward
            holds(forward == expected, f"{forward} sums over the ranks forward with {world} shares, not {expected}")
            holds(back == expected, f"{back} sums over the ranks backward with {world} shares, not {expected}")
            for call in sent.call_args_list:
                holds(call.args[0].shape == x.shape, f"a tensor of shape {list(call.args[0].shape)} was sent")

    together(2, work)


@prop("The conjugate operators are exchanged: copy is the identity forward and a sum backward; sum is the other way.")
def copy_and_sum_are_conjugate(built: Built) -> None:
    def work(rank: int) -> list[Tensor]:
        x = (torch.arange(6.0).view(2, 3) * (rank + 1)).t().requires_grad_()  # [3 2], strided
        results = []
        for operator in (built.copy_to_ranks, built.sum_over_ranks):
            out = operator(x)
            results += [out.detach().clone(), *grad(out, x, torch.full((3, 2), 10.0 * (rank + 1)))]
        return [*results, x.detach()]

    base = torch.arange(6.0).view(2, 3).t()
    for rank, (copied, copied_grad, summed, summed_grad, x) in enumerate(together(2, work)):
        equal(copied, base * (rank + 1), f"copy_to_ranks on rank {rank}")
        equal(copied_grad, torch.full((3, 2), 30.0), f"its gradient on rank {rank}")
        equal(summed, base * 3, f"sum_over_ranks on rank {rank}")
        equal(summed_grad, torch.full((3, 2), 10.0 * (rank + 1)), f"its gradient on rank {rank}")
        equal(x, base * (rank + 1), f"the input on rank {rank} afterwards: it must not be written to")


@prop("The shares are not the dense layer cut up: of column the rows, of row the columns, as parameters of their own.")
def shares_make_up_the_dense_layer(built: Built) -> None:
    weight, bias, x = normal(0, 6, 12), normal(1, 6), normal(2, 2, 12)
    dense = F.linear(x, weight)
    columns = [built.ColumnParallelLinear(weight, bias, rank=rank, world=3) for rank in range(3)]
    rows = [built.RowParallelLinear(weight, None, rank=rank, world=3) for rank in range(3)]
    # Without a process group each gives what it has itself.
    equal(torch.cat([part(x) for part in columns], -1).detach(), dense + bias, "the outputs of column, side by side")
    terms = [part(piece) for part, piece in zip(rows, x.chunk(3, -1), strict=True)]
    equal(torch.stack(terms).sum(0).detach(), dense, "the sum of the outputs of row")
    for part in (*columns, *rows):
        holds(part.weight.numel() == 24, f"a rank of 3 keeps {part.weight.numel()} of 72 weights")
        holds(isinstance(part.weight, nn.Parameter), "a share is not a parameter")
        shared = part.weight.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
        holds(not shared, "a share is a view of the dense weight: a step would change that, and it stays in memory")
    _refuses(lambda: built.ColumnParallelLinear(weight, bias, rank=0, world=4), "6 outputs over 4 ranks")
    _refuses(lambda: built.RowParallelLinear(weight, bias, rank=3, world=3), "rank 3 of 3")
    _refuses(lambda: built.ParallelFeedForward(*_feed_forward(0), rank=0, world=5), "a hidden width of 12 over 5 ranks")


@prop("With one process nothing may be sent or changed, and the sites are tapped in order: up, hidden, down, output.")
def alone_it_is_an_ordinary_layer(built: Built) -> None:
    weights, x = _feed_forward(1), normal(2, 2, 5, 6)
    layer = built.ParallelFeedForward(*weights, rank=0, world=1)
    equal(layer(x).detach(), _dense(x, weights), "the output of one rank of one")
    equal(built.copy_to_ranks(x), x, "copy_to_ranks alone")
    equal(built.sum_over_ranks(x), x, "sum_over_ranks alone")
    without = built.ParallelFeedForward(weights[0], None, weights[2], None, rank=0, world=1)
    zeros = [weights[0], torch.zeros_like(weights[1]), weights[2], torch.zeros_like(weights[3])]
    equal(without(x).detach(), _dense(x, zeros), "the output without biases")
    explicit_taps(layer, ("up.out", "hidden", "down.out", "out"), x)


def _branch(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 24), nn.GELU(), nn.Dropout(0.5), nn.Linear(24, 6))


@prop(
    "What is recomputed is not what was computed: look at the dropout, and the gradients of inputs and parameters.",
    seed=seeds,
    needs=st.booleans(),
    cast=st.booleans(),
    examples=12,
)
def recomputing_changes_nothing(built: Built, seed: int, needs: bool, cast: bool) -> None:
    branch, calls = _branch(seed), []
    places = torch.tensor([2, 0, 1])

    def function(x: Tensor, places: Tensor) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return branch(x)[places]  # type: ignore[no-any-return]

    results = []
    with torch.random.fork_rng(devices=[]):
        for call in (function, lambda *given: built.recompute(function, *given)):
            branch.zero_grad()
            torch.manual_seed(seed)
            x = normal(seed, 3, 6, dtype=torch.float32).requires_grad_(needs)
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                out = call(x, places)
            after = torch.rand(2)
            backward((out.float() * normal(seed, 3, 6)).sum())
            named = {"the output": out.detach(), "the next random numbers": after, "those after": torch.rand(2)}
            leaves = {"the input": x, **dict(branch.named_parameters())}
            named |= {f"the gradient of {name}": p.grad for name, p in leaves.items() if p.grad is not None}
            results.append(named)
    kept, again = results
    lost = ", ".join(kept.keys() - again.keys())
    holds(not lost, f"there is no tensor for {lost}")
    for name, expected in kept.items():
        equal(again[name], expected, name)
    holds(calls[1:] == [False, True], f"called with a graph: {calls[1:]}; expected once without, then once with")


@prop("The values between input and output are kept after all: only the inputs may be saved for the backward pass.")
def recomputing_keeps_the_inputs_only(built: Built) -> None:
    branch, sizes, made = _branch(0), [], []
    x = normal(0, 50, 6, dtype=torch.float32).requires_grad_()

    def function(x: Tensor) -> Tensor:
        hidden = branch[0](x)  # type: ignore[index]
        made.append(weakref.ref(hidden))
        return branch[1:](hidden).square()  # type: ignore[index,no-any-return]

    def pack(kept: Tensor) -> Tensor:
        sizes.append(kept.numel())
        return kept

    with saved_tensors_hooks(pack, lambda kept: kept):
        out = built.recompute(function, x)
    holds(sum(sizes) <= x.numel() + 8, f"{sum(sizes)} numbers are saved, expected the {x.numel()} of the input")
    holds(made[0]() is None, "a value between input and output is still in memory after the forward pass")
    backward(out.sum())
    holds(x.grad is not None, "the input has no gradient")
    with torch.no_grad():
        holds(not built.recompute(function, x).requires_grad, "there is a graph where gradients are off")
    holds(len(made) == 3, f"{len(made)} calls for forward, backward, and forward without gradients")


def _scaled(scaler: Any, gradient: float) -> tuple[bool, Tensor, Tensor]:
    """One step of SGD with rate 1 from 0: whether it stepped, the parameter and its gradient."""
    p, unused, other = (torch.zeros(2, requires_grad=True) for _ in range(3))
    optimizer = torch.optim.SGD([{"params": [p, unused]}, {"params": [other]}], lr=1.0, momentum=0.9)
    backward(scaler.scale_loss((p * gradient).sum() + (other * 2).sum()))
    stepped = scaler.step(optimizer)
    begun = bool(optimizer.state)
    holds(begun == bool(stepped), "the optimiser's state moved in a step that was left out" if begun else "no step")
    both = torch.cat([p.detach(), other.detach()])
    return stepped, both, torch.stack([x.grad[0] for x in (p, other) if x.grad is not None])


@prop(
    "Gradients must be divided by the factor before the step; one with inf or NaN is left out, and the factor lowered.",
    scale=st.sampled_from([1.0, 8.0, 2.0**16]),
    backoff=st.sampled_from([0.5, 0.25]),
)
def scaling_changes_no_step(built: Built, scale: float, backoff: float) -> None:
    scaler = built.LossScaler(scale=scale, backoff=backoff)
    stepped, both, grads = _scaled(scaler, 3.0)
    holds(stepped is True, "step did not return True for finite gradients")
    equal(both, torch.tensor([-3.0, -3.0, -2.0, -2.0]), "the parameters after a step of rate 1")
    equal(grads, torch.tensor([3.0, 2.0]), "the gradients after the step")
    near(scaler.scale, scale, 0.0, "the factor after one good step")
    for bad in (math.inf, -math.inf, math.nan):
        before = scaler.scale
        stepped, both, _ = _scaled(scaler, bad)
        holds(stepped is False, f"step did not return False for a gradient of {bad}")
        equal(both, torch.zeros(4), f"the parameters after a gradient of {bad}")
        near(scaler.scale, before * backoff, 0.0, f"the factor after a gradient of {bad}")


@prop(
    "The factor is not scale growth^g backoff^b: g counts runs of `every` good steps, and a bad one begins a run anew.",
    steps=st.lists(st.booleans(), max_size=30),
    every=st.integers(1, 5),
    growth=st.sampled_from([2.0, 4.0]),
)
def the_factor_has_its_closed_form(built: Built, steps: list[bool], every: int, growth: float) -> None:
    scaler = built.LossScaler(scale=4.0, growth=growth, every=every)
    for done in range(len(steps) + 1):
        runs = "".join("+" if good else "-" for good in steps[:done])
        grown = sum(len(run) // every for run in runs.split("-"))
        near(scaler.scale, 4.0 * growth**grown * 0.5 ** runs.count("-"), 0.0, f"the factor after {runs or 'no step'}")
        if done < len(steps):
            _scaled(scaler, 1.0 if steps[done] else math.nan)
    _refuses(lambda: built.LossScaler(scale=0.0), "a factor of 0")
    _refuses(lambda: built.LossScaler(backoff=1.0), "a backoff of 1")
    _refuses(lambda: built.LossScaler(every=0), "growth after 0 steps")


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
    right = built.intensity(flops, size) > 1e12 / 1e10 * (1 + 1e-9)
    holds(not right or seconds == flops / 1e12, "what lies right of the ridge must be bound by FLOPs")
    near(built.amdahl(0.75, math.inf), 4.0, 1e-12, "the gain when 3/4 of the time is gone")
    _refuses(lambda: built.amdahl(1.5, 2.0), "a share of 1.5")
    _refuses(lambda: built.amdahl(0.5, 0.0), "a speed-up of 0")
    _refuses(lambda: built.roofline(1.0, 1.0, peak_flops=0.0, peak_bytes=1.0), "a peak of 0")


@prop(
    "Batches come out of order, twice, or not at all: hand them on by their index, however long each of them took.",
    count=st.integers(0, 12),
    workers=st.integers(1, 4),
    ahead=st.integers(0, 5),
    examples=12,
)
def batches_come_in_order(built: Built, count: int, workers: int, ahead: int) -> None:
    made: list[int] = []

    def make(index: int) -> int:
        time.sleep(0.001 * ((index * 7) % 3))
        made.append(index)
        return index

    got = list(built.batches_ahead(make, count, workers=workers, ahead=ahead))
    holds(got == list(range(count)), f"the batches come as {got}, expected 0 to {count - 1}")
    holds(sorted(made) == got, f"{len(made)} batches are made for {count}")


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

    before, most = threading.active_count(), workers + ahead
    stream: Iterator[int] = iter(built.batches_ahead(make, 20, workers=workers, ahead=ahead))
    for taken in range(1, 4):
        next(stream)
        _settle(lambda taken=taken: len(begun) >= taken + most - 1)  # type: ignore[misc]
        time.sleep(0.002)  # for one too many
        holds(len(begun) > taken, f"after {taken} batches were taken, nothing is prepared")
        holds(len(begun) <= taken + most, f"{len(begun) - taken} batches are begun and not taken, expected {most}")
    stream.close()  # type: ignore[attr-defined]
    _settle(lambda: threading.active_count() <= before)
    holds(threading.active_count() <= before, "threads are left when the taker stops early")


def _settle(done: Callable[[], bool]) -> None:
    """Give threads a moment, and no more than they need."""
    deadline = time.monotonic() + 1.0
    while not done() and time.monotonic() < deadline:
        time.sleep(0.001)


@prop("An error in a worker is lost or comes at another place, or batches are still begun when the taker has stopped.")
def errors_and_early_stops_are_clean(built: Built) -> None:
    def make(index: int) -> int:
        if index == 3:
            raise ZeroDivisionError("batch 3")
        time.sleep(0.002)  # the error is there before the batches that come first
        return index

    got, before = [], threading.active_count()
    try:
        got.extend(built.batches_ahead(make, 10, workers=4, ahead=4))
        holds(condition=False, text="the error of batch 3 was not raised")
    except ZeroDivisionError:
        pass
    holds(got == [0, 1, 2], f"before the error of batch 3 came {got}, expected 0, 1, 2")
    _settle(lambda: threading.active_count() <= before)
    holds(threading.active_count() <= before, "threads are left after an error")
    begun: list[int] = []

    def slow(index: int) -> None:
        begun.append(index)
        time.sleep(0.005)

    stream = built.batches_ahead(slow, 100, ahead=4)
    next(stream)
    stream.close()
    last = len(begun)
    time.sleep(0.025)
    holds(len(begun) == last, "batches are begun after the taker has stopped")
    _refuses(lambda: list(built.batches_ahead(make, 2, workers=0)), "no worker")
    _refuses(lambda: list(built.batches_ahead(make, 2, ahead=-1)), "-1 batches ahead")
