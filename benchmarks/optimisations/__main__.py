"""What each project's optimisation gains: `python benchmarks/optimisations [PROJECT ...]`.

Each module here has ``variants()``: the naive version first. They run in turn in one process; a gain is the median of
the ratios of neighbours in time.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lab.projects import PROJECTS

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = Path(__file__).parent
ROUNDS = 15


def seconds(function: Callable[[], object]) -> float:
    """Time one call."""
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def main(chosen: list[str]) -> None:
    """Print a line for each variant."""
    for project in PROJECTS:
        path = HERE / f"{project.id.replace('-', '_')}.py"
        if not path.is_file() or (chosen and project.id not in chosen):
            continue
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        variants: dict[str, Callable[[], object]] = module.variants()
        for function in variants.values():
            function()  # warm
        times = [[seconds(function) for function in variants.values()] for _ in range(ROUNDS)]
        print(f"{project.number:>2}. {project.id}: {(module.__doc__ or '').splitlines()[0]}")
        for i, name in enumerate(variants):
            gain = statistics.median(row[0] / row[i] for row in times)
            took = statistics.median(row[i] for row in times)
            print(f"      {name:<28} {1000 * took:9.2f} ms   {gain:7.2f}x as fast as {next(iter(variants))}")


if __name__ == "__main__":
    main(sys.argv[1:])
