"""``lab diff``: where do two runs part?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lab.cli.options import json_option, print_json
from lab.errors import BadInput

if TYPE_CHECKING:
    from rich.console import Console

    from lab.diff import Difference, Point


@click.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option(
    "--tolerance",
    type=click.FloatRange(0.0, 1.0),
    default=1e-5,
    show_default=True,
    help="What counts as equal.",
)
@json_option
def diff(a: Path, b: Path, *, tolerance: float, as_json: bool) -> int:
    """Find the first step, and in it the most upstream place, at which the runs A and B differ.

    Compares what both recorded, in the order in which it came about: weights at the start, learning rate, batch,
    values through the model, loss, gradients back through it, weights. Of the same code on the same machine two runs
    agree to the last bit (--tolerance 0); another way of computing the same rounds otherwise.

    Exit status: 0 when they agree, 1 when they differ.
    """
    from lab.diff import compare
    from lab.results import load

    runs = load(a), load(b)
    found = compare(*runs, tolerance)
    if not found.compared and found.first is None:
        raise BadInput(f"{a}, {b}: the two runs recorded nothing that can be compared")
    if as_json:
        print_json(found.to_dict())
    else:
        from rich.console import Console

        _print(found, Console(highlight=False))
    return 0 if found.first is None else 1


def _print(found: Difference, console: Console) -> None:
    from rich.markup import escape

    first, place = found.first, found.place
    for key, (x, y) in found.settings.items():
        console.print(f"[dim]setting[/]  {key}: {escape(f'{x!r} and {y!r}')}", soft_wrap=True)
    for which, sites in zip("AB", found.only, strict=True):
        if sites:
            console.print(f"[dim]only in {which}[/]  {', '.join(sites[:6])}{', ...' if len(sites) > 6 else ''}")
    agreed = ", ".join(f"{name} ({count})" for name, count in found.compared.items())
    before = f"to {found.closest:.1g}" if found.closest else "to the last bit"
    if first is None:
        console.print(f"[green]they agree[/] {before}: {agreed}")
        return
    if agreed:
        console.print(f"[dim]agree {before}[/]  {agreed}")
    console.print(f"[red]they part[/] at step {first.step}, in the {_told(first)}")
    if place is not None and place is not first:
        console.print(f"inside, first seen at step {place.step}, in the {_told(place)}")


def _told(point: Point) -> str:
    where = f" of [cyan]{point.at}[/]" if point.at else ""
    return f"{point.stage}{where}: {point.metric} {point.a:.6g} and {point.b:.6g}, {point.relative:.2g} apart"
