"""Every built-in fault proves itself against its healthy twin, says what is true of it, and is undone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import lab
from lab.errors import BadInput
from lab.manager import discover
from lab.runtime.prove import prove, scenario_of, shortened
from lab.runtime.run import run_once
from lab.runtime.start import with_start
from lab.scenario import make_faults

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import SmallRun

    from lab import Run, Step
    from lab.catalogue import Catalogue

FAULTS = sorted(discover().faults)
LATE_TO_SHOW = ("loss.log_of_zero",)  # a probability has to become small first


@pytest.mark.parametrize("id", FAULTS)
def test_what_a_fault_declares_exists(id: str) -> None:
    catalogue = discover()
    info = catalogue.faults[id].info
    assert info.cause in catalogue.causes
    assert info.repair
    assert info.title


@pytest.mark.parametrize("id", FAULTS)
def test_a_fault_moves_its_metric_beyond_the_healthy_spread(tmp_path: Path, catalogue: Catalogue, id: str) -> None:
    if scenario_of(id, catalogue)[1].train.ranks > 1:
        pytest.skip("several processes take seconds to start: tests/test_scenarios.py compares it with its twin")
    # `lab prove` itself takes three seeds, of full length.
    proof = prove(id, catalogue, tmp_path, seeds=2, steps=None if id in LATE_TO_SHOW else 16)
    assert proof.holds, proof


@lab.plugin("ends", title="Keeps what a run leaves behind")
class Ends(lab.Plugin):
    """Keeps the run, the loss of each step and what the run ends with."""

    run: Any = None

    def __init__(self) -> None:
        self.losses: list[torch.Tensor] = []

    def lab_start(self, run: Run) -> None:
        self.run = run

    def lab_step_end(self, step: Step) -> None:
        assert step.loss is not None
        self.losses.append(step.loss.detach().clone())

    def equals(self, other: Ends, steps: int | None = None) -> bool:
        """Whether the losses of the first steps are equal bit by bit; of all, the weights and the sample too."""
        mine, others = self.losses[:steps], other.losses[:steps]
        if not all(map(same, mine, others)) or len(mine) != len(others):
            return False
        weights = zip(self.run.model.parameters(), other.run.model.parameters(), strict=True)
        sample = self.run.history.facts["sample"] == other.run.history.facts["sample"]
        return steps is not None or (sample and all(same(a, b) for a, b in weights))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal bit for bit, NaN included."""
    return a.shape == b.shape and a.detach().numpy().tobytes() == b.detach().numpy().tobytes()


STEPS, BEGINS = 6, 3


@pytest.mark.parametrize("id", FAULTS)
def test_a_fault_acts_from_its_step_on_and_is_undone_when_the_run_ends(
    tmp_path: Path, catalogue: Catalogue, id: str
) -> None:
    name, scenario = scenario_of(id, catalogue)
    if scenario.train.ranks > 1:
        pytest.skip("it acts in processes that are gone when the run ends")
    broken = shortened(with_start(scenario), STEPS).model_copy(update={"probes": []})

    def run(*, faulty: bool = True, from_step: int | None = None) -> Ends:
        sections = broken.fault if faulty else []
        if from_step is not None:
            sections = [section.model_copy(update={"from_step": from_step}) for section in sections]
        asked, ends = broken.model_copy(update={"fault": sections}), Ends()
        faults, folder = make_faults(asked, catalogue, name), tmp_path / f"{faulty}-{from_step}-{len(runs)}"
        run_once(name, asked, catalogue, folder, faults, torch.device("cpu"), [ends])
        runs.append(ends)
        return ends

    runs: list[Ends] = []
    before, during, after = run(faulty=False), run(), run(faulty=False)
    assert before.equals(after)
    assert during.run.sites.taps == {}
    for module in during.run.model.modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        assert "_taps" not in vars(module)
        assert not any(hooks)
    held = {id_ for group in during.run.optimizer.param_groups for id_ in map(id_of, group["params"])}
    assert held == {id_of(p) for p in during.run.model.parameters() if p.requires_grad}
    decays = [[group["weight_decay"] for group in ends.run.optimizer.param_groups] for ends in (before, during)]
    assert decays[0] == decays[1]
    try:
        never = run(from_step=STEPS)
    except BadInput as refused:
        assert "from_step" in str(refused)  # noqa: PT017 - it may refuse, but must say what
        return
    assert never.equals(before)
    assert run(from_step=BEGINS).equals(before, BEGINS)


def id_of(thing: object) -> int:
    return id(thing)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    "at", ["tokens.out", "blocks.0.attn.q", "blocks.0.attn.scores", "blocks.1.mlp.hidden", "norm.out"]
)
def test_a_non_finite_value_is_found_where_and_when_it_was_put(small_run: SmallRun, at: str, value: str) -> None:
    diagnosis, _ = small_run(faults=[{"id": "numerics.nonfinite", "at": at, "value": value, "from_step": 6}])
    if value == "-inf" and at.endswith("scores"):
        # A score of minus infinity is a mask: it hides one position (from a full pass, not from one with a cache), and
        # no value is wrong.
        assert not [symptom for symptom in diagnosis.symptoms if symptom.id.endswith("nonfinite")]
        return
    best = diagnosis.causes[0]
    if value == "-inf" and at.endswith(".q"):
        # Scores of minus infinity hide what they belong to: what comes out is finite, and only its slope is not.
        assert (best.id, best.since_step) == ("numerics.nonfinite_gradient", 6)
        return
    assert (best.id, best.since_step) == ("numerics.nonfinite", 6)
    # What is inside attention is read now and then only: the first site after it is blamed.
    assert best.at == (at if not at.endswith("scores") else "blocks.0.attn.proj.out")


def test_a_non_finite_gradient_is_told_from_a_non_finite_value(small_run: SmallRun) -> None:
    fault = {"id": "numerics.nonfinite", "at": "blocks.0.out", "gradient": True, "from_step": 6}
    best = small_run(faults=[fault])[0].causes[0]
    assert (best.id, best.since_step) == ("numerics.nonfinite_gradient", 6)
