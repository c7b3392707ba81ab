"""What several commands share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lab.files import plain
from lab.manager import discover

if TYPE_CHECKING:
    from lab.catalogue import Catalogue

RUNS = Path("runs")

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
plugin_option = click.option(
    "--plugin", "plugins", multiple=True, metavar="FILE", help="Load a plugin: a .py file or a module. May be repeated."
)


def load_catalogue(plugins: tuple[str, ...]) -> Catalogue:
    """Find every plugin; say on standard error which installed ones are broken.

    Raises:
        BadInput: A plugin that was asked for by name cannot be used.
    """
    catalogue = discover(plugins, Path.cwd())
    for name, reason in catalogue.broken.items():
        click.echo(f"lab: plugin {name} is left out: {reason}", err=True)
    return catalogue


def print_json(thing: Any) -> None:
    """Print as JSON. What is not a number becomes null, which every reader of JSON takes."""
    click.echo(json.dumps(plain(thing), indent=2, allow_nan=False))
