"""``lab list``: what there is."""

from __future__ import annotations

import shutil
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lab.cli.options import json_option, load_catalogue, plugin_option, print_json
from lab.files import PROGRESS
from lab.projects import PROJECTS
from lab.shelf import find_scenarios

if TYPE_CHECKING:
    from collections.abc import Callable

    from lab.catalogue import Catalogue
    from lab.projects import Project

Rows = list[dict[str, Any]]

KINDS: dict[str, Callable[[Catalogue], Rows]] = {
    "projects": lambda _: [
        {"id": p.id, "title": p.title, "number": p.number, "builds": p.builds, "ready": p.ready, "progress": progress}
        for p, progress in ((p, _progress(p)) for p in PROJECTS)
    ],
    "scenarios": lambda _: [{"id": e.id, "title": e.title, "project": e.project} for e in find_scenarios().values()],
    "faults": lambda c: [
        {"id": f.info.id, "title": f.info.title, "cause": f.info.cause, "moves": f.info.moves}
        for f in c.faults.values()
    ],
    "probes": lambda c: [
        {
            "id": p.info.id,
            "title": p.info.title,
            "every": p.info.every,
            "examines": p.info.examines,
            "cost": p.info.cost,
        }
        for p in c.probes.values()
    ],
    "checks": lambda c: [{"id": r.id, "title": r.title, "basis": r.basis} for r in c.rules.values()],
    "causes": lambda c: [{"id": k.id, "title": k.title} for k in c.causes.values()],
    "plugins": lambda c: [{"id": p.info.id, "title": p.info.title} for p in c.plugins.values()],  # type: ignore[attr-defined]
}


def _progress(project: Project) -> str:
    """Say how far the learner of this folder is with a project; empty where not begun."""
    if not (Path.cwd() / PROGRESS).exists():
        return ""
    from lab.learn.progress import read_progress

    entry = read_progress(Path.cwd()).projects.get(project.id)
    if entry is None:
        return ""
    return f"{entry.hold} of {entry.of}" if entry.state == "begun" and entry.of else entry.state


@click.command("list")
@click.argument("kind", required=False, type=click.Choice(list(KINDS)))
@json_option
@plugin_option
def list_(kind: str | None, *, as_json: bool, plugins: tuple[str, ...]) -> None:
    """List projects, scenarios, faults, probes, checks, causes or plugins; without KIND, all of them."""
    catalogue = load_catalogue(plugins)
    found = {name: rows(catalogue) for name, rows in KINDS.items() if kind in (None, name)}
    if as_json:
        print_json(found)
        return
    columns = shutil.get_terminal_size().columns
    for name, rows in found.items():
        click.secho(f"{name} ({len(rows)})", italic=True)
        width = max((len(row["id"]) for row in rows), default=0)
        for row in rows:
            _print(row["id"].ljust(width), *_described(name, row), columns)
        click.echo()
    if kind is None:
        click.secho("lab show NAME says more; lab run SCENARIO runs one", dim=True)


def _print(id: str, text: str, more: str, colour: str, columns: int) -> None:
    """Print an entry: its id, and beside it what it is, on as many lines as that takes.

    Not by rich, which takes half a second for all entries: this is the command that one types first.
    """
    lines = textwrap.wrap(text, max(20, columns - len(id) - 1)) or [""]
    fits = len(id) + len(lines[-1]) + len(more) + 3 <= columns
    if more and not fits:
        lines.append("")
    for place, line in enumerate(lines):
        shown = click.style(id, fg="cyan") if place == 0 else " " * len(id)
        last = place == len(lines) - 1 and more
        tail = click.style(more, dim=colour == "dim", fg=None if colour == "dim" else colour) if last else ""
        click.echo(f"{shown} {line}{'  ' if last and line else ''}{tail}")


def _described(kind: str, row: dict[str, Any]) -> tuple[str, str, str]:
    """What an entry is, what is said beside, and the colour of that."""
    text = row["title"]
    if kind == "projects":
        colour = {"passed": "green", "": "dim"}.get(row["progress"], "yellow")
        state = (row["progress"], colour) if row["ready"] else ("(no spec yet)", "dim")
        return f"{row['number']:>2}. {text}", *state
    if kind == "scenarios":
        return text, row["project"], "dim"
    return text, "examines" if kind == "probes" and row["examines"] else "", "dim"
