"""How long `lab diff` takes on two run folders, against reading the two: in turn, in one process.

python benchmarks/diff.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import history
import torch

from lab.diff import compare_folders
from lab.files import METRICS
from lab.manager import discover
from lab.runtime.run import run_once
from lab.scenario import load_scenario
from lab.store import read_history


def main() -> None:
    """Print seconds, and the ratio."""
    options = history.parser(__doc__)
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--steps", type=int, default=60)
    given = options.parse_args()
    catalogue = discover()
    _, scenario = load_scenario("healthy-decoder")
    scenario = scenario.model_copy(update={"steps": given.steps})
    with tempfile.TemporaryDirectory() as folder:
        kept = [Path(folder) / name for name in ("a", "b")]
        for seed, place in enumerate(kept):
            seeded = scenario.model_copy(update={"seed": seed})
            run_once("diff", seeded, catalogue, place, [], torch.device("cpu"), [])
        a, b = kept
        calls = {
            "diff": lambda: compare_folders(a, b, None),
            "read": lambda: [read_history(place / METRICS) for place in kept],
        }
        times = history.in_turn(calls, given.rounds)
    figures = {
        "two folders, s": history.figure(times["diff"]),
        "against reading them": history.figure(history.against(times, "diff", "read")),
    }
    history.tell("diff", {"rounds": given.rounds, "steps": given.steps}, figures)


if __name__ == "__main__":
    main()
