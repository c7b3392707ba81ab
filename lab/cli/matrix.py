"""``lab matrix``: every fault in every project, and what was found of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lab.cli.options import json_option, load_catalogue, plugin_option, print_json
from lab.errors import BadInput, nearest
from lab.projects import PROJECTS

if TYPE_CHECKING:
    from rich.console import Console

    from lab.matrix.report import Summary


@click.command()
@click.option("--project", default="", help="Of one project only.")
@click.option("--fault", default="", help="Of one fault only, beside the healthy runs.")
@click.option("--seeds", type=click.IntRange(1, 1000), default=1, show_default=True, help="Configurations a project.")
@click.option("--jobs", type=click.IntRange(1, 256), help="Processes; by default as many as cores.")
@click.option("--held-out", is_flag=True, help="The configurations that are for measuring only.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("matrix"), show_default=True, help="Its folder.")
@json_option
@plugin_option
def matrix(
    *,
    project: str,
    fault: str,
    seeds: int,
    jobs: int | None,
    held_out: bool,
    out: Path,
    as_json: bool,
    plugins: tuple[str, ...],
) -> int:
    """Run every fault in every project where it applies, beside healthy runs, and say what was found, named and placed.

    Rows are kept as they come: a matrix that was stopped goes on where it was when it is called again.

    Exit status: 0 when every fault was found and no healthy run was called faulty, 1 when not.
    """
    catalogue = load_catalogue(plugins)
    known = [each.id for each in PROJECTS]
    if project and project not in known:
        raise BadInput(f"--project {project}: no such project{nearest(project, known)}")
    if fault and fault not in catalogue.faults:
        raise BadInput(f"--fault {fault}: no such fault{nearest(fault, catalogue.faults)}")
    from rich.console import Console
    from rich.progress import track

    from lab.matrix.cells import cells
    from lab.matrix.report import summarise
    from lab.matrix.run import run_cells

    which = "held-out" if held_out else "develop"
    wanted = [*cells(catalogue, which=which, seeds=seeds, project=project, fault=fault)]  # type: ignore[arg-type]
    running = run_cells(wanted, out, jobs=jobs or os.cpu_count() or 1, plugins=plugins)
    err = Console(stderr=True)
    rows = [*track(running, "matrix", total=len(wanted), console=err, transient=True, disable=not err.is_terminal)]
    summary = summarise(rows)
    if as_json:
        print_json(summary.to_dict())
    else:
        _print(summary, Console())
    found = all(row["detected"] for row in summary.broken)
    return 0 if found and not summary.false_alarms else 1


def _print(summary: Summary, console: Console) -> None:
    from rich.table import Table

    table = Table("fault", "runs", "found", "named", "placed", "steps until seen", "seen only by")
    for column in table.columns[1:6]:
        column.justify = "right"
    for line in summary.lines:
        placed, asked = line.placed
        delay = "" if line.delay is None else f"{line.delay:g}"
        figures = (len(line.rows), line.count("detected"), line.count("named"))
        table.add_row(line.fault, *map(str, figures), f"{placed}/{asked}" if asked else "", delay, ", ".join(line.only))
    console.print(table)
    told = summary.to_dict()
    console.print(
        f"{told['faults']} faults, {told['runs']} runs: {told['detected']} found, {told['named']} named first, "
        f"{told['located']} of {told['with_a_place']} placed; "
        f"{told['healthy_runs']} healthy runs, {told['false_alarms']} false alarms; {told['seconds']:.0f} s of work",
        highlight=False,
    )
    for row in summary.false_alarms:
        console.print(f"[red]false alarm[/] {row['key']}: {', '.join(row['symptoms'])}", highlight=False)
    for row in summary.broken:
        if row.get("error"):
            console.print(f"[red]failed[/] {row['key']}: {row['error']}", highlight=False)
