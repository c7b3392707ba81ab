"""Finds the links to other profilers, which are plugins and are loaded for whoever asks for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lab.catalogue import Catalogue
from lab.manager import load_named
from lab.profiling.recorder import NEEDED

if TYPE_CHECKING:
    from lab.catalogue import Plugin

TRACED = 4  # steps that a trace takes
TRACE, SAMPLE = "lab.plugins.torch_profiler", "lab.plugins.py_spy"


def make_tools(*, trace: bool, sample: bool, wait: int = NEEDED) -> list[Plugin]:
    """Make the tools that were asked for: what writes a trace after `wait` steps, and what samples from outside."""
    catalogue = Catalogue()
    for name, wanted in ((TRACE, trace), (SAMPLE, sample)):
        if wanted:
            load_named(catalogue, name)
    tools: list[Any] = [*catalogue.plugins.values()]
    return [tool(wait + TRACED * place) for place, tool in enumerate(tools)]
