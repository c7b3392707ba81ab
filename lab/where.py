"""Which place to look at, where two runs part: in the model, or in the loop that trains it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab.points import way

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lab.points import Point
    from lab.stages import Part
    from lab.store import History

SPREAD = 3  # parts of a model that are no one place any more
TARGETS = "targets"  # what a batch is to be answered with, as a probe that hashes batches calls it
# The part of a training loop that is to blame for what has no place in the model.
LOOP: dict[Part, str] = {
    "weight": "model",
    "random": "random numbers",
    "mode": "loop",
    "held": "optimizer",
    "rate": "schedule",
    "batch": "data",
    "value": "model",
    "beside": "loss",
    "loss": "loss",
    "gradient": "gradients",
    "norm": "gradients",
    "clip": "clipping",
    "update": "optimizer",
    "evaluation": "evaluation",
    "experiment": "experiments",
    "work": "loop",
}


def beside(first: Point | None, here: Sequence[Point], weights: set[str]) -> list[Point]:
    """The numbers of one kind with the first that differs: of weights, or of values at sites."""
    if first is None or not first.inside:
        return []
    of_weight = first.at in weights
    return [point for point in here if point.part == first.part and point.at and (point.at in weights) == of_weight]


def where(
    first: Point,
    here: Sequence[Point],
    siblings: Sequence[Point],
    alone: Sequence[str],
    order: dict[str, int],
    about: str = "",
) -> str:
    """Say which place to look at.

    Args:
        first: The first number that differs.
        here: All numbers of its step.
        siblings: Those of one kind with it.
        alone: The places that only one of the runs has.
        order: Of the sites in the forward pass.
        about: What the first number is about, where it has no site.
    """
    if not first.inside:
        return _outside(first, here, alone, about)
    everywhere = is_everywhere(siblings)
    if first.part == "gradient" and _is_output(first, here, order):
        # It is what the loss sends. Were that another, so would all be that goes back from there.
        rest = [point for point in here if point.part == "gradient" and point.at != first.at]
        return LOOP["loss"] if not rest or any(point.differs for point in rest) else module_of(first.at)
    # What differs all over the model at once is made by no place in it. A gradient that goes back from one place
    # reaches all before it, and agrees until there.
    if everywhere and (
        first.part in ("weight", "held", "update") or (first.part == "gradient" and siblings[0].at == first.at)
    ):
        return LOOP[first.part]
    if first.part == "value":
        return module_of(_between(first, siblings, alone, order))
    return module_of(alone[0] if len(alone) == 1 else first.at)  # a weight, or a site, that only one of the models has


def is_everywhere(siblings: Sequence[Point]) -> bool:
    """Whether numbers of one kind differ all over the model."""
    return len({_stem(point.at) for point in siblings if point.differs}) >= SPREAD


def _outside(first: Point, here: Sequence[Point], alone: Sequence[str], about: str) -> str:
    """The part of the loop that makes what has no place in the model."""
    if first.part == "norm" and any(point.part == "gradient" for point in here):
        return LOOP["clip"]  # of gradients that agree
    if first.part == "experiment" and alone:
        return module_of(alone[0])  # looked into in the one run in which it was found
    if first.part == "beside" or first.at == TARGETS:
        return first.at or LOOP[first.part]
    return about or LOOP[first.part]


def _is_output(first: Point, here: Sequence[Point], order: dict[str, int]) -> bool:
    """Whether a site is the last that the forward pass meets."""
    sites = [point.at for point in here if point.part == "value" and point.at in order]
    return bool(sites) and first.at == max(sites, key=lambda site: order[site])


def _between(first: Point, siblings: Sequence[Point], alone: Sequence[str], order: dict[str, int]) -> str:
    """The first site that only one of the models has between what agrees last and what differs first; else that."""
    until = way(first.at, order)
    since = max((place for p in siblings if not p.differs and (place := way(p.at, order)) < until), default=-1.0)
    found = [site for site in alone if site in order and since < order[site] < until]
    return min(found, key=lambda site: order[site], default=first.at)


def _stem(site: str) -> str:
    """The outermost module that holds a weight; of layers that are counted, each is one."""
    parts = site.split(".")
    return ".".join(parts[: 2 if len(parts) > 2 and parts[1].isdigit() else 1])


def module_of(site: str) -> str:
    """The module whose output a site is; else the site."""
    return site.removesuffix(".out") or site


def after(first: Point | None, before: Sequence[Point]) -> str:
    """The site that agrees last before a value that differs."""
    if first is None or first.part != "value":
        return ""
    return next((point.at for point in reversed(before) if point.part == "value" and point.at != first.at), "")


def found_by(runs: Sequence[History], allowed: float, order: dict[str, int]) -> list[str]:
    """The places at which experiments of one run alone found more than is allowed: they looked where something was."""
    found: list[dict[str, tuple[int, float]]] = []
    for history in runs:
        metrics = [metric for metric, stage in history.stages.items() if stage.part == "experiment"]
        series = [(site, each) for metric in metrics for site, each in history.each(metric) if site]
        seen = [(site, each.first(each.values > allowed)) for site, each in series]
        found.append({site: (when[0], way(site, order)) for site, when in seen if when is not None})
    return [
        site
        for mine, others in (found, found[::-1])
        for site in sorted(mine, key=mine.__getitem__)
        if site not in others
    ]
