"""``lab compare``: which of several trainings is faster, needs less memory, learns more?"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lab.cli.options import json_option, plugin_option, print_json
from lab.errors import BadInput
from lab.paired import FEWEST

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lab.comparison import Line, Measure, Round
    from lab.recipe import Recipe
    from lab.runtime.turns import Job

    Compared = list[tuple[Measure, list[Line]]]

ITSELF = "A again"
COLOURS = {"faster": "green", "less": "green", "lower": "green", "slower": "red", "more": "red", "higher": "red"}


@click.command()
@click.argument("runs", nargs=-1, metavar="RUN...")
@click.option(
    "--repeats",
    type=click.IntRange(1, 1000),
    default=FEWEST,
    show_default=True,
    help="Rounds; fewer than six tell nothing, more tell of smaller differences.",
)
@click.option("--steps", type=click.IntRange(1, 10_000_000), help="In place of the scenarios' number of steps.")
@click.option("--device", default="cpu", show_default=True, help="Where the models live: cpu, cuda, cuda:1, ...")
@json_option
@plugin_option
def compare(
    runs: tuple[str, ...], *, repeats: int, steps: int | None, device: str, as_json: bool, plugins: tuple[str, ...]
) -> int:
    """Train each RUN again and again, in turn, and say which is slower, needs more memory, or ends with a higher loss.

    RUN is the folder of a run, which is made again with its seed, plugins and components, or a scenario: its id, or a
    .toml file. All are compared with the first, which also runs a second time in each round: what that differs is the
    noise of the machine. One RUN alone is compared with its healthy twin. Nothing is watched meanwhile.

    Runs of `lab exec` and `lab.watch` cannot be made again: then all are compared by what was recorded, once.

    Exit status: 0, whatever is seen.
    """
    from lab.comparison import compare as compared
    from lab.recipe import find_recipe

    if not runs:
        raise BadInput("give at least two runs or scenarios to compare, or one that has a fault")
    recipes = [find_recipe(given) for given in runs]
    foreign = [given for given, recipe in zip(runs, recipes, strict=True) if recipe.scenario is None]
    if foreign:
        names, tasks = _numbered(runs), []
        rounds = [_recorded(runs, foreign[0])]
    else:
        jobs = _jobs(runs, recipes, plugins, steps, device)
        names, tasks = [job.name for job in jobs], [job.scenario.task for job in jobs]
        rounds = _rounds(jobs, repeats)
    found = compared(rounds, names, tasks)
    if as_json:
        print_json(_told(names, rounds, found, repeated=not foreign))
    else:
        _print(names, rounds, found, repeated=not foreign)
    return 0


def _numbered(runs: Sequence[str]) -> list[str]:
    """Return a name for each run: what was given, with a number where it was given before."""
    return [run if runs.index(run) == i else f"{run} ({runs[:i].count(run) + 1})" for i, run in enumerate(runs)]


def _recorded(runs: Sequence[str], foreign: str) -> Round:
    """Read what each run has recorded.

    Raises:
        BadInput: There is one alone, or one that was never run.
    """
    from lab.recorded import read_trained

    if len(runs) < 2:
        raise BadInput(f"{foreign}: give another run to compare it with")
    for run in runs:
        if not Path(run).is_dir():
            raise BadInput(f"{run}: has recorded nothing, and {foreign} cannot be made again: give folders of runs")
    return [read_trained(Path(run)) for run in runs]


def _jobs(
    runs: Sequence[str], recipes: Sequence[Recipe], plugins: tuple[str, ...], steps: int | None, device: str
) -> list[Job]:
    """Return what to train: the first, the first again, and the others. All that they name is there.

    Raises:
        BadInput: It is not; or one without faults is alone.
    """
    from lab.cli.run import checked
    from lab.comparison import SKIPPED
    from lab.runtime.turns import Job

    jobs = []
    for name, recipe in zip(_numbered(runs), recipes, strict=True):
        assert recipe.scenario is not None
        scenario = recipe.scenario if steps is None else recipe.scenario.model_copy(update={"steps": steps})
        if scenario.steps <= SKIPPED:
            raise BadInput(f"{name}: {scenario.steps} steps; the first {SKIPPED} do not count: give more (--steps)")
        asked = tuple(dict.fromkeys((*recipe.plugins, *plugins)))
        checked(scenario, asked, name)
        for file in recipe.uses.values():
            if not Path(file).is_file():
                raise BadInput(f"{name}: was made with {file}, and there is no such file any more")
        jobs.append(Job(name, scenario, asked, recipe.uses, device))
    if len(jobs) == 1:
        if not jobs[0].scenario.fault:
            raise BadInput(f"{runs[0]}: has no fault, and so no twin; give another run to compare it with")
        healthy = jobs[0].scenario.model_copy(update={"fault": []})
        jobs.insert(0, replace(jobs[0], name=f"{runs[0]}, its twin", scenario=healthy))
    return [jobs[0], replace(jobs[0], name=f"{jobs[0].name}, again"), *jobs[1:]]


def _rounds(jobs: Sequence[Job], repeats: int) -> list[Round]:
    """Train in rounds, with a progress bar."""
    from rich.console import Console
    from rich.progress import track

    from lab.runtime.rounds import train_rounds

    err = Console(stderr=True)
    rounds = train_rounds(jobs, repeats)
    return [*track(rounds, "compare", total=repeats, console=err, transient=True, disable=not err.is_terminal)]


# ---------------------------------------------------------------- what is told


def _told(names: Sequence[str], rounds: Sequence[Round], found: Compared, *, repeated: bool) -> dict[str, Any]:
    """Return the object that ``--json`` prints."""
    from lab.comparison import Line

    measures = [
        {"measure": measure.id, "title": measure.title, "unit": measure.unit, "runs": [*map(Line.to_dict, lines)]}
        for measure, lines in found
    ]
    about = {"runs": [*names], "repeated": repeated, "repeats": len(rounds), "threads": rounds[0][0].threads}
    return {**about, "measures": measures}


def _print(names: Sequence[str], rounds: Sequence[Round], found: Compared, *, repeated: bool) -> None:
    """Print which run is which, a table with a line for each run in each measure, and how far to trust it."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    letters = _letters(names, again=repeated)
    table = Table("", "", "median", "against A", "")
    for column in table.columns[2:4]:
        column.justify = "right"
    for measure, lines in found:
        for letter, line in zip(letters, lines, strict=True):
            said = f"[{COLOURS[line.said]}]{line.said}[/]" if line.said in COLOURS else line.said
            title = measure.title if letter == "A" else ""
            table.add_row(title, letter, _value(measure, line.value), _change(measure, line), said)
        table.add_section()
    console = Console(highlight=False)
    for letter, name in zip(letters, names, strict=True):
        if letter != ITSELF:
            console.print(f"[dim]{letter}[/]  {escape(name)}", soft_wrap=True)
    console.print(table)
    console.print("\n".join(_sentences(rounds, found, repeated=repeated)), soft_wrap=True)


