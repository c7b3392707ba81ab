"""Optimisers: do they hold the model's own tensors, do they remember, and can their means work together?"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from lab import NotChecked, Probe, Stage, Symptom, probe, rule, torch
from lab import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from lab import History, Run, Step

LOOKS = 3
UPDATES = 10  # so many without a rate are no beginning of a warmup


@probe(
    "optimizer",
    title="Whose tensors does the optimiser hold, how many updates does it remember, and are its betas in order?",
    every=10,
    cost="a look at its groups and its state",
    stages={"optimizer.rate": Stage("rate")},
)
class OptimizerState(Probe):
    """Looks at the groups, and at the state after an update.

    Records in each step ``optimizer.rate``, the largest of any group, and ``optimizer.count``, how many updates it
    remembers of the first parameter that it remembers any of. Else ``optimizer.own``, the share of the model's
    trainable parameters that it holds, ``optimizer.alike``, the share of them for each of which it holds a tensor of
    the same shape that is none of the model's, ``optimizer.gradients``, how many of the tensors that it holds have a
    gradient, and of Adam ``optimizer.betas``: beta1^2 / sqrt(beta2), the largest of any group.
    """

    def lab_before_update(self, run: Run, step: Step) -> None:
        rates = [group.get("lr") for group in run.optimizer.param_groups]
        if rates and None not in rates:
            step.record("optimizer.rate", _largest(rates))
        if not self.due(step) or not run.parameters:
            return
        held = [p for group in run.optimizer.param_groups for p in group["params"]]
        ours = {id(p) for p in run.model.parameters()}
        others = Counter(p.shape for p in held if id(p) not in ours)
        shapes = Counter(p.shape for p in run.parameters.values())
        own = run.held & {id(p) for p in run.parameters.values()}
        step.record("optimizer.own", len(own) / len(run.parameters))
        step.record("optimizer.alike", (shapes & others).total() / len(run.parameters))
        step.record("optimizer.gradients", sum(p.grad is not None for p in held))

    def lab_step_end(self, run: Run, step: Step) -> None:
        states = [state for state in run.optimizer.state.values() if isinstance(state, dict)]
        count = next((state["step"] for state in states if "step" in state), None)
        if count is not None:
            step.record("optimizer.count", _largest([count]))
        if self.due(step) and any("exp_avg" in state and "exp_avg_sq" in state for state in states):
            betas = [pair for group in run.optimizer.param_groups if (pair := _betas(group)) is not None]
            if betas:
                step.record("optimizer.betas", max(b1**2 / max(b2, 1e-12) ** 0.5 for b1, b2 in betas))


def _largest(values: list[Any]) -> float | Tensor:
    """The largest of numbers and tensors []; those that are tensors stay on their device, that of the first."""
    tensors = [value.detach().reshape(()).double() for value in values if isinstance(value, torch.Tensor)]
    numbers = [float(value) for value in values if not isinstance(value, torch.Tensor)]
    if not tensors:
        return max(numbers)
    first = tensors[0]
    here = [tensor for tensor in tensors if tensor.device == first.device]
    return torch.stack([*here, *(torch.full_like(first, number) for number in numbers)]).amax()


def _betas(group: dict[str, Any]) -> tuple[float, float] | None:
    """Return both betas of a group, if it is Adam's: two numbers, and means that both fade."""
    betas = group.get("betas")
    if not isinstance(betas, (tuple, list)) or len(betas) != 2 or group.get("amsgrad"):
        return None
    if any(isinstance(beta, torch.Tensor) for beta in betas):
        return None
    return float(betas[0]), float(betas[1])


