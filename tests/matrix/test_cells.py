"""The cells of the matrix: two sets that share nothing, the same each time, each a scenario that can be run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from lab.matrix.cells import CHOICES, STEPS, aims, cells, configured
from lab.projects import PROJECTS

if TYPE_CHECKING:
    from lab.catalogue import Catalogue


def test_the_two_sets_share_no_size_no_rate_and_no_seed(catalogue: Catalogue) -> None:
    for name, options in CHOICES["develop"].items():
        assert not set(options) & set(CHOICES["held-out"][name]), name
    seeds = [{cell.seed for cell in cells(catalogue, which=which, seeds=50)} for which in ("develop", "held-out")]
    assert not seeds[0] & seeds[1]


def test_every_project_is_healthy_once_and_every_fault_is_tried(catalogue: Catalogue) -> None:
    found = list(cells(catalogue))
    assert len({cell.key for cell in found}) == len(found)
    assert [cell.project for cell in found if not cell.fault] == [project.id for project in PROJECTS]
    assert {cell.fault for cell in found} - {""} == set(catalogue.faults) == set(aims(catalogue))


@pytest.mark.parametrize("which", ["develop", "held-out"])
def test_a_configuration_is_the_same_each_time_and_differs_by_seed(catalogue: Catalogue, which: str) -> None:
    known = aims(catalogue)
    models = set()
    for cell in cells(catalogue, which=which, seeds=6, project="attention"):  # type: ignore[arg-type]
        scenario = configured(cell, known.get(cell.fault))
        assert scenario == configured(cell, known.get(cell.fault))
        assert scenario.steps == STEPS
        assert scenario.model.width in CHOICES[which]["width"]  # type: ignore[index]
        assert [section.id for section in scenario.fault] == ([cell.fault] if cell.fault else [])
        assert all(section.parameters.get("from_step", 0) < STEPS for section in scenario.fault)
        models.add((scenario.model, scenario.data.source, scenario.train.lr))
    assert len(models) >= 3


def test_what_a_project_is_about_is_kept(catalogue: Catalogue) -> None:
    scenarios = {cell.project: configured(cell, None) for cell in cells(catalogue) if not cell.fault}
    assert scenarios["recurrent"].model.mixer in ("rnn", "gru", "lstm")
    assert scenarios["convolution"].model.mixer == "convolution"
    assert scenarios["encoder"].train.objective == "masked"
    assert scenarios["linear"].model.layers == 0
    assert scenarios["alignment"].train.objective == "dpo"
    assert scenarios["distributed"].train.ranks == 2
