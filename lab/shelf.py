"""Finds the scenarios that ship with the lab. Nothing is validated here, so that a list is quick."""

from __future__ import annotations

import importlib
import tomllib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Entry:
    """A scenario that was found: its id, where it is, and what a list shows of it."""

    id: str
    path: Path
    title: str
    project: str


def find_scenarios() -> dict[str, Entry]:
    """Return the scenarios by id, in the order of the projects."""
    root = Path(importlib.import_module("lab.scenarios").__path__[0])
    found = {}
    for path in sorted(root.glob("*/*.toml")):
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
        found[path.stem] = Entry(path.stem, path, str(raw.get("title", "")), str(raw.get("project", "")))
    return found
