"""``lab list``: what there is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lab.cli.options import json_option, load_catalogue, plugin_option, print_json
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
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    for name, rows in found.items():
        table = Table("id", "what it is", title=f"{name} ({len(rows)})", title_justify="left", box=None, pad_edge=False)
        table.columns[0].style = "cyan"
        table.columns[0].no_wrap = True
        table.show_header = False
        for row in rows:
            table.add_row(escape(str(row["id"])), _described(name, row))
        console.print(table)
        console.print()
    if kind is None:
        console.print("[dim]lab show NAME says more; lab run SCENARIO runs one[/]")


def _described(kind: str, row: dict[str, Any]) -> str:
    from rich.markup import escape

    text = escape(str(row["title"]))
    if kind == "projects":
        colour = {"passed": "green", "": "dim"}.get(row["progress"], "yellow")
        state = f"  [{colour}]{row['progress']}[/]" if row["ready"] else "  [dim](no spec yet)[/]"
        return f"{row['number']:>2}. {text}{state}"
    if kind == "scenarios":
        return f"{text}  [dim]{row['project']}[/]"
    if kind == "probes" and row["examines"]:
        return f"{text}  [dim]examines[/]"
    return text
