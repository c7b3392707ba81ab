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
    from collections.abc import Sequence

    from rich.console import Console

    from lab.matrix.cells import Cell
    from lab.matrix.report import Pairs, Summary, Unknown
    from lab.matrix.run import Row

# Of so many pairs that are drawn, one or more is compatible.
DRAWN = 3


@click.command()
@click.option("--project", default="", help="Of one project only.")
@click.option("--fault", default="", help="Of one fault only, beside the healthy runs.")
@click.option("--seeds", type=click.IntRange(0, 1000), default=1, show_default=True, help="Configurations a project.")
@click.option(
    "--share",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Of the runs with a fault only this share, drawn at random, the same each time.",
)
@click.option("--healthy", type=click.IntRange(0, 100_000), default=0, help="So many more healthy runs.")
@click.option("--pairs", type=click.IntRange(0, 10_000), default=0, help="So many pairs of faults, in one run each.")
@click.option("--unknown", type=click.IntRange(0, 10_000), default=0, help="So many faults whose cause is taken away.")
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
    share: float,
    healthy: int,
    pairs: int,
    unknown: int,
    jobs: int | None,
    held_out: bool,
    out: Path,
    as_json: bool,
    plugins: tuple[str, ...],
) -> int:
    """Run every fault in every project where it applies, beside healthy runs, and say what was found, named and placed.

    Rows are kept as they come: a matrix that was stopped goes on where it was when it is called again. `--healthy`,
    `--pairs` and `--unknown` come on top; with `--seeds 0` they are all there is.

    Exit status: 0 when every fault was found and every healthy run was called healthy, 1 when not.
    """
    catalogue = load_catalogue(plugins)
    known = [each.id for each in PROJECTS]
    if project and project not in known:
        raise BadInput(f"--project {project}: no such project{nearest(project, known)}")
    if fault and fault not in catalogue.faults:
        raise BadInput(f"--fault {fault}: no such fault{nearest(fault, catalogue.faults)}")
    from lab.matrix.cells import cells, drawn, healthy_cells, pair_cells, unknown_cells
    from lab.matrix.report import Unknown, pair_up, summarise

    which = "held-out" if held_out else "develop"
    sweep = [*cells(catalogue, which=which, seeds=seeds, project=project, fault=fault)] if seeds else []  # type: ignore[arg-type]
    sweep = drawn(sweep, share)
    more = [cell for cell in healthy_cells(healthy, which) if cell not in sweep]  # type: ignore[arg-type]
    paired = [*pair_cells(catalogue, DRAWN * pairs, which)]  # type: ignore[arg-type]
    blind = [*unknown_cells(catalogue, unknown, which)]  # type: ignore[arg-type]
    rows = _run([*sweep, *more, *paired, *blind], out, jobs or os.cpu_count() or 1, plugins)
    summary = summarise([rows[cell.key] for cell in (*sweep, *more)])
    both = pair_up([rows[cell.key] for cell in paired], pairs)
    nameless = Unknown(tuple(rows[cell.key] for cell in blind if rows[cell.key]["applies"]))
    if as_json:
        told = {"pairs": both.to_dict()} if pairs else {}
        told |= {"unknown": nameless.to_dict()} if unknown else {}
        print_json({**summary.to_dict(), **told})
    else:
        from rich.console import Console

        console = Console()
        _print(summary, console)
        _print_more(both, nameless, console)
    found = all(row["detected"] for row in summary.broken)
    return 0 if found and not summary.false_alarms and not summary.inconclusive else 1


def _run(wanted: Sequence[Cell], out: Path, jobs: int, plugins: tuple[str, ...]) -> dict[str, Row]:
    """Run the cells, each once, with a progress bar; return their rows by key."""
    from rich.console import Console
    from rich.progress import track

    from lab.matrix.run import run_cells

    once = [*{cell.key: cell for cell in wanted}.values()]
    err = Console(stderr=True)
    running = run_cells(once, out, jobs=jobs, plugins=plugins)
    shown = track(running, "matrix", total=len(once), console=err, transient=True, disable=not err.is_terminal)
    return {row["key"]: row for row in shown}


def _print(summary: Summary, console: Console) -> None:
    from rich.table import Table

    if summary.lines:
        table = Table("fault", "runs", "found", "named", "placed", "steps until told", "seen only by")
        for column in table.columns[1:6]:
            column.justify = "right"
        for line in summary.lines:
            placed, asked = line.placed
            delay = "" if line.delay is None else f"{line.delay:g}"
            figures = (len(line.rows), line.count("detected"), line.count("named"))
            only = ", ".join(line.only)
            table.add_row(line.fault, *map(str, figures), f"{placed}/{asked}" if asked else "", delay, only)
        console.print(table)
    told = summary.to_dict()
    if summary.broken:
        console.print(
            f"{told['faults']} faults, {told['runs']} runs: {told['detected']} found, {told['named']} named first, "
            f"{told['located']} of {told['with_a_place']} placed; median steps until told: "
            f"{_steps(summary.delay(late=False))} from the start, {_steps(summary.delay(late=True))} of faults that "
            "begin late",
            highlight=False,
        )
    if summary.healthy:
        called = f"{told['false_alarms']} false alarms, {told['inconclusive']} inconclusive"
        console.print(f"{told['healthy_runs']} healthy runs, {called}", highlight=False)
    console.print(f"{told['seconds']:.0f} s of work", highlight=False)
    for row in summary.false_alarms:
        console.print(f"[red]false alarm[/] {row['key']}: {', '.join(row['symptoms'])}", highlight=False)
    for row in summary.inconclusive:
        raised = [f"{name}: {why}" for name, why in row["not_checked"].items() if "raised" in why or "set aside" in why]
        console.print(f"[red]inconclusive[/] {row['key']}: {'; '.join(raised)}", highlight=False)
    for row in summary.broken:
        if row.get("error"):
            console.print(f"[red]failed[/] {row['key']}: {row['error']}", highlight=False)


def _steps(delay: float | None) -> str:
    return "-" if delay is None else f"{delay:g}"


def _print_more(pairs: Pairs, unknown: Unknown, console: Console) -> None:
    if pairs.rows:
        text = f"{len(pairs.rows)} pairs: {pairs.both_named} with both among the first three causes"
        console.print(f"{text} ({pairs.left_out} pairs left out: one alone is not named, or ends it)", highlight=False)
        for row in pairs.rows:
            if not row["named"]:
                named = ", ".join(row["causes"]) or "nothing"
                console.print(f"[yellow]not both[/] {row['fault']} in {row['project']}: {named}", highlight=False)
    if unknown.rows:
        console.print(
            f"{len(unknown.rows)} faults whose cause was taken away: {len(unknown.misnamed)} called something else",
            highlight=False,
        )
        for row in unknown.misnamed:
            text = f"{row['causes'][0]}, on {row['score']:.0%} of the evidence"
            console.print(f"[yellow]misnamed[/] {row['fault']} in {row['project']}: {text}", highlight=False)