def _letters(names: Sequence[str], *, again: bool) -> list[str]:
    """Return a short name for each run: A, A again where the first stands twice, B, C."""
    count = len(names) - again
    letters = [chr(ord("A") + i) if i < 26 else f"run {i + 1}" for i in range(count)]
    return [letters[0], *([ITSELF] if again else []), *letters[1:]]


def _sentences(rounds: Sequence[Round], found: Compared, *, repeated: bool) -> list[str]:
    """Say how it was measured, and how far it can be trusted."""
    if not repeated:
        once = "Not all of these can be made again. This is what was recorded, once, with what watching costs."
        return [f"{once} One timing is no proof."]
    change = found[0][1][1].change
    assert change is not None
    count = f"{len(rounds)} rounds" if len(rounds) > 1 else "1 round"
    how = f"{count}, each of new processes and another seed, a step of each in turn"
    lies = f"an interval holds the truth in {change.confidence:.1%} of such comparisons"
    noise = f"{change.middle:.3f}x of itself ({change.low:.3f} to {change.high:.3f})"
    return [
        f"{how}; threads: {rounds[0][0].threads}; {lies if change.enough else f'{FEWEST} rounds tell more'}.",
        f"The noise of this machine: a step of A takes {noise}.",
    ]


def _value(measure: Measure, value: float) -> str:
    if math.isnan(value):
        return "-"
    if measure.unit == "s":
        return f"{1e3 * value:.3g} ms"
    return f"{value / 2**20:.1f} MiB" if measure.unit == "B" else f"{value:.4f}"


def _change(measure: Measure, line: Line) -> str:
    """Return a change and its interval in words; nothing where there is none."""
    change = line.change
    if change is None or math.isnan(change.middle):
        return ""
    number, sign = ("{:+.3g}", "") if measure.is_loss else ("{:.3f}", "x")
    lies = f" ({number.format(change.low)} to {number.format(change.high)})" if change.count > 1 else ""
    return f"{number.format(change.middle)}{sign}{lies}"
