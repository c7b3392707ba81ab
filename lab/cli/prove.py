"""``lab prove``: does a fault do anything?"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lab.cli.options import json_option, load_catalogue, plugin_option, print_json

if TYPE_CHECKING:
    from lab.runtime.prove import Proof


@click.command()
@click.argument("fault")
@click.option("--seeds", type=click.IntRange(2, 100), default=3, show_default=True, help="How many, from 0.")
@click.option("--scenario", default="", help="A scenario that uses the fault, in place of the lab's own.")
@json_option
@plugin_option
def prove(fault: str, *, seeds: int, scenario: str, as_json: bool, plugins: tuple[str, ...]) -> int:
    """Run FAULT against its healthy twin at matched seeds: does the metric that it names move?

    It counts when it moves at every seed by more than three standard deviations of the healthy seeds.

    Exit status: 0 when it does, 1 when not.
    """
    catalogue = load_catalogue(plugins)
    from lab.runtime.prove import prove as run

    with tempfile.TemporaryDirectory(prefix="lab-") as folder:
        proof = run(fault, catalogue, Path(folder), seeds=seeds, scenario=scenario)
    if as_json:
        print_json(proof.to_dict())
    else:
        _print(proof)
    return 0 if proof.holds else 1


def _print(proof: Proof) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "seed", "healthy", "broken", "shift", title=f"{proof.fault} in {proof.scenario}", title_justify="left"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for seed, row in enumerate(zip(proof.healthy, proof.broken, proof.shifts, strict=True)):
        table.add_row(str(seed), *(f"{value:.4g}" for value in row))
    console = Console()
    console.print(table)
    place = f" at {proof.at}" if proof.at else ""
    said = "[green]it proves itself[/]" if proof.holds else "[red]it does not prove itself[/]"
    console.print(f"{proof.metric}{place}: healthy seeds spread by {proof.spread:.3g}; {said}", highlight=False)
