"""Project 4: reverse-mode autodiff, SGD, Adam, AdamW, the learning-rate schedule and gradient clipping.

Linnainmaa, 1970, and Griewank and Walther, 2008 (reverse mode); Polyak, 1964 (momentum); Kingma and Ba, 2015 (Adam);
Loshchilov and Hutter, 2019 (decoupled decay); Pascanu et al., 2013 (clipping).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lab.errors import BadInput

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Index = int | list[int] | Tensor
    Operand = Tensor | float  # and Variable
    States = dict[Tensor, dict[str, Any]]
    Params = Iterable[Tensor] | Iterable[dict[str, Any]]


class Variable:
    """A tensor that remembers what it was computed from; torch.autograd has no part in it.

    Operators and methods mean what they mean on tensors. An operand that is a tensor or a number is a constant.

    Args:
        value: Of floating point. Memory is shared: do not write to it before `backward`.
        parents: What it was computed from, each with its vector-Jacobian function, from the gradient here to the
            gradient there; the latter may still have the shape that broadcasting gave it.

    Attributes:
        grad: Of a leaf (a variable without parents), after `backward`; else None.

    Raises:
        BadInput: The value is not of floating point.
    """

    def __init__(self, value: Tensor, *parents: tuple[Variable | Operand, Callable[[Tensor], Tensor]]) -> None:
        if not value.is_floating_point():
            raise BadInput(f"a variable needs floating point; this tensor is {value.dtype}")
        self.value = value.detach()
        self.parents = tuple((parent, vjp) for parent, vjp in parents if isinstance(parent, Variable))
        self.grad: Tensor | None = None
        constants = (parent.detach() for parent, _ in parents if isinstance(parent, Tensor))
        # Backward needs these as they are now; the version of a tensor counts the writes to its memory.
        self.versions = [(x, x._version) for x in (self.value, *constants)]

    def backward(self, seed: Tensor | None = None) -> None:
        """Add to ``grad`` of every leaf the gradient of ``(self * seed).sum()``. A second call adds the same again.

        Args:
            seed: Of the shape of the value. None is 1, for a value of one number.

        Raises:
            BadInput: A seed is missing or has another shape, or a value or a constant was changed in place meanwhile.
        """
        if seed is None and self.value.numel() != 1:
            raise BadInput(f"backward from shape {list(self.value.shape)} needs a seed; from one number it needs none")
        seed = torch.ones_like(self.value) if seed is None else seed.detach().to(self.value.dtype)
        if seed.shape != self.value.shape:
            raise BadInput(f"a seed of shape {list(seed.shape)}, for a value of shape {list(self.value.shape)}")
        order = self.ancestors()
        if any(x._version != version for node in order for x, version in node.versions):
            raise BadInput("a value was changed in place before backward, which needs it as it was")
        gradients = {self: seed}  # of this call, as far as they are summed
        for node in reversed(order):
            gradient = gradients.pop(node)  # complete: every use of the node came before it
            if not node.parents:
                # A copy, since a sum hands one tensor to both its parents, and clipping writes to gradients.
                own = gradient.clone(memory_format=torch.contiguous_format)
                node.grad = own if node.grad is None else node.grad + own
            for parent, vjp in node.parents:
                part = unbroadcast(vjp(gradient), parent.value)
                gradients[parent] = gradients[parent] + part if parent in gradients else part

    def ancestors(self) -> list[Variable]:
        """Return all that this was computed from, and itself last, each once and after its own parents.

        Depth first on a list of its own: Python's stack ends at about 1000 calls.
        """
        order: list[Variable] = []
        seen: set[Variable] = set()
        stack = [(self, False)]
        while stack:
            node, parents_done = stack.pop()
            if parents_done:
                order.append(node)
            elif node not in seen:
                seen.add(node)
                stack.append((node, True))
                stack.extend((parent, False) for parent, _ in node.parents)
        return order

    def __add__(self, other: Variable | Operand) -> Variable:
        return Variable(self.value + constant(other), (self, lambda g: g), (other, lambda g: g))

    def __neg__(self) -> Variable:
        return Variable(-self.value, (self, lambda g: -g))

    def __sub__(self, other: Variable | Operand) -> Variable:
        return self + -other

    def __rsub__(self, other: Operand) -> Variable:
        return -self + other

    def __mul__(self, other: Variable | Operand) -> Variable:
        a, b = self.value, constant(other)
        return Variable(a * b, (self, lambda g: g * b), (other, lambda g: g * a))

    __radd__, __rmul__ = __add__, __mul__

    def __truediv__(self, other: Variable | Operand) -> Variable:
        b = constant(other)
        ratio = self.value / b
        # Not a / b^2: the square overflows float16 from b = 256 on.
        return Variable(ratio, (self, lambda g: g / b), (other, lambda g: -g * (ratio / b)))

    def __rtruediv__(self, other: Operand) -> Variable:
        a, b = constant(other), self.value
        ratio = a / b
        return Variable(ratio, (other, lambda g: g / b), (self, lambda g: -g * (ratio / b)))

    def __pow__(self, exponent: float) -> Variable:
        x, n = self.value, exponent
        # x^0 is 1 also at 0, where 0 * x^-1 would be NaN.
        return Variable(x**n, (self, lambda g: g * (n * x ** (n - 1)) if n else torch.zeros_like(g)))

    def __matmul__(self, other: Variable | Tensor) -> Variable:
        return matmul(self, other)

    def __rmatmul__(self, other: Tensor) -> Variable:
        return matmul(other, self)

    def exp(self) -> Variable:
        """``e^x``."""
        y = self.value.exp()
        return Variable(y, (self, lambda g: g * y))

    def log(self) -> Variable:
        """Return the natural logarithm."""
        x = self.value
        return Variable(x.log(), (self, lambda g: g / x))

    def tanh(self) -> Variable:
        """Return the hyperbolic tangent."""
        y = self.value.tanh()
        return Variable(y, (self, lambda g: g * (1 - y * y)))

    def relu(self) -> Variable:
        """``max(x, 0)``, with slope 0 at 0."""
        x = self.value
        return Variable(x.clamp_min(0), (self, lambda g: g.masked_fill(x <= 0, 0)))  # 0 also where g is infinite

    def sum(self, dim: int | tuple[int, ...] | None = None, *, keepdim: bool = False) -> Variable:
        """Sum over these axes; None is all."""
        x, axes = self.value, tuple(range(self.value.dim())) if dim is None else dim
        kept = x.sum(axes, keepdim=True)
        y = kept if keepdim else kept.squeeze(axes)
        return Variable(y, (self, lambda g: g.reshape(kept.shape).expand(x.shape)))

    def mean(self, dim: int | tuple[int, ...] | None = None, *, keepdim: bool = False) -> Variable:
        """Average over these axes; None is all. Not a sum divided: that overflows float16 above 65504."""
        x, axes = self.value, tuple(range(self.value.dim())) if dim is None else dim
        kept = x.mean(axes, keepdim=True)
        y, count = kept if keepdim else kept.squeeze(axes), x.numel() / max(1, kept.numel())
        return Variable(y, (self, lambda g: (g / count).reshape(kept.shape).expand(x.shape)))

    def reshape(self, *shape: int) -> Variable:
        """Return the same numbers, in order, in another shape."""
        before = self.value.shape
        return Variable(self.value.reshape(shape), (self, lambda g: g.reshape(before)))

    def transpose(self, first: int, second: int) -> Variable:
        """Swap two axes."""
        return Variable(self.value.transpose(first, second), (self, lambda g: g.transpose(first, second)))

    def __getitem__(self, index: Index | tuple[Index, ...]) -> Variable:
        """Take rows (one index) or entries (an index for each axis), no slices. One taken twice gets both gradients."""
        x, indices = self.value, index if isinstance(index, tuple) else (index,)
        # Copies: whoever gave them may write to them.
        places = tuple(torch.as_tensor(i, device=x.device).clone() for i in indices)
        return Variable(x[places], (self, lambda g: torch.zeros_like(x).index_put_(places, g, accumulate=True)))


def constant(x: Variable | Operand) -> Tensor | float:
    """Return the value of a variable, and a tensor outside torch's graph."""
    if isinstance(x, Variable):
        return x.value
    return x.detach() if isinstance(x, Tensor) else x


