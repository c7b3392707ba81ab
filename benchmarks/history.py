"""What the benchmarks found, one JSON line a result, in ``benchmarks/history.jsonl``: kept beside the code.

Each line says which commit was measured, when, with which torch, on how many threads of which machine, and with which
settings; only lines that agree in all of these but the commit and the day can be compared.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.errors import BadInput

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

HERE = Path(__file__).parent
FILE, COMMIT = "LAB_BENCHMARK_HISTORY", "LAB_BENCHMARK_COMMIT"  # variables by which compare.py says where, and of what
PARTS = 5  # stretches of a measurement, of which each gives a figure: how far these differ is its spread


@dataclass(frozen=True)
class Figure:
    """A number that a benchmark found.

    Attributes:
        value: It.
        low, high: The smallest and the largest that its own repeats gave; the value itself where there are none.
        budget: The most that DESIGN.md allows; None where it says nothing.
    """

    value: float
    low: float
    high: float
    budget: float | None = None

    @property
    def verdict(self) -> str:
        """Whether its budget is held; empty where it has none."""
        if self.budget is None:
            return ""
        return f"budget {self.budget:g}: {'held' if self.value <= self.budget else 'not held'}"


@dataclass(frozen=True)
class Result:
    """What one call of a benchmark found: a line of the history. `dirty`: of files that no commit holds."""

    benchmark: str
    commit: str
    dirty: bool
    date: str
    torch: str
    threads: int
    machine: str
    settings: dict[str, Any]
    figures: dict[str, Figure] = field(default_factory=dict)

    @property
    def setting(self) -> tuple[str, ...]:
        """What two results have to share to be compared."""
        return self.benchmark, self.torch, str(self.threads), self.machine, json.dumps(self.settings, sort_keys=True)


def figure(values: Sequence[float], budget: float | None = None) -> Figure:
    """Return the median of repeats, with the smallest and the largest of them.

    Many are taken in a few stretches, in the order in which they were measured, and the median of each is a repeat.
    """
    size = max(1, len(values) // PARTS)
    parts = [statistics.median(values[i : i + size]) for i in range(0, len(values) - size + 1, size)]
    return Figure(statistics.median(values), min(parts), max(parts), budget)


def single(value: float, budget: float | None = None) -> Figure:
    """Return a number that was measured once."""
    return Figure(value, value, value, budget)


def tell(benchmark: str, settings: Mapping[str, Any], figures: Mapping[str, Figure], *, note: bool = True) -> None:
    """Print figures, each with its spread and its budget, and append them to the history."""
    for name, found in figures.items():
        spread = f"{found.low:.4g} to {found.high:.4g}" if found.low < found.high else ""
        print(f"{name:44} {found.value:10.4g}   {spread:22} {found.verdict}".rstrip(), flush=True)
    if note:
        append(benchmark, settings, figures)


def append(benchmark: str, settings: Mapping[str, Any], figures: Mapping[str, Figure]) -> None:
    """Append a result to the history."""
    import torch

    commit, dirty = _commit()
    cores = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    date = time.strftime("%Y-%m-%d")
    about = (benchmark, commit, dirty, date, torch.__version__, torch.get_num_threads(), cores, dict(settings))
    with path().open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(Result(*about, dict(figures)))) + "\n")


def path() -> Path:
    """Where the history is kept."""
    return Path(os.environ.get(FILE) or HERE / "history.jsonl")


def read(file: Path | None = None) -> list[Result]:
    """Return all results, the oldest first.

    Raises:
        BadInput: There is no history yet, or a line of it is no result; the text names the line.
    """
    from pydantic import TypeAdapter, ValidationError

    from lab.scenario import explain

    file = file or path()
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise BadInput(f"{file}: no history yet; each benchmark appends what it finds") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{file}: cannot be read: {error}") from None
    found, result = [], TypeAdapter(Result)
    for number, line in enumerate(lines, 1):
        try:
            found.append(result.validate_json(line, strict=True))
        except ValidationError as error:
            raise BadInput(f"{file}:{number}: not a result of a benchmark: {explain(error, None)}") from None
    return found


def _commit() -> tuple[str, bool]:
    """Return the commit that is measured, and whether files differ from it; the history itself may."""
    if given := os.environ.get(COMMIT):
        return given, False
    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/history.jsonl")
        return git("rev-parse", "HEAD"), bool(changed)
    except BadInput:
        return "unknown", True


def git(*arguments: str) -> str:
    """Return what git says in this checkout.

    Raises:
        BadInput: It refuses, or there is none.
    """
    try:
        done = subprocess.run(["git", *arguments], cwd=HERE.parent, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BadInput(f"git: {error.strerror}") from None
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["failed"]
        raise BadInput(f"git {arguments[0]}: {said[0]}")
    return done.stdout.strip()


def parser(about: str | None) -> argparse.ArgumentParser:
    """Return a parser of arguments that prints a benchmark's docstring as it stands."""
    return argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)


def in_turn(calls: Mapping[str, Any], rounds: int, warm: int = 1) -> dict[str, list[float]]:
    """Return the seconds of each call, by name; in each round each is called once, the first one later each time."""
    order, times = [*calls], dict[str, list[float]]((name, []) for name in calls)
    for number in range(warm + rounds):
        shift = number % len(order)
        for name in order[shift:] + order[:shift]:
            begun = time.perf_counter()
            calls[name]()
            if number >= warm:
                times[name].append(time.perf_counter() - begun)
    return times


def against(times: Mapping[str, Sequence[float]], name: str, base: str) -> list[float]:
    """Return the ratio of one to another in each round."""
    return [a / b for a, b in zip(times[name], times[base], strict=True)]
