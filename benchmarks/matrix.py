"""How many cells of the matrix one process does in a minute, and what a cell costs beside its training alone.

    python benchmarks/matrix.py

Always the same cells: a small share of those that rules were written with, in a few projects. For the ratio the
configurations of their healthy runs are trained in turn, watched and judged, and with nobody there.
"""

from __future__ import annotations

import tempfile
import time
from itertools import count
from pathlib import Path

import history
import torch

from lab.catalogue import Catalogue
from lab.manager import discover
from lab.matrix.cells import Cell, cells, configured, drawn
from lab.matrix.run import run_cells
from lab.runtime.run import run_once

PROJECTS = ("attention", "losses", "normalisation")


def main() -> None:
    """Print cells a minute, and the ratio."""
    options = history.parser(__doc__)
    options.add_argument("--share", type=float, default=0.05)
    options.add_argument("--rounds", type=int, default=5)
    given = options.parse_args()
    catalogue, nobody = discover(), Catalogue()
    every = [cell for project in PROJECTS for cell in cells(catalogue, which="develop", seeds=1, project=project)]
    chosen = drawn(every, given.share)
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        rows = [*run_cells(chosen, Path(folder) / "matrix", jobs=1)]
        minutes = (time.perf_counter() - begun) / 60
        numbers = count()

        def run(cell: Cell, *, watched: bool) -> None:
            scenario = configured(cell)
            if not watched:
                scenario = scenario.model_copy(update={"probes": []})
            place = Path(folder) / str(next(numbers))
            run_once("cell", scenario, catalogue if watched else nobody, place, [], torch.device("cpu"), [])

        ratios = []
        for cell in [cell for cell in every if not cell.faults]:
            calls = {"watched": lambda c=cell: run(c, watched=True), "alone": lambda c=cell: run(c, watched=False)}
            ratios += history.against(history.in_turn(calls, given.rounds), "watched", "alone")
    figures = {
        "cells a minute, in one process": history.single(len(rows) / minutes),
        "a cell, against its training alone": history.figure(ratios),
    }
    settings = {"share": given.share, "rounds": given.rounds, "cells": len(rows)}
    history.tell("matrix", settings, figures)


if __name__ == "__main__":
    main()
