"""Where two runs part: the first step, and in it the most upstream place, at which what they recorded differs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lab.blame import Blame, of_gradients, of_processes, of_update
from lab.errors import BadInput
from lab.files import METRICS
from lab.judging import is_lost, judged
from lab.points import INSIDE, compared, merged, points, way, weights_of
from lab.processes import RANK
from lab.results import load
from lab.stages import PARTS
from lab.tolerance import Noise, Tolerance
from lab.where import after, beside, found_by, is_everywhere, module_of, where

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lab.points import Point
    from lab.results import Results
    from lab.stages import Part, Stage
    from lab.store import History

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
    blame: Blame | None = None

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
            "blame": None if self.blame is None else vars(self.blame),
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


def _blame(
    first: Point,
    place: str,
    siblings: Sequence[Point],
    steps: Sequence[Sequence[Point]],
    weights: set[str],
    known: dict[str, Stage],
) -> Blame | None:
    """What the loop did, where the first that differs is gradients, or weights after the update, all over the model."""
    here = steps[-1]
    if first.part == "held" and is_everywhere(siblings):
        return Blame(place, "held")
    if first.part == "update" and is_everywhere(siblings):
        return of_update(here, weights)
    if first.part != "gradient":
        return None
    before = steps[0] if len(steps) > 1 and steps[0][0].step == first.step - 1 else ()
    signed = {metric for metric, stage in known.items() if stage.kind == "signed"}
    return of_gradients(place, here, before, weights, signed)


@dataclass(frozen=True)
class Compared:
    """What two run folders were found to hold.

    Attributes:
        found: How they differ; of several processes, that of the earliest and most upstream difference.
        process: In which process that was.
        of: How many were compared.
    """

    found: Difference
    process: int
    of: int

    def to_dict(self) -> dict[str, Any]:
        """Give this as JSON types."""
        return {**self.found.to_dict(), "process": self.process}


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
    steps = [*judged(points(a.history, b.history, order), Tolerance(noise, tolerance))]
    last = next((i for i, here in enumerate(steps) if any(point.differs for point in here)), len(steps) - 1)
    here = steps[last] if steps else []
    first = next((point for point in here if point.differs), None)
    before = here[: here.index(first)] if first is not None else here
    later = (point for found in steps[last:] for point in found)
    weights = weights_of(a.history) | weights_of(b.history)
    siblings = beside(first, here, weights)
    only = _only(a.history, b.history, order)
    coarser = noise.coarser(sorted(order, key=lambda site: order[site]))
    place, blame = "", None
    if first is not None:
        found_out = first.part == "experiment"
        alone = found_by((a.history, b.history), first.allowed, order) if found_out else [*only[0], *only[1]]
        known = compared(a.history, b.history)
        place = where(first, here, siblings, alone, order, known[first.metric].about)
        blame = _blame(first, place, siblings, steps[max(0, last - 1) : last + 1], weights, known)
    elif coarser is not None:
        place = module_of(coarser[0])
    return Difference(
        first=first,
        place=next((point for point in later if point.differs and point.inside), None),
        after=after(first, before),
        where=place if blame is None else blame.where,
        blame=blame,
        before=_agreed(before),
        earlier=_agreed([point for found in steps[:last] for point in found]),
        beside=(sum(point.differs for point in siblings), len(siblings)),
        settings=_all_settings(a, b),
        only=only,
        steps=(a.history.last_step + 1, b.history.last_step + 1),
        compared=tuple(found[0].step for found in steps if any(point.part == "value" for point in found)),
        lost=next((found[0].step for found in steps[: last + 1] if is_lost(found)), None),
        coarser=coarser,
        tolerance=tolerance,
        measured=noise.measured,
    )


def compare_folders(a: Path, b: Path, tolerance: float | None = None) -> Compared:
    """Compare what two run folders hold, of each process by itself; see `compare`.

    Raises:
        BadInput: One of them is no run, or no probe that takes part recorded it; or there is nothing that both hold.
    """
    pairs = list(zip(processes(a), processes(b), strict=False))
    found = [compare(_read(mine), _read(others), tolerance) for mine, others in pairs]
    if not any(each.count or each.first for each in found):
        raise BadInput(f"{a}, {b}: the two runs recorded nothing that can be compared")
    which = upstream(found)
    return Compared(_together(found, which), which, len(found))


def _together(found: Sequence[Difference], which: int) -> Difference:
    """The difference of one of several processes, and what all of them together tell of it."""
    chosen = found[which]
    if len(found) == 1 or chosen.first is None:
        return chosen
    until = _when(chosen)
    blame = of_processes(chosen.first, chosen.where, chosen.blame, [_when(each) > until for each in found])
    return chosen if blame is None else replace(chosen, blame=blame, where=blame.where)


def _when(found: Difference) -> tuple[float, int]:
    """The step, and the part of it, in which two runs part."""
    return (math.inf, 0) if found.first is None else (found.first.step, list(PARTS).index(found.first.part))


def _read(folder: Path) -> Results:
    """Read a run that can be compared.

    Raises:
        BadInput: It cannot.
    """
    run = load(folder)
    if not run.history.stages:
        raise BadInput(f"{folder}: recorded by no probe that takes part in a comparison, or by an older lab")
    return run


def processes(folder: Path) -> list[Path]:
    """The folders of a run as each of its processes saw it; of one process, that of the run alone."""
    others = [path.parent for path in folder.glob(f"{RANK}*/{METRICS}")]
    return [folder, *sorted(others, key=lambda path: (len(path.name), path.name))]


def upstream(found: Sequence[Difference]) -> int:
    """Which of several is that of the earliest and most upstream difference; the first if none differs."""
    when = [_when(each) for each in found]
    return when.index(min(when))


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
