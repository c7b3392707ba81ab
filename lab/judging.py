"""Says of each number that two runs recorded how far apart rounding may have moved it, in the order of a step."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lab.points import Point
    from lab.tolerance import Tolerance


def judged(found: Iterator[Point], judge: Tolerance) -> Iterator[list[Point]]:
    """Say of each number how far apart the two may be; yield them by step."""
    for step, numbers in itertools.groupby(found, key=lambda point: point.step):
        judge.begin(step)
        here: list[Point] = []
        for part, points in itertools.groupby(numbers, key=lambda point: point.part):
            mine = [*points]
            here += _updates(mine, judge) if part == "update" else [_alone(point, judge) for point in mine]
        yield here


def _alone(point: Point, judge: Tolerance) -> Point:
    point = replace(point, allowed=judge.of(point.part, point.at, exact=point.exact))
    if not point.differs:
        judge.saw(point.part, point.at, point.relative)
    return point


def _updates(updates: Sequence[Point], judge: Tolerance) -> list[Point]:
    """Judge weights after an update: in a single one of them rounding may have turned an element around."""
    found = [_alone(point, judge) for point in updates]
    apart = {point.at for point in found if point.differs}
    if len(apart) != 1:
        return found
    (only,) = apart
    turned = [replace(point, allowed=judge.flipped(only)) if point.differs else point for point in found]
    if any(point.differs for point in turned):
        return found
    for point in turned:
        if point.at == only:
            judge.saw(point.part, only, point.relative)
    return turned


def is_lost(found: Sequence[Point]) -> bool:
    """Whether most numbers of a step may have been moved so far by rounding that they tell nothing."""
    told = [point for point in found if point.part != "weight"]  # of which nothing is asked where nobody looked before
    return sum(math.isinf(point.allowed) for point in told) > len(told) / 2
