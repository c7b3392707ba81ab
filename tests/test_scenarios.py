"""The shipped scenarios end as expected, and the healthy ones have no symptom."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from lab.runtime.run import run_scenario
from lab.scenario import load_scenario
from lab.shelf import find_scenarios

if TYPE_CHECKING:
    from pathlib import Path

    from lab.catalogue import Catalogue

NAMES = sorted(find_scenarios())
NOT_THERE = (
    "no attention in this model",
    "need not be causal",
    "no positions",
    "padding",
    "takes no cache",
    "no cache can be right",
    "the model's cache is of another kind",
    "no layer norm and no RMS norm",
    "there is one process",
    "more goes into the model than tokens",
    "weights are cut between the processes",
    "the formula of ShardedAdamW is not known here",
    "no adapter in this model",
    "no convolution over positions in this model",
    "no recurrence in this model",
    "no reference in this run",
    "no table of classes",
    "no weights were loaded while the run was built",
    "no two tables of the same shape are trained",
    "no form of the cross-entropy",
    "no cache was found to work with this model",
    "no feed-forward layer in this model",
    "no list of blocks with norms",
    "no module of this model depends on its mode",
    "no end of a text is known",
    "no training whose evaluation is known",
    "no layer's weights have moved far enough to tell",
    "the lab's own training",
    "no weights that were taken of the model",
    "nothing was compiled",
)
# `lab matrix` varies more, and `lab prove` compares with the twin: here each is run once, and alone.


@pytest.mark.parametrize("name", NAMES)
def test_a_scenario_ends_as_expected(tmp_path: Path, catalogue: Catalogue, name: str) -> None:
    scenario = load_scenario(name)[1]
    # Of faults between processes this is the only comparison with the twin.
    outcome = run_scenario(name, scenario, catalogue, tmp_path / "run", twin=scenario.train.ranks > 1)
    assert outcome.differences == ()
    if not scenario.fault:
        assert outcome.diagnosis.verdict == "healthy"
        assert outcome.diagnosis.symptoms == ()
        for reason in outcome.diagnosis.not_checked.values():
            assert any(text in reason for text in NOT_THERE), "only what the model does not have may go unchecked"
    else:
        assert len(outcome.diagnosis.causes) == 1
        assert outcome.diagnosis.unexplained == ()
    if scenario.fault and scenario.train.ranks > 1:
        moved = [c for c in outcome.checks if c.metric == catalogue.faults[scenario.fault[0].id].info.moves]
        assert moved
        for check in moved:
            assert check.value is not None
            assert check.twin_value is not None
            assert abs(check.value - check.twin_value) > 1e-6 * abs(check.twin_value)


def test_there_is_a_scenario_for_each_fault(catalogue: Catalogue) -> None:
    used = {section.id for name in NAMES for section in load_scenario(name)[1].fault}
    assert used == set(catalogue.faults)
