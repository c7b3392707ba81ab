"""What it costs to write a run's metrics and to read them back, against sqlite3 without the lab.

    python benchmarks/store.py

Steps of as many numbers as a watched run records. `sqlite3`: the same bytes, a row a step, by insert and select alone;
`a row a number`: the table that one would make first. Each is written and read in turn, to a new file each time.
"""

from __future__ import annotations

import contextlib
import sqlite3
import tempfile
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import history
import numpy as np

from lab.store import Row, Store, read_history

if TYPE_CHECKING:
    from collections.abc import Callable

NUMBERS = 200
COLUMNS = tuple((f"metric.{i % 20}", f"blocks.{i // 20}") for i in range(NUMBERS))
VALUES = np.arange(float(NUMBERS))


def write_lab(path: Path, steps: int) -> None:
    """By the lab."""
    store, row = Store(path), Row(COLUMNS, VALUES)
    for step in range(steps):
        store.write(step, row)
    store.close()


def _open(path: Path, table: str) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=NORMAL")
    db.execute(table)
    return db


def write_bare(path: Path, steps: int) -> None:
    """A row a step, in one transaction."""
    with contextlib.closing(_open(path, "CREATE TABLE steps (step INTEGER, data BLOB)")) as db:
        db.execute("BEGIN")
        for step in range(steps):
            db.execute("INSERT INTO steps VALUES (?, ?)", (step, VALUES.tobytes()))
        db.execute("COMMIT")


def write_rows(path: Path, steps: int) -> None:
    """A row a number, in one transaction."""
    table = "CREATE TABLE metrics (step INTEGER, metric TEXT, site TEXT, value REAL)"
    with contextlib.closing(_open(path, table)) as db:
        db.execute("BEGIN")
        for step in range(steps):
            rows = [(step, *names, float(value)) for names, value in zip(COLUMNS, VALUES, strict=True)]
            db.executemany("INSERT INTO metrics VALUES (?, ?, ?, ?)", rows)
        db.execute("COMMIT")


def read_bare(path: Path) -> Any:
    """All rows."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        return db.execute("SELECT * FROM steps").fetchall()


def read_rows(path: Path) -> Any:
    """All rows."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        return db.execute("SELECT * FROM metrics").fetchall()


def main() -> None:
    """Print the ratios."""
    options = history.parser(__doc__)
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--steps", type=int, default=1000)
    given = options.parse_args()
    steps: int = given.steps
    with tempfile.TemporaryDirectory() as folder:
        numbers = count()

        def fresh(write: Callable[[Path, int], None]) -> Callable[[], None]:
            return lambda: write(Path(folder) / f"{next(numbers)}.db", steps)

        writes = {"lab": fresh(write_lab), "sqlite3": fresh(write_bare), "a row a number": fresh(write_rows)}
        wrote = history.in_turn(writes, given.rounds)
        kept = {name: Path(folder) / f"kept-{i}.db" for i, name in enumerate(writes)}
        for name, write in zip(writes, (write_lab, write_bare, write_rows), strict=True):
            write(kept[name], steps)
        reads: dict[str, Callable[[], Any]] = {
            "lab": lambda: read_history(kept["lab"]),
            "sqlite3": lambda: read_bare(kept["sqlite3"]),
            "a row a number": lambda: read_rows(kept["a row a number"]),
        }
        seen = history.in_turn(reads, given.rounds)
    figures = {}
    for what, times in (("written", wrote), ("read", seen)):
        figures[f"steps {what} a second"] = history.figure([steps / seconds for seconds in times["lab"]])
        for other in ("sqlite3", "a row a number"):
            figures[f"{what}, against {other}"] = history.figure(history.against(times, "lab", other))
    history.tell("store", {"rounds": given.rounds, "steps": steps, "numbers": NUMBERS}, figures)


if __name__ == "__main__":
    main()
