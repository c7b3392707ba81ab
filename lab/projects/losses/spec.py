"""What any log-softmax, cross-entropy, label smoothing and mean squared error must do."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lab.spec import Built, equal, floats, gradients, holds, near, normal, prop, seeds

rows, classes = st.integers(1, 12), st.integers(1, 9)
ignores = st.sampled_from([-100, -1, 99])
smoothings = st.sampled_from([0.0, 0.1, 0.5, 1.0])


def _problem(seed: int, count: int, wide: int, ignore: int = -100) -> tuple[Tensor, Tensor]:
    """Logits [N V] in float64 and targets [N], about a third of them left out, but never all."""
    draw = torch.Generator().manual_seed(seed)
    targets = torch.randint(wide, (count,), generator=draw)
    left_out = torch.rand(count, generator=draw) < 1 / 3
    left_out[0] = False
    return normal(seed, count, wide, scale=3.0), targets.masked_fill(left_out, ignore)


def _formula(logits: Tensor, targets: Tensor, ignore: int = -100) -> Tensor:
    """One target at a time: minus the logarithm of its probability."""
    costs = [row.logsumexp(-1) - row[int(y)] for row, y in zip(logits, targets, strict=True) if int(y) != ignore]
    return torch.stack(costs).mean()


@prop(
    "The loss is not the mean of logsumexp(z) - z_target over the targets that count: look at what it is divided by.",
    seed=seeds,
    count=rows,
    wide=classes,
    ignore=ignores,
)
def equals_the_formula_and_torch(built: Built, seed: int, count: int, wide: int, ignore: int) -> None:
    logits, targets = _problem(seed, count, wide, ignore)
    expected = _formula(logits, targets, ignore)
    equal(F.cross_entropy(logits, targets, ignore_index=ignore), expected, "torch's own operator")
    equal(built.cross_entropy_explicit(logits, targets, ignore), expected, "cross_entropy_explicit")
    equal(built.cross_entropy(logits, targets, ignore), expected, "cross_entropy")


@prop(
    "Log-softmax is not z - logsumexp(z) over the last axis: look at the axis, or at what is subtracted twice.",
    seed=seeds,
    count=rows,
    wide=classes,
)
def log_softmax_equals_torch(built: Built, seed: int, count: int, wide: int) -> None:
    logits = normal(seed, 2, count, wide, scale=3.0)  # [2 N V]
    got = built.log_softmax(logits)
    equal(got, torch.log_softmax(logits, -1), "log_softmax")
    equal(got.exp().sum(-1), torch.ones(2, count, dtype=torch.float64), "the sum of a row of probabilities")


@prop(
    "Label smoothing differs from torch's: every class, the target too, gets smoothing / V, over targets that count.",
    seed=seeds,
    count=rows,
    wide=classes,
    ignore=ignores,
    smoothing=smoothings,
)
def smoothing_equals_torch(built: Built, seed: int, count: int, wide: int, ignore: int, smoothing: float) -> None:
    logits, targets = _problem(seed, count, wide, ignore)
    expected = F.cross_entropy(logits, targets, ignore_index=ignore, label_smoothing=smoothing)
    equal(built.smoothed_cross_entropy(logits, targets, smoothing, ignore), expected, "smoothed_cross_entropy")


@prop(
    "The gradient is not (softmax - target) / n, and 0 where a target is left out: a term is detached or n is wrong.",
    seed=seeds,
    count=rows,
    wide=classes,
    smoothing=smoothings,
)
def the_gradient_is_softmax_minus_target(built: Built, seed: int, count: int, wide: int, smoothing: float) -> None:
    logits, targets = _problem(seed, count, wide)
    kept = targets != -100
    onehot = F.one_hot(targets.clamp_min(0), wide).double()  # [N V]; rows left out are hidden below
    for name, share in (("cross_entropy_explicit", 0.0), ("cross_entropy", 0.0), ("smoothed_cross_entropy", smoothing)):
        leaf = logits.clone().requires_grad_()
        more = (share,) if name == "smoothed_cross_entropy" else ()
        (grad,) = torch.autograd.grad(getattr(built, name)(leaf, targets, *more), leaf)
        wanted = (1 - share) * onehot + share / wide  # [N V]
        expected = (torch.softmax(logits, -1) - wanted) * kept[:, None] / kept.sum()
        equal(grad, expected, f"the gradient of {name}")


@prop(
    "Backward disagrees with the values: something is detached, or computed without gradient.", seed=seeds, examples=5
)
def gradients_are_those_of_finite_differences(built: Built, seed: int) -> None:
    logits, targets = _problem(seed, 4, 3)
    gradients(lambda z: built.cross_entropy_explicit(z, targets), logits)
    gradients(lambda z: built.smoothed_cross_entropy(z, targets, 0.2), logits)
    gradients(built.log_softmax, logits)
    gradients(built.mean_squared_error, logits, normal(seed + 1, 4, 3))


@prop(
    "Logits of 1e4 or -1e4 gave inf or NaN: subtract each row's largest logit before the exponential.",
    seed=seeds,
    count=rows,
    centre=st.sampled_from([-1e4, 0.0, 1e4]),
    dtype=floats,
)
def large_logits_stay_finite(built: Built, seed: int, count: int, centre: float, dtype: torch.dtype) -> None:
    logits, targets = _problem(seed, count, 5)
    # Around 0 the logits of a row are themselves +-1e4; else all are near one large number, of another sign in every
    # second row: the largest of all rows is no use to the others.
    signs = 1.0 - 2.0 * (torch.arange(count) % 2)[:, None]  # [N 1]
    logits = (1e4 * logits.sign() if centre == 0 else logits + centre * signs).to(dtype).requires_grad_()
    exact = logits.detach().double()
    # The logarithm of the sum is near 1e4, where neighbouring numbers are eps * 1e4 apart.
    slack = 4 * torch.finfo(dtype).eps * 1e4
    for name in ("cross_entropy_explicit", "cross_entropy", "smoothed_cross_entropy"):
        loss = getattr(built, name)(logits, targets)
        smoothing = 0.1 if name == "smoothed_cross_entropy" else 0.0
        near(loss.detach(), float(F.cross_entropy(exact, targets, label_smoothing=smoothing)), slack, name)
        (grad,) = torch.autograd.grad(loss, logits)
        holds(torch.isfinite(grad).all(), f"the gradient of {name} is not finite")
    gap = (built.log_softmax(logits.detach()).double() - torch.log_softmax(exact, -1)).abs().amax()
    near(gap, 0.0, slack, "the largest error of log_softmax")


@prop(
    "With all targets left out the loss is a mean over none, NaN as in torch: a 0 would hide a batch without targets.",
    count=rows,
    ignore=ignores,
)
def the_mean_over_no_target_is_nan(built: Built, count: int, ignore: int) -> None:
    logits, targets = normal(0, count, 5), torch.full((count,), ignore)
    for name in ("cross_entropy_explicit", "cross_entropy"):
        loss = getattr(built, name)(logits, targets, ignore)
        equal(loss, F.cross_entropy(logits, targets, ignore_index=ignore), name)
        holds(loss.isnan(), f"{name} is {float(loss):.3g} with no target that counts")
    holds(built.smoothed_cross_entropy(logits, targets, 0.1, ignore).isnan(), "smoothed_cross_entropy is not NaN")
    holds(len(built.token_losses(logits, targets, ignore)) == 0, "token_losses has losses with no target that counts")


@prop(
    "A constant added to all logits of a row moved the loss: what is subtracted is not added back, or not everywhere.",
    seed=seeds,
    count=rows,
    wide=classes,
    shift=st.integers(-500, 500),
)
def a_constant_added_changes_nothing(built: Built, seed: int, count: int, wide: int, shift: int) -> None:
    logits, targets = _problem(seed, count, wide)
    moved = logits + shift * normal(seed + 1, count, 1)  # another constant in each row
    for name in ("cross_entropy_explicit", "cross_entropy", "smoothed_cross_entropy"):
        call = getattr(built, name)
        equal(call(moved, targets), call(logits, targets), name, rtol=1e-9, atol=1e-9)
    equal(built.log_softmax(moved), built.log_softmax(logits), "log_softmax", rtol=1e-9, atol=1e-9)


@prop(
    "The result has another dtype than the logits, or is further from the exact value than that dtype's rounding.",
    seed=seeds,
    count=rows,
    dtype=floats,
)
def keeps_the_dtype(built: Built, seed: int, count: int, dtype: torch.dtype) -> None:
    logits, targets = _problem(seed, count, 7)
    logits = logits.to(dtype)
    exact, other = logits.double(), normal(seed + 1, count, 7, dtype=dtype)
    for name, got, expected in (
        ("cross_entropy_explicit", built.cross_entropy_explicit(logits, targets), _formula(exact, targets)),
        ("cross_entropy", built.cross_entropy(logits, targets), _formula(exact, targets)),
        (
            "smoothed_cross_entropy",
            built.smoothed_cross_entropy(logits, targets, 0.1),
            F.cross_entropy(exact, targets, label_smoothing=0.1),
        ),
        ("log_softmax", built.log_softmax(logits), torch.log_softmax(exact, -1)),
        ("mean_squared_error", built.mean_squared_error(logits, other), F.mse_loss(exact, other.double())),
    ):
        holds(got.dtype == dtype, f"{name} is {got.dtype}, the logits are {dtype}")
        # Each is a few roundings of numbers up to about 16.
        eps = torch.finfo(dtype).eps
        equal(got.double(), expected, name, rtol=8 * eps, atol=32 * eps)


@prop(
    "Memory order is no part of the values: a view was made where the layout does not allow it.",
    seed=seeds,
    smoothing=smoothings,
)
def takes_logits_that_are_not_contiguous(built: Built, seed: int, smoothing: float) -> None:
    flat, targets = _problem(seed, 12, 5)
    expected = _formula(flat, targets)
    logits, strided = flat.t().contiguous().t(), targets.repeat_interleave(2)[::2]  # [12 5] and [12], strided
    equal(built.cross_entropy_explicit(logits, strided), expected, "cross_entropy_explicit")
    equal(built.log_softmax(logits), torch.log_softmax(flat, -1), "log_softmax")
    smooth = F.cross_entropy(flat, targets, label_smoothing=smoothing)
    equal(built.smoothed_cross_entropy(logits, strided, smoothing), smooth, "smoothed_cross_entropy")
    # What a language model gives: [B T V] and [B T], here with the first two axes swapped.
    model, text = flat.view(3, 4, 5).transpose(0, 1), targets.view(3, 4).t()
    equal(built.cross_entropy(model, text), expected, "cross_entropy")
    holds(len(built.token_losses(model, text)) == int((text != -100).sum()), "token_losses has another length")


@prop(
    "The losses of single tokens must be those that count, in order, without gradient: zeros for the rest lower means.",
    seed=seeds,
    count=rows,
    wide=classes,
    ignore=ignores,
)
def token_losses_are_those_that_count(built: Built, seed: int, count: int, wide: int, ignore: int) -> None:
    logits, targets = _problem(seed, count, wide, ignore)
    kept = targets != ignore
    got = built.token_losses(logits.requires_grad_(), targets, ignore)
    log_p = torch.log_softmax(logits.detach(), -1)[kept]  # [n V]
    equal(got, -log_p.gather(-1, targets[kept][:, None]).squeeze(-1), "token_losses")
    holds(not got.requires_grad, "token_losses keeps a graph, and with it the memory of the forward pass")


@prop(
    "Mean squared error is the mean over all entries of (p - t)^2, of equal shapes: [N 1] against [N] is a mistake.",
    seed=seeds,
    count=st.integers(2, 9),
    wide=classes,
)
def mean_squared_error_equals_torch_and_never_broadcasts(built: Built, seed: int, count: int, wide: int) -> None:
    predictions, targets = normal(seed, count, wide), normal(seed + 1, count, wide)
    equal(built.mean_squared_error(predictions, targets), F.mse_loss(predictions, targets), "mean_squared_error")
    try:
        built.mean_squared_error(predictions[:, :1], targets[:, 0])
    except (ValueError, RuntimeError, TypeError, AssertionError):
        return
    holds(condition=False, text=f"mean_squared_error takes shapes [{count} 1] and [{count}] and broadcasts them")