def matmul(a: Variable | Tensor, b: Variable | Tensor) -> Variable:  # [... N K] @ [... K M] -> [... N M]
    """Return the matrix product, of which at least one factor is a variable.

    Raises:
        BadInput: One has fewer than two axes.
    """
    x, y = torch.as_tensor(constant(a)), torch.as_tensor(constant(b))
    if min(x.dim(), y.dim()) < 2:
        raise BadInput(f"matmul of shapes {list(x.shape)} and {list(y.shape)}: both need two axes or more")
    return Variable(x @ y, (a, lambda g: g @ y.mT), (b, lambda g: x.mT @ g))


def unbroadcast(gradient: Tensor, value: Tensor) -> Tensor:
    """Sum a gradient over the axes along which a value was repeated; return it in the value's shape and dtype."""
    new = gradient.dim() - value.dim()  # axes that broadcasting put in front
    stretched = (new + i for i, n in enumerate(value.shape) if n == 1 and gradient.shape[new + i] != 1)
    repeated = (*range(new), *stretched)
    summed = gradient.sum(repeated).reshape(value.shape) if repeated else gradient
    return summed.to(value.dtype)


def cross_entropy(logits: Variable, targets: Tensor) -> Variable:
    """Return the mean of ``logsumexp(z) - z_target``, in nats, for logits [N V] and targets [N].

    Raises:
        BadInput: The shapes are others, or a target is none of 0 to V - 1.
    """
    if logits.value.dim() != 2 or targets.shape != logits.value.shape[:1]:
        raise BadInput(f"logits {list(logits.value.shape)} and targets {list(targets.shape)}: expected [N V] and [N]")
    classes = logits.value.shape[1]
    if bool(((targets < 0) | (targets >= classes)).any()):  # an index below 0 would count from the end
        raise BadInput(f"a target is not one of the {classes} classes, 0 to {classes - 1}; leave such rows out first")
    # The largest logit as a constant: what it adds to both terms cancels, and so does its gradient.
    shifted = logits - logits.value.amax(dim=-1, keepdim=True)  # [N V]
    chosen = shifted[torch.arange(len(targets), device=targets.device), targets]  # [N]
    return (shifted.exp().sum(-1).log() - chosen).mean()


