"""How long it takes until a command says something: processes in turn, beside a Python that does nothing.

    python benchmarks/startup.py

`torch imported` counts the commands that import torch: none of these needs it.
"""

from __future__ import annotations

import subprocess
import sys

import history

BUDGET = 0.3  # seconds
COMMANDS = {"lab --help": ["--help"], "lab list": ["list"]}
SAY = "import sys; from lab.cli import status_of; status_of({!r}); sys.exit('torch' in sys.modules)"


def call(code: str) -> int:
    """Run Python code in a process of its own; return its exit status."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode


def main() -> None:
    """Print seconds, and ratios to a Python that does nothing."""
    options = history.parser(__doc__)
    options.add_argument("--rounds", type=int, default=15)
    rounds: int = options.parse_args().rounds
    nothing = "python -c pass"
    codes = {nothing: "pass", **{name: SAY.format(arguments) for name, arguments in COMMANDS.items()}}
    times = history.in_turn({name: lambda code=code: call(code) for name, code in codes.items()}, rounds)
    figures = {f"{nothing}, s": history.figure(times[nothing])}
    for name in COMMANDS:
        figures[f"{name}, s"] = history.figure(times[name], BUDGET)
        figures[f"{name}, against {nothing}"] = history.figure(history.against(times, name, nothing))
    imported = sum(call(codes[name]) for name in COMMANDS)
    figures["torch imported"] = history.single(imported, 0)
    history.tell("startup", {"rounds": rounds}, figures)


if __name__ == "__main__":
    main()
