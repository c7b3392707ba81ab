"""``lab bisect``: which commit changed a training?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lab.cli.options import json_option, print_json
from lab.errors import BadInput

if TYPE_CHECKING:
    from rich.console import Console

    from lab.bisect import Bisected, Trial
    from lab.commits import Script

SHORT = 10  # characters of a hash
COLOURS = {"agrees": "green", "differs": "red", "skipped": "yellow"}


@click.command()
@click.option("--out", type=click.Path(path_type=Path), help="Keep the runs there; by default they are dropped.")
@click.option("--every", type=click.IntRange(1, 1_000_000), default=10, show_default=True, help="Steps between looks.")
@click.option("--tolerance", type=click.FloatRange(0.0, 1.0), help="What counts as equal, as for lab diff.")
@json_option
@click.argument("good")
@click.argument("bad")
@click.argument("script", nargs=-1, required=True, type=click.UNPROCESSED)
def bisect(
    good: str,
    bad: str,
    script: tuple[str, ...],
    *,
    out: Path | None,
    every: int,
    tolerance: float | None,
    as_json: bool,
) -> int:
    """Find the commit from which on a training is no longer that of the commit GOOD.

    \b
    lab bisect v1.2 HEAD -- train.py --lr 3e-4
    lab bisect HEAD~40 HEAD -- -m mypackage.train

    Runs SCRIPT with its arguments at commits between GOOD and BAD, watched as by lab exec, and compares each run with
    that of GOOD as lab diff does: what differs by rounding alone is the same. Each commit is checked out in a temporary
    folder: what you have checked out stays as it is, and what is in no commit is not there. The script runs from the
    folder that you are in; it has to end, and to be seeded. A commit at which it fails is skipped.

    Exit status: 0 when the commit is found, 2 when there is nothing to find, or no way to.
    """  # noqa: D301 - to click, the character \b keeps the lines below it apart
    from rich.console import Console

    from lab.bisect import bisect as search
    from lab.explain import explain

    console = Console(stderr=True, highlight=False)
    here = Path.cwd()
    found = search(
        good, bad, _script(script, here, every), here, out=out, tolerance=tolerance, tell=lambda t: _tell(t, console)
    )
    if as_json:
        print_json({**found.to_dict(), "explanation": explain(found.compared.found)})
    else:
        _print(found, Console(highlight=False))
    return 0


def _script(words: tuple[str, ...], here: Path, every: int) -> Script:
    """What is to be run: a path from the root of the repository, or a module.

    Raises:
        BadInput: No module is named, or the script is in another repository.
    """
    from lab.commits import Script, root_of

    if words[0] == "-m":
        if len(words) == 1:
            raise BadInput("-m: takes the name of a module")
        return Script(words[1], words[2:], module=True, every=every)
    root = root_of(here).resolve()
    path = (here / words[0]).resolve()
    if not path.is_relative_to(root):
        raise BadInput(f"{words[0]}: not in the repository {root}; only what is committed is run")
    return Script(path.relative_to(root).as_posix(), words[1:], every=every)


def _tell(trial: Trial, console: Console) -> None:
    """Say what became of a commit."""
    from rich.markup import escape

    reason = f" [dim]{escape(trial.reason)}[/]" if trial.reason else ""
    verdict = f"[{COLOURS[trial.verdict]}]{trial.verdict:<8}[/]"
    console.print(f"{trial.commit[:SHORT]} {verdict} {escape(trial.subject)}{reason}", soft_wrap=True)


def _print(found: Bisected, console: Console) -> None:
    """Print the commit, and how its run differs from that before it."""
    from rich.markup import escape

    from lab.cli.diff import print_difference

    first, parent = found.first, found.parent
    console.print(f"[red]first to differ[/]  {first.commit[:SHORT]} {escape(first.subject)}", soft_wrap=True)
    console.print(f"[dim]last to agree[/]    {parent.commit[:SHORT]} {escape(parent.subject)}", soft_wrap=True)
    for trial in found.between:
        about = f"{trial.commit[:SHORT]} {escape(trial.subject)}: {escape(trial.reason)}"
        console.print(f"[dim]or[/]               {about}", soft_wrap=True)
    if found.merges:
        console.print("[dim]it is a merge: bisect between what it was merged into and its second parent[/]")
    console.print("[dim]A is the last to agree, B the first to differ[/]")
    print_difference(found.compared.found, console)
