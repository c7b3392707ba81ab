"""What each fault does to a cache, exactly, and that it is undone."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import pytest
import torch

from lab import BadInput

if TYPE_CHECKING:
    from conftest import SmallRun

faults = importlib.import_module("lab.faults.generation")


def kept() -> torch.Tensor:
    return torch.arange(6.0).view(1, 1, 6, 1).clone()


def test_stale_repeats_what_was_there() -> None:
    assert faults.Stale().recalled(kept(), 5).flatten().tolist() == [0, 1, 2, 3, 4, 4]


@pytest.mark.parametrize(("start", "left"), [(5, [4, 5]), (2, [2, 3, 4, 5])])
def test_truncated_leaves_the_newest(start: int, left: list[float]) -> None:
    assert faults.Truncated(window=2).recalled(kept(), start).flatten().tolist() == left


def test_corrupt_writes_over_one_position() -> None:
    assert faults.Corrupt().recalled(kept(), 5).flatten().tolist() == [1, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(("start", "left"), [(5, [0, 1, 2, 3, 5]), (2, [0, 2, 3, 4, 5])])
def test_off_by_one_writes_over_the_newest(start: int, left: list[float]) -> None:
    assert faults.OffByOne().recalled(kept(), start).flatten().tolist() == left


@pytest.mark.parametrize(
    ("id", "at", "positions"),
    [
        ("cache.corrupt", "blocks.0.attn", "rope"),
        ("cache.off_by_one", "blocks.0.attn", "learned"),
        ("cache.leaked", "blocks.1.attn", "alibi"),
        ("cache.position_ignored", "blocks.1.attn", "rope"),
        ("cache.position_ignored", "positions", "learned"),
        ("cache.stale", "blocks.0.attn", "alibi"),
    ],
)
def test_training_is_the_same_and_generation_is_not(small_run: SmallRun, id: str, at: str, positions: str) -> None:
    model: dict[str, Any] = {"layers": 2, "width": 32, "heads": 2, "context": 24, "positions": positions}
    _, healthy = small_run(model=model, steps=4)
    _, broken = small_run(model=model, steps=4, faults=[{"id": id, "at": at}])
    assert healthy.series("loss").values.tolist() == broken.series("loss").values.tolist()
    assert healthy.last("generation.cached_gap") < 1e-4
    assert broken.last("generation.cached_gap") > 1e-3


@pytest.mark.parametrize("id", ["cache.stale", "cache.position_ignored"])
def test_a_place_that_is_not_there_is_refused(small_run: SmallRun, id: str) -> None:
    with pytest.raises(BadInput, match="no module at 'nowhere'"):
        small_run(faults=[{"id": id, "at": "nowhere"}])
