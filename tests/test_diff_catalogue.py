"""`lab diff` finds the faults of the catalogue from two folders: a share of what benchmarks/diff_catalogue.py tries."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lab.manager import discover

if TYPE_CHECKING:
    from lab.catalogue import Catalogue

FILE = Path(__file__).parent.parent / "benchmarks" / "diff_catalogue.py"
# Those that take more than the first place that differs; beside them one of each family that has none here.
HARD = (
    "alignment.reference_averaged",
    "cache.leaked",
    "clip.before_unscale",
    "data.vocabulary_mismatch",
    "distributed.initialised_apart",
    "distributed.sync_too_early",
    "loop.no_step",
    "loop.no_zero_grad",
    "loop.zero_grad_late",
    "norm.missing",
    "optimizer.stale_parameters",
    "performance.recompilation",
    "performance.recompute",
    "targets.answers_cut",
)


def _benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("diff_catalogue", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


benchmark = _benchmark()
CATALOGUE = discover()
PLACED: list[str] = benchmark.placed(CATALOGUE)
FAMILIES = {fault.partition(".")[0]: fault for fault in (*reversed(PLACED), *HARD)}
SAMPLE = sorted({*HARD, *FAMILIES.values()})


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory, catalogue: Catalogue) -> Any:
    return benchmark.Twins(catalogue, tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("fault", SAMPLE)
def test_a_fault_is_found_at_its_step_and_in_its_place(twins: Any, fault: str) -> None:
    found = twins.compare(fault)
    assert found.right, (found.expected, found.step, found.aim.at, found.place)


def test_what_is_tried_is_in_the_catalogue() -> None:
    assert set(HARD) <= set(PLACED)


@pytest.mark.parametrize("fault", ["performance.loop_over_heads", "performance.retained_graph"])
def test_waste_leaves_every_number_as_it_is_and_is_told_as_work(twins: Any, fault: str) -> None:
    found = twins.compare(fault)
    assert found.difference.first is None
    assert found.right, (found.expected, found.step, found.aim.at, found.place)
