"""Trainings side by side: what is told of them, from numbers that are known."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest

from lab.comparison import NOTHING, SKIPPED, Trained, compare
from lab.paired import FEWEST

if TYPE_CHECKING:
    from lab.comparison import Line, Round


def trained(step: float = 1.0, *, steps: int = 20, loss: float = 1.0, memory: float = 100.0) -> Trained:
    slow = [50.0 * step] * SKIPPED  # the first are not to count
    losses = [3.0 - 0.1 * i for i in range(steps)]
    return Trained([*slow, *[step] * (steps - SKIPPED)], losses, held_out=loss, memory=memory, evaluations=[step])


def told(rounds: list[Round], *, tasks: tuple[str, ...] = ()) -> dict[str, Line]:
    names = [str(i) for i in range(len(rounds[0]))]
    return {measure.id: lines[-1] for measure, lines in compare(rounds, names, tasks)}


def test_a_slower_one_is_told_and_by_how_much() -> None:
    found = told([[trained(1.0 + 0.1 * i), trained(2.0 + 0.2 * i)] for i in range(FEWEST)])["step"]
    assert found.said == "slower"
    assert found.change is not None
    assert found.change.middle == pytest.approx(2)
    assert found.value == pytest.approx(2.5)
    assert told([[trained(2.0), trained(1.0)]] * FEWEST)["step"].said == "faster"


def test_what_is_equal_is_not_told_apart() -> None:
    for line in told([[trained(), trained()]] * FEWEST).values():
        assert line.said == NOTHING


def test_one_round_on_the_other_side_is_enough_to_say_nothing() -> None:
    rounds = [[trained(1.0), trained(2.0)]] * (FEWEST - 1) + [[trained(1.0), trained(0.9)]]
    assert told(rounds)["step"].said == NOTHING


def test_steps_are_compared_in_pairs() -> None:
    drift = [1.0, 9.0, 2.0, 7.0, 3.0, 40.0]
    first = Trained([1.0] * SKIPPED + drift, [1.0] * 9)
    other = Trained([1.0] * SKIPPED + [1.1 * value for value in drift], [1.0] * 9)
    change = told([[first, other]] * FEWEST)["step"].change
    assert change is not None
    assert change.low == pytest.approx(1.1)


def test_memory_and_loss_have_words_of_their_own() -> None:
    found = told([[trained(), trained(memory=110.0, loss=0.9)]] * FEWEST)
    assert (found["memory"].said, found["loss"].said) == ("more", "lower")
    assert found["loss"].change is not None
    assert found["loss"].change.middle == pytest.approx(-0.1)


def test_at_equal_time_the_slower_one_has_done_fewer_steps() -> None:
    found = told([[trained(1.0), trained(2.0)]] * FEWEST)["loss_at_equal_time"]
    assert found.value == pytest.approx(3.0 - 0.1 * 4.5)  # 10 of its 20 steps
    assert found.said == "higher"
    fewer = told([[trained(1.0), trained(1.0, steps=12)]] * FEWEST)["loss_at_equal_time"]
    assert fewer.said == NOTHING


def test_losses_of_other_tasks_are_not_compared() -> None:
    found = told([[trained(), trained(2.0, loss=9.0)]] * FEWEST, tasks=("markov", "text"))
    assert found["loss"].said == found["loss_at_equal_time"].said == "of another task"
    assert found["loss"].change is None
    assert found["step"].said == "slower"


def test_a_single_round_is_no_proof() -> None:
    found = told([[trained(1.0), trained(2.0)]])
    assert found["step"].said == "one timing is no proof"
    assert found["loss"].said == "one run is no proof"
    assert told([[trained(1.0), trained(2.0)]] * (FEWEST - 1))["step"].said == "too few repeats to tell"


def test_what_is_not_known_is_left_out_and_what_is_no_number_is_said() -> None:
    nothing = Trained([1.0] * 9, [1.0] * 9)
    assert set(told([[nothing, nothing]] * FEWEST)) == {"step", "training_loss", "loss_at_equal_time"}
    assert told([[trained(), nothing, trained()]] * FEWEST)["memory"].said == NOTHING
    exploded = told([[trained(), trained(), trained(loss=math.nan)]] * FEWEST)["loss"]
    assert exploded.said == "not known of both"
