"""``lab diff``: where do two runs part?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lab.cli.options import json_option, print_json
from lab.errors import BadInput

if TYPE_CHECKING:
    from rich.console import Console

    from lab.diff import Difference
    from lab.results import Results

SHOWN = 8  # settings, and places, of many


@click.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option(
    "--tolerance",
    type=click.FloatRange(0.0, 1.0),
    help="What counts as equal, relatively; 0: the last bit. By default, what rounding was measured to do in the runs.",
)
@json_option
def diff(a: Path, b: Path, *, tolerance: float | None, as_json: bool) -> int:
    """Find the first step, and in it the most upstream place, at which the runs A and B differ.

    Compares what both recorded, in the order in which it came about: weights, random state, learning rate, batch,
    values through the model, loss, gradients back through it, weights after the update. Runs that compute the same in
    another order differ by rounding, and how far that goes was measured when they ran; what goes beyond is told.

    Exit status: 0 when they agree, 1 when they differ.
    """
    from lab.diff import compare, processes, upstream
    from lab.explain import explain

    pairs = list(zip(processes(a), processes(b), strict=False))
    found = [compare(_load(mine), _load(others), tolerance) for mine, others in pairs]
    if not any(each.count or each.first for each in found):
        raise BadInput(f"{a}, {b}: the two runs recorded nothing that can be compared")
    which = upstream(found)
    first = found[which]
    if as_json:
        print_json({**first.to_dict(), "process": which, "explanation": explain(first)})
    else:
        from rich.console import Console

        console = Console(highlight=False)
        if which:
            console.print(f"[dim]process[/]  {which} of {len(pairs)}")
        print_difference(first, console)
    return 0 if first.first is None else 1


def _load(folder: Path) -> Results:
    """Read a run that can be compared.

    Raises:
        BadInput: It cannot.
    """
    from lab.results import load

    run = load(folder)
    if not run.history.stages:
        raise BadInput(f"{folder}: recorded by no probe that takes part in a comparison, or by an older lab")
    return run


def print_difference(found: Difference, console: Console) -> None:
    """Print how two runs differ, for a person."""
    from rich.markup import escape

    from lab.explain import headline, sentences

    told = [f"{key}: {x!r} and {y!r}" for key, (x, y) in found.settings.items()]
    for line in told[:SHOWN]:
        console.print(f"[dim]setting[/]  {escape(line)}", soft_wrap=True)
    if len(told) > SHOWN:
        console.print(f"[dim]setting[/]  and {len(told) - SHOWN} more: --json has them all")
    for which, sites in zip("AB", found.only, strict=True):
        if sites:
            more = f" and {len(sites) - SHOWN} more" if len(sites) > SHOWN else ""
            console.print(f"[dim]only in {which}[/]  {escape(', '.join(sites[:SHOWN]))}{more}", soft_wrap=True)
    colour = "green" if found.first is None else "red"
    console.print(f"[{colour}]{escape(headline(found))}[/]", soft_wrap=True)
    for sentence in sentences(found):
        console.print(f"  {escape(sentence)}", soft_wrap=True)
    if found.first is not None:
        console.print(f"[dim]look at[/]  [cyan]{escape(found.where)}[/]", soft_wrap=True)
