"""The cells of the matrix: two sets that share nothing, the same each time, each a scenario that can be run."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from lab.matrix.cells import (
    CHOICES,
    LATEST,
    STEPS,
    Cell,
    aimed,
    aims,
    cells,
    configured,
    drawn,
    healthy_cells,
    pair_cells,
    unknown_cells,
)
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
        used = [aimed(cell, known[fault]) for fault in cell.faults]
        scenario = configured(cell, used)
        assert scenario == configured(cell, [aimed(cell, known[fault]) for fault in cell.faults])
        assert scenario.steps == STEPS
        assert scenario.model.width in CHOICES[which]["width"]  # type: ignore[index]
        assert [section.id for section in scenario.fault] == ([cell.fault] if cell.fault else [])
        assert all(section.parameters.get("from_step", 0) <= LATEST for section in scenario.fault)
        models.add((scenario.model, scenario.data.source, scenario.train.lr))
    assert len(models) >= 3


def test_what_a_project_is_about_is_kept(catalogue: Catalogue) -> None:
    scenarios = {cell.project: configured(cell) for cell in cells(catalogue) if not cell.fault}
    assert scenarios["recurrent"].model.mixer in ("rnn", "gru", "lstm")
    assert scenarios["convolution"].model.mixer == "convolution"
    assert scenarios["encoder"].train.objective == "masked"
    assert scenarios["linear"].model.layers == 0
    assert scenarios["alignment"].train.objective == "dpo"
    assert scenarios["distributed"].train.ranks == 2


def test_a_fault_is_aimed_at_another_layer_and_step_and_its_place_moves_along(catalogue: Catalogue) -> None:
    aim = aims(catalogue)["mask.future_leak"]
    places, begins = set(), set()
    for seed in range(12):
        cell = Cell(("mask.future_leak",), "attention", "healthy-attention", seed, "develop")
        moved = aimed(cell, aim)
        assert moved.at == moved.section.parameters["at"] == moved.reach
        assert int(moved.at.split(".")[1]) < configured(cell).model.layers
        assert aimed(cell, aim, late=False).from_step == 0
        places.add(moved.at)
        begins.add(moved.from_step)
    assert len(places) > 1
    assert {0} < begins


def test_the_place_of_a_fault_of_all_layers_stays(catalogue: Catalogue) -> None:
    aim = replace(aims(catalogue)["attention.no_scale"], reach="blocks.*.attn", at="")
    cell = Cell(("attention.no_scale",), "attention", "healthy-attention", 3, "develop")
    assert (aimed(cell, aim).at, aimed(cell, aim).reach) == (aim.at, aim.reach)


def test_healthy_runs_of_all_projects_differ(catalogue: Catalogue) -> None:
    found = list(healthy_cells(60))
    assert len({cell.key for cell in found}) == len(found) == 60
    assert {cell.project for cell in found} == {project.id for project in PROJECTS}
    models = {configured(cell).model for cell in found if cell.project == "attention"}
    assert len(models) == 3


def test_a_share_is_the_same_each_time_and_keeps_the_healthy_runs(catalogue: Catalogue) -> None:
    every = list(cells(catalogue))
    some = drawn(every, 0.1)
    assert some == drawn(every, 0.1)
    assert [cell for cell in some if not cell.faults] == [cell for cell in every if not cell.faults]
    broken = [cell for cell in every if cell.faults]
    assert len([cell for cell in some if cell.faults]) == round(len(broken) / 10)
    assert drawn(every, 1.0) == every


def test_a_pair_comes_after_its_two_faults_and_a_cause_that_is_taken_away_is_that_of_the_fault(
    catalogue: Catalogue,
) -> None:
    found = list(pair_cells(catalogue, 5))
    for first, second, both in zip(found[0::3], found[1::3], found[2::3], strict=True):
        assert both.faults == first.faults + second.faults
        assert (first.seed, first.project) == (second.seed, second.project) == (both.seed, both.project)
    unknown = list(unknown_cells(catalogue, 5))
    assert len({cell.fault for cell in unknown}) == 5
    assert all(cell.without == catalogue.faults[cell.fault].info.cause for cell in unknown)
    assert found == list(pair_cells(catalogue, 5))
    assert unknown != list(unknown_cells(catalogue, 5, "held-out"))
