"""Updates: is what the optimiser did to the weights what its own formula says?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lab import NotChecked, Probe, Symptom, probe, rule, torch
from lab import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from lab import History, Run, Step

ELEMENTS = 8
# An update is a dozen rounded operations, each wrong by at most one unit; a chain of them stays well below 64.
ROUNDING = 64.0
SPECIAL = ("amsgrad", "maximize", "capturable", "fused", "differentiable")


@probe(
    "updates",
    title="Does an update follow from the gradient as AdamW's formula says?",
    cost="a few elements of each weight, on examined steps",
    examines=True,
)
class Updates(Probe):
    """Computes AdamW's update for a few elements of each parameter, from the state before it, and compares.

    Records the largest difference, in units of rounding: ``update.error`` from the formula,
    ``update.error_uncorrected`` from the same without bias correction, ``update.error_coupled`` from the same with the
    decay in the gradient.
    """

    def lab_start(self) -> None:
        self._kept: list[_Expected] = []
        self._reason = ""

    def lab_before_update(self, run: Run, step: Step) -> None:
        self._kept = []
        if not step.examined:
            return
        self._reason = unusual(run.optimizer)
        if self._reason:
            return
        for group in run.optimizer.param_groups:
            for dtype in (torch.float32, torch.float64):
                if params := [p for p in group["params"] if p.dtype == dtype and usual(p)]:
                    self._kept.append(expect(params, group, [run.optimizer.state.get(p, {}) for p in params]))
        if not self._kept:
            self._reason = "no parameter in float32 or float64 that the optimiser holds has a gradient"

    def lab_step_end(self, step: Step) -> None:
        kept, self._kept = self._kept, []
        if not kept:
            return
        errors = [(_joined(e.params) - e.wanted).abs() / e.unit for e in kept]  # each [3 n]
        largest = torch.cat(errors, dim=1).amax(dim=1)
        for name, error in zip(("error", "error_uncorrected", "error_coupled"), largest, strict=True):
            step.record(f"update.{name}", error)

    # In an experiment the gradients are set aside: whether there are any was seen before the update.
    def lab_examine(self) -> None:
        if self._reason:
            raise NotChecked(self._reason)


@dataclass
class _Expected:
    """What three formulas make of a few elements of parameters, [3 n], and a unit of rounding, [n]."""

    params: list[Tensor]
    wanted: Tensor
    unit: Tensor


def unusual(optimizer: torch.optim.Optimizer) -> str:
    """Say why the formula of this optimiser is not known here; empty when it is."""
    kind = type(optimizer)
    if kind.__name__ != "AdamW" or not kind.__module__.startswith(("torch.optim.", "lab.projects.")):
        return f"the formula of {kind.__name__} is not known here, only AdamW's"
    for group in optimizer.param_groups:
        for option in SPECIAL:
            if group.get(option):
                return f"AdamW with {option} rounds or moves in another way"
        if any(not isinstance(value, (int, float)) for value in (group["lr"], *group["betas"])):
            return "a rate or a beta is a tensor"
        if not group["eps"] > 0:
            return "eps is 0: a gradient of 0 has no update"
    return ""


def usual(p: Tensor) -> bool:
    """Whether a parameter is a plain tensor in a usual format, with a gradient."""
    plain = type(p) in (torch.nn.Parameter, torch.Tensor) and p.dtype in (torch.float32, torch.float64)
    return plain and p.numel() > 0 and p.grad is not None and not p.grad.is_sparse


def taken(x: Tensor) -> Tensor:
    """Return a few elements, evenly spaced, [n]."""
    flat = x.detach().reshape(-1)
    return flat[:: max(1, len(flat) // ELEMENTS)][:ELEMENTS]


def _joined(tensors: list[Tensor]) -> Tensor:
    return torch.cat([taken(x) for x in tensors]).double()


def expect(params: list[Tensor], group: dict[str, Any], states: list[dict[str, Any]]) -> _Expected:
    """Compute the update of a few elements of parameters of one dtype, by AdamW's formula and by two wrong ones."""
    (b1, b2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
    x, grad = _joined(params), _joined([g for p in params if (g := p.grad) is not None])
    m, v = (
        _joined([state.get(name, torch.zeros_like(p)) for p, state in zip(params, states, strict=True)])
        for name in ("exp_avg", "exp_avg_sq")
    )
    counts = [torch.as_tensor(state.get("step", 0), dtype=torch.float64, device=x.device) for state in states]
    sizes = torch.tensor([len(taken(p)) for p in params], device=x.device)
    t = torch.repeat_interleave(torch.stack(counts).reshape(-1), sizes) + 1  # [n]
    c1, c2 = 1 - b1**t, 1 - b2**t

    def quotient(g: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        root = ((b2 * v + (1 - b2) * g * g) / second).sqrt() + group["eps"]
        return (b1 * m + (1 - b1) * g) / first / root, (m.abs() + g.abs()) / first / root

    one = torch.ones_like(t)
    coupled = grad + decay * x
    (right, size), (bare, _), (mixed, _) = quotient(grad, c1, c2), quotient(grad, one, one), quotient(coupled, c1, c2)
    kept = (1 - lr * decay) * x
    info = torch.finfo(params[0].dtype)
    unit = info.eps * (x.abs() + lr * size) + info.tiny
    return _Expected(params, torch.stack([kept - lr * right, kept - lr * bare, x - lr * mixed]), unit)


def _instead(history: History, other: str) -> tuple[int, float] | None:
    """Return the first step whose update was not AdamW's and was that of another formula, and how far it was off."""
    errors, others = history.series("update.error"), history.series(f"update.error_{other}")
    if not np.any(np.isfinite(errors.values)):
        raise NotChecked("no update was finite on an examined step")
    return errors.first((errors.values > ROUNDING) & (others.values <= ROUNDING))


@rule(
    "update.uncorrected",
    title="AdamW corrects its means for their start at 0",
    reads=("update.error", "update.error_uncorrected"),
    basis="experiment",
    phase="update",
)
def update_uncorrected(history: History) -> Iterator[Symptom]:
    """An update equal, but for rounding, to the formula without bias correction, and not to the one with it."""
    if found := _instead(history, "uncorrected"):
        step, seen = found
        text = f"the update of step {step} is AdamW's without bias correction, and not the one with it"
        yield Symptom(at="", since=step, seen=seen, expected=f"at most {ROUNDING:.0f} units of rounding", text=text)


@rule(
    "update.coupled",
    title="AdamW's decay is apart from the gradient",
    reads=("update.error", "update.error_coupled"),
    basis="experiment",
    phase="update",
)
def update_coupled(history: History) -> Iterator[Symptom]:
    """An update equal, but for rounding, to the formula with the decay in the gradient, and not to AdamW's."""
    if found := _instead(history, "coupled"):
        step, seen = found
        text = f"the update of step {step} is Adam's with the decay in the gradient, and not AdamW's"
        yield Symptom(at="", since=step, seen=seen, expected=f"at most {ROUNDING:.0f} units of rounding", text=text)
