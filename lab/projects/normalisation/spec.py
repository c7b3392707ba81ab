"""What any layer normalisation and any RMS normalisation must do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lab.spec import Built, equal, explicit_taps, floats, gradients, holds, normal, prop, seeds

if TYPE_CHECKING:
    from collections.abc import Callable

KINDS = ("LayerNorm", "RMSNorm")

batches, lengths, widths = st.integers(1, 3), st.integers(1, 6), st.integers(2, 16)
kinds = st.sampled_from(KINDS)


def _made(built: Built, kind: str, width: int, *, eps: float = 1e-5, seed: int | None = None) -> Any:
    """Build one in float64; with a seed, its gain and bias are drawn, or a lost one would go unseen."""
    made = getattr(built, kind)(width, eps=eps).double()
    if seed is not None:
        with torch.no_grad():
            made.weight.copy_(normal(seed + 1000, width))
            if kind == "LayerNorm":
                made.bias.copy_(normal(seed + 2000, width))
    return made


def _paths(made: Any) -> tuple[tuple[str, Callable[[Tensor], Tensor]], ...]:
    return (("forward", made), ("explicit", made.explicit))


def _torch(kind: str, made: Any, x: Tensor) -> Tensor:  # [... C] -> [... C]
    if kind == "LayerNorm":
        return F.layer_norm(x, x.shape[-1:], made.weight, made.bias, made.eps)
    return F.rms_norm(x, x.shape[-1:], made.weight, made.eps)


@prop(
    "Values differ from those of torch: look at the axis, the biased variance, the mean, and where eps stands.",
    seed=seeds,
    kind=kinds,
    batch=batches,
    length=lengths,
    width=widths,
    eps=st.sampled_from([1e-6, 1e-5, 0.5]),
)
def equals_torch(built: Built, seed: int, kind: str, batch: int, length: int, width: int, eps: float) -> None:
    made = _made(built, kind, width, eps=eps, seed=seed)
    x = 2.0 + 3.0 * normal(seed, batch, length, width)  # [B T C]
    for name, path in _paths(made):
        equal(path(x), _torch(kind, made, x), f"{kind}: {name}'s output")


@prop(
    "Backward disagrees with the values: the mean or the variance was detached, or taken without gradient.",
    seed=seeds,
    kind=kinds,
    examples=6,
)
def gradients_are_those_of_finite_differences(built: Built, seed: int, kind: str) -> None:
    for _, path in _paths(_made(built, kind, 5, eps=0.1, seed=seed)):
        gradients(path, normal(seed, 2, 3, 5))


@prop(
    "A row of equal numbers has no variance: without eps under the root it divides 0 by 0, and NaN spreads from there.",
    seed=seeds,
    value=st.sampled_from([0.0, 1.0, -4096.0]),
)
def rows_without_variance_stay_finite(built: Built, seed: int, value: float) -> None:
    # For LayerNorm any constant row has no variance; for RMSNorm only the row of zeros has no mean square.
    for kind in KINDS:
        made = _made(built, kind, 8, seed=seed)
        for name, path in _paths(made):
            x = torch.full((1, 2, 8), value if kind == "LayerNorm" else 0.0, dtype=torch.float64).requires_grad_()
            out = path(x)
            expected = made.bias if kind == "LayerNorm" else torch.zeros(8, dtype=torch.float64)  # [C]
            equal(out, expected.expand(1, 2, 8), f"{kind}: {name}'s output")
            (grad,) = torch.autograd.grad(out.square().sum(), x)
            holds(torch.isfinite(grad).all(), f"{kind}: the gradient of {name} is not finite for a row of {value:g}")


@prop(
    "The output's variance must be v / (v + eps): the variance is unbiased, or eps is lost or outside the root.",
    seed=seeds,
    width=widths,
    eps=st.sampled_from([1e-3, 0.5, 2.0]),
)
def output_variance_is_v_over_v_plus_eps(built: Built, seed: int, width: int, eps: float) -> None:
    x = normal(seed, 2, 3, width)  # [B T C]
    variance = x.var(dim=-1, correction=0)  # [B T]
    for name, path in _paths(_made(built, "LayerNorm", width, eps=eps)):
        out = path(x)
        equal(out.mean(dim=-1), torch.zeros_like(variance), f"the mean of {name}'s output", rtol=0.0, atol=1e-9)
        equal(out.var(dim=-1, correction=0), variance / (variance + eps), f"the variance of {name}'s output")


@prop(
    "RMSNorm's output must have root mean square 1: the mean is subtracted, or squares are summed and not averaged.",
    seed=seeds,
    width=widths,
    shift=st.sampled_from([0.0, 1.0, -20.0]),
)
def rms_is_1(built: Built, seed: int, width: int, shift: float) -> None:
    x = shift + normal(seed, 2, 3, width)  # [B T C]
    for name, path in _paths(_made(built, "RMSNorm", width, eps=0.0)):
        size = path(x).square().mean(dim=-1).sqrt()  # [B T]
        equal(size, torch.ones_like(size), f"the root mean square of {name}'s output")


@prop(
    "One position moved the output of another: statistics run over the positions, and so the future leaks in.",
    seed=seeds,
    kind=kinds,
    length=st.integers(2, 6),
    width=widths,
)
def never_mixes_positions(built: Built, seed: int, kind: str, length: int, width: int) -> None:
    x = normal(seed, 1, length, width)  # [1 T C]; one row, so that only positions can mix
    for name, path in _paths(_made(built, kind, width, seed=seed)):
        for place in range(length):
            others = [t for t in range(length) if t != place]
            moved = x.clone()
            moved[:, place] = 5.0 * moved[:, place] + 3.0
            equal(path(moved)[:, others], path(x)[:, others], f"{kind}: {name}'s output but at position {place}")


@prop(
    "One sequence moved the output of another: statistics run over the batch, as those of batch normalisation do.",
    seed=seeds,
    kind=kinds,
    batch=st.integers(2, 4),
    width=widths,
)
def never_mixes_batch_rows(built: Built, seed: int, kind: str, batch: int, width: int) -> None:
    x = normal(seed, batch, 1, width)  # [B 1 C]; one position, so that only rows can mix
    for name, path in _paths(_made(built, kind, width, seed=seed)):
        for row in range(batch):
            others = [b for b in range(batch) if b != row]
            moved = x.clone()
            moved[row] = 5.0 * moved[row] + 3.0
            equal(path(moved)[others], path(x)[others], f"{kind}: {name}'s output but of row {row}")


@prop(
    "A scaled input (for LayerNorm also a shifted one) must give the same output: the mean or the root is missing.",
    seed=seeds,
    width=widths,
    scale=st.sampled_from([0.1, 1.0, 7.0]),
    shift=st.sampled_from([0.0, 3.0, -10.0]),
)
def scale_and_shift_change_nothing(built: Built, seed: int, width: int, scale: float, shift: float) -> None:
    x = normal(seed, 1, 3, width)  # [B T C]
    for kind in KINDS:
        moved = scale * x + (shift if kind == "LayerNorm" else 0.0)
        for name, path in _paths(_made(built, kind, width, eps=0.0, seed=seed)):  # with eps they hold only nearly
            equal(path(moved), path(x), f"{kind}: {name}'s output", rtol=1e-6, atol=1e-6)


@prop(
    "Gain or bias is lost, misplaced or not trained: the output must be gain times the normalised row, plus the bias.",
    seed=seeds,
    kind=kinds,
    width=widths,
)
def gain_and_bias_are_used(built: Built, seed: int, kind: str, width: int) -> None:
    x = normal(seed, 2, 3, width)  # [B T C]
    plain, made = _made(built, kind, width), _made(built, kind, width, seed=seed)
    for (name, path), (_, bare) in zip(_paths(made), _paths(plain), strict=True):
        normalised = bare(x)
        expected = normalised * made.weight + (made.bias if kind == "LayerNorm" else 0.0)
        out = path(x)
        equal(out, expected, f"{kind}: {name}'s output")
        holds(out.requires_grad, f"{kind}: {name}'s output has no gradient")
        grads = torch.autograd.grad(out.sum(), list(made.parameters()), allow_unused=True)
        holds(all(grad is not None for grad in grads), f"{kind}: a parameter has no gradient through {name}")
        equal(grads[0], normalised.sum((0, 1)), f"{kind}: the gradient of the gain through {name}")


@prop(
    "The output has another dtype than the input, or squares overflowed: 256 squared is already infinite in float16.",
    seed=seeds,
    kind=kinds,
    dtype=floats,
    scale=st.sampled_from([1.0, 2000.0]),
)
def keeps_the_dtype_without_overflow(built: Built, seed: int, kind: str, dtype: torch.dtype, scale: float) -> None:
    made = _made(built, kind, 16).to(dtype)
    x = normal(seed, 2, 3, 16, dtype=dtype, scale=scale)  # [B T C]
    for name, path in _paths(made):
        holds(path(x).dtype == dtype, f"{kind}: {name}'s output is {path(x).dtype}, the input is {dtype}")
    rounding = 8.0 * torch.finfo(dtype).eps
    expected = _torch(kind, _made(built, kind, 16), x.double()).to(dtype)
    equal(made(x), expected, f"{kind}: forward's output", rtol=rounding, atol=rounding)


@prop(
    "One position, none, an empty batch or an input that is not contiguous must do: a view or a squeeze is too strict.",
    seed=seeds,
    kind=kinds,
    shape=st.sampled_from([(1, 1), (0, 3), (2, 0), (1,), (0,), (), (2, 3)]),
)
def takes_one_none_and_strided(built: Built, seed: int, kind: str, shape: tuple[int, ...]) -> None:
    made = _made(built, kind, 4, seed=seed)
    x = normal(seed, *shape, 4)  # [... C]
    strided = normal(seed, 4, 3, 2).permute(2, 1, 0)  # [B T C], C with the largest stride
    for name, path in _paths(made):
        equal(path(x), _torch(kind, made, x), f"{kind}: {name}'s output for shape {[*shape, 4]}")
        equal(path(strided), _torch(kind, made, strided.contiguous()), f"{kind}: {name}'s output for a strided input")


@prop(
    "Probes and faults find nothing at a site that is not tapped, or is tapped more than once.",
    seed=seeds,
    kind=kinds,
    examples=4,
)
def taps_its_output(built: Built, seed: int, kind: str) -> None:
    explicit_taps(_made(built, kind, 4), ("out",), normal(seed, 1, 3, 4))
