"""What the loop did, where all gradients or all weights differ at once: what can be told from the numbers themselves.

A fingerprint that goes with a sign is a sum over elements, each times 1 or -1: that of a sum of two tensors is the sum
of theirs. So gradients that were not cleared, or that were scaled, are told from others exactly, whatever they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lab.points import by_step
from lab.where import LOOP

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lab.points import Point
    from lab.store import History

WHOLE = 1e-5  # what a share may be more than all of it, by rounding
LEAST = 3  # gradients that have to agree on it: of fewer, it may be chance


@dataclass(frozen=True)
class Blame:
    """What a loop did.

    Attributes:
        where: The part of the loop.
        why: What it did, by the name by which `lab.explain` knows it.
        number: How often, or by how much, where that is known.
        says: What a flag tells of the one run of which it is so.
    """

    where: str
    why: str
    number: float | None = None
    says: str = ""


def of_flags(runs: tuple[History, History], first: Point) -> Blame | None:
    """Say what a probe found of one run alone that explains why their first difference is there; None if nothing.

    It is asked in the first step from that one on in which both looked; before, both have to have been alike.
    """
    stages = {**runs[1].stages, **runs[0].stages}
    for metric, stage in stages.items():
        if stage.kind != "flag" or stage.part != first.part:
            continue
        mine, others = (by_step(history, metric) for history in runs)
        steps = sorted(mine.keys() & others.keys())
        unlike = [step for step in steps if (mine[step] == 0) != (others[step] == 0)]
        looked = next((step for step in steps if step >= first.step), None)
        if unlike and unlike[0] == looked:
            of_first = others[looked] == 0
            return Blame(stage.about or LOOP[stage.part], "first" if of_first else "second", says=stage.says)
    return None


def of_gradients(
    place: str, here: Sequence[Point], before: Sequence[Point], weights: set[str], signed: set[str]
) -> Blame | None:
    """Say what was done to gradients that differ all over the model; None if that cannot be told.

    Args:
        place: Where the first that differs points to.
        here: The numbers of a step.
        before: Those of the step before, none if that is not known.
        weights: The names of weights.
        signed: The metrics that add up as what they are recorded of does.
    """
    mine = [point for point in here if point.part == "gradient" and point.at in weights]
    if len({point.at for point in mine}) < LEAST or not any(point.differs for point in mine):
        return None
    if any(all(_none(which(point)) for point in mine) for which in (_a, _b)):
        return Blame("loop", "gone")
    sums = [point for point in mine if point.metric in signed]
    if _is_kept(sums, before):
        return Blame("loop", "kept")
    factor = _factor(mine)
    if factor is None:
        return None
    # What the loss sends is scaled as well: by intent, as float16 needs it, but it must be undone before they are cut.
    clipped = place == "loss" and any(point.part == "clip" and point.differs for point in here)
    return Blame("clipping" if clipped else place, "unscaled" if clipped else "scaled", factor)


def of_processes(first: Point, where: str, blame: Blame | None, agree: Sequence[bool]) -> Blame | None:
    """Say whether several processes no longer have alike what they share; None if that cannot be told.

    Args:
        first: The first number that differs in any of them.
        where: The place it points to.
        blame: What that process alone tells.
        agree: Of each process, whether it agrees until after the part of the step in which `first` is.
    """
    if first.part not in ("weight", "gradient", "update"):
        return None
    if where not in ("model", "gradients", "optimizer") and (blame is None or blame.why != "still"):
        return None
    if any(agree):
        return Blame("distributed", "apart")
    if first.part == "gradient":
        return Blame("distributed", "exchanged", None if blame is None else blame.number)
    return None


def of_update(here: Sequence[Point], weights: set[str]) -> Blame | None:
    """Say whether one of the runs made no update at all, where the other made one; None if that is not so."""
    begun: dict[str, list[Point]] = {}
    ended: dict[str, list[Point]] = {}
    for point in here:
        if point.at in weights and point.part in ("weight", "update"):
            (begun if point.part == "weight" else ended).setdefault(point.at, []).append(point)
    known = ended.keys() & begun.keys()

    def moved(which: Callable[[Point], float]) -> bool:
        return any(sorted(map(which, begun[at])) != sorted(map(which, ended[at])) for at in known)

    return Blame("loop", "still") if known and moved(_a) != moved(_b) else None


def _is_kept(sums: Sequence[Point], before: Sequence[Point]) -> bool:
    """Whether one of the runs has the gradients of the step before in those of this one, all by the same share.

    The share is that to which they had been clipped.
    """
    last = {(point.metric, point.at): point for point in before}
    pairs = [(point, last[point.metric, point.at]) for point in sums if (point.metric, point.at) in last]
    if len(pairs) < LEAST:
        return False
    for which, sign in ((_a, 1.0), (_b, -1.0)):
        apart = [(point.a - point.b) * sign for point, _ in pairs]
        share = _share(apart, [which(then) for _, then in pairs], [_noise(point) for point, _ in pairs])
        if share is not None and 0 < share <= 1 + WHOLE:
            return True
    return False


def _factor(gradients: Sequence[Point]) -> float | None:
    """How many times as large as in the second run all gradients of the first are; None if not all by the same."""
    both = [(point.a, point.b, _noise(point)) for point in gradients]
    return _share([a for a, _, _ in both], [b for _, b, _ in both], [noise for _, _, noise in both])


def _share(values: Sequence[float], others: Sequence[float], noise: Sequence[float]) -> float | None:
    """The number by which others have to be multiplied to be these, each within its noise; None if there is none."""
    norm = sum(other * other for other in others)
    if not all(map(math.isfinite, (*values, *noise))) or not math.isfinite(norm) or norm == 0:
        return None
    share = sum(x * y for x, y in zip(values, others, strict=True)) / norm
    fits = (abs(x - share * y) <= most for x, y, most in zip(values, others, noise, strict=True))
    return share if all(fits) else None


def _noise(point: Point) -> float:
    """How far apart rounding may have moved the two."""
    size = abs(point.a - point.b) / point.relative if point.relative else max(abs(point.a), abs(point.b))
    return point.allowed * size


def _none(value: float) -> bool:
    return value == 0 or math.isnan(value)


def _a(point: Point) -> float:
    return point.a


def _b(point: Point) -> float:
    return point.b
