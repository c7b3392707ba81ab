"""``lab run``: train, break, watch, diagnose."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lab.cli.build import ready_project
from lab.cli.options import RUNS, json_option, load_catalogue, plugin_option, print_json
from lab.errors import BadInput
from lab.files import METRICS, RUN, new_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.catalogue import Catalogue
    from lab.runtime.run import Outcome
    from lab.scenario import Scenario


@click.command()
@click.argument("scenario", required=False)
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), help="In place of the scenario's seed.")
@click.option("--steps", type=click.IntRange(1, 10_000_000), help="In place of the scenario's number of steps.")
@click.option("--out", type=click.Path(path_type=Path), help="The run folder; by default a new one in ./runs.")
@click.option(
    "--resume", type=click.Path(path_type=Path), metavar="RUN", help="Go on with a run that was stopped, in its folder."
)
@click.option("--blind", is_flag=True, help="Draw a scenario by --seed, and hide which: say what is wrong with it.")
@click.option("--project", default="", help="With --blind: draw from this project.")
@click.option("--device", default="cpu", show_default=True, help="Where the model lives: cpu, cuda, cuda:1, ...")
@click.option("--twin/--no-twin", default=True, show_default=True, help="Run the healthy twin too, and compare.")
@click.option(
    "--use", "uses", multiple=True, metavar="PROJECT=FILE", help="Run with your own component. May be repeated."
)
@json_option
@plugin_option
def run(
    scenario: str | None,
    *,
    seed: int | None,
    steps: int | None,
    out: Path | None,
    resume: Path | None,
    blind: bool,
    project: str,
    device: str,
    twin: bool,
    uses: tuple[str, ...],
    as_json: bool,
    plugins: tuple[str, ...],
) -> int:
    """Run SCENARIO (an id from `lab list scenarios`, or a .toml file) and diagnose it.

    A run that was stopped goes on with --resume: from its last checkpoint (train.checkpoint_every), to the same
    numbers as if it had never stopped.

    With --blind there is no SCENARIO and no diagnosis: look at the run, then say `lab answer RUN --cause ... --at ...`.

    Exit status: 0 when everything is as the scenario expects, 1 when not.
    """
    if blind:
        if scenario is not None or resume is not None:
            raise BadInput("--blind draws a scenario itself: give none, and no --resume with it")
        return run_blind(project, seed or 0, steps, out, device, plugins)
    if project:
        raise BadInput("--project goes with --blind")
    if resume is not None:
        if scenario is not None or seed is not None or steps is not None or out is not None:
            raise BadInput("--resume goes on with a run as it was: give no scenario, --seed, --steps or --out with it")
        name, loaded, plugins, uses = stopped(resume, plugins, uses)
        given = name
    else:
        name, loaded = asked(scenario, seed, steps)
        given = scenario or name
    catalogue = checked(loaded, plugins, given)
    folder = resume or out or new_name(name, loaded.seed)

    use_components(uses)
    from lab.runtime.run import find_device, run_scenario

    find_device(device)
    if resume is None:
        new_folder(folder)
    with refused_runs_removed(folder, given, device):
        outcome = run_scenario(
            name,
            loaded,
            catalogue,
            folder,
            device=device,
            twin=twin,
            tools=lambda: list(catalogue.plugins.values()),
            resume=resume is not None,
        )
    tell(outcome, as_json=as_json)
    return 0 if outcome.as_expected else 1


@contextlib.contextmanager
def refused_runs_removed(folder: Path, given: str, device: str) -> Iterator[None]:
    """Remove the folder of a run that was refused, and name in the error what was given.

    Raises:
        BadInput: The block raised it, or needs more memory than there is.
    """
    try:
        yield
    except BadInput as error:
        discard(folder)
        raise BadInput(f"{given}: {error}") from None
    except RuntimeError as error:
        if "allocate" not in str(error):  # torch has no error of its own for this on a CPU
            raise
        discard(folder)
        raise BadInput(f"{given}: does not fit in the memory of {device}; lower data.batch or [model]") from None


def tell(outcome: Outcome, *, as_json: bool) -> None:
    """Print what a scenario showed."""
    if "tools_set_aside" in outcome.facts:
        click.echo(f"lab: set aside, since it raised: {outcome.facts['tools_set_aside']}", err=True)
    if as_json:
        print_json(outcome.to_dict())
        return
    from rich.console import Console

    from lab.cli.report import print_outcome

    print_outcome(outcome, Console())


def asked(scenario: str | None, seed: int | None, steps: int | None) -> tuple[str, Scenario]:
    """Return the scenario that was asked for, with its name.

    Raises:
        BadInput: None was, or there is none of that name.
    """
    from lab.scenario import load_scenario

    if scenario is None:
        raise BadInput("give a scenario: lab list scenarios")
    name, loaded = load_scenario(scenario)
    changes = {key: value for key, value in (("seed", seed), ("steps", steps)) if value is not None}
    return name, loaded.model_copy(update=changes)


def checked(scenario: Scenario, plugins: tuple[str, ...], where: str) -> Catalogue:
    """Return the catalogue, in which all that a scenario names exists: checked before torch is imported.

    Raises:
        BadInput: Something does not.
    """
    from lab.scenario import check_names, make_faults

    catalogue = load_catalogue(plugins)
    check_names(scenario, catalogue, where)
    make_faults(scenario, catalogue, where)
    return catalogue


def run_blind(
    project: str, seed: int, steps: int | None, out: Path | None, device: str, plugins: tuple[str, ...]
) -> int:
    """Run a drawn scenario with every probe and without a rule, and say where it is kept.

    Raises:
        BadInput: There is no such project, or nothing to draw from.
    """
    from lab.catalogue import Catalogue
    from lab.errors import nearest
    from lab.learn.blind import draw, seal, shown
    from lab.projects import PROJECTS
    from lab.scenario import make_faults

    known = [each.id for each in PROJECTS]
    if project and project not in known:
        raise BadInput(f"--project {project}: no such project{nearest(project, known)}")
    catalogue = load_catalogue(plugins)
    name, scenario = draw(project, seed, catalogue)
    scenario = scenario.model_copy(update={"steps": steps or scenario.steps})
    faults = make_faults(scenario, catalogue, "blind")
    folder = out or new_name("blind", seed)
    from lab.runtime.run import find_device, run_once
    from lab.runtime.start import with_start

    place = find_device(device)
    scenario = with_start(scenario)
    # Without rules and causes nothing is found, and nothing that names the fault is written.
    unjudged = Catalogue(catalogue.faults, catalogue.probes, catalogue.plugins, asked=catalogue.asked)
    tools = list(catalogue.plugins.values())
    run_once("blind", scenario, unjudged, folder, faults, place, tools, shown=shown(scenario))
    seal(folder, name, scenario)
    click.echo(f"Something may be wrong with this run, or nothing. It is kept in {folder}.")
    click.echo(f"Look at it:   lab board {folder}")
    click.echo(f"Then say:     lab answer {folder} --cause ID --at PLACE --evidence METRIC   (or --hint, or --give-up)")
    return 0


def stopped(
    folder: Path, plugins: tuple[str, ...], uses: tuple[str, ...]
) -> tuple[str, Scenario, tuple[str, ...], tuple[str, ...]]:
    """Return what a run was: its scenario with its name, its plugins, and the learner's components.

    Raises:
        BadInput: The folder holds no run, or what it says of it cannot be read.
    """
    from lab.recipe import read_recipe

    try:
        recipe = read_recipe(folder)
    except BadInput as error:
        raise BadInput(f"--resume {error}") from None
    if recipe.scenario is None:
        raise BadInput(f"--resume {folder}: a training that the lab did not write; only its own script can go on")
    used = tuple(f"{project}={file}" for project, file in recipe.uses.items())
    return recipe.name, recipe.scenario, plugins or recipe.plugins, uses or used


def use_components(uses: tuple[str, ...]) -> None:
    """Let the learner's files stand for the lab's components, the earliest project first.

    Raises:
        BadInput: Not PROJECT=FILE, no such project or file, or a file that cannot stand for it.
    """
    if not uses:
        return
    from lab.learn.component import use
    from lab.learn.progress import digest_of, read_progress

    given = {}
    for text in uses:
        name, equals, file = text.partition("=")
        if not equals or not file:
            raise BadInput(f"--use {text}: write --use PROJECT=FILE")
        if not Path(file).is_file():
            raise BadInput(f"--use {text}: no file {file}")
        given[ready_project(name)] = Path(file)
    progress = read_progress(Path.cwd())
    for project, path in sorted(given.items(), key=lambda pair: pair[0].number):
        entry = progress.projects.get(project.id)
        if entry is None or entry.digest != digest_of(path):
            click.echo(f"lab: {path} as it stands has not passed: lab check {project.id} {path}", err=True)
        use(project, str(path.resolve()))


def discard(folder: Path) -> None:
    """Remove a run that was refused before its first step, so that --out is free for the next attempt."""
    from lab.store import read_history

    with contextlib.suppress(BadInput, OSError):
        if not (folder / METRICS).exists() or read_history(folder / METRICS).last_step < 0:
            for path in (folder / RUN, *folder.glob(f"{METRICS}*")):
                path.unlink(missing_ok=True)
            folder.rmdir()


def new_name(name: str, seed: int) -> Path:
    """Return a folder in ``runs`` that does not exist yet.

    Raises:
        BadInput: There are ten thousand of them.
    """
    for number in range(1, 10_000):
        folder = RUNS / (f"{name}-{seed}" if number == 1 else f"{name}-{seed}-{number}")
        if not folder.exists():
            return folder
    raise BadInput(f"{RUNS}: ten thousand runs of {name}; remove some, or give --out")
