"""What the tests share: a catalogue, and small runs."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Protocol

import pytest
import torch
from hypothesis import HealthCheck, settings

from lab.manager import discover
from lab.runtime.run import run_once
from lab.scenario import FaultSection, Scenario, make_faults

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lab.catalogue import Catalogue, Plugin
    from lab.diagnosis.model import Diagnosis
    from lab.store import History

# A busy machine is no reason for a test to fail.
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")
# Two processes on two cores: a thread each.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_group_is_left() -> Iterator[None]:
    """Lightning says in the environment which process this is, and accelerate joins a group that it finds there."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def catalogue() -> Catalogue:
    return discover()


class SmallRun(Protocol):
    """Runs a small model for a few steps, with faults and more plugins."""

    def __call__(
        self, *plugins: Plugin, faults: list[dict[str, object]] | None = None, probes: bool = True, **changes: object
    ) -> tuple[Diagnosis, History]: ...


@pytest.fixture
def small_run(tmp_path: Path, catalogue: Catalogue) -> SmallRun:
    count = 0

    def run(
        *plugins: Plugin, faults: list[dict[str, object]] | None = None, probes: bool = True, **changes: object
    ) -> tuple[Diagnosis, History]:
        nonlocal count
        count += 1
        scenario = Scenario.model_validate(
            {
                "title": "small",
                "project": "decoder",
                "steps": 12,
                "model": {"layers": 2, "width": 32, "heads": 2, "context": 24},
                "data": {"source": "markov", "batch": 4},
                "probes": None if probes else [],
                **changes,
            }
        )
        sections = [FaultSection.model_validate(fault) for fault in faults or []]
        made = make_faults(scenario.model_copy(update={"fault": sections}), catalogue, "small")
        folder = tmp_path / f"run-{count}"
        return run_once("small", scenario, catalogue, folder, made, torch.device("cpu"), list(plugins))

    return run
