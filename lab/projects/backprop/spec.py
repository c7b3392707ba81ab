"""What any reverse-mode autodiff, SGD, Adam, AdamW, learning-rate schedule and gradient clipping must do."""

from __future__ import annotations

import copy
import itertools
import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lab.spec import Built, equal, floats, gradients, holds, near, normal, prop, seeds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Operation = Callable[..., Any]  # of variables or of tensors alike

SHAPES = ((3, 4), (4,), (2, 2, 2), ())  # of the parameters that the optimisers are given


def _fixed() -> Tensor:
    """Return a constant operand, [3 4]."""
    return normal(5, 3, 4).abs() + 0.5


# Each is written once and computed twice: on variables, and on tensors by torch.autograd.
OPERATIONS: dict[str, Operation] = {
    "a + b": lambda a, b: a + b,
    "a - b": lambda a, b: a - b,
    "a * b": lambda a, b: a * b,
    "a / b": lambda a, b: a / b,
    "a @ b^T": lambda a, b: a @ b.transpose(0, 1),
    "a^T @ b": lambda a, b: a.transpose(0, 1) @ b,
    "-a": lambda a, _: -a,
    "a + 2": lambda a, _: a + 2,
    "2 - a": lambda a, _: 2 - a,
    "3 * a - 1": lambda a, _: 3 * a - 1,
    "2 / a": lambda a, _: 2 / a,
    "a / 4": lambda a, _: a / 4,
    "tensor - a": lambda a, _: _fixed() - a,
    "a * tensor": lambda a, _: a * _fixed(),
    "tensor / a": lambda a, _: _fixed() / a,
    "a @ tensor": lambda a, _: a @ _fixed().t(),
    "tensor @ a": lambda a, _: _fixed().t() @ a,
    "a ** 3": lambda a, _: a**3,
    "a ** -1.5": lambda a, _: a**-1.5,
    "a ** 0": lambda a, _: a**0,
    "exp": lambda a, _: a.exp(),
    "log": lambda a, _: a.log(),
    "tanh": lambda a, _: a.tanh(),
    "relu": lambda a, _: (a - _fixed()).relu(),
    "sum()": lambda a, _: a.sum(),
    "sum(0)": lambda a, _: a.sum(0),
    "sum(-1, keepdim=True)": lambda a, _: a.sum(-1, keepdim=True),
    "sum((0, 1))": lambda a, _: a.sum((0, 1)),
    "mean()": lambda a, _: a.mean(),
    "mean(1)": lambda a, _: a.mean(1),
    "mean(0, keepdim=True)": lambda a, _: a.mean(0, keepdim=True),
    "reshape": lambda a, _: a.reshape(2, 6),
    "transpose": lambda a, _: a.transpose(0, 1),
    "rows, one twice": lambda a, _: a[torch.tensor([2, 0, 2])],
    "entries, one twice": lambda a, _: a[torch.tensor([1, 0, 1]), torch.tensor([3, 2, 3])],
}


