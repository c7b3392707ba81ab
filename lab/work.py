"""How much work two runs took for what they computed: operators, bytes, calls, graphs that are kept, threads, waiting.

Their numbers may all agree and their work may not, rightly so after a refactor. Amounts of work are exact, and equal or
not, but for two kinds:

- What should have been let go, and is only counted while it lives (``growing``). A variable that still names it, or a
  cycle of references that nobody has collected yet, holds some of it for a while; GROWN of them together are held by
  something that grows.
- A measured time, as a share of another (``timed``). In each run the SPAN newest steps that both recorded say how far
  it varies by itself: from the third smallest to the third largest. Two runs differ where these ranges are further
  apart than the longer one is long: of times that were drawn alike, fewer than one pair in a million.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lab.points import by_step, distance, way
from lab.where import LOOP

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lab.stages import Stage
    from lab.store import History

GROWN = 16  # a judgement, as in the rules for what is kept: twice as many are remembered
SPAN, OUTLIERS = 21, 2  # steps, and those of them at either end that the system may have interrupted


@dataclass(frozen=True)
class Amount:
    """An amount of work, in the first step in which two runs do not have the same.

    Attributes:
        step, metric, at: Which.
        a, b: What the first run and the second recorded.
        says: What it counts.
        about: The place to look at, where it has no site.
        before: The last step before that one in which both recorded it; None if there is none.
    """

    step: int
    metric: str
    at: str
    a: float
    b: float
    says: str
    about: str
    before: int | None


@dataclass(frozen=True)
class Work:
    """How the work of two runs compares.

    Attributes:
        count: How many amounts both recorded, all steps together.
        amounts: Those that differ in the first step in which any does: at the place to look at, then
            elsewhere; those first of which the one is the larger multiple of the other.
        where: That place: of the modules whose work differs, the first that holds no other of them; else a part of the
            loop. Empty if none differs.
    """

    count: int = 0
    amounts: tuple[Amount, ...] = ()
    where: str = ""

    @property
    def step(self) -> int | None:
        """The first step in which they differ; None if they do not."""
        return self.amounts[0].step if self.amounts else None


def work_of(a: History, b: History, order: dict[str, int]) -> Work:
    """Compare the work of two runs, as far as both recorded it.

    Args:
        a: A run.
        b: Another.
        order: Of the sites in the forward pass.
    """
    count, found = 0, []
    for metric, stage in {**b.stages, **a.stages}.items():
        if stage.part != "work":
            continue
        for site in sorted({*a.sites(metric)} & {*b.sites(metric)}):
            mine, others = by_step(a, metric, site), by_step(b, metric, site)
            steps = sorted(mine.keys() & others.keys())
            count += len(steps)
            pairs = [(mine[step], others[step]) for step in steps]
            place = _KINDS.get(stage.kind, _unequal)(pairs)
            if place is not None:
                before = steps[place - 1] if place else None
                found.append(_amount(metric, site, stage, steps[place], pairs[place], before))
    if not found:
        return Work(count)
    begin = min(amount.step for amount in found)
    here = [amount for amount in found if amount.step == begin]
    where = next(_innermost([amount.at for amount in here], order), here[0].about)
    here.sort(key=lambda amount: ((amount.at or amount.about) != where, -distance(amount.a, amount.b)))
    return Work(count, tuple(here), where)


def _amount(metric: str, site: str, stage: Stage, step: int, pair: tuple[float, float], before: int | None) -> Amount:
    return Amount(step, metric, site, *pair, stage.says or metric, stage.about or LOOP["work"], before)


def _innermost(sites: Sequence[str], order: dict[str, int]) -> Iterator[str]:
    """Those modules that hold no other, in the order of the forward pass."""
    named = {site for site in sites if site}
    inner = [site for site in named if not any(other.startswith(f"{site}.") for other in named)]
    yield from sorted(inner, key=lambda site: (way(site, order), site))


# ---------------------------------------------------------------- from which of their values on two series differ


def _unequal(pairs: Sequence[tuple[float, float]]) -> int | None:
    """The first value that is not the same."""
    return next((place for place, pair in enumerate(pairs) if distance(*pair)), None)


def _grown(pairs: Sequence[tuple[float, float]]) -> int | None:
    """The first value from which on one is larger than the other until it is GROWN larger."""
    until = next((place for place, (a, b) in enumerate(pairs) if abs(a - b) >= GROWN), None)
    if until is None:
        return None
    sign = 1 if pairs[until][0] > pairs[until][1] else -1
    return _since([sign * (a - b) > 0 for a, b in pairs[: until + 1]])


def _timed(pairs: Sequence[tuple[float, float]]) -> int | None:
    """The first value from which on they are further apart than either varies by itself, up to the newest."""
    if len(pairs) < SPAN:
        return None
    a, b = (sorted(pair[run] for pair in pairs[-SPAN:])[OUTLIERS : SPAN - OUTLIERS] for run in (0, 1))
    sign = 1 if a[0] > b[0] else -1
    between = a[0] - b[-1] if sign > 0 else b[0] - a[-1]
    spread = max(a[-1] - a[0], b[-1] - b[0])
    return _since([sign * (x - y) > spread for x, y in pairs]) if between > spread else None


def _since(apart: Sequence[bool]) -> int:
    """The first of a row that goes on to the newest, of values that are apart; a single one in it may not be."""
    last = max(place for place, is_apart in enumerate(apart) if is_apart)
    while last and any(apart[max(0, last - 2) : last]):
        last -= 1 if apart[last - 1] else 2
    return last


_KINDS: dict[str, Callable[[Sequence[tuple[float, float]]], int | None]] = {"growing": _grown, "timed": _timed}