class Foreach(Optimizer):
    """What SGD, Adam and AdamW share: one call of a kernel updates all tensors of a group (foreach)."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with options of their own; the constructor calls it for each group.

        Raises:
            BadInput: A rate, decay, momentum or eps is below 0, or a beta is not in [0, 1).
        """
        options = {**self.defaults, **param_group}
        for name in ("lr", "weight_decay", "momentum", "eps"):
            if name in options and not options[name] >= 0:
                raise BadInput(f"{name} = {options[name]}: it must be 0 or more")
        if not all(0 <= beta < 1 for beta in options.get("betas", ())):
            raise BadInput(f"betas = {options['betas']}: each must be at least 0 and below 1")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self.update(group, params, [p.grad for p in params])
        return loss

    def update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        """Update the parameters of a group in place; the gradients stay as they are."""
        raise NotImplementedError


class SGD(Foreach):
    """Gradient descent: ``u <- momentum u + g + weight_decay p``, then ``p <- p - lr u`` (Polyak's momentum)."""

    def __init__(self, params: Params, lr: float = 1e-3, *, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        """Update the parameters of a group."""
        grads = coupled(grads, params, group["weight_decay"])
        if group["momentum"]:
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            kept = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_mul_(kept, group["momentum"])
            torch._foreach_add_(kept, grads)
            grads = kept
        torch._foreach_add_(params, grads, alpha=-group["lr"])


class Adam(Foreach):
    """Adam with coupled weight decay: the decay is part of the gradient, so that the quotient scales it too.

    Args:
        params: Parameters, or groups of them.
        lr, betas, eps, weight_decay: As in Kingma and Ba, algorithm 1.
        bias_correction: Divide both means by the share of them that is not their start at 0. Without it the first step
            is ``(1 - beta1) / sqrt(1 - beta2)`` times as long: 3.16 with the betas of the paper.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        bias_correction: bool = True,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "bias_correction": bias_correction})

    def update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        """Update the parameters of a group."""
        grads = coupled(grads, params, group["weight_decay"])
        adam(self.state, group, params, grads, corrected=group["bias_correction"])


class AdamW(Foreach):
    """Adam with bias correction and decoupled weight decay, over all tensors at once (foreach).

    Args:
        params: Parameters, or groups of them.
        lr, betas, eps, weight_decay: As in Loshchilov and Hutter, algorithm 2.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        """Update the parameters of a group."""
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        adam(self.state, group, params, grads)


def coupled(grads: list[Tensor], params: list[Tensor], decay: float) -> list[Tensor]:
    """Return ``g + decay p``, the gradient with that of ``decay / 2`` times the squared norm, in new tensors."""
    # torch has no public name for it.
    return list(torch._foreach_add(grads, params, alpha=decay)) if decay else grads  # noqa: SLF001


def adam(
    states: States, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], *, corrected: bool = True
) -> None:
    """Update both means, and the parameters by their quotient; each parameter counts its own steps."""
    (b1, b2), lr = group["betas"], group["lr"]
    for p in params:
        if not states[p]:
            states[p].update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        states[p]["step"] += 1
    means = [states[p]["exp_avg"] for p in params]
    squares = [states[p]["exp_avg_sq"] for p in params]
    torch._foreach_lerp_(means, grads, 1 - b1)  # m <- b1 m + (1 - b1) g
    torch._foreach_mul_(squares, b2)
    torch._foreach_addcmul_(squares, grads, grads, 1 - b2)  # v <- b2 v + (1 - b2) g^2
    steps = [states[p]["step"] if corrected else math.inf for p in params]  # beta^inf is 0: no correction
    roots = torch._foreach_sqrt(squares)
    torch._foreach_div_(roots, [math.sqrt(1 - b2**t) for t in steps])  # sqrt(v / (1 - b2^t))
    torch._foreach_add_(roots, group["eps"])
    torch._foreach_addcdiv_(params, means, roots, [-lr / (1 - b1**t) for t in steps])


def learning_rate(step: int, *, peak: float, warmup: int, total: int, floor: float = 0.1) -> float:
    """Linear warmup, then half a cosine down to ``floor * peak`` (Loshchilov and Hutter, 2017).

    Args:
        step: From 0; the first step of a warmup already moves.
        peak: The highest rate.
        warmup: Steps until it is reached.
        total: Steps in all; the last is ``total - 1``.
        floor: The rate at the last step as a share of the peak.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - 1 - warmup))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))


@torch.no_grad()
def clip_gradients(params: Iterable[Tensor], limit: float) -> Tensor:
    """Scale all gradients together so that their joint norm is at most `limit`; return the norm [] before that.

    Raises:
        BadInput: The limit is below 0: the gradients would point the other way.
    """
    if not limit >= 0:
        raise BadInput(f"a limit of {limit} for the norm of the gradients: it must be 0 or more")
    grads = [p.grad for p in params if p.grad is not None]
    if not grads:
        return torch.zeros(())
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    # Without a branch on the norm, which would wait for the device.
    torch._foreach_mul_(grads, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm
