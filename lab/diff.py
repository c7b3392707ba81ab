"""Where two runs part: the first step, and in it the most upstream place, at which what they recorded differs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from lab.blame import Blame, of_flags, of_gradients, of_processes, of_update
from lab.difference import Agreed, Compared, Difference
from lab.errors import BadInput
from lab.files import METRICS
from lab.judging import is_lost, judged
from lab.points import compared, merged, points, weights_of
from lab.processes import RANK
from lab.results import load
from lab.stages import PARTS
from lab.tolerance import Noise, Tolerance
from lab.unshared import all_settings
from lab.unshared import only as only_in
from lab.where import after, beside, found_by, is_everywhere, module_of, where
from lab.work import work_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lab.points import Point
    from lab.results import Results
    from lab.stages import Part, Stage


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
    only = only_in(a.history, b.history, order)
    coarser = noise.coarser(sorted(order, key=lambda site: order[site]))
    work = work_of(a.history, b.history, order)
    place, blame = "", None
    if first is not None:
        found_out = first.part == "experiment"
        alone = found_by((a.history, b.history), first.allowed, order) if found_out else [*only[0], *only[1]]
        known = compared(a.history, b.history)
        place = where(first, here, siblings, alone, order, known[first.metric].about)
        blame = of_flags((a.history, b.history), first) or _blame(
            first, place, siblings, steps[max(0, last - 1) : last + 1], weights, known
        )
    else:
        place = work.where or ("" if coarser is None else module_of(coarser[0]))
    return Difference(
        first=first,
        place=next((point for point in later if point.differs and point.inside), None),
        after=after(first, before),
        where=place if blame is None else blame.where,
        blame=blame,
        before=_agreed(before),
        earlier=_agreed([point for found in steps[:last] for point in found]),
        beside=(sum(point.differs for point in siblings), len(siblings)),
        settings=all_settings(a, b),
        only=only,
        steps=(a.history.last_step + 1, b.history.last_step + 1),
        compared=tuple(found[0].step for found in steps if any(point.part == "value" for point in found)),
        lost=next((found[0].step for found in steps[: last + 1] if is_lost(found)), None),
        coarser=coarser,
        tolerance=tolerance,
        measured=noise.measured,
        work=work,
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
    """The step, and the part of it, in which two runs part; those that agree come last, and if in all, quite so."""
    if found.first is not None:
        return found.first.step, list(PARTS).index(found.first.part)
    return math.inf, len(PARTS) + (found.work.step is None)


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
