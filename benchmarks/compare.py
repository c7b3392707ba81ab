"""Two commits beside each other, from what their benchmarks found.

    python benchmarks/compare.py main~5 main                           # from benchmarks/history.jsonl
    python benchmarks/compare.py main~5 main --run                     # measure both now, in turn
    python benchmarks/compare.py main~5 main --run store --rounds 5    # these benchmarks, more often

Only results of the same benchmark, settings, torch, threads and machine are compared, and none of files that no commit
holds. A change is `beyond` the spread where no repeat of the one lies between those of the other; one measurement
alone has no spread, and is said to be `once`. With `--run` each commit is checked out in a folder of its own, and
measured by the benchmarks of this checkout: one ruler for both.
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import history

from lab.errors import BadInput, nearest

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from history import Figure, Result

QUICK = ("hooks", "store", "startup")
RUNNABLE = (*QUICK, "diff", "matrix", "overhead", "scenario", "throughput")
CHANCE = 0.05
ROUNDS = 4  # of each: all of one before all of the other by chance in 2 of 70 cases; of three each in 2 of 20
FAMILIES = ("faults", "probes", "plugins", "scenarios")


def main() -> int:
    """Print the table; 2 on bad input."""
    options = history.parser(__doc__)
    options.add_argument("a", help="a commit, as git names it")
    options.add_argument("b", help="another")
    options.add_argument("--run", nargs="*", metavar="BENCHMARK", help=f"measure now; by default {' '.join(QUICK)}")
    options.add_argument("--rounds", type=int, default=ROUNDS, help="with --run: how often each of the two; four tell")
    given = options.parse_args()
    try:
        print("\n".join(table(given)))
    except BadInput as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    return 0


def table(given: argparse.Namespace) -> list[str]:
    """Return the lines of the table.

    Raises:
        BadInput: A commit or a benchmark is not there, or nothing of the two can be compared.
    """
    a, b = commit(given.a), commit(given.b)
    if given.run is None:
        return compare(history.read(), a, b)
    wanted = given.run or QUICK
    for name in wanted:
        if name not in RUNNABLE:
            raise BadInput(f"--run {name}: no such benchmark{nearest(name, RUNNABLE)}")
    if given.rounds < 1:
        raise BadInput(f"--rounds {given.rounds}: one at least")
    with tempfile.TemporaryDirectory(prefix="lab-compare-") as folder:
        file = Path(folder) / "history.jsonl"
        with checked_out(a, Path(folder) / "a") as first, checked_out(b, Path(folder) / "b") as second:
            both = [(a, first), (b, second)]
            for number in range(given.rounds):
                for name in wanted:
                    for hash_, tree in both if number % 2 == 0 else reversed(both):
                        measure(name, hash_, tree, file)
        return compare(history.read(file), a, b)


def commit(name: str) -> str:
    """Return the hash of a commit.

    Raises:
        BadInput: There is none of that name.
    """
    try:
        return history.git("rev-parse", "--verify", "--end-of-options", f"{name}^{{commit}}")
    except BadInput:
        raise BadInput(f"{name}: no such commit here") from None


# ---------------------------------------------------------------- measuring


@contextlib.contextmanager
def checked_out(commit: str, folder: Path) -> Iterator[Path]:
    """Check a commit out in a folder of its own while in the block."""
    history.git("worktree", "add", "--detach", str(folder), commit)
    try:
        for family in FAMILIES:  # installed, they are parts of lab; here they are found as such
            (folder / "lab" / family).symlink_to(Path("..") / family)
        yield folder
    finally:
        history.git("worktree", "remove", "--force", str(folder))


def measure(name: str, commit: str, tree: Path, file: Path) -> None:
    """Run a benchmark of this checkout on the lab of another, and append what it finds to a history.

    Raises:
        BadInput: It fails there, as on a commit that lacks what it measures.
    """
    environment = {**os.environ, "PYTHONPATH": str(tree), history.FILE: str(file), history.COMMIT: commit}
    command = [sys.executable, str(history.HERE / f"{name}.py")]
    done = subprocess.run(command, env=environment, cwd=tree, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no word"]
        raise BadInput(f"{name} fails at {commit[:9]}: {said[-1]}")
    print(f"measured {name} at {commit[:9]}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------- comparing


def compare(results: Sequence[Result], a: str, b: str) -> list[str]:
    """Return a line for each figure that both commits have under the same conditions.

    Raises:
        BadInput: There is none.
    """
    found = {commit: gathered(results, commit) for commit in (a, b)}
    shared = [key for key in found[a] if key in found[b]]
    for commit in (a, b):
        if not found[commit]:
            more = (
                "; those of files that no commit held do not count" if any(r.commit == commit for r in results) else ""
            )
            raise BadInput(f"no result of {commit[:9]}: run benchmarks there, or give --run{more}")
    if not shared:
        raise BadInput(f"{a[:9]} and {b[:9]} share no benchmark with the same settings, torch, threads and machine")
    lines = [f"{'':54} {a[:9]:>10} {b[:9]:>10} {'change':>8}"]
    for key in shared:
        setting, name = key
        lines.append(line(f"{setting[0]}: {name}", found[a][key], found[b][key]))
    if any(len(found[commit][key]) == 1 for commit in (a, b) for key in shared):
        lines.append(
            "Some were measured in one process, at another time: chance and other work may differ. --run measures now."
        )
    left = len(found[a].keys() ^ found[b].keys())
    return [*lines, f"{left} figures of one of the two alone"] if left else lines


Key = tuple[tuple[str, ...], str]


def gathered(results: Sequence[Result], commit: str) -> dict[Key, list[Figure]]:
    """Return what was found at a commit, each figure as often as it was measured."""
    found: dict[Key, list[Figure]] = {}
    for result in results:
        if result.commit == commit and not result.dirty:
            for name, figure in result.figures.items():
                found.setdefault((result.setting, name), []).append(figure)
    return found


def line(title: str, a: Sequence[Figure], b: Sequence[Figure]) -> str:
    """Return a figure of both, the change, whether that is beyond the spread, and the budget."""
    x, y = (statistics.median(figure.value for figure in each) for each in (a, b))
    change = f"{y / x:8.3f}x" if x else f"{y - x:+9.3g}"
    return f"{title:54} {x:10.4g} {y:10.4g} {change}  {judged(a, b):7} {_budget(b, y)}".rstrip()


def judged(a: Sequence[Figure], b: Sequence[Figure]) -> str:
    """Say whether a change is beyond what repeats differ by: no repeat of one lies between those of the other.

    Where both commits were measured more than once, their values are the repeats. Without a change each order of all of
    them is as likely as any other, so that all of one stand before all of the other by chance in 2 cases of
    ``(n+m choose n)``. Where that is above 1 in 20 the repeats are too `few` to tell.
    """
    (low_a, high_a), (low_b, high_b) = spread(a), spread(b)
    if low_a == high_a == low_b == high_b:
        return "equal"
    counts = len(a), len(b)
    if min(counts) == 1 and (low_a == high_a or low_b == high_b):
        return "once"
    if min(counts) > 1 and 2 / math.comb(sum(counts), counts[0]) > CHANCE:
        return "few"
    return "beyond" if high_a < low_b or high_b < low_a else "within"


def spread(figures: Sequence[Figure]) -> tuple[float, float]:
    """Return the smallest and the largest repeat of a figure; of one measurement, those within it."""
    if len(figures) == 1:
        return figures[0].low, figures[0].high
    return min(figure.value for figure in figures), max(figure.value for figure in figures)


def _budget(figures: Sequence[Figure], value: float) -> str:
    budget = figures[-1].budget
    return "" if budget is None else history.Figure(value, value, value, budget).verdict


if __name__ == "__main__":
    sys.exit(main())
