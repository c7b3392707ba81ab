"""Where two runs part: the first step, and in it the most upstream place, at which what they recorded differs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.results import Results
    from lab.store import History

TOLERANCE = 1e-5  # of the larger value: float32 rounds to 6e-8, and sums of many lose two digits
SETTINGS = ("seed", "steps", "model", "data", "train", "fault")  # of a scenario, what a run depends on


class Stage(NamedTuple):
    """A part of a step: what it is called, the metric that shows it, and whether it goes through the model backward."""

    name: str
    metric: str
    backward: bool = False


PLACES = ("activation.rms", "gradient.norm")  # at the sites, and by parameter: what a model is made of
# In the order in which a step goes through them.
STAGES = (
    Stage("weights at the start", "start.scale"),
    Stage("learning rate", "learning_rate"),
    Stage("batch", "data.fingerprint"),
    Stage("value", "activation.rms"),
    Stage("value", "attention.entropy"),
    Stage("loss", "loss"),
    Stage("gradient", "gradient.site", backward=True),
    Stage("gradient", "gradient.norm", backward=True),
    Stage("gradient norm", "gradient.total"),
    Stage("weight", "weight.norm"),
    Stage("held-out loss", "loss.held_out"),
)


@dataclass(frozen=True)
class Point:
    """A value that both runs recorded.

    Attributes:
        step, stage, metric, at: Which.
        a, b: What the first run and the second recorded.
        relative: Their distance, over the larger of the two; infinite where one is not finite and the other is.
    """

    step: int
    stage: str
    metric: str
    at: str
    a: float
    b: float
    relative: float


@dataclass(frozen=True)
class Difference:
    """How two runs differ.

    Attributes:
        first: The first value that differs; None if none does.
        place: The first value at a place in the model that differs: `first`, or at a later step, where values inside
            were not recorded before.
        compared: By stage, how many values before `first` agree.
        closest: The largest relative distance among those.
        settings: By key of the scenario, what the two say, where they do not say the same.
        only: Sites that one of them has, and the other has not.
        tolerance: What counts as equal.
    """

    first: Point | None
    place: Point | None
    compared: dict[str, int]
    closest: float
    settings: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    only: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    tolerance: float = TOLERANCE

    def to_dict(self) -> dict[str, Any]:
        """Give this as JSON types."""
        return {
            "equal": self.first is None,
            "first": None if self.first is None else vars(self.first),
            "place": None if self.place is None else vars(self.place),
            "compared": self.compared,
            "closest": self.closest,
            "settings": {key: [*both] for key, both in self.settings.items()},
            "only": [[*sites] for sites in self.only],
            "tolerance": self.tolerance,
        }


def compare(a: Results, b: Results, tolerance: float = TOLERANCE) -> Difference:
    """Compare what two runs recorded, in the order in which it came about.

    Args:
        a: A run, read back.
        b: Another.
        tolerance: Relative; what is not further apart counts as equal.
    """
    compared: dict[str, int] = {}
    closest, first, place = 0.0, None, None
    for point in points(a.history, b.history):
        if point.relative <= tolerance:
            if first is None:
                compared[point.stage] = compared.get(point.stage, 0) + 1
                closest = max(closest, point.relative)
            continue
        first = first or point
        if point.at:
            place = point
            break
    told = [{key: run.about.get("scenario", {}).get(key) for key in SETTINGS} for run in (a, b)]
    settings = _settings(told[0], told[1])
    mine, others = ({site for metric in PLACES for site in h.sites(metric)} for h in (a.history, b.history))
    only = tuple(sorted(mine - others)), tuple(sorted(others - mine))
    return Difference(first, place, compared, closest, settings, only, tolerance)


def points(a: History, b: History) -> Iterator[Point]:
    """Yield each value that both recorded, in the order of steps, of stages, and of the way through the model."""
    order = {**b.order, **a.order}
    found: list[tuple[tuple[int, int, float, str], Point]] = []
    for rank, stage in enumerate(STAGES):
        for site in a.sites(stage.metric):
            mine = dict(zip(*_lists(a, stage.metric, site), strict=True))
            theirs = dict(zip(*_lists(b, stage.metric, site), strict=True))
            # The values of two stages are one way through the model.
            key = next(i for i, s in enumerate(STAGES) if s.name == stage.name)
            way = _way(site, order) * (-1.0 if stage.backward else 1.0)
            for step in mine.keys() & theirs.keys():
                x, y = mine[step], theirs[step]
                point = Point(step, stage.name, stage.metric, site, x, y, distance(x, y))
                found.append(((step, key, way, f"{rank} {site}"), point))
    found.sort(key=lambda pair: pair[0])
    yield from (point for _, point in found)


def distance(x: float, y: float) -> float:
    """Relative to the larger of the two; 0 where both are the same, not finite or not."""
    if x == y or (math.isnan(x) and math.isnan(y)):
        return 0.0
    if not (math.isfinite(x) and math.isfinite(y)):
        return math.inf
    return abs(x - y) / max(abs(x), abs(y))


def _lists(history: History, metric: str, site: str) -> tuple[list[int], list[float]]:
    series = history.series(metric, site)
    return series.steps.tolist(), series.values.tolist()


def _way(site: str, order: dict[str, int]) -> float:
    """The place of a site, or of the parameter of a module, in the forward pass."""
    names = (site, f"{site.rpartition('.')[0]}.out")
    return float(next((order[name] for name in names if name in order), len(order)))


def _settings(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    found: dict[str, tuple[Any, Any]] = {}
    for key in [*a, *(key for key in b if key not in a)]:
        x, y = a.get(key), b.get(key)
        if isinstance(x, dict) and isinstance(y, dict):
            found |= _settings(x, y, f"{prefix}{key}.")
        elif x != y:
            found[f"{prefix}{key}"] = (x, y)
    return found
