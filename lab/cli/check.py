"""``lab check``: a component of your own against a project's spec."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lab.cli.build import ready_project
from lab.cli.options import json_option, print_json
from lab.errors import BadInput
from lab.projects import PROJECTS

if TYPE_CHECKING:
    from lab.learn.check import Result
    from lab.projects import Project


@click.command("check")
@click.argument("project", required=False)
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option("--all", "every", is_flag=True, help="Every project that has a spec; with --reference.")
@click.option("--reference", is_flag=True, help="Check the lab's own component in place of a file.")
@json_option
def check(project: str | None, file: Path | None, *, every: bool, reference: bool, as_json: bool) -> int:
    """Check FILE (by default PROJECT.py here) against the spec of PROJECT.

    Shows the smallest example that fails first. Exit status: 0 when every property holds, 1 when one does not.
    """
    from lab.learn.check import check as run_check

    found: dict[str, list[Result]] = {}
    for each in _chosen(project, every=every, reference=reference):
        path = None if reference else (file or Path(f"{each.id.replace('-', '_')}.py"))
        found[each.id] = []
        for result in run_check(each, path):
            found[each.id].append(result)
            if not as_json:
                mark = click.style("ok  ", fg="green") if result.passed else click.style("FAIL", fg="red")
                click.echo(f"{mark}  {each.id}  {result.name.replace('_', ' ')}")
        if path is not None:
            _keep(each, path, found[each.id])
    failed = [result for results in found.values() for result in results if not result.passed]
    if as_json:
        rows = {name: [{"name": r.name, "failure": r.failure} for r in results] for name, results in found.items()}
        print_json({"passed": not failed, "projects": rows})
    else:
        _report(failed, sum(map(len, found.values())))
    return 1 if failed else 0


def _chosen(project: str | None, *, every: bool, reference: bool) -> list[Project]:
    if every and project:
        raise BadInput(f"--all checks every project: leave {project!r} out")
    if every and not reference:
        raise BadInput("--all checks the lab's own components: add --reference, or name one project")
    if every:
        return [p for p in PROJECTS if p.ready]
    if project is None:
        raise BadInput("which project? lab check PROJECT [FILE]; lab build goes on where you are")
    return [ready_project(project)]


def _keep(project: Project, file: Path, results: list[Result]) -> None:
    """Note in the learner's progress how many properties hold."""
    from lab.learn.progress import digest_of, read_progress, save_progress

    progress = read_progress(Path.cwd())
    entry = progress.entry(project)
    entry.file, entry.hold, entry.of = str(file), sum(r.passed for r in results), len(results)
    entry.state = "passed" if results and entry.hold == entry.of else "begun"
    entry.digest = digest_of(file) if entry.state == "passed" else ""
    save_progress(Path.cwd(), progress)


def _report(failed: list[Result], count: int) -> None:
    """Say what failed, the first failure in full."""
    if not failed:
        click.echo(f"\nall {count} properties hold")
        return
    failure = failed[0].failure or {}
    click.echo(f"\n{failed[0].name.replace('_', ' ')}: {failure['text']}")
    if failure.get("meaning"):
        click.echo(f"  what it means  {failure['meaning']}")
    if failure.get("example"):
        click.echo(f"  smallest case  {', '.join(f'{k} = {v}' for k, v in failure['example'].items())}")
    for line in failure.get("lines", ()):
        click.echo(f"  {line}")
    click.echo(f"\n{len(failed)} of {count} properties do not hold")
