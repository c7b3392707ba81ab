"""``lab show``: all that is known of one thing."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from lab.catalogue import parameters
from lab.cli.options import json_option, load_catalogue, plugin_option, print_json
from lab.errors import BadInput, nearest
from lab.projects import PROJECTS
from lab.shelf import find_scenarios

if TYPE_CHECKING:
    from lab.catalogue import Catalogue


@click.command()
@click.argument("name", required=False)
@click.option("--schema", is_flag=True, help="Print the JSON Schema of scenario files, for editors.")
@json_option
@plugin_option
def show(name: str | None, *, schema: bool, as_json: bool, plugins: tuple[str, ...]) -> None:
    """Show the project, scenario, fault, probe, check, cause or plugin called NAME."""
    if schema:
        from lab.scenario import Scenario

        print_json(Scenario.model_json_schema(by_alias=True))
        return
    if name is None:
        raise click.UsageError("give a NAME (lab list shows them), or --schema")
    catalogue = load_catalogue(plugins)
    everything = _everything(catalogue)
    found = {kind: things[name] for kind, things in everything.items() if name in things}
    if not found:
        raise BadInput(f"nothing is called {name!r}{nearest(name, [n for t in everything.values() for n in t])}")
    if as_json:
        print_json(found)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for kind, facts in found.items():
        console.print(Text.assemble((kind, "dim"), " ", (name, "bold cyan")))
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        for key, value in facts.items():
            if value not in ("", [], (), None) and key != "id":
                table.add_row(key.replace("_", " "), Text(_said(value)))
        console.print(table)
        console.print()


def _said(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "\n".join(_said(part) for part in value)
    if isinstance(value, dict):
        return "\n".join(f"{key} = {_said(part)}" for key, part in value.items())
    return str(value)


def _everything(catalogue: Catalogue) -> dict[str, dict[str, dict[str, Any]]]:
    """Return what each kind of thing says of itself, by kind and id."""
    return {
        "project": {p.id: {**dataclasses.asdict(p), "ready": p.ready} for p in PROJECTS},
        "scenario": {
            id: {"title": e.title, "file": e.path.read_text(encoding="utf-8")} for id, e in find_scenarios().items()
        },
        "fault": {id: _fault(cls) for id, cls in catalogue.faults.items()},
        "cause": {id: dataclasses.asdict(cause) for id, cause in catalogue.causes.items()},
        "probe": {
            id: {
                **dataclasses.asdict(cls.info),
                "checks": [r.id for r in catalogue.rules.values() if id in catalogue.beside(r)],
            }
            for id, cls in catalogue.probes.items()
        },
        "check": {
            id: {"title": r.title, "reads": list(r.reads), "basis": r.basis, "phase": r.phase, "doc": r.doc}
            for id, r in catalogue.rules.items()
        },
        "plugin": {id: dataclasses.asdict(cls.info) for id, cls in catalogue.plugins.items()},  # type: ignore[attr-defined]
    }


def _fault(cls: Any) -> dict[str, Any]:
    given = {name: _parameter(field) for name, field in parameters(cls).items()}
    return {**dataclasses.asdict(cls.info), "parameters": given}


def _parameter(field: dataclasses.Field[Any]) -> str:
    kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return f"{'required' if default is dataclasses.MISSING else repr(default)}    ({kind})"
