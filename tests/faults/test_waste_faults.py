"""What takes longer than it needs: each fault does what it says, is found, and is undone."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
import torch

from lab import BadInput

if TYPE_CHECKING:
    from conftest import SmallRun

CORES = len(os.sched_getaffinity(0))
MASKED = {"objective": "masked"}
# A fault, its training, the metric that it moves, what that is with it and without, and where it is placed.
FAULTS: list[tuple[dict[str, Any], dict[str, Any], str, float, float, str]] = [
    ({"id": "performance.too_many_threads", "times": 3}, {}, "threads.intra_op", 3 * CORES, 1, "loop"),
    ({"id": "performance.forward_twice"}, {}, "calls.in_vain", 1, 0, "loop"),
    ({"id": "performance.forward_twice"}, {"accumulate": 2}, "calls.in_vain", 2, 0, "loop"),
    ({"id": "performance.padding_waste", "kept": 0.25}, MASKED, "padding.columns", 0.75, 0, "data"),
    ({"id": "performance.padding_waste", "kept": 0.25}, MASKED | {"accumulate": 2}, "padding.columns", 0.75, 0, "data"),
]


@pytest.mark.parametrize(("fault", "train", "metric", "broken", "healthy", "at"), FAULTS)
def test_it_is_named_and_undone(
    small_run: SmallRun,
    fault: dict[str, Any],
    train: dict[str, Any],
    metric: str,
    broken: float,
    healthy: float,
    at: str,
) -> None:
    before = torch.get_num_threads()
    diagnosis, history = small_run(faults=[fault], train=train, steps=6, data={"source": "markov", "batch": 8})
    assert torch.get_num_threads() == before
    assert history.series(metric).values.tolist() == [broken] * len(history.series(metric))
    assert [(cause.id, cause.at, cause.since_step) for cause in diagnosis.causes] == [(fault["id"], at, 0)]
    assert diagnosis.unexplained == ()
    twin, history = small_run(train=train, steps=6, data={"source": "markov", "batch": 8})
    assert twin.verdict == "healthy"
    assert history.series(metric).values[0] == healthy


def test_a_second_pass_changes_no_number(small_run: SmallRun) -> None:
    _, healthy = small_run(steps=6)
    _, broken = small_run(steps=6, faults=[{"id": "performance.forward_twice", "from_step": 2}])
    assert broken.series("loss").values.tolist() == healthy.series("loss").values.tolist()
    counted = broken.series("calls.in_vain")
    assert counted.values.tolist() == [float(step >= 2) for step in counted.steps]


def test_a_loader_that_takes_longer_than_training(small_run: SmallRun) -> None:
    fault = {"id": "performance.loader_bound", "from_step": 3}
    diagnosis, history = small_run(faults=[fault], steps=30)
    assert [(cause.id, cause.at) for cause in diagnosis.causes] == [(fault["id"], "data")]
    assert 3 <= diagnosis.causes[0].since_step <= 8
    share = history.series("loader.share").values
    assert sorted(share[4:])[len(share[4:]) // 2] == pytest.approx(0.75, abs=0.15)
    healthy, history = small_run(steps=30)
    assert "loader.waiting" in healthy.checked
    assert healthy.verdict == "healthy"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"id": "performance.padding_waste"}, "train.objective = 'masked'"),
    ({"id": "performance.padding_waste", "kept": 0.9}, "kept"),
    ({"id": "performance.too_many_threads", "times": 1}, "times"),
]


@pytest.mark.parametrize(("fault", "text"), REFUSED)
def test_where_it_means_nothing_it_is_refused(small_run: SmallRun, fault: dict[str, Any], text: str) -> None:
    with pytest.raises(BadInput, match=text):
        small_run(faults=[fault], steps=1)
