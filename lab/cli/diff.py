"""``lab diff``: where do two runs part?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lab.cli.options import json_option, print_json

if TYPE_CHECKING:
    from rich.console import Console

    from lab.difference import Difference

SHOWN = 8  # settings, and places, of many


@click.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option(
    "--tolerance",
    type=click.FloatRange(0.0, 1.0),
    help="What counts as equal, relatively; 0: the last bit. By default, what rounding was measured to do in the runs.",
)
@click.option("--work", is_flag=True, help="Exit with 1 also where all numbers agree and the work does not.")
@json_option
def diff(a: Path, b: Path, *, tolerance: float | None, work: bool, as_json: bool) -> int:
    """Find the first step, and in it the most upstream place, at which the runs A and B differ.

    Compares what both recorded, in the order in which it came about: weights, random state, learning rate, batch,
    values through the model, loss, gradients back through it, weights after the update. Runs that compute the same in
    another order differ by rounding, and how far that goes was measured when they ran; what goes beyond is told. Where
    all numbers agree, the work is compared that it took to compute them: operators, bytes, graphs kept, threads.

    Exit status: 0 when their numbers agree, 1 when they differ.
    """
    from lab.diff import compare_folders
    from lab.explain import explain

    compared = compare_folders(a, b, tolerance)
    if as_json:
        print_json({**compared.to_dict(), "explanation": explain(compared.found)})
    else:
        from rich.console import Console

        console = Console(highlight=False)
        if compared.process:
            console.print(f"[dim]process[/]  {compared.process} of {compared.of}")
        print_difference(compared.found, console)
    found = compared.found
    return 1 if found.first is not None or (work and found.work.amounts) else 0


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
    agree = found.first is None
    colour = "red" if not agree else "yellow" if found.work.amounts else "green"
    console.print(f"[{colour}]{escape(headline(found))}[/]", soft_wrap=True)
    for sentence in sentences(found):
        console.print(f"  {escape(sentence)}", soft_wrap=True)
    if not agree or found.work.amounts:
        console.print(f"[dim]look at[/]  [cyan]{escape(found.where)}[/]", soft_wrap=True)
