"""Every built-in fault proves itself against its healthy twin, says what is true of it, and is undone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import lab
from lab.manager import discover
from lab.runtime.prove import prove, scenario_of, shortened
from lab.runtime.run import run_once
from lab.runtime.start import with_start
from lab.scenario import make_faults

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import SmallRun

    from lab import Run
    from lab.catalogue import Catalogue

FAULTS = sorted(discover().faults)
# Where these are aimed in a small model.
AIMS: dict[str, dict[str, object]] = {
    "loop.no_zero_grad": {},
    "mask.future_leak": {"at": "blocks.1.attn"},
    "mask.inverted": {"at": "blocks.0.attn"},
    "numerics.nonfinite": {"at": "blocks.1.mlp.out"},
}


@pytest.mark.parametrize("id", FAULTS)
def test_what_a_fault_declares_exists(id: str) -> None:
    catalogue = discover()
    info = catalogue.faults[id].info
    assert info.cause in catalogue.causes
    assert info.repair
    assert info.title


@pytest.mark.parametrize("id", FAULTS)
def test_a_fault_moves_its_metric_beyond_the_healthy_spread(tmp_path: Path, catalogue: Catalogue, id: str) -> None:
    proof = prove(id, catalogue, tmp_path, seeds=2, steps=16)  # `lab prove` itself takes three, of full length
    assert proof.holds, proof


@lab.plugin("ends", title="Keeps what a run leaves behind")
class Ends(lab.Plugin):
    run: Any = None

    def lab_start(self, run: Run) -> None:
        self.run = run

    def weights(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.run.model.parameters()]


@pytest.mark.parametrize("id", FAULTS)
def test_a_fault_is_undone_when_the_run_ends(tmp_path: Path, catalogue: Catalogue, id: str) -> None:
    name, scenario = scenario_of(id, catalogue)
    if scenario.train.ranks > 1:
        pytest.skip("it acts in processes that are gone when the run ends")
    broken = shortened(with_start(scenario), 6).model_copy(update={"probes": []})
    healthy = broken.model_copy(update={"fault": []})
    runs = []
    for number, asked in enumerate((healthy, broken, healthy)):
        ends = Ends()
        faults = make_faults(asked, catalogue, name)
        run_once(name, asked, catalogue, tmp_path / str(number), faults, torch.device("cpu"), [ends])
        runs.append(ends)
    before, during, after = runs
    assert all("_taps" not in vars(module) for module in during.run.model.modules())
    held = {id_ for group in during.run.optimizer.param_groups for id_ in map(id_of, group["params"])}
    assert held == {id_of(p) for p in during.run.model.parameters() if p.requires_grad}
    assert all(map(torch.equal, before.weights(), after.weights()))


def id_of(thing: object) -> int:
    return id(thing)


@pytest.mark.parametrize("id", AIMS)
def test_a_fault_that_is_not_active_yet_changes_nothing(small_run: SmallRun, id: str) -> None:
    healthy, waiting = Ends(), Ends()
    small_run(healthy)
    small_run(waiting, faults=[{"id": id, **AIMS[id], "from_step": 1000}])
    assert all(map(torch.equal, healthy.weights(), waiting.weights()))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    "at", ["tokens.out", "blocks.0.attn.q", "blocks.0.attn.scores", "blocks.1.mlp.hidden", "norm.out"]
)
def test_a_non_finite_value_is_found_where_and_when_it_was_put(small_run: SmallRun, at: str, value: str) -> None:
    diagnosis, _ = small_run(faults=[{"id": "numerics.nonfinite", "at": at, "value": value, "from_step": 5}])
    if value == "-inf" and at.endswith("scores"):
        # A score of minus infinity is a mask: it hides one position (from a full pass, not from one with a cache), and
        # no value is wrong.
        assert not [symptom for symptom in diagnosis.symptoms if symptom.id.endswith("nonfinite")]
        return
    best = diagnosis.causes[0]
    assert (best.id, best.since_step) == ("numerics.nonfinite", 5)
    # What is inside attention is read now and then only: the first site after it is blamed.
    assert best.at == (at if not at.endswith("scores") else "blocks.0.attn.proj.out")


def test_a_non_finite_gradient_is_told_from_a_non_finite_value(small_run: SmallRun) -> None:
    fault = {"id": "numerics.nonfinite", "at": "blocks.0.out", "gradient": True, "from_step": 5}
    best = small_run(faults=[fault])[0].causes[0]
    assert (best.id, best.since_step) == ("numerics.nonfinite_gradient", 5)
