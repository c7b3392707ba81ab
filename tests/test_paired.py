"""Whether a difference is told: exactly as often as theory says where there is none, and always where there is one."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.paired import CONFIDENCE, FEWEST, estimate, log_ratio, place, ratio

changes = st.lists(st.floats(-5, 5), min_size=1, max_size=40)
times = st.lists(st.tuples(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3)), min_size=1, max_size=40)


@given(changes)
def test_the_interval_holds_the_median(given: list[float]) -> None:
    found = estimate(given)
    assert found.middle == statistics.median(given)
    assert min(given) <= found.low <= found.middle <= found.high <= max(given)
    assert found.count == len(given)


@given(changes)
def test_the_other_way_round_it_is_the_inverse(given: list[float]) -> None:
    found, inverse = ratio(given), ratio([-value for value in given])
    assert found.middle == pytest.approx(1 / inverse.middle)
    assert found.low == pytest.approx(1 / inverse.high)
    assert found.side(1.0) == -inverse.side(1.0)


@given(times)
def test_a_ratio_of_pairs_is_the_inverse_the_other_way_round(pairs: list[tuple[float, float]]) -> None:
    first, other = zip(*pairs, strict=True)
    assert log_ratio(first, other) == pytest.approx(-log_ratio(other, first))
    assert log_ratio(first, first) == 0


def test_pairs_go_together_and_what_is_left_over_does_not_count() -> None:
    assert math.exp(log_ratio([1, 10, 100], [2, 20, 200, 1])) == pytest.approx(2)
    assert math.isnan(log_ratio([], [1]))
    assert math.isnan(log_ratio([0], [1]))
    assert math.isnan(log_ratio([1, math.nan], [1, 1]))


@pytest.mark.parametrize("count", range(1, 15))
def test_the_confidence_is_that_of_counting_all_ways_to_fall(count: int) -> None:
    k, confidence = place(count)
    sides = [sum(ways) for ways in itertools.product((0, 1), repeat=count)]
    held = sum(k <= below <= count - k for below in sides) / len(sides)  # the k-th on either side of the median
    assert confidence == pytest.approx(held)
    assert (confidence >= CONFIDENCE) == (count >= FEWEST)
    if k < count // 2:  # no narrower one would do
        assert sum(k < below < count - k for below in sides) / len(sides) < CONFIDENCE


@pytest.mark.parametrize("repeats", [FEWEST, 9, 15])
def test_of_pairs_without_a_difference_as_many_are_told_apart_as_is_said(repeats: int) -> None:
    chance, trials = random.Random(repeats), 4000

    def noisy() -> float:
        return chance.lognormvariate(0, 0.05) * (2 if chance.random() < 0.2 else 1)  # now and then interrupted

    def told() -> bool:
        drift = [chance.lognormvariate(0, 1) for _ in range(repeats)]  # what the machine does meanwhile
        found = ratio([math.log(noisy() * d) - math.log(noisy() * d) for d in drift])
        return found.side(1.0) != 0

    expected = 1 - place(repeats)[1]
    assert expected <= 1 - CONFIDENCE
    error = math.sqrt(expected * (1 - expected) / trials)
    assert abs(sum(told() for _ in range(trials)) / trials - expected) < 4 * error


def test_a_difference_beyond_the_noise_is_always_told() -> None:
    chance = random.Random(0)
    for _ in range(200):
        found = ratio([math.log(1.33) + chance.uniform(-0.2, 0.2) for _ in range(FEWEST)])
        assert found.side(1.0) == 1


def test_nothing_is_told_of_too_few_or_of_what_is_no_number() -> None:
    assert ratio([1.0] * (FEWEST - 1)).side(1.0) == 0
    assert not estimate([2.0]).enough
    assert estimate([2.0]).confidence == 0
    broken = estimate([1.0] * 9 + [math.nan])
    assert math.isnan(broken.middle)
    assert broken.side(0.0) == 0
