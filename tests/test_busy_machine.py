"""Faults that are told by time and by threads, beside a process that keeps a core busy: a part of a benchmark."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from lab.catalogue import Catalogue

FILE = Path(__file__).parent.parent / "benchmarks" / "performance_faults.py"


@pytest.fixture(scope="module")
def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("performance_faults", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # what another process is to run is found by this name
    spec.loader.exec_module(module)
    return module


def test_each_fault_of_the_family_is_tried(benchmark: Any, catalogue: Catalogue) -> None:
    family = {id for id in catalogue.faults if id.startswith("performance.")}
    assert {fault for fault, _ in benchmark.scenarios()} == family
    assert len([*benchmark.scenarios(every=True)]) > len(family)


# Waiting is told after 21 steps, threads after three.
@pytest.mark.parametrize(("fault", "steps"), [("performance.loader_bound", 24), ("performance.too_many_threads", 4)])
def test_what_time_and_threads_tell_they_tell_on_a_busy_machine(
    benchmark: Any, catalogue: Catalogue, fault: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(FILE.parent))
    with benchmark.busy(1):
        shown = benchmark.show(dict(benchmark.scenarios())[fault], 0, catalogue, steps)
    assert shown.right
