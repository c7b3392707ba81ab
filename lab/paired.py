"""Whether one of two things costs more, from measurements that were taken in pairs.

Times on a machine that does other work too have no known distribution: now and then one is twice as long. So the
interval assumes none. Where n independent pairs have no difference but noise, each falls on either side of nothing as a
coin does, and how many do is binomial. The k-th smallest and the k-th largest of them therefore hold the median with a
probability that is exact: ``1 - 2 P(fewer than k heads in n)`` (the sign test's interval; Hollander and Wolfe,
Nonparametric Statistical Methods, section 3.6). The price: of five pairs or fewer even the smallest and the largest
hold it in less than 95 of 100 cases.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

CONFIDENCE = 0.95
FEWEST = 6  # pairs: 2 of 2^6 ways to fall are all on one side, 3 of 100; of 2^5 it is 6 of 100


@dataclass(frozen=True)
class Estimate:
    """The median of a change, and where it lies.

    Attributes:
        middle: The median that was seen.
        low, high: The interval.
        confidence: The probability that such an interval holds the true median.
        count: Of how many pairs.
    """

    middle: float
    low: float
    high: float
    confidence: float
    count: int

    @property
    def enough(self) -> bool:
        """Whether there are pairs enough to tell anything."""
        return self.confidence >= CONFIDENCE

    def side(self, nothing: float) -> int:
        """Return 1 where the whole interval is above `nothing`, -1 where it is below, and 0 where nothing is told."""
        if not self.enough:
            return 0
        return int(self.low > nothing) - int(self.high < nothing)

    def to_dict(self) -> dict[str, Any]:
        """Give this as JSON types."""
        return {
            "median": self.middle,
            "low": self.low,
            "high": self.high,
            "confidence": self.confidence,
            "pairs": self.count,
        }


def place(count: int) -> tuple[int, float]:
    """Return k, and how probable it is that the k-th smallest and the k-th largest of `count` hold the median.

    It is the largest k for which that is 95% or more; 1 where there is none.
    """
    best, outside, ways = (1, 1 - 2.0 ** (1 - count)), 0, 2**count
    for k in range(1, count // 2 + 1):
        outside += math.comb(count, k - 1)
        confidence = 1 - 2 * outside / ways
        if confidence >= CONFIDENCE:
            best = k, confidence
    return best


def estimate(changes: Sequence[float]) -> Estimate:
    """Return the median of independent changes, one a pair, and its interval.

    All are NaN where one of them is. One change is an interval of itself, with a confidence of 0.
    """
    if any(map(math.isnan, changes)):
        return Estimate(math.nan, math.nan, math.nan, 0.0, len(changes))
    ordered = sorted(changes)
    k, confidence = place(len(ordered))
    return Estimate(statistics.median(ordered), ordered[k - 1], ordered[-k], confidence, len(ordered))


def ratio(changes: Sequence[float]) -> Estimate:
    """Return `estimate` of ratios, from their logarithms: so a ratio and its inverse have the same interval."""
    found = estimate(changes)
    middle, low, high = (math.exp(value) for value in (found.middle, found.low, found.high))
    return Estimate(middle, low, high, found.confidence, found.count)


def log_ratio(first: Sequence[float], other: Sequence[float]) -> float:
    """Return the logarithm of `other` over `first`, as the median over what was measured in turn.

    What the longer one has more is left out. NaN where nothing is left, or is not above 0.
    """
    pairs = [*zip(first, other, strict=False)]
    if not pairs or not all(a > 0 and b > 0 for a, b in pairs):
        return math.nan
    return statistics.median(math.log(b) - math.log(a) for a, b in pairs)
