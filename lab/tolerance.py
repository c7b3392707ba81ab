"""What counts as equal where two runs are compared: as far apart as rounding, measured in them, can have moved them.

A run measures how far rounding alone moves each value and gradient (``rounding``), and how far what it does in one step
moves those of the next (``drift``); see the stages of those kinds. Between two runs that compute the same in another
order, a number is then expected to differ

- by its rounding, where what it is made of is equal to the last bit;
- by its drift times the level L, where the weights are not: L is the largest ratio, over all weights, of how far they
  are apart to how far one update lets rounding move them, and 1 at least. It is seen in the two runs, step by step;
- by what it differed before the update, and by its drift times the level of the gradients, where it is a weight.

Noise that grows from step to step, as it does in every training, so raises L, and a difference is what goes beyond
that which is upstream of it. FACTOR allows for two things. A number recorded of a tensor is one projection of it, as if
drawn from a normal distribution: 1 in 16,000 is beyond four standard deviations. And a sum of n terms in another order
may differ by 0.3 sqrt(n) times what a change of each term by a unit in its last place does (n partial sums, each of
which grows like a root and is rounded, in both runs). That is 4 for 190 terms in a row: what a kernel with 32 partial
sums makes of 6000. Half-precision formats are summed in float32, and need the first allowance alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lab.stages import Kind, Part
    from lab.store import History, Series

FACTOR, NORMAL = 16.0, 4.0
HALF = 2.0**-12  # rounding by more than that is that of a format of 16 bits, of which kernels sum in float32
UNIT = 2.0**-23  # of float32: what is known of a number for which nothing was measured
ASSUMED = 1e-5  # of runs that measured nothing: float32 rounds to 6e-8, and sums of many lose two digits
LOST = 0.5  # where rounding may have moved a number by half of itself, it tells nothing
ALONE = "alone"  # the site at which a run says how far its loss is rounded, where what it is given is not
BACKWARD: tuple[Part, ...] = ("gradient", "norm", "clip")
# What is made of what: where a part has no measurement of its own, it is that of another.
SAME: dict[Part, Part] = {
    "update": "weight",
    "beside": "value",
    "evaluation": "value",
    "experiment": "value",
    "clip": "norm",
}


class Noise:
    """How far rounding moves numbers, as two runs measured it; the larger, since one may compute less exactly.

    Attributes:
        measured: Whether either did.
    """

    def __init__(self, runs: tuple[History, History]) -> None:
        self._series: dict[tuple[Kind, Part], dict[str, list[Series]]] = {}
        for history in runs:
            for metric, stage in history.stages.items():
                if stage.kind in ("rounding", "drift"):
                    known = self._series.setdefault((stage.kind, stage.part), {})
                    for site, series in history.each(metric):
                        known.setdefault(site, []).append(series.finite)
        self._by_run = [self._values(history) for history in runs]
        self.measured = any(self._series.values())
        self.at(0)

    @staticmethod
    def _values(history: History) -> dict[str, Series]:
        """How far rounding was measured to move the values of a run, by site."""
        stages = history.stages.items()
        metrics = [metric for metric, stage in stages if stage.kind == "rounding" and stage.part == "value"]
        return {site: series.finite for metric in metrics for site, series in history.each(metric)}

    def at(self, step: int) -> None:
        """Go to a step: of several measurements the newest counts; before the first, that one."""
        self._step = step
        self._most: dict[tuple[Kind, Part], float] = {}

    def rounding(self, part: Part, site: str) -> float:
        """How far rounding moves a number, relatively; where it was not measured, the most of its part."""
        return self._of("rounding", part, site) or UNIT

    def drift(self, part: Part, site: str) -> float:
        """How far it is moved by what rounding does one step before; at least as far as by its own, in float32."""
        return max(self._of("drift", part, site), min(self.rounding(part, site), HALF))

    def flipped(self, site: str) -> float:
        """How far a weight is moved if a single element of it is updated to the opposite."""
        return self._newest(self._series.get(("rounding", "update"), {}).get(site, []))

    @property
    def alone(self) -> float:
        """How far it moves the loss of outputs that are equal to the last bit."""
        return self._newest(self._series.get(("rounding", "loss"), {}).get(ALONE, [])) or UNIT

    def sent(self, kind: Kind) -> float:
        """How far it moves what the loss sends back, by what it does to the output."""
        return self._newest(self._series.get((kind, "gradient"), {}).get("", []))

    def coarser(self, sites: Iterable[str]) -> tuple[str, float, float] | None:
        """The first of these sites whose value rounding moves FACTOR times as far in one run, and how far in each."""
        a, b = ({site: s for site, s in self._by_run[run].items() if len(s)} for run in (0, 1))
        for site in sites:
            if site in a and site in b:
                mine, others = float(a[site].values[0]), float(b[site].values[0])
                if max(mine, others) > FACTOR * max(min(mine, others), UNIT):
                    return site, mine, others
        return None

    def _of(self, kind: Kind, part: Part, site: str) -> float:
        part = "loss" if part == "evaluation" and not site else SAME.get(part, part)
        known = self._series.get((kind, part), {})
        if site in known:
            return self._newest(known[site])
        if part == "weight":  # a buffer: it is made of values
            part, known = "value", self._series.get((kind, "value"), {})
        if (kind, part) not in self._most:
            self._most[kind, part] = max(map(self._newest, known.values()), default=0.0)
        return self._most[kind, part]

    def _newest(self, measured: list[Series]) -> float:
        found = [0.0]
        for series in measured:
            if len(series):
                place = max(0, int(series.steps.searchsorted(self._step, "right")) - 1)
                found.append(float(series.values[place]))
        return max(found)


@dataclass
class Tolerance:
    """Says, in the order in which a step goes, how far two numbers may be apart, and is told how far they were.

    Args:
        noise: What was measured.
        fixed: To be used instead, for everything; None to use what was measured.

    Attributes:
        level: How far the weights are apart, in units of what one update lets rounding move them.
    """

    noise: Noise
    fixed: float | None = None
    level: float = 0.0
    _step: int = -1
    _at: int = 0  # the step at whose beginning the weights were as far apart as `level` says
    _follows: bool = False  # whether the update of the step before was seen
    _moved: bool = False  # whether anything that weights are made of was ever not equal to the last bit
    _gradients: float = 0.0  # how far gradients were apart, in units of their rounding, at most
    _expected: dict[str, float] = field(default_factory=dict)  # how far each weight was after the update before
    _before: dict[str, float] = field(default_factory=dict)  # the same when this step began
    _after: dict[str, float] = field(default_factory=dict)
    _seen: dict[tuple[Part, str], float] = field(default_factory=dict)
    _ever: bool = False  # whether anything at all was ever not equal to the last bit
    _values: bool = False  # whether any value of this step is not, or may not be where none was recorded
    _looked: bool = False
    _newest: str = ""  # the part of this step that the level is of

    def begin(self, step: int) -> None:
        """Go on to a step."""
        if self._after:
            self._expected, self._after, self._at = self._after, {}, self._step + 1
            self._before = self._expected
        self._follows = self._at == step and step > 0
        if self._moved:
            self.level += step - self._at  # each update adds its own
        self._step, self._at, self._newest = step, step, ""
        self._values, self._looked = self._ever, False
        self.noise.at(step)

    def of(self, part: Part, site: str, *, exact: bool = False) -> float:
        """How far apart two numbers of this part may be; infinite where nothing can be said."""
        if exact:
            return 0.0
        if self.fixed is not None:
            return self.fixed
        if not self.noise.measured:
            return ASSUMED
        allowed = self._measured(part, site)
        return math.inf if allowed > LOST else allowed

    def _measured(self, part: Part, site: str) -> float:
        rounding = self.noise.rounding(part, site)
        if part == "loss" and not self._values:
            rounding = self.noise.alone
        if part in BACKWARD and self._values:
            rounding = max(rounding, self.noise.sent("rounding"))
        rounding = max(FACTOR * min(rounding, HALF), NORMAL * rounding)
        if part == "weight":
            if self._follows:
                return self._expected.get(site, 0.0) + rounding
            # If they were moved apart where nobody looked, they only tell how far.
            return math.inf if self._moved else rounding
        drift = FACTOR * self.noise.drift(part, site)
        if part in BACKWARD:
            drift = max(drift, FACTOR * self.noise.sent("drift"))
        if part == "update":
            moved = self._gradients > 0
            return self._before.get(site, 0.0) + max(rounding, drift * max(1.0, self._gradients) if moved else 0.0)
        if not self._moved:
            return rounding
        seen = self._seen.get((part, site), 0.0) if part in ("loss", "norm") else 0.0
        return max(rounding, drift * max(1.0, self.level), FACTOR * seen)

    def flipped(self, site: str) -> float:
        """How far apart two weights may be after an update, if rounding has turned one of their elements around.

        Its gradient is then nothing but rounding. That is so seldom that what was measured knows nothing of it, and in
        one weight of a step at most: more than that is none.
        """
        known = self.fixed is None and self.noise.measured and self._gradients > 0
        return self._before.get(site, 0.0) + self.noise.flipped(site) if known else 0.0

    def saw(self, part: Part, site: str, distance: float) -> None:
        """Take note of how far two numbers are apart that count as equal, or of which nothing can be said."""
        if not math.isfinite(distance):
            return
        if part == "value":
            self._values = distance > 0 or (self._values and self._looked)
            self._looked = True
        self._ever = self._ever or distance > 0
        if part not in ("weight", "loss", "gradient", "norm", "update"):
            return
        self._moved = self._moved or distance > 0
        unit = self.noise.rounding(part, site)
        if part in ("weight", "update"):
            if self._newest != part:  # the first of them
                self.level = 0.0
                if part == "weight":
                    self._before = {}
            self._newest = part
            weights = self._before if part == "weight" else self._after
            self.level = max(self.level, distance / self.noise.drift(part, site))
            weights[site] = max(weights.get(site, 0.0), distance)
        elif part == "gradient":
            self._gradients = max(self._gradients, distance / unit)
        elif part in ("loss", "norm"):
            self._seen[part, site] = max(self._seen.get((part, site), 0.0), distance)
