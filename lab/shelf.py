"""Finds the scenarios that ship with the lab. Nothing is validated here, so that a list is quick."""

from __future__ import annotations

import functools
import importlib
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Entry:
    """A scenario that was found: its id, where it is, and what a list shows of it."""

    id: str
    path: Path
    title: str
    project: str


@functools.cache
def scenario_files() -> Mapping[str, Path]:
    """Return the files of the scenarios by id, in the order of the projects."""
    root = Path(importlib.import_module("lab.scenarios").__path__[0])
    return MappingProxyType({path.stem: path for path in sorted(root.glob("*/*.toml"))})


@functools.cache
def find_scenarios() -> Mapping[str, Entry]:
    """Return the scenarios by id, in the order of the projects."""
    found = {}
    for id, path in scenario_files().items():
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
        found[id] = Entry(id, path, str(raw.get("title", "")), str(raw.get("project", "")))
    return MappingProxyType(found)
