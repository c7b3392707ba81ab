"""What the faults of several processes do, exactly, and that each is named for itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from processes import in_processes

from lab import BadInput

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import SmallRun

    from lab.catalogue import Catalogue

UP = "blocks.0.mlp.up.weight"
# A fault, more of its training, where it is placed, and a metric with what it is from the first look on.
FAULTS: list[tuple[dict[str, Any], dict[str, Any], str, str, str, float]] = [
    ({"id": "distributed.same_shard"}, {}, "data", "shards.shared", "", 1),
    ({"id": "distributed.same_shard"}, {"accumulate": 2, "shard_optimizer": True}, "data", "shards.shared", "", 1),
    ({"id": "distributed.shard_off_by_one"}, {}, "data", "shards.shared", "", 1 / 8),
    ({"id": "distributed.shard_off_by_one", "rows": 3}, {}, "data", "shards.shared", "", 3 / 8),
    ({"id": "distributed.partial_sync", "at": UP}, {}, UP, "reduction.left_out", UP, 1),
    ({"id": "distributed.partial_sync", "at": UP}, {"accumulate": 2}, UP, "reduction.left_out", UP, 1),
    ({"id": "distributed.sum_for_mean"}, {}, "distributed", "reduction.ratio", "", 2),
    ({"id": "distributed.sum_for_mean"}, {"accumulate": 2, "clip": 0.1}, "distributed", "reduction.ratio", "", 2),
    ({"id": "distributed.averaged_twice"}, {}, "distributed", "reduction.ratio", "", 0.5),
    ({"id": "distributed.sync_too_early"}, {"accumulate": 2}, "loop", "reduction.parts", "", 2),
    ({"id": "distributed.sync_too_early"}, {"accumulate": 4, "clip": 0.1}, "loop", "reduction.parts", "", 4),
    ({"id": "distributed.drift"}, {}, "distributed", "ranks.gradients", "", 0),
    ({"id": "distributed.no_sync"}, {}, "distributed", "reduction.averaged", "", 0),
]


@pytest.mark.parametrize(("fault", "train", "at", "metric", "site", "value"), FAULTS)
def test_it_is_named_and_placed(
    tmp_path: Path,
    catalogue: Catalogue,
    fault: dict[str, Any],
    train: dict[str, Any],
    at: str,
    metric: str,
    site: str,
    value: float,
) -> None:
    diagnosis, histories = in_processes(tmp_path, catalogue, fault, train_=train, steps=21)
    assert [(cause.id, cause.at, cause.since_step <= 1) for cause in diagnosis.causes] == [(fault["id"], at, True)]
    assert diagnosis.unexplained == ()
    for history in histories:
        assert history.series(metric, site).values == pytest.approx(value, rel=1e-5)


def test_a_fault_that_begins_late_is_dated(tmp_path: Path, catalogue: Catalogue) -> None:
    fault = {"id": "distributed.sum_for_mean", "from_step": 10}
    diagnosis, _ = in_processes(tmp_path, catalogue, fault, train_={}, steps=21)
    assert [(cause.id, cause.since_step) for cause in diagnosis.causes] == [(fault["id"], 10)]


def test_other_weights_at_the_start(tmp_path: Path, catalogue: Catalogue) -> None:
    fault = {"id": "distributed.initialised_apart"}
    diagnosis, (first, second) = in_processes(tmp_path, catalogue, fault, train_={})
    assert [cause.id for cause in diagnosis.causes] == [fault["id"]]
    assert diagnosis.unexplained == ()
    # Other weights, and the same gradients ever after.
    assert first.last("ranks.apart") > 0
    np.testing.assert_array_equal(first.series("ranks.gradients").values, 0)
    assert first.series("gradient.total").values[0] == second.series("gradient.total").values[0]


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"id": "distributed.sync_too_early"}, {}, "accumulate above 1"),
    ({"id": "distributed.partial_sync", "at": "nowhere"}, {}, "no weight has this name"),
    ({"id": "distributed.shard_off_by_one", "rows": 8}, {}, "8 rows for each process"),
    ({"id": "distributed.initialised_apart"}, {"shard_optimizer": True}, "at its first update"),
    ({"id": "distributed.same_shard"}, {"parallel": "tensor"}, "ranks above 1"),
]


@pytest.mark.parametrize(("fault", "train", "text"), REFUSED)
def test_where_it_means_nothing_it_is_refused(
    tmp_path: Path, catalogue: Catalogue, fault: dict[str, Any], train: dict[str, Any], text: str
) -> None:
    with pytest.raises(BadInput, match=text):
        in_processes(tmp_path, catalogue, fault, train_=train, steps=1)


@pytest.mark.parametrize("name", ["same_shard", "shard_off_by_one", "sum_for_mean", "drift", "initialised_apart"])
def test_one_process_is_refused(small_run: SmallRun, name: str) -> None:
    with pytest.raises(BadInput, match="ranks above 1"):
        small_run(faults=[{"id": f"distributed.{name}"}], steps=1)
