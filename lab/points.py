"""What two runs both recorded, number by number, in the order in which it came about."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lab.stages import PARTS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.stages import Part, Stage
    from lab.store import History

INSIDE: tuple[Part, ...] = ("weight", "value", "gradient")  # what a model is made of
BESIDE = {"parts", "rounding", "drift", "flag"}  # kinds of metrics that are not compared themselves
APART = ("setting", "work")  # parts that are compared by themselves
ALWAYS: tuple[Part, ...] = ("value", "gradient")  # in which what one run has and the other lacks is a difference
PLACES: tuple[Part, ...] = (
    *INSIDE,
    "held",
    "update",
    "evaluation",
    "experiment",
)  # of which a number may have a place in it


@dataclass(frozen=True)
class Point:
    """A number that both runs recorded.

    Attributes:
        step, part, metric, at: Which.
        a, b: What the first run and the second recorded.
        relative: Their distance, over the size of what they are numbers of; infinite where they are not comparable:
            hashes that differ, or one finite and the other not.
        exact: Whether nothing rounds them.
        allowed: How far apart rounding may have moved them.
    """

    step: int
    part: Part
    metric: str
    at: str
    a: float
    b: float
    relative: float
    exact: bool = False
    allowed: float = 0.0

    @property
    def inside(self) -> bool:
        """Whether it is a number at a place in the model."""
        return bool(self.at) and self.part in PLACES

    @property
    def differs(self) -> bool:
        """Whether they are further apart than that."""
        return math.isinf(self.relative) or self.relative > self.allowed


def points(a: History, b: History, order: dict[str, int]) -> Iterator[Point]:
    """Yield each number that both recorded, in the order of steps, of their parts, and of the way through the model.

    What is compared is what either run says is (`lab.stages.Stage`). Of a weight that both have, and that has a
    gradient in one of them only, the other's is NaN; likewise of a site that one of them did not meet in this step.
    """
    found: list[tuple[tuple[Any, ...], Point]] = []
    ranks = {part: rank for rank, part in enumerate(PARTS)}
    weights = weights_of(a) & weights_of(b)
    split = _parts(a) != _parts(b)
    for number, (metric, stage) in enumerate(compared(a, b).items()):
        if stage.kind == "newest" and split:
            continue
        for site in dict.fromkeys([*a.sites(metric), *b.sites(metric)]):
            exact = stage.kind == "exact"
            place = -1.0 if exact else way(site, order) * (-1.0 if stage.part == "gradient" else 1.0)
            known = site in weights or (site in a.sites(metric) and site in b.sites(metric))
            for step, x, y, relative in _pairs(a, b, metric, site, stage, missing=known and stage.part in ALWAYS):
                point = Point(step, stage.part, metric, site, x, y, relative, exact)
                found.append(((step, ranks[stage.part], place, site, number), point))
    found.sort(key=lambda pair: pair[0])
    yield from (point for _, point in found)


def compared(a: History, b: History) -> dict[str, Stage]:
    """The metrics that two runs are compared by, and where each belongs."""
    known = {**b.stages, **a.stages}
    return {m: s for m, s in known.items() if s.kind not in BESIDE and s.part not in APART}


def _parts(history: History) -> list[float]:
    """In how many parts a batch passes the model, as far as it is known."""
    metrics = [metric for metric, stage in history.stages.items() if stage.kind == "parts"]
    return sorted({float(value) for metric in metrics for value in history.series(metric).values})


def weights_of(history: History) -> set[str]:
    """The names of the weights that a run recorded."""
    return {
        site
        for m, s in history.stages.items()
        if s.part == "weight" and s.kind == "number"
        for site in history.sites(m)
    }


def _pairs(
    a: History, b: History, metric: str, site: str, stage: Stage, *, missing: bool
) -> Iterator[tuple[int, float, float, float]]:
    """Yield the steps in which both recorded a number, the two, and how far they are apart; with `missing`, either."""
    mine, others = by_step(a, metric, site), by_step(b, metric, site)
    sizes = [by_step(history, stage.size, site) if stage.kind == "signed" else {} for history in (a, b)]
    steps = mine.keys() & others.keys()
    if missing:
        steps |= {step for step in mine.keys() ^ others.keys() if step in _steps_of(a, metric) & _steps_of(b, metric)}
    for step in steps:
        x, y = mine.get(step, math.nan), others.get(step, math.nan)
        size = 1.0 if stage.kind == "share" else max((abs(size[step]) for size in sizes if step in size), default=None)
        relative = distance(x, y, size)
        yield step, x, y, math.inf if stage.kind == "exact" and relative else relative


def _steps_of(history: History, metric: str) -> set[int]:
    """The steps in which a run recorded a metric at any site."""
    return {step for site in history.sites(metric) for step in history.series(metric, site).steps.tolist()}


def distance(x: float, y: float, size: float | None = None) -> float:
    """Relative to a size, by default the larger of the two; 0 where both are the same, not finite or not."""
    if x == y or (math.isnan(x) and math.isnan(y)):
        return 0.0
    size = max(abs(x), abs(y)) if size is None else size
    if not (math.isfinite(x) and math.isfinite(y) and math.isfinite(size)) or size == 0:
        return math.inf
    return abs(x - y) / size


def by_step(history: History, metric: str, site: str = "") -> dict[int, float]:
    """What a run recorded of a metric at a site, by step."""
    series = history.series(metric, site)
    return dict(zip(series.steps.tolist(), series.values.tolist(), strict=True))


def way(site: str, order: dict[str, int]) -> float:
    """The place of a site, of a module, or of the parameter of one, in the forward pass."""
    names = (site, f"{site}.out", f"{site.rpartition('.')[0]}.out")
    return float(next((order[name] for name in names if name in order), len(order)))


def merged(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
    """Join the orders in which two runs met their sites: what only `b` has comes after what it has before that."""
    joined = sorted(a, key=lambda site: a[site])
    behind = -1
    for site in sorted(b, key=lambda site: b[site]):
        if site in a:
            behind = joined.index(site)
        else:
            behind += 1
            joined.insert(behind, site)
    return {site: place for place, site in enumerate(joined)}
