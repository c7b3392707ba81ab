"""Every built-in fault proves itself against its healthy twin, says what is true of it, and is undone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import lab
from lab.manager import discover

if TYPE_CHECKING:
    from conftest import SmallRun

    from lab import History, Run

# Where each is aimed in a small model, and the site at which its metric is read.
AIMS: dict[str, tuple[dict[str, object], str]] = {
    "init.too_large": ({}, ""),
    "loop.no_zero_grad": ({}, ""),
    "mask.future_leak": ({"at": "blocks.1.attn"}, ""),
    "mask.inverted": ({"at": "blocks.0.attn"}, ""),
    "numerics.nonfinite": ({"at": "blocks.1.mlp.out", "from_step": 3}, "blocks.1.mlp.out"),
    "optimizer.missing_parameter": ({"at": "blocks.0.mlp.up.weight"}, "blocks.0.mlp.up.weight"),
}


def test_every_fault_is_aimed_here() -> None:
    assert set(AIMS) == set(discover().faults)


@pytest.mark.parametrize("id", AIMS)
def test_what_a_fault_declares_exists(id: str) -> None:
    catalogue = discover()
    info = catalogue.faults[id].info
    assert info.cause in catalogue.causes
    assert info.repair
    assert info.title


def last(history: History, metric: str, site: str) -> float:
    return float(history.series(metric, site).values[-1])


@pytest.mark.parametrize("id", AIMS)
def test_a_fault_moves_its_metric_beyond_the_healthy_spread(small_run: SmallRun, id: str) -> None:
    aim, site = AIMS[id]
    metric = discover().faults[id].info.moves
    healthy = np.array([last(small_run(seed=seed)[1], metric, site) for seed in range(3)])
    broken = np.array([last(small_run(faults=[{"id": id, **aim}], seed=seed)[1], metric, site) for seed in range(3)])
    shift = np.abs(broken - healthy)
    assert np.all(~np.isfinite(broken) | (shift > 3 * healthy.std() + 1e-6)), (healthy, broken)


@lab.plugin("ends", title="Keeps what a run leaves behind")
class Ends(lab.Plugin):
    run: Any = None

    def lab_start(self, run: Run) -> None:
        self.run = run

    def weights(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.run.model.parameters()]


@pytest.mark.parametrize("id", AIMS)
def test_a_fault_is_undone_when_the_run_ends(small_run: SmallRun, id: str) -> None:
    before, during, after = Ends(), Ends(), Ends()
    small_run(before)
    small_run(during, faults=[{"id": id, **AIMS[id][0]}])
    small_run(after)
    assert all("_taps" not in vars(module) for module in during.run.model.modules())
    held = {id_ for group in during.run.optimizer.param_groups for id_ in map(id_of, group["params"])}
    assert held == set(map(id_of, during.run.model.parameters()))
    assert all(map(torch.equal, before.weights(), after.weights()))


def id_of(thing: object) -> int:
    return id(thing)


@pytest.mark.parametrize("id", ["mask.future_leak", "mask.inverted", "numerics.nonfinite", "loop.no_zero_grad"])
def test_a_fault_that_is_not_active_yet_changes_nothing(small_run: SmallRun, id: str) -> None:
    healthy, waiting = Ends(), Ends()
    small_run(healthy)
    small_run(waiting, faults=[{"id": id, **AIMS[id][0], "from_step": 1000}])
    assert all(map(torch.equal, healthy.weights(), waiting.weights()))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    "at", ["tokens.out", "blocks.0.attn.q", "blocks.0.attn.scores", "blocks.1.mlp.hidden", "norm.out"]
)
def test_a_non_finite_value_is_found_where_and_when_it_was_put(small_run: SmallRun, at: str, value: str) -> None:
    diagnosis, _ = small_run(faults=[{"id": "numerics.nonfinite", "at": at, "value": value, "from_step": 5}])
    if value == "-inf" and at.endswith("scores"):
        # A score of minus infinity is a mask: it hides one position, and no value is wrong.
        assert diagnosis.verdict == "healthy"
        return
    best = diagnosis.causes[0]
    assert (best.id, best.since_step) == ("numerics.nonfinite", 5)
    # What is inside attention is read now and then only: the first site after it is blamed.
    assert best.at == (at if not at.endswith("scores") else "blocks.0.attn.proj.out")


def test_a_non_finite_gradient_is_told_from_a_non_finite_value(small_run: SmallRun) -> None:
    fault = {"id": "numerics.nonfinite", "at": "blocks.0.out", "gradient": True, "from_step": 5}
    best = small_run(faults=[fault])[0].causes[0]
    assert (best.id, best.since_step) == ("numerics.nonfinite_gradient", 5)
