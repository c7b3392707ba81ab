"""What properties are written with: the entry that is shown is the one that is wrong."""

from __future__ import annotations

import math

import pytest
import torch

from lab.spec import Mismatch, equal, normal


@pytest.mark.parametrize("special", [math.inf, -math.inf, math.nan])
def test_the_entry_that_differs_is_shown_and_not_one_that_is_equally_infinite(special: float) -> None:
    expected = torch.tensor([special, 1.0, 2.0])
    equal(expected.clone(), expected)
    with pytest.raises(Mismatch, match=r"at \[2\] is 3, expected 2"):
        equal(torch.tensor([special, 1.0, 3.0]), expected)


def test_nan_or_infinity_where_a_number_should_be_is_the_worst_gap() -> None:
    for wrong in (math.nan, math.inf):
        with pytest.raises(Mismatch, match=r"at \[1\] is (nan|inf), expected 1"):
            equal(torch.tensor([0.0, wrong, 9.0]), torch.tensor([0.0, 1.0, 2.0]))


def test_normal_draws_a_number_as_well_as_a_tensor() -> None:
    assert normal(0).shape == ()
    assert normal(0, 2, 3).shape == (2, 3)
    assert float(normal(0)) == float(normal(0, 1)[0])
