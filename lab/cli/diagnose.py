"""``lab diagnose``: judge a run folder again, with the rules of today."""

from __future__ import annotations

from pathlib import Path

import click

from lab.cli.options import json_option, load_catalogue, plugin_option, print_json
from lab.errors import BadInput


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--all", "whole", is_flag=True, help="Say of each check what it asks.")
@json_option
@plugin_option
def diagnose(run: Path, *, whole: bool, as_json: bool, plugins: tuple[str, ...]) -> int:
    """Diagnose what is in the folder RUN, also of a run that goes on or was killed.

    What was checked is listed by subject; with `--all`, each check in words.

    Exit status: 0 when it is healthy, 1 when it is faulty or nothing can be said.
    """
    from lab.learn.blind import is_sealed
    from lab.results import load

    if is_sealed(run):
        raise BadInput(f"{run}: a blind run; say what is wrong with it first: lab answer {run} --cause ...")
    results = load(run)
    diagnosis = results.diagnosis(load_catalogue(plugins))
    if as_json:
        about = results.about.get("run", {})
        print_json({"run": str(run), "scenario": about.get("scenario"), **diagnosis.to_dict()})
    else:
        from rich.console import Console

        from lab.cli.report import print_diagnosis

        print_diagnosis(diagnosis, Console(), str(run), whole=whole)
    return 0 if diagnosis.verdict == "healthy" else 1
