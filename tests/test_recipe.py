"""What a run was made of is read back, and nothing that is hidden."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from lab.errors import BadInput
from lab.files import RUN, write_run_file
from lab.learn.blind import Answer, keep, seal, shown
from lab.recipe import find_recipe, read_recipe
from lab.scenario import load_scenario

if TYPE_CHECKING:
    from pathlib import Path

NAME, SCENARIO = load_scenario("asked-and-answered")


def written(folder: Path, *, hidden: bool = False) -> Path:
    folder.mkdir()
    kept = shown(SCENARIO) if hidden else SCENARIO
    dumped = kept.model_dump(by_alias=True, exclude_none=True)
    write_run_file(folder, "run", dumped, 3, plugins=("mine.py",), use={"attention": "attention.py"})
    return folder


def test_a_run_is_read_back_as_it_was_asked_for(tmp_path: Path) -> None:
    recipe = find_recipe(str(written(tmp_path / "run")))
    assert recipe.scenario == SCENARIO
    assert (recipe.plugins, recipe.uses) == (("mine.py",), {"attention": "attention.py"})


def test_a_scenario_is_found_by_its_id_and_a_folder_without_a_run_is_none(tmp_path: Path) -> None:
    assert find_recipe(NAME).scenario == SCENARIO
    with pytest.raises(BadInput, match="did you mean 'asked-and-answered'"):
        find_recipe("asked-and-answerd")
    with pytest.raises(BadInput, match="holds no run"):
        find_recipe(str(tmp_path))


def test_a_training_that_the_lab_did_not_write_has_none(tmp_path: Path) -> None:
    write_run_file(tmp_path, "watch", {}, 0)
    assert read_recipe(tmp_path).scenario is None


def test_a_blind_run_stays_hidden_until_it_was_answered(tmp_path: Path) -> None:
    folder = written(tmp_path / "run", hidden=True)
    seal(folder, NAME, SCENARIO)
    with pytest.raises(BadInput, match="lab answer"):
        find_recipe(str(folder))
    keep(folder, Answer("healthy"), [], 0)
    recipe = find_recipe(str(folder))
    assert (recipe.name, recipe.scenario) == (NAME, SCENARIO)


@pytest.mark.parametrize(
    "text", ["", "run = 3", "[run]\nscenario = 'x'\n", "= =", "[run]\nscenario='x'\n[scenario]\ntitle=3"]
)
def test_a_damaged_run_file_is_told_in_a_line(tmp_path: Path, text: str) -> None:
    (tmp_path / RUN).write_text(text)
    with pytest.raises(BadInput, match=RUN):
        read_recipe(tmp_path)
