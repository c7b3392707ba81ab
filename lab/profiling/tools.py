"""Finds the links to other profilers, which are plugins and are loaded for whoever asks for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lab.manager import load_for
from lab.profiling.recorder import NEEDED

if TYPE_CHECKING:
    from lab.catalogue import Plugin

TRACED = 4  # steps that a trace takes


def make_tools(*, trace: bool, sample: bool, wait: int = NEEDED) -> list[Plugin]:
    """Make the tools that were asked for: what writes a trace after `wait` steps, and what samples from outside."""
    purposes = [purpose for purpose, wanted in (("trace", trace), ("sample", sample)) if wanted]
    tools: list[Any] = [tool for purpose in purposes for tool in load_for(purpose)]
    return [tool(wait + TRACED * place) for place, tool in enumerate(tools)]
