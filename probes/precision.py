"""Are the bits that a weight is kept in enough for its updates?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lab import NotChecked, Probe, Symptom, probe, rule, torch
from lab import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from lab import History, Run, Step

SAMPLE = 4096  # elements of a parameter
FEW = 8  # of fewer elements, all may stand still by chance where updates are rounded at random


@probe(
    "precision",
    title="Do updates survive the format that weights are kept in?",
    every=0,
    cost="a few thousand elements of each parameter, on measured steps",
    seldom=True,
)
class Precision(Probe):
    """Follows some elements of each parameter through an update by Adam, whose size its state tells.

    Records ``precision.bfloat16`` (the share of elements that bfloat16 can hold), ``precision.small`` (the share whose
    update is below a quarter of bfloat16's unit in the last place: it is lost when rounded to the nearest, on either
    side of a power of two), and of these ``precision.moved``, the share that changed; ``precision.lost`` is the share
    of all elements that both bfloat16 can hold and whose small update left them as they were. By parameter,
    ``precision.still``: whether all its elements are such, but for zeros.
    """

    def lab_before_update(self, run: Run, step: Step) -> None:
        self._before: dict[str, Tensor] = {}
        if not self.due(step):
            return
        held = run.held
        for name, p in run.parameters.items():
            if p.numel() >= FEW and p.grad is not None and not p.grad.is_sparse and id(p) in held:
                self._before[name] = _sample(p).float().clone()

    def lab_step_end(self, run: Run, step: Step) -> None:
        before, self._before = self._before, {}
        groups: dict[int, dict[str, Any]] = {id(p): g for g in run.optimizer.param_groups for p in g["params"]}
        names, old, new, sizes = [], [], [], []
        for name, value in before.items():
            p = run.parameters[name]
            size = _update(run.optimizer.state.get(p, {}), groups[id(p)], value)
            if size is not None:
                names.append(name)
                old.append(value)
                new.append(_sample(p).float())
                sizes.append(size)
        if not old:
            return
        was, now, size = torch.cat(old), torch.cat(new), torch.cat(sizes)
        exact = was.bfloat16().float() == was
        unit = torch.exp2(torch.floor(torch.log2(was.abs().clamp_min(1e-30))) - 7)  # 8 bits, the first implied
        # Below 2^-16 of that unit, the update is lost in float32 as well.
        small = (size > unit * 2**-16) & (size < unit / 4) & (was != 0)
        moved = small & (now != was)
        step.record("precision.bfloat16", exact.double().mean())
        step.record("precision.small", small.double().mean())
        step.record("precision.moved", moved.sum() / small.sum().clamp_min(1))
        lost = exact & small & ~moved
        step.record("precision.lost", lost.double().mean())
        sides = [len(value) for value in old]
        stuck = zip(torch.split(lost | (was == 0), sides), torch.split(lost, sides), strict=True)
        step.record_all(
            "precision.still", tuple(names), torch.stack([(all_.all() & some.any()).double() for all_, some in stuck])
        )


def _sample(p: Tensor) -> Tensor:
    flat = p.detach().reshape(-1)
    return flat[:: max(1, len(flat) // SAMPLE)]


def _update(state: dict[str, Any], group: dict[str, Any], value: Tensor) -> Tensor | None:
    """The size of the update of the elements sampled, decay included; None when this is not Adam's state."""
    mean, square, count = state.get("exp_avg"), state.get("exp_avg_sq"), state.get("step")
    if mean is None or square is None or count is None or group.get("amsgrad") or "betas" not in group:
        return None
    if mean.numel() != square.numel() or len(_sample(mean)) != len(value):
        return None
    count = torch.as_tensor(count, device=value.device, dtype=torch.float32)
    first, second = group["betas"]
    m = _sample(mean).float().abs() / (1 - first**count)
    v = _sample(square).float() / (1 - second**count)
    decay = group.get("weight_decay", 0.0) * value.abs()
    # Decay through the gradient (Adam) is in the means already; counted once more it only makes fewer count as small.
    return group["lr"] * (m / (v.sqrt() + group["eps"]) + decay)  # type: ignore[no-any-return]


@rule(
    "precision.update_lost",
    title="Updates survive the format that weights are kept in",
    reads=("precision.lost", "precision.still"),
    basis="theory",
    phase="update",
)
def precision_update_lost(history: History) -> Iterator[Symptom]:
    """All weights are numbers of bfloat16, updates are too small for it, and not one such weight changes.

    The updates of most weights, or of every weight of some parameter: the gains of norms, which are about 1, are the
    first to stand still.

    An update below a quarter of the unit in the last place is rounded away. Of float32 weights one in 65536 is a
    number of bfloat16. Stochastic rounding or a compensation moves some of these weights, sooner or later: it has to
    be none, in three measured steps. "Most" is more than half.
    """
    lost, exact = history.series("precision.lost"), history.series("precision.bfloat16").values
    moved, small = history.series("precision.moved").values, history.series("precision.small").values
    kept = exact == 1
    if not np.any(kept):
        return
    still = [series for _, series in history.each("precision.still")]
    whole = [np.isin(lost.steps, series.steps[series.values > 0]) for series in still if series.values.sum() >= 3]
    wrong = kept & (moved == 0) & ((small > 0.5) | np.any([np.zeros(len(lost), dtype=bool), *whole], axis=0))
    if np.any(kept & (moved > 0)):
        return
    if wrong.sum() < 3:
        if len(lost) < 3:
            raise NotChecked("fewer than three steps were measured")
        return
    step, share = lost.first(wrong) or (0, 0.0)
    yield Symptom(
        at="",
        since=step,
        seen=share,
        expected="0",
        text=f"{share:.0%} of the weights do not take their update at step {step}: they are kept in bfloat16, and it "
        "is below a quarter of their last bit",
    )
