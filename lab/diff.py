"""Where two runs part: the first step, and in it the most upstream place, at which what they recorded differs."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lab.files import METRICS
from lab.points import INSIDE, compared, merged, points, way, weights_of
from lab.stages import PARTS
from lab.tolerance import Noise, Tolerance
from lab.where import after, beside, found_by, module_of, where

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from lab.points import Point
    from lab.results import Results
    from lab.stages import Part
    from lab.store import History

RANK = "rank-"  # begins the name of the folder that another of several processes has
SETTINGS = ("seed", "steps", "model", "data", "train", "fault")  # of a scenario, what a run depends on


@dataclass(frozen=True)
class Agreed:
    """A part of a step in which the runs agree.

    Attributes:
        part: Which.
        count: How many numbers.
        closest: The largest distance among them.
        allowed: The most that rounding may have moved any of them.
    """

    part: Part
    count: int
    closest: float
    allowed: float

    def with_(self, other: Agreed) -> Agreed:
        """Join what agrees in other steps."""
        most = max(self.closest, other.closest), max(self.allowed, other.allowed)
        return Agreed(self.part, self.count + other.count, *most)


@dataclass(frozen=True)
class Difference:
    """How two runs differ.

    Attributes:
        first: The first number that differs; None if none does.
        place: The first number at a place in the model that differs: `first`, or at a later step, where values inside
            were not recorded before.
        where: The place to look at: that of `first`; what only one run has just upstream of it; or, where it is no
            place in the model, the part of the loop that makes it.
        after: The site that agrees last before `first`, where that is a value: what makes them differ is between them.
        before: What agrees in the step of `first`, upstream of it; in the last step if nothing differs.
        earlier: What agrees in the steps before that one.
        beside: How many numbers of the part of `first` differ in that step, and how many there are.
        settings: What the two were told to do, by key, where they were not told the same.
        only: Places that one of them has, and the other has not, in the order of the forward pass.
        steps: How many steps each recorded.
        compared: The steps in which values inside were compared.
        lost: The first step from which on rounding alone may have moved most numbers by half; None if there is none.
        coarser: The first site at which rounding moves the value much further in one run than in the other, and how
            far in each: one of them computes in another format. None if there is none.
        tolerance: What was to count as equal; None for what rounding was measured to do.
        measured: Whether that was measured.
    """

    first: Point | None
    place: Point | None
    where: str
    after: str
    before: tuple[Agreed, ...]
    earlier: tuple[Agreed, ...]
    beside: tuple[int, int]
    settings: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    only: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    steps: tuple[int, int] = (0, 0)
    compared: tuple[int, ...] = ()
    lost: int | None = None
    coarser: tuple[str, float, float] | None = None
    tolerance: float | None = None
    measured: bool = True

    @property
    def count(self) -> int:
        """How many numbers agree before the first that does not."""
        return sum(agreed.count for agreed in (*self.earlier, *self.before))

    def to_dict(self) -> dict[str, Any]:
        """Give this as JSON types."""
        return {
            "equal": self.first is None,
            "first": None if self.first is None else vars(self.first),
            "place": None if self.place is None else vars(self.place),
            "where": self.where,
            "after": self.after,
            "before": [vars(agreed) for agreed in self.before],
            "earlier": [vars(agreed) for agreed in self.earlier],
            "beside": {"differ": self.beside[0], "of": self.beside[1]},
            "settings": {key: [*both] for key, both in self.settings.items()},
            "only": [[*sites] for sites in self.only],
            "steps": [*self.steps],
            "compared": [*self.compared],
            "lost": self.lost,
            "coarser": None if self.coarser is None else [*self.coarser],
            "tolerance": self.tolerance,
            "measured": self.measured,
        }


def compare(a: Results, b: Results, tolerance: float | None = None) -> Difference:
    """Compare what two runs recorded, in the order in which it came about.

    Args:
        a: A run, read back.
        b: Another.
        tolerance: Relative; what is not further apart counts as equal. None: what rounding was measured to do in these
            runs (see `lab.tolerance`); 0: the last bit.
    """
    noise = Noise((a.history, b.history))
    order = merged(a.history.order, b.history.order)
    steps = [*_judged(points(a.history, b.history, order), Tolerance(noise, tolerance))]
    last = next((i for i, here in enumerate(steps) if any(point.differs for point in here)), len(steps) - 1)
    here = steps[last] if steps else []
    first = next((point for point in here if point.differs), None)
    before = here[: here.index(first)] if first is not None else here
    later = (point for found in steps[last:] for point in found)
    siblings = beside(first, here, weights_of(a.history) | weights_of(b.history))
    only = _only(a.history, b.history, order)
    coarser = noise.coarser(sorted(order, key=lambda site: order[site]))
    place = ""
    if first is not None:
        found_out = first.part == "experiment"
        alone = found_by((a.history, b.history), first.allowed, order) if found_out else [*only[0], *only[1]]
        place = where(first, here, siblings, alone, order)
    elif coarser is not None:
        place = module_of(coarser[0])
    return Difference(
        first=first,
        place=next((point for point in later if point.differs and point.inside), None),
        after=after(first, before),
        where=place,
        before=_agreed(before),
        earlier=_agreed([point for found in steps[:last] for point in found]),
        beside=(sum(point.differs for point in siblings), len(siblings)),
        settings=_all_settings(a, b),
        only=only,
        steps=(a.history.last_step + 1, b.history.last_step + 1),
        compared=tuple(found[0].step for found in steps if any(point.part == "value" for point in found)),
        lost=next((found[0].step for found in steps[: last + 1] if _is_lost(found)), None),
        coarser=coarser,
        tolerance=tolerance,
        measured=noise.measured,
    )


def processes(folder: Path) -> list[Path]:
    """The folders of a run as each of its processes saw it; of one process, that of the run alone."""
    return [folder, *sorted(path.parent for path in folder.glob(f"{RANK}*/{METRICS}"))]


def upstream(found: Sequence[Difference]) -> int:
    """Which of several is that of the earliest and most upstream difference; the first if none differs."""
    ranks = {part: rank for rank, part in enumerate(PARTS)}
    when = [(d.first.step, ranks[d.first.part]) if d.first is not None else (math.inf, 0) for d in found]
    return when.index(min(when))


def _judged(found: Iterator[Point], judge: Tolerance) -> Iterator[list[Point]]:
    """Say of each number how far apart the two may be; yield them by step."""
    for step, numbers in itertools.groupby(found, key=lambda point: point.step):
        judge.begin(step)
        here = []
        for point in numbers:
            allowed = judge.of(point.part, point.at, exact=point.exact)
            here.append(replace(point, allowed=allowed))
            if not here[-1].differs:
                judge.saw(point.part, point.at, point.relative)
        yield here


def _is_lost(found: Sequence[Point]) -> bool:
    """Whether most numbers of a step may have been moved so far by rounding that they tell nothing."""
    told = [point for point in found if point.part != "weight"]  # of which nothing is asked where nobody looked before
    return sum(math.isinf(point.allowed) for point in told) > len(told) / 2


def _agreed(found: Sequence[Point]) -> tuple[Agreed, ...]:
    """Sum up what agrees, by part."""
    parts: dict[Part, list[Point]] = {}
    for point in found:
        if math.isfinite(point.allowed):
            parts.setdefault(point.part, []).append(point)
    return tuple(
        Agreed(part, len(mine), max(p.relative for p in mine), max(p.allowed for p in mine))
        for part, mine in parts.items()
    )


# ---------------------------------------------------------------- what they do not share


def _only(a: History, b: History, order: dict[str, int]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The sites, and weights, of which one run recorded a number and the other did not."""
    known = compared(a, b)
    mine, others = (
        {site for metric, stage in known.items() if stage.part in INSIDE for site in history.sites(metric)}
        for history in (a, b)
    )
    alone = [sorted(sites, key=lambda site: (way(site, order), site)) for sites in (mine - others, others - mine)]
    return tuple(alone[0]), tuple(alone[1])


def _all_settings(a: Results, b: Results) -> dict[str, tuple[Any, Any]]:
    """What scenario, optimiser and modules were told, and on what they ran, where the two differ."""
    told = []
    for run in (a, b):
        scenario = run.about.get("scenario", {})
        about = {key: scenario[key] for key in SETTINGS if key in scenario}
        about |= {"seed": run.about.get("run", {}).get("seed", about.get("seed"))}
        about |= {"version": run.about.get("versions", {}), "machine": run.about.get("machine", {})}
        for metric, stage in run.history.stages.items():
            if stage.part == "setting":
                for site, series in run.history.each(metric):
                    about.setdefault("set", {})[site] = float(series.values[0])
        told.append(about)
    return settings(told[0], told[1])


def settings(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """What two nested tables do not share, by key."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in [*a, *(key for key in b if key not in a)]:
        x, y = a.get(key), b.get(key)
        if isinstance(x, dict) and isinstance(y, dict):
            found |= settings(x, y, f"{prefix}{key}.")
        elif x != y:
            found[f"{prefix}{key}"] = (x, y)
    return found
