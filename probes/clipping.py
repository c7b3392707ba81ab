"""Clipping: are the gradients that an update uses those that were clipped, as they were clipped?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab import LookAgain, NotChecked, Probe, Symptom, probe, rule, torch
from lab import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray
    from torch import Tensor

    from lab import History, Run, Step

LOOKS = 3
SAME = 2.0**-7  # a unit in the last place of bfloat16, in which gradients may be kept
EXACT = 1e-3  # of a quotient that is a power of two: clipping adds 1e-6 to the norm that it divides by


@probe(
    "clipping",
    title="The norm of the gradients before they are clipped, and when they are used",
    every=10,
    cost="a norm of each gradient, on measured steps",
    examines=True,
)
class Clipping(Probe):
    """Looks at steps in which gradients are clipped once; where they are clipped by groups, it does not judge.

    Records ``clip.limit``, ``clip.norm`` (what the clipping answered: the norm before it), ``clip.left`` (the norm of
    the same gradients just before the update), ``clip.all`` (that of all gradients), ``clip.count``, of how many
    tensors gradients were to be clipped, and ``clip.late``, whether that was before the backward pass.
    """

    def lab_start(self) -> None:
        self._reason = "no clipping by torch.nn.utils.clip_grad_norm_ was seen"

    def lab_before_update(self, run: Run, step: Step) -> None:
        if not self.due(step) or not step.clips:
            return
        if len(step.clips) > 1:
            self._reason = "gradients are clipped more than once in a step"
            return
        clip, every = step.clips[0], _norm(run.parameters.values())
        ours = {id(p) for p in run.model.parameters()}
        if clip.params and not any(id(p) in ours for p in clip.params):
            self._reason = "the gradients that are clipped are not this model's"
            return
        if every is None or not np.isfinite(clip.limit):
            return
        self._reason = ""
        left = _norm(clip.params)
        step.record("clip.limit", clip.limit)
        step.record("clip.norm", clip.norm)
        step.record("clip.left", 0.0 if left is None else left)
        step.record("clip.all", every)
        step.record("clip.count", len(clip.params))
        step.record("clip.late", clip.late)

    def lab_examine(self) -> None:
        if self._reason:
            raise NotChecked(self._reason)


def _norm(params: Iterable[Tensor]) -> Tensor | None:
    """The joint norm of gradients; None where there are none, or of a kind that is not measured here."""
    grads = [p.grad for p in params if p.grad is not None]
    if not grads or any(type(grad) is not torch.Tensor or grad.is_sparse for grad in grads):
        return None
    if any(grad.device != grads[0].device for grad in grads):
        return None
    joint: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    return joint


def _from_some_step_on(wrong: NDArray[np.bool_], asked: NDArray[np.bool_]) -> bool:
    """Whether, from the first step that is wrong, all are of which it can be asked.

    Raises:
        LookAgain: They are too few.
    """
    if not np.any(wrong):
        return False
    first = int(np.flatnonzero(wrong)[0])
    if not np.array_equal(wrong[first:], asked[first:]):
        return False
    if wrong.sum() < LOOKS:
        raise LookAgain(f"fewer than {LOOKS} measured steps had anything to clip")
    return True


@rule(
    "clip.without_effect",
    title="Gradients are clipped before they are used",
    reads=("clip.left", "clip.norm"),
    basis="experiment",
    phase="backward",
)
def clip_without_effect(history: History) -> Iterator[Symptom]:
    """From some step on clipping meets no gradient, although there are some; or it leaves them as they were.

    That is so in each measured step with something to clip, and in three at least.
    It met none: it answers a norm of 0, of no tensor at all, or of tensors whose gradients are not 0. It left them:
    their norm is above the limit, and the one that was answered. Or it came after the update, and the norm is above
    the limit at the next. What changes gradients after clipping, such as noise, changes the norm.
    """
    limit, norm, left, every, count, late = (
        history.series(f"clip.{name}").values for name in ("limit", "norm", "left", "all", "count", "late")
    )
    nothing = (norm == 0) & (((count == 0) & (every > 0)) | (left > 0))
    over = left > limit * (1 + SAME)
    kept = over & (np.abs(left - norm) <= SAME * norm) & (late == 0)
    for wrong, asked, how in (
        (nothing, every > 0, "clipping answered a norm of 0, and the gradients' norm is {norm:.3g}"),
        (kept, (norm > limit) & (late == 0), "the gradients' norm is {norm:.3g} before clipping and after it"),
        (over & (late == 1), (left > limit * (1 + SAME)), "clipping came after the update; the norm is {norm:.3g}"),
    ):
        if _from_some_step_on(wrong, asked):
            step = int(history.series("clip.left").steps[np.flatnonzero(wrong)[0]])
            seen = float(np.fmax(left, every)[wrong][0])
            text = f"at step {step} {how.format(norm=seen)}, with a limit of {limit[wrong][0]:.3g}"
            yield Symptom(at="", since=step, seen=seen, expected=f"at most {limit[wrong][0]:.3g}", text=text)
            return


@rule(
    "clip.scaled",
    title="Gradients are clipped as large as they are used",
    reads=("clip.left", "clip.norm"),
    basis="experiment",
    phase="backward",
)
def clip_scaled(history: History) -> Iterator[Symptom]:
    """From some step on, whenever gradients were above the limit, their norm at the update is it over a power of two.

    A norm that was clipped is the limit itself. Loss scales are powers of two: gradients that are clipped before they
    are divided by it keep the limit over the scale, whatever they were. In three measured steps at least.
    """
    limit, norm, left = history.series("clip.limit"), history.series("clip.norm"), history.series("clip.left")
    clipped = norm.values > limit.values * (1 + SAME)
    with np.errstate(divide="ignore", invalid="ignore"):
        power = np.log2(limit.values / left.values)
        whole = np.round(power)
        wrong = clipped & (whole >= 1) & (np.abs(power - whole) <= EXACT)
    if _from_some_step_on(wrong, clipped):
        step, seen = left.first(wrong) or (0, 0.0)
        times = 2.0 ** whole[wrong][0]
        text = f"at step {step} the gradients are clipped to {limit.values[0]:.3g}, and used {times:,.0f} times smaller"
        yield Symptom(at="", since=step, seen=seen, expected=f"{limit.values[0]:.3g}, where clipped", text=text)
