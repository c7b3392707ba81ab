"""``lab answer``: say what is wrong with a blind run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lab.cli.options import json_option, load_catalogue, plugin_option, print_json
from lab.errors import BadInput

if TYPE_CHECKING:
    from lab.catalogue import Catalogue
    from lab.diagnosis.model import Diagnosis
    from lab.learn.blind import Mark
    from lab.scenario import Scenario


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--cause", help="The cause: an id from `lab list causes`, or healthy.")
@click.option("--at", default="", help="The place: a site, a module or a parameter.")
@click.option("--evidence", multiple=True, metavar="METRIC", help="A metric that shows it. May be repeated.")
@click.option("--hint", is_flag=True, help="Show the next hint; it is counted.")
@click.option("--give-up", is_flag=True, help="Show what it was, without an answer.")
@json_option
@plugin_option
def answer(
    run: Path,
    *,
    cause: str | None,
    at: str,
    evidence: tuple[str, ...],
    hint: bool,
    give_up: bool,
    as_json: bool,
    plugins: tuple[str, ...],
) -> int:
    """Say what is wrong with the blind run in the folder RUN; then see what it was.

    Look first: `lab board RUN`, or `lab.load(RUN)` in Python. One answer counts: whether anything is wrong, what,
    where, and which metrics show it.

    Exit status: 0 when all of it is right, 1 when not.
    """
    from lab.learn.blind import Answer, is_sealed, keep, marks, next_hint, unseal

    catalogue = load_catalogue(plugins)
    name, scenario, hints = unseal(run)
    if not is_sealed(run):
        raise BadInput(f"{run}: was answered already; answer.json in it holds how")
    if hint:
        click.echo(next_hint(run))
        return 0
    if (cause is None) == (not give_up):
        raise BadInput("say --cause, with --at and --evidence, or --give-up")
    from lab.results import load

    diagnosis = load(run).diagnosis(catalogue)
    said = None if cause is None else Answer(cause, at, evidence)
    found = [] if said is None else marks(said, scenario, catalogue, diagnosis)
    keep(run, said, found, hints)
    if as_json:
        told = {"scenario": name, "hints": hints, "marks": [vars(mark) for mark in found], **diagnosis.to_dict()}
        print_json({**told, "faults": [section.model_dump() for section in scenario.fault]})
    else:
        _print(name, scenario, catalogue, found, hints, diagnosis)
    return 0 if found and all(mark.right for mark in found) else 1


def _print(
    name: str, scenario: Scenario, catalogue: Catalogue, found: list[Mark], hints: int, diagnosis: Diagnosis
) -> None:
    from rich.console import Console
    from rich.table import Table

    from lab.cli.report import print_diagnosis

    console = Console()
    if found:
        table = Table("", "you said", "it is", "")
        for mark in found:
            table.add_row(mark.subject, mark.said or "-", mark.true, "[green]✓[/]" if mark.right else "[red]✗[/]")
        console.print(table)
        right = sum(mark.right for mark in found)
        console.print(f"{right} of {len(found)}, with {hints} hint{'' if hints == 1 else 's'}.", highlight=False)
    if scenario.fault:
        info = catalogue.faults[scenario.fault[0].id].info
        console.print(f"It was [bold]{info.title}[/]: {info.id}, in the scenario {name}.", highlight=False)
    else:
        console.print("Nothing was broken.")
    print_diagnosis(diagnosis, console, "what the lab says of it")