@rule(
    "optimizer.stale",
    title="The optimiser holds the model's own tensors",
    reads=("optimizer.own", "movement.gradient", "movement.distance"),
    basis="experiment",
    phase="update",
)
def optimizer_stale(history: History) -> Iterator[Symptom]:
    """It holds none of the model's parameters, but for each one a tensor of its shape; none of these has a gradient.

    Master copies in another format get gradients before the update, and the model gets their values after it: so no
    weight of the model may have moved either.
    """
    own, alike = history.series("optimizer.own"), history.series("optimizer.alike")
    gradients = history.series("optimizer.gradients")
    if np.any(own.values > 0) or np.any(alike.values < 1) or np.any(gradients.values > 0):
        return
    moved = any(np.any(series.values != 0) for _, series in history.each("movement.distance"))
    wanted = any(np.any(series.values > 0) for _, series in history.each("movement.gradient"))
    if moved or not wanted:
        return
    if len(own) < 2:
        raise NotChecked("one step was seen; whether something else moves the weights shows in the next")
    text = "the optimiser holds other tensors than the model, of the same shapes and without gradients; no weight moves"
    yield Symptom(at="", since=int(own.steps[0]), seen=0.0, expected="1", text=text)


@rule(
    "optimizer.forgot",
    title="The optimiser remembers all its updates",
    reads=("optimizer.count", "optimizer.rate"),
    basis="experiment",
    phase="update",
)
def optimizer_forgot(history: History) -> Iterator[Symptom]:
    """Its count of updates fell, once, and the rate after that was not lowered.

    Some forget on purpose, to start again: then the rate starts again too (warm restarts with a warmup), or it
    happens again and again (a new task, a new target network). Only what happens once, at a rate of at least half of
    that before, is told here.
    """
    count, rate = history.series("optimizer.count").finite, history.series("optimizer.rate")
    falls = np.flatnonzero(np.diff(count.values) < 0)
    if len(falls) != 1:
        return
    at = int(falls[0]) + 1
    # The count tells since when it counts: at step s it is c, so that the first of its updates was at s - c + 1.
    begun = int(count.steps[at] - count.values[at] + 1)
    before, after = rate.values[rate.steps < begun], rate.values[rate.steps >= begun]
    if not len(before) or not len(after) or not after[0] >= before[-1] / 2:
        return
    text = (
        f"at step {int(count.steps[at])} the optimiser remembers {count.values[at]:.0f} updates, and before it "
        f"remembered {count.values[at - 1]:.0f}: its means began anew at step {begun}, at the full rate"
    )
    yield Symptom(at="", since=begun, seen=float(count.values[at]), expected="one more an update", text=text)


@rule(
    "optimizer.betas",
    title="Adam's mean of squares fades more slowly than its mean of gradients",
    reads=("optimizer.betas",),
    basis="theory",
    phase="update",
)
def optimizer_betas(history: History) -> Iterator[Symptom]:
    """beta1^2 is at most sqrt(beta2), as proofs that Adam converges need (Kingma and Ba, 2015, theorem 4.1).

    Beyond it, the update of an element whose gradients end grows: its mean of gradients shrinks by beta1 a step, the
    root of its mean of squares by sqrt(beta2), which is less.
    """
    series = history.series("optimizer.betas")
    over = series.values > 1
    if np.any(over) and len(series) < LOOKS:
        raise NotChecked(f"fewer than {LOOKS} steps were measured")
    if len(series) and np.all(over):
        seen = float(series.values[0])
        text = f"beta1^2 / sqrt(beta2) is {seen:.3g}: the mean of squares is forgotten before the mean of gradients"
        yield Symptom(at="", since=int(series.steps[0]), seen=seen, expected="at most 1", text=text)


@rule(
    "optimizer.rate_zero",
    title="The rate is above 0",
    reads=("optimizer.rate", "movement.distance", "movement.gradient"),
    basis="experiment",
    phase="update",
)
def optimizer_rate_zero(history: History) -> Iterator[Symptom]:
    """The rate of every group is 0 in each update from the first on, there are gradients, and nothing has moved.

    A warmup that begins with 0 has one such update, and a schedule that ends with 0 has them at its end.
    """
    rate = history.series("optimizer.rate")
    if np.any(rate.values != 0):
        return
    if len(rate) < UPDATES:
        raise NotChecked(f"fewer than {UPDATES} updates were seen")
    moved = any(np.any(series.values != 0) for _, series in history.each("movement.distance"))
    wanted = any(np.any(series.values > 0) for _, series in history.each("movement.gradient"))
    if wanted and not moved:
        text = f"the rate is 0 in each of {len(rate)} updates, and no weight has moved"
        yield Symptom(at="", since=int(rate.steps[0]), seen=0.0, expected="above 0", text=text)