def _drawn(seed: int, shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
    """Draw standard normal numbers times `scale`; the shape may be ()."""
    return normal(seed, *shape, 1, scale=scale)[..., 0]


def _refuses(call: Callable[[], object], what: str) -> None:
    """Raise `Mismatch` unless the call raises; what is not written yet refuses nothing."""
    try:
        call()
    except NotImplementedError:
        raise
    except Exception:  # noqa: BLE001 - which error it is, the component may choose
        return
    holds(condition=False, text=f"{what} raised nothing")


def _compare(built: Built, function: Operation, *inputs: Tensor, what: str) -> None:
    """Compare value and gradients with torch's, for a seed of drawn numbers."""
    ours = [built.Variable(x) for x in inputs]
    theirs = [x.detach().clone().requires_grad_() for x in inputs]
    got, expected = function(*ours), function(*theirs)
    equal(got.value, expected.detach(), f"the value of {what}")
    seed = _drawn(7, expected.shape).to(expected.dtype)
    wanted = torch.autograd.grad(expected, theirs, seed, allow_unused=True)
    got.backward(seed)
    for name, variable, grad in zip("abc", ours, wanted, strict=False):
        if grad is None:
            holds(variable.grad is None, f"{what} has a gradient at {name}, which is no part of it")
        else:
            equal(variable.grad, grad, f"the gradient of {what} at {name}")


@prop(
    "One operation's value or vector-Jacobian product differs from torch's: the text says which operation it is.",
    seed=seeds,
    examples=4,
)
def each_operation_equals_torch(built: Built, seed: int) -> None:
    a, b = normal(seed, 3, 4).abs() + 0.5, normal(seed + 1, 3, 4).abs() + 0.5
    for name, function in OPERATIONS.items():
        _compare(built, function, a, b, what=name)
    _compare(built, lambda x: x.relu(), torch.tensor([-1.0, 0.0, 2.0]), what="relu of -1, 0 and 2")


@prop(
    "A gradient does not have its value's shape, or misses terms: sum over each axis along which it was repeated.",
    seed=seeds,
    shapes=st.sampled_from(
        [
            ((3, 4), (4,)),
            ((2, 1, 4), (3, 1)),
            ((1,), (5,)),
            ((), (2, 3)),
            ((3, 1), (1, 3)),
            ((0, 3), (3,)),
            ((1, 1), ()),
        ]
    ),
)
def broadcasting_is_undone(built: Built, seed: int, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    a, b = (_drawn(seed + i, shape).abs() + 0.5 for i, shape in enumerate(shapes))
    for name in ("a + b", "a - b", "a * b", "a / b"):
        _compare(built, OPERATIONS[name], a, b, what=f"{name} of shapes {list(a.shape)} and {list(b.shape)}")
        _compare(built, OPERATIONS[name], b, a, what=f"{name} of shapes {list(b.shape)} and {list(a.shape)}")
    # A weight [C D] used at every position of [B T C], and the other way round.
    x, w = normal(seed, 2, 3, 4), normal(seed + 1, 4, 2)
    _compare(built, lambda a, b: a @ b, x, w, what="[B T C] @ [C D]")
    _compare(built, lambda a, b: a @ b, w[:, :2], normal(seed, 3, 2, 5), what="[C D] @ [B D E]")


def _network(leaves: list[Any], seed: int) -> Any:
    """Twenty operations on nodes drawn from those before, so that many are used more than once, far apart."""
    nodes, draw = list(leaves), torch.Generator().manual_seed(seed)
    for kind, i, j in torch.randint(10**6, (20, 3), generator=draw).tolist():
        a, b = nodes[i % len(nodes)], nodes[j % len(nodes)]
        nodes.append((a * b.tanh(), a.tanh() + b, a - b * 0.5, a.tanh() @ b.tanh())[kind % 4])
    total = nodes[0].tanh().sum()
    for node in nodes[1:]:
        total = total + node.tanh().sum()
    return total


@prop(
    "A node used more than once must get one term per use, all of them before its own are passed on to its parents.",
    seed=seeds,
)
def each_use_of_a_node_counts_once(built: Built, seed: int) -> None:
    x = built.Variable(normal(seed, 3))
    y = x * x  # used at two depths
    (y * x + y + x + x).sum().backward()
    equal(x.grad, 3 * x.value**2 + 2 * x.value + 2, "the gradient of x^3 + x^2 + 2 x")
    inputs = [normal(seed + i, 3, 3) for i in range(3)]
    _compare(built, lambda *leaves: _network(list(leaves), seed), *inputs, what="a graph of twenty operations")


@prop("A chain of 10,000 operations ended in an error or a wrong gradient: order the graph without recursion.")
def a_long_chain_is_no_recursion(built: Built) -> None:
    x = built.Variable(torch.ones((), dtype=torch.float64))
    y = x
    for _ in range(10_000):
        y = y * 1.0001
    y.backward()
    near(float(x.grad), 1.0001**10_000, 1e-9, "the gradient through 10,000 products")
    # Each of 60 sums uses the one before twice: 2^60 paths, which only an order visited once can pass.
    y = z = built.Variable(torch.ones((), dtype=torch.float64))
    for _ in range(60):
        y = y + y
    y.backward()
    near(float(z.grad) / 2.0**60, 1.0, 1e-12, "the gradient through 60 doublings, over 2^60")


@prop(
    "A second backward must add the same gradient again: what earlier calls left in the graph was counted with it.",
    seed=seeds,
)
def a_second_backward_adds_the_same(built: Built, seed: int) -> None:
    x = built.Variable(normal(seed, 4))
    loss = ((x * x).exp() * x).sum()
    loss.backward()
    once = x.grad.clone()
    loss.backward()
    equal(x.grad, 2 * once, "the gradient after two calls")
    (x * 3).sum().backward()  # another graph on the same leaf, as when gradients of two batches are summed
    equal(x.grad, 2 * once + 3, "the gradient after a third call from another graph")


@prop(
    "Two leaves share memory for their gradients, or one is a view that repeats: clipping in place then scales twice.",
    seed=seeds,
)
def gradients_are_tensors_of_their_own(built: Built, seed: int) -> None:
    a, b = built.Variable(normal(seed, 3, 2)), built.Variable(normal(seed + 1, 3, 2))
    upstream = normal(seed + 2, 3, 2)
    (a + b).backward(upstream)
    a.grad.mul_(0)
    equal(b.grad, normal(seed + 2, 3, 2), "the gradient of b once that of a was written to")
    equal(upstream, normal(seed + 2, 3, 2), "the seed once the gradient of a was written to")
    c = built.Variable(normal(seed, 3, 2))
    c.sum().backward()
    c.grad[0, 0] = 5.0
    near(float(c.grad.sum()), 10.0, 1e-12, "six entries of 1, one then set to 5, summed,")


@prop(
    "The variables must not build torch's graph as well: detach what is given; memory and time would double.",
    seed=seeds,
    examples=5,
)
def torch_autograd_has_no_part_in_it(built: Built, seed: int) -> None:
    weight, data = normal(seed, 4, 2).requires_grad_(), normal(seed + 1, 3, 4).requires_grad_()
    w = built.Variable(weight)
    out = ((data @ w) * data.sum() / 2.0).tanh()
    holds(not w.value.requires_grad, "the value of a variable requires grad: torch follows it")
    holds(not out.value.requires_grad, "the result requires grad: torch follows it")
    holds(w.value.data_ptr() == weight.data_ptr(), "the value is a copy: an update of the parameter is not seen")
    out.sum().backward()
    holds(not w.grad.requires_grad, "the gradient requires grad: torch follows the backward pass")
    holds(weight.grad is None and data.grad is None, "torch's own backward has run")


class _AsTorch(torch.autograd.Function):
    """Lets gradcheck, which differentiates torch's functions, differentiate one of variables."""

    @staticmethod
    def forward(ctx: Any, built: Built, function: Operation, *inputs: Tensor) -> Tensor:
        ctx.leaves = [built.Variable(x) for x in inputs]
        ctx.out = function(*ctx.leaves)
        value: Tensor = ctx.out.value
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *seed: Tensor) -> Any:
        for leaf in ctx.leaves:
            leaf.grad = None
        ctx.out.backward(seed[0])
        return (None, None, *(leaf.grad for leaf in ctx.leaves))


@prop("Backward disagrees with the values: a term of the chain rule is missing.", seed=seeds, examples=5)
def gradients_are_those_of_finite_differences(built: Built, seed: int) -> None:
    x, targets = normal(seed, 3, 4), torch.tensor([1, 0, 1])

    def loss(w: Any, b: Any, v: Any) -> Any:
        return built.cross_entropy((x @ w + b).tanh() @ v, targets)

    def path(w: Any, b: Any, v: Any) -> Any:
        return ((w.exp() + b) / (v.mean() ** 2 + 1)).transpose(0, 1).reshape(2, -1)[[0, 1, 1]].mean(1)

    inputs = normal(seed + 1, 4, 2), normal(seed + 2, 2), normal(seed + 3, 2, 2)
    apply: Operation = _AsTorch.apply
    for function in (loss, path):
        gradients(partial(apply, built, function), *inputs)


@prop(
    "The result or its gradient has another dtype than the variable, or is further from exact than that dtype rounds.",
    seed=seeds,
    dtype=floats,
)
def keeps_the_dtype(built: Built, seed: int, dtype: torch.dtype) -> None:
    a, b = normal(seed, 5, 3, dtype=dtype), normal(seed + 1, 3, dtype=dtype)

    def function(a: Any, b: Any) -> Any:
        return (a * b + a.tanh()).transpose(0, 1).relu().mean()

    ours, exact = [built.Variable(x) for x in (a, b)], [x.double().requires_grad_() for x in (a, b)]
    got, expected = function(*ours), function(*exact)
    got.backward()
    wanted = torch.autograd.grad(expected, exact)
    slack = 16 * torch.finfo(dtype).eps
    results = got.value, *(v.grad for v in ours)
    for name, ours_, theirs in zip(("value", "a", "b"), results, (expected, *wanted), strict=True):
        holds(ours_.dtype == dtype, f"{name} is {ours_.dtype}, the variables are {dtype}")
        equal(ours_.double(), theirs.detach(), name, rtol=slack, atol=slack)
    mixed = built.Variable(a)
    (mixed * normal(seed, 5, 3)).sum().backward()  # the constant is float64
    holds(mixed.grad.dtype == dtype, f"the gradient of a {dtype} variable times a float64 tensor is {mixed.grad.dtype}")


@prop("Huge, empty, single or strided input gave NaN, inf or an error where the exact gradient is finite.")
def extremes_stay_finite(built: Built) -> None:
    one, wide = torch.ones((), dtype=torch.float16), torch.tensor(300.0, dtype=torch.float16)
    b = built.Variable(wide)
    (one / b).backward()
    near(float(b.grad), -1 / 9e4, 2e-7, "the slope of 1 / b at 300, in float16,")
    b = built.Variable(wide)
    (built.Variable(one) / b).backward()
    near(float(b.grad), -1 / 9e4, 2e-7, "the slope of a / b at a = 1, b = 300, in float16,")
    x = built.Variable(torch.full((4096,), 100.0, dtype=torch.float16))
    mean = x.mean()
    mean.backward()
    near(float(mean.value), 100.0, 0.1, "the mean of 4096 numbers of 100, in float16,")
    near(float(x.grad[0]), 1 / 4096, 1e-6, "its gradient")
    for name, at, expected in (("relu", -1.0, 0.0), ("tanh", 1e4, 0.0), ("exp", -1e4, 0.0)):
        x = built.Variable(torch.tensor(at))
        seed = torch.tensor(torch.inf if name == "relu" else 1.0)  # 0 times inf would be NaN
        getattr(x, name)().backward(seed)
        near(float(x.grad), expected, 0.0, f"the gradient of {name} at {at:g}")
    x = built.Variable(torch.zeros(2))
    (x**0).sum().backward()
    equal(x.grad, torch.zeros(2), "the gradient of x^0 at 0")
    for logits in (normal(0, 4, 3, dtype=torch.float32, scale=1e4), normal(0, 4, 3).float() - 1e4):
        z, targets = built.Variable(logits), torch.tensor([0, 1, 2, 0])
        loss = built.cross_entropy(z, targets)
        equal(loss.value, F.cross_entropy(logits, targets), "cross_entropy of logits near 1e4", rtol=1e-5, atol=1e-2)
        loss.backward()
        holds(torch.isfinite(z.grad).all(), "the gradient of cross_entropy at logits near 1e4 is not finite")
    strided = normal(0, 4, 3).t()  # [3 4], not contiguous
    for name in ("a @ b^T", "reshape", "mean(1)", "rows, one twice"):
        _compare(built, OPERATIONS[name], strided, normal(1, 3, 8)[:, ::2], what=f"{name} of strided input")
    _compare(built, lambda a: (a * 2).sum(0), normal(0, 0, 3), what="sum(0) of an empty tensor")
    for name in ("sum()", "mean()", "exp", "a / 4"):
        _compare(built, OPERATIONS[name], torch.tensor(0.5), torch.tensor(1.0), what=f"{name} of a tensor of shape []")


@prop("A wrong gradient, silently: refuse many numbers without a seed, a wrong seed, integers, and changed values.")
def refuses_what_has_no_gradient(built: Built) -> None:
    x = built.Variable(normal(0, 2, 3))
    _refuses((x * 2).backward, "backward from six numbers without a seed")
    _refuses(lambda: (x * 2).backward(torch.ones(3)), "a seed of shape [3] for a value of shape [2 3]")
    _refuses(lambda: built.Variable(torch.arange(3)), "a variable of integers")
    _refuses(lambda: x @ built.Variable(normal(0, 3)), "a matrix product with one axis")
    weight = normal(0, 3)
    w = built.Variable(weight)
    loss = (w * w).sum()
    weight.mul_(2)  # as an optimiser does
    _refuses(loss.backward, "backward after the weight was changed in place")
    data, index = normal(0, 3), torch.tensor([0, 1])
    loss = (built.Variable(normal(1, 3)) * data).sum()
    data.mul_(2)
    _refuses(loss.backward, "backward after a constant factor was changed in place")
    w = built.Variable(normal(0, 3))
    loss = w[index].sum()
    index.fill_(2)
    loss.backward()
    equal(w.grad, torch.tensor([1.0, 1, 0]).double(), "the gradient of rows 0 and 1 once the index was changed")
    z = built.Variable(normal(0, 2, 3))
    built.cross_entropy(z, torch.tensor([0, 2]))
    for targets in ([0, -1], [0, 3], [[0], [1]], [0, 1, 2]):
        call = partial(built.cross_entropy, z, torch.tensor(targets))
        _refuses(call, f"cross_entropy of logits [2 3] and targets {targets}")


def _blobs() -> tuple[Tensor, Tensor]:
    """Ninety points [90 2] in three groups around a circle, and which group each is of [90]."""
    labels = torch.arange(90) % 3
    angle = 2 * math.pi * labels / 3
    return torch.stack((angle.cos(), angle.sin()), dim=-1).double() + normal(0, 90, 2, scale=0.3), labels


@prop("A network of two layers did not train as torch's does: a gradient at some step differs, or the loss stayed.")
def a_small_network_trains_as_in_torch(built: Built) -> None:
    x, y = _blobs()
    ours = [normal(1, 2, 8), normal(2, 8), normal(3, 8, 3, scale=0.3), normal(4, 3)]  # w [C F], b [F], v [F V], c [V]
    theirs = [p.clone().requires_grad_() for p in ours]
    mine = built.SGD(ours, lr=0.3, momentum=0.9)
    reference = torch.optim.SGD(theirs, lr=0.3, momentum=0.9)
    losses = []
    for step in range(30):
        leaves = [built.Variable(p) for p in ours]
        w, b, v, c = leaves
        loss = built.cross_entropy((x @ w + b).tanh() @ v + c, y)
        loss.backward()
        expected = F.cross_entropy((x @ theirs[0] + theirs[1]).tanh() @ theirs[2] + theirs[3], y)
        wanted = torch.autograd.grad(expected, theirs)
        for name, p, q, leaf, grad in zip("wbvc", ours, theirs, leaves, wanted, strict=True):
            equal(leaf.grad, grad, f"the gradient of {name} at step {step}", rtol=1e-8, atol=1e-10)
            p.grad, q.grad = leaf.grad, grad
        losses.append(float(loss.value))
        mine.step()
        reference.step()
    holds(losses[-1] < losses[0] / 4, f"the loss went from {losses[0]:.3g} to {losses[-1]:.3g} in 30 steps")


def _parameters(seed: int) -> list[Tensor]:
    return [_drawn(seed + i, shape).requires_grad_() for i, shape in enumerate(SHAPES)]


def _set(params: list[Tensor], seed: int, without: tuple[int, ...] = (), scale: float = 1.0) -> None:
    for i, p in enumerate(params):
        p.grad = None if i in without else _drawn(1000 + 10 * seed + i, p.shape, scale)


def _groups(params: list[Tensor]) -> list[dict[str, Any]]:
    return [{"params": params[:2], "lr": 3e-2}, {"params": params[2:], "lr": 1e-2, "weight_decay": 0.0}]


def _same_path(built: Built, name: str, seed: int, **options: Any) -> None:
    """Compare 100 steps with torch's: two groups, a rate that falls, one parameter without gradient, one that joins."""
    ours, theirs = _parameters(seed), _parameters(seed)
    mine = getattr(built, name)(_groups(ours), **options)
    reference = getattr(torch.optim, name)(_groups(theirs), **options)
    for step in range(100):
        for params, optimizer in ((ours, mine), (theirs, reference)):
            _set(params, step, without=(1,) if step >= 30 else (1, 3))
            optimizer.param_groups[0]["lr"] = 3e-2 * (1 - step / 100)
            optimizer.step()
    for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        equal(p.detach(), q.detach(), f"parameter {i} after 100 steps of {name}", rtol=1e-9, atol=1e-11)
        if p.grad is not None and q.grad is not None:
            holds(torch.equal(p.grad, q.grad), f"{name} wrote to the gradient of parameter {i}")


betas = st.sampled_from([(0.9, 0.999), (0.9, 0.95), (0.0, 0.5)])


@prop(
    "SGD leaves torch's path: u <- momentum u + g + decay p, in this order, then p <- p - lr u.",
    seed=seeds,
    examples=3,
)
def sgd_equals_torch_over_100_steps(built: Built, seed: int) -> None:
    for momentum, decay in itertools.product((0.0, 0.9), (0.0, 0.3)):
        _same_path(built, "SGD", seed, momentum=momentum, weight_decay=decay)


@prop(
    "Adam or AdamW leaves torch's path: look at the two means, their corrections, where eps is added, and the decay.",
    seed=seeds,
    pair=betas,
    eps=st.sampled_from([1e-8, 1e-2]),
    examples=5,
)
def adam_and_adamw_equal_torch_over_100_steps(built: Built, seed: int, pair: tuple[float, float], eps: float) -> None:
    for name, decay in itertools.product(("Adam", "AdamW"), (0.0, 0.3)):
        _same_path(built, name, seed, betas=pair, eps=eps, weight_decay=decay)


@prop(
    "The first step must be lr g / (|g| + eps) at any scale of g; uncorrected, (1 - b1) / sqrt(1 - b2) times that.",
    seed=seeds,
    scale=st.sampled_from([1e-12, 1e-6, 1.0, 1e6]),
    pair=betas,
)
def the_first_step_has_the_size_of_the_rate(built: Built, seed: int, scale: float, pair: tuple[float, float]) -> None:
    tiny = 1e-30
    for name, options, factor in (
        ("Adam", {}, 1.0),
        ("AdamW", {"weight_decay": 0.0}, 1.0),
        ("Adam", {"bias_correction": False}, (1 - pair[0]) / math.sqrt(1 - pair[1])),
    ):
        p = torch.zeros(6, dtype=torch.float64)
        p.grad = normal(seed, 6, scale=scale)
        getattr(built, name)([p], lr=0.01, betas=pair, eps=tiny, **options).step()
        equal(p, -0.01 * factor * p.grad.sign(), f"the first step of {name} {options}", rtol=1e-9, atol=0.0)
    p = torch.zeros(6, dtype=torch.float64)
    p.grad = normal(seed, 6, scale=scale)
    built.Adam([p], lr=0.01, betas=pair, eps=1e-8).step()
    equal(p, -0.01 * p.grad / (p.grad.abs() + 1e-8), "the first step of Adam with eps 1e-8", rtol=1e-9, atol=0.0)


@prop(
    "AdamW's decay must be lr decay p and no more; Adam's goes through the quotient, and moves by lr whatever it is.",
    decay=st.floats(0.01, 0.5),
)
def decay_is_decoupled_in_adamw_only(built: Built, decay: float) -> None:
    p, q = torch.full((3,), 2.0, dtype=torch.float64), torch.full((3,), 2.0, dtype=torch.float64)
    p.grad, q.grad = torch.zeros_like(p), torch.zeros_like(q)
    mine = built.AdamW([p], lr=0.1, weight_decay=decay)
    for _ in range(5):
        mine.step()
    equal(p, torch.full_like(p, 2.0 * (1 - 0.1 * decay) ** 5), "a weight of 2 after 5 steps of AdamW, gradient 0,")
    built.Adam([q], lr=0.1, weight_decay=decay).step()
    equal(q, torch.full_like(q, 1.9), "a weight of 2 after a step of Adam, gradient 0,", rtol=1e-6, atol=0.0)


@prop(
    "An optimiser must go on from its saved state as if it had never stopped: keep means and counts in `self.state`.",
    seed=seeds,
    examples=3,
)
def the_state_can_be_saved(built: Built, seed: int) -> None:
    for name, options in (("SGD", {"momentum": 0.9}), ("Adam", {}), ("AdamW", {})):
        _saved(built, name, seed, options)


def _saved(built: Built, name: str, seed: int, options: dict[str, float]) -> None:
    """Compare eight steps with five, a copy of the state, and three."""
    ours = _parameters(seed)
    mine = getattr(built, name)(_groups(ours), **options)

    def steps(params: list[Tensor], optimizer: Any, which: range) -> None:
        for step in which:
            _set(params, step)
            holds(optimizer.step(lambda: 42.0) == 42.0, f"the step of {name} does not return what the closure does")

    steps(ours, mine, range(5))
    resumed = [p.detach().clone().requires_grad_() for p in ours]
    second = getattr(built, name)(_groups(resumed), **options)
    second.load_state_dict(copy.deepcopy(mine.state_dict()))
    steps(ours, mine, range(5, 8))
    steps(resumed, second, range(5, 8))
    holds(all(map(torch.equal, ours, resumed)), f"{name} resumed from its state took another path")


@prop("A step up the gradient, or away for good: refuse rates, decays and limits below 0, and betas outside [0, 1).")
def refuses_numbers_that_cannot_descend(built: Built) -> None:
    p = torch.zeros(2)
    for name, options in (
        ("SGD", {"lr": -0.1}),
        ("SGD", {"lr": 0.1, "momentum": -0.9}),
        ("Adam", {"betas": (0.9, 1.0)}),
        ("Adam", {"betas": (-0.1, 0.9)}),
        ("Adam", {"eps": -1e-8}),
        ("AdamW", {"lr": math.nan}),
        ("AdamW", {"weight_decay": -0.1}),
    ):
        make = getattr(built, name)
        make([p])
        _refuses(partial(make, [p], **options), f"{name} with {options}")
        _refuses(partial(make, [{"params": p, **options}]), f"{name} with a group of {options}")
    p.grad = torch.ones(2)
    _refuses(lambda: built.clip_gradients([p], -1.0), "clipping to a norm of -1")


def _rates(built: Built, peak: float, warmup: int, total: int, floor: float) -> Iterator[float]:
    return (built.learning_rate(step, peak=peak, warmup=warmup, total=total, floor=floor) for step in range(total))


@prop(
    "The rate must rise by equal parts to its peak at the end of the warmup, then fall by half a cosine to its floor.",
    peak=st.floats(1e-6, 10.0),
    warmup=st.integers(0, 50),
    falling=st.integers(2, 300),
    floor=st.floats(0.0, 1.0),
)
def the_rate_rises_then_falls_to_its_floor(built: Built, peak: float, warmup: int, falling: int, floor: float) -> None:
    total = warmup + falling
    for step, rate in enumerate(_rates(built, peak, warmup, total, floor)):
        angle = math.pi * (step - warmup) / (falling - 1)
        falls = peak * (floor + (1 - floor) * (0.5 + 0.5 * math.cos(angle)))
        near(rate, peak * (step + 1) / warmup if step < warmup else falls, 1e-9 * peak, f"the rate at step {step}")
    after = built.learning_rate(total + 5, peak=peak, warmup=warmup, total=total, floor=floor)
    near(after, floor * peak, 1e-9 * peak, "the rate five steps after the end")
    for step in range(3):  # a run of one step has no room to fall
        rate = built.learning_rate(step, peak=peak, warmup=0, total=1, floor=floor)
        holds(0 <= rate <= peak * (1 + 1e-12), f"the rate of a run of one step is {rate:.3g} at step {step}")


@prop(
    "Clipping must scale all gradients by one factor, min(1, limit / joint norm), and return the norm before it.",
    seed=seeds,
    limit=st.sampled_from([1e-3, 1.0, 7.0, 1e3]),
    scale=st.sampled_from([0.0, 1e-2, 1.0, 1e3]),
    without=st.sampled_from([(), (1,), (0, 2), (0, 1, 2, 3)]),
)
def clipping_equals_torch(built: Built, seed: int, limit: float, scale: float, without: tuple[int, ...]) -> None:
    ours, theirs = _parameters(seed), _parameters(seed)
    for params in (ours, theirs):
        _set(params, seed, without, scale)
    expected = torch.nn.utils.clip_grad_norm_(theirs, limit)
    norm = built.clip_gradients(iter(ours), limit)
    near(float(norm), float(expected), 1e-9 * max(1.0, float(expected)), "the norm before clipping")
    for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        if q.grad is not None:
            equal(p.grad, q.grad, f"the gradient of parameter {i} after clipping", rtol=1e-9, atol=1e-12)
