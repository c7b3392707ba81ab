"""What the loop did with all gradients or all weights is told from the numbers, and from nothing less than all."""

from __future__ import annotations

import pytest

from lab.blame import Blame, of_gradients, of_processes, of_update
from lab.points import Point, distance

WEIGHTS = ["a", "b", "c", "d"]
NOISE = 1e-6


def points(part: str, first: list[float], second: list[float], metric: str = "signed") -> list[Point]:
    """One number a weight, in both runs."""
    made = zip(WEIGHTS, first, second, strict=False)
    return [Point(1, part, metric, at, a, b, distance(a, b, 4.0), allowed=NOISE) for at, a, b in made]  # type: ignore[arg-type]


BEFORE, NOW = [1.0, -2.0, 0.5, 3.0], [0.25, 1.5, -4.0, 2.0]


def gradients(first: list[float], second: list[float], before: list[float] | None = None) -> Blame | None:
    earlier = points("gradient", before or BEFORE, before or BEFORE)
    return of_gradients("gradients", points("gradient", first, second), earlier, set(WEIGHTS), {"signed"})


@pytest.mark.parametrize("share", [1.0, 0.37])
def test_gradients_of_the_step_before_are_known_in_those_of_this_one(share: float) -> None:
    both = [x + share * y for x, y in zip(NOW, BEFORE, strict=True)]
    assert gradients(both, NOW) == Blame("loop", "kept")
    assert gradients(NOW, both) == Blame("loop", "kept")


def test_nothing_is_said_of_gradients_that_one_weight_has_otherwise() -> None:
    both = [x + y for x, y in zip(NOW, BEFORE, strict=True)]
    both[2] += 100 * NOISE
    assert gradients(both, NOW) is None
    assert gradients([x + 0.1 * i for i, x in enumerate(NOW)], NOW) is None
    twice = [x + 2 * y for x, y in zip(NOW, BEFORE, strict=True)]
    assert gradients(twice, NOW) is None  # no clipping makes them more
    assert gradients(NOW, NOW) is None


def test_what_does_not_add_up_as_tensors_do_is_no_evidence() -> None:
    both = points("gradient", [x + y for x, y in zip(NOW, BEFORE, strict=True)], NOW)
    assert of_gradients("gradients", both, points("gradient", BEFORE, BEFORE), set(WEIGHTS), set()) is None
    assert of_gradients("gradients", both, [], set(WEIGHTS), {"signed"}) is None


@pytest.mark.parametrize("none", [0.0, float("nan")])
def test_gradients_that_are_gone(none: float) -> None:
    assert gradients([none] * 4, NOW) == Blame("loop", "gone")
    assert gradients([none, none, none, 1.0], NOW) is None


def test_gradients_that_are_scaled_by_one_number() -> None:
    found = gradients([2 * x for x in NOW], NOW)
    assert found is not None
    assert (found.where, found.why) == ("gradients", "scaled")
    assert found.number == pytest.approx(2.0)


def test_a_scale_of_the_loss_that_is_there_when_gradients_are_clipped() -> None:
    here = [*points("gradient", [65536 * x for x in NOW], NOW), *points("clip", [1e-5], [0.5])]
    found = of_gradients("loss", here, [], set(WEIGHTS), {"signed"})
    assert found == Blame("clipping", "unscaled", 65536.0)
    unclipped = of_gradients("loss", here[:4], [], set(WEIGHTS), {"signed"})
    assert unclipped == Blame("loss", "scaled", 65536.0)


def test_two_gradients_are_too_few() -> None:
    here = points("gradient", [2.0, 4.0], [1.0, 2.0])
    assert of_gradients("gradients", here, [], set(WEIGHTS), {"signed"}) is None


def test_an_update_that_one_run_did_not_make() -> None:
    weights = points("weight", NOW, NOW)
    moved = [x + 0.1 for x in NOW]
    assert of_update([*weights, *points("update", NOW, moved)], set(WEIGHTS)) == Blame("loop", "still")
    assert of_update([*weights, *points("update", moved, NOW)], set(WEIGHTS)) == Blame("loop", "still")
    other = [x + 0.2 for x in NOW]
    assert of_update([*weights, *points("update", other, moved)], set(WEIGHTS)) is None
    assert of_update([*weights, *points("update", [*NOW[:3], 9.0], moved)], set(WEIGHTS)) is None
    assert of_update(points("update", NOW, moved), set(WEIGHTS)) is None


def test_what_processes_share_is_to_be_the_same_in_all() -> None:
    (weight, *_), (gradient, *_), (value, *_) = (points(part, BEFORE, NOW) for part in ("weight", "gradient", "value"))
    assert of_processes(weight, "model", None, [False, True]) == Blame("distributed", "apart")
    assert of_processes(weight, "model", None, [False, False]) is None  # in all of them: drawn otherwise
    assert of_processes(weight, "blocks.0.mlp.up.weight", None, [False, True]) is None
    assert of_processes(value, "model", None, [False, True]) is None
    scaled = Blame("gradients", "scaled", 2.0)
    assert of_processes(gradient, "gradients", scaled, [False, False]) == Blame("distributed", "exchanged", 2.0)
    kept = Blame("loop", "kept")
    assert of_processes(gradient, "loop", kept, [False, False]) is None
    assert of_processes(gradient, "loop", Blame("loop", "still"), [False, True]) == Blame("distributed", "apart")
