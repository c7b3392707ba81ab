"""What a run is made of, so that it can be made again: its scenario, its plugins, and the learner's components."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lab.errors import BadInput, one_line
from lab.files import RUN
from lab.learn.blind import SEALED, is_sealed, unseal
from lab.scenario import Scenario, explain, load_scenario


@dataclass(frozen=True)
class Recipe:
    """What to run.

    Attributes:
        name: What the scenario is called.
        scenario: It, read; None for a training that the lab did not write, which it cannot run.
        plugins: Those that were asked for by name.
        uses: The learner's files, by the id of the project.
    """

    name: str
    scenario: Scenario | None
    plugins: tuple[str, ...] = ()
    uses: dict[str, str] = field(default_factory=dict)


def read_recipe(folder: Path) -> Recipe:
    """Return what the run in a folder was made of, as far as that is not hidden.

    Raises:
        BadInput: The folder holds no run, or what it says of it cannot be read.
    """
    path = folder / RUN
    try:
        about: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        run, dumped = about["run"], about["scenario"]
        name, plugins, uses = run["scenario"], tuple(run.get("plugins", ())), dict(run.get("use", {}))
        if not dumped:
            return Recipe(name, None)
        scenario = Scenario.model_validate(dumped)
    except (FileNotFoundError, NotADirectoryError):
        raise BadInput(f"{folder}: holds no run; a run folder has a {RUN}") from None
    except ValidationError as error:
        raise BadInput(f"{path}: scenario: {explain(error, Scenario)}") from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise BadInput(f"{path}: not what the lab wrote: {one_line(error)}") from None
    return Recipe(name, scenario, plugins, uses)


def find_recipe(given: str) -> Recipe:
    """Return the recipe of a run folder, or of a scenario by its id or the path of its file.

    Of a blind run that was answered it is what had been hidden.

    Raises:
        BadInput: It is neither, or it is to stay hidden.
    """
    folder = Path(given)
    if not folder.is_dir():
        return Recipe(*load_scenario(given))
    recipe = read_recipe(folder)
    if is_sealed(folder):
        raise BadInput(f"{folder}: a blind run; say first what is wrong with it: lab answer {folder}")
    if (folder / SEALED).is_file():
        name, scenario, _ = unseal(folder)
        return replace(recipe, name=name, scenario=scenario)
    return recipe
