"""From the first command to its diagnosis: `lab run reads-the-future` and its twin, beside a Python that imports torch.

    python benchmarks/scenario.py

Each in a process of its own, in turn.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from itertools import count
from pathlib import Path

import history

BUDGET = 20.0  # seconds, on two cores
LAB = "from lab.cli import main; main()"


def main() -> None:
    """Print seconds, and the ratio."""
    options = history.parser(__doc__)
    options.add_argument("--rounds", type=int, default=5)
    rounds: int = options.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        numbers = count()

        def run() -> None:
            out = str(Path(folder) / str(next(numbers)))
            command = [sys.executable, "-c", LAB, "run", "reads-the-future", "--out", out]
            subprocess.run(command, check=True, capture_output=True)

        def alone() -> None:
            subprocess.run([sys.executable, "-c", "import torch"], check=True)

        times = history.in_turn({"run": run, "torch": alone}, rounds, warm=0)
    figures = {
        "the first scenario, s": history.figure(times["run"], BUDGET),
        "against python -c 'import torch'": history.figure(history.against(times, "run", "torch")),
    }
    history.tell("scenario", {"rounds": rounds}, figures)


if __name__ == "__main__":
    main()
