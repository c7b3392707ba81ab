"""The metrics of a run: one SQLite file in WAL mode, written as the run goes on, read back as series and tables.

A step's metrics are one row: the names of its columns are kept once (a *layout*), its values as float64 bytes. So a
step costs one insert however many metrics it has, and a run that is killed can be read up to its last commit.
"""

from __future__ import annotations

import contextlib
import sqlite3
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lab.errors import BadInput, LookAgain
from lab.stages import Stage

Values = npt.NDArray[np.float64]
Columns = tuple[tuple[str, str], ...]

SCHEMA = """
CREATE TABLE IF NOT EXISTS columns (layout INTEGER, position INTEGER, metric TEXT, site TEXT,
                                    PRIMARY KEY (layout, position)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS steps (step INTEGER, layout INTEGER, seconds REAL, data BLOB);
CREATE TABLE IF NOT EXISTS sites (site TEXT PRIMARY KEY, place INTEGER) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS remarks (kind TEXT, name TEXT, text TEXT, PRIMARY KEY (kind, name)) WITHOUT ROWID;
"""

# Which of the remarks in the store a reader can ask for.
SET_ASIDE, DECLINED, TRACEBACK, FACT, STAGE = "set_aside", "declined", "traceback", "fact", "stage"


class Metric(NamedTuple):
    """One number with a name and a site; the step is that of the row that it stands in."""

    metric: str
    site: str
    value: float


class Row(Sequence[Metric]):
    """The metrics of one step, on the host."""

    def __init__(self, columns: Columns, values: Values) -> None:
        self.columns = columns
        self.values = values

    def __len__(self) -> int:
        return len(self.columns)

    def __getitem__(self, index: int) -> Metric:  # type: ignore[override]  # a row is not sliced
        return Metric(*self.columns[index], float(self.values[index]))


@dataclass
class Series:
    """One metric at one site over the steps at which it was recorded. Both arrays have shape [n]."""

    steps: npt.NDArray[np.int64]
    values: Values

    def __len__(self) -> int:
        return len(self.steps)

    def first(self, wrong: npt.NDArray[np.bool_]) -> tuple[int, float] | None:
        """Return the step and the value where `wrong` [n] is first true; None when it never is."""
        where = np.flatnonzero(wrong)
        return (int(self.steps[where[0]]), float(self.values[where[0]])) if len(where) else None

    def until_now(self, wrong: npt.NDArray[np.bool_], looks: int) -> int | None:
        """Return from which place on `wrong` [n] holds up to the last; None if it does not hold at the last.

        Raises:
            LookAgain: It does, and in fewer than `looks` of them.
        """
        right = np.flatnonzero(~wrong)
        begin = int(right[-1]) + 1 if len(right) else 0
        newest = len(wrong) - begin
        if 0 < newest < looks:
            raise LookAgain(f"wrong in the newest {newest} of {len(wrong)} looks; {looks} tell")
        return begin if newest else None

    @property
    def finite(self) -> Series:
        """The part that is finite."""
        keep = np.isfinite(self.values)
        return Series(self.steps[keep], self.values[keep])


class _Layout:
    """Rows with the same columns, in arrays that double when they are full: a column is then a view."""

    def __init__(self, columns: Columns) -> None:
        self.columns = columns
        self.count = 0
        self._steps = np.empty(16, dtype=np.int64)
        self._rows = np.empty((16, len(columns)), dtype=np.float64)

    def add(self, step: int, values: Values) -> None:
        if self.count == len(self._steps):
            self._steps = np.concatenate([self._steps, np.empty_like(self._steps)])
            self._rows = np.concatenate([self._rows, np.empty_like(self._rows)])
        self._steps[self.count] = step
        self._rows[self.count] = values
        self.count += 1

    def column(self, position: int) -> Series:
        return Series(self._steps[: self.count], self._rows[: self.count, position])


@dataclass
class History:
    """What a run has shown so far, in memory: all that rules may read.

    Attributes:
        order: Name of each site to its place in the forward pass.
        facts: What is known of the run once and for all, in words.
        stages: Name of each metric by which runs are compared, and where in a step it belongs.
        reasons: Id of each probe that was set aside or could not judge, and why.
        others: What the other processes of the same training have shown, by the name of their folder. It is known
            when they have ended, and of trainings only that the lab did not write.
        last_step: The newest step that was recorded; -1 before the first.
    """

    order: dict[str, int] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    stages: dict[str, Stage] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    others: dict[str, History] = field(default_factory=dict)
    last_step: int = -1
    _layouts: dict[Columns, _Layout] = field(default_factory=dict)
    _where: dict[str, dict[str, list[tuple[_Layout, int]]]] = field(default_factory=dict)
    _made: dict[tuple[str, str], Series] = field(default_factory=dict)  # what rules asked for, since the newest row

    def add(self, step: int, row: Row) -> None:
        """Add the metrics of a step."""
        layout = self._layouts.get(row.columns)
        if layout is None:
            layout = self._layouts[row.columns] = _Layout(row.columns)
            for position, (metric, site) in enumerate(row.columns):
                self._where.setdefault(metric, {}).setdefault(site, []).append((layout, position))
        layout.add(step, row.values)
        self._made.clear()
        self.last_step = max(self.last_step, step)

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics that were recorded."""
        return list(self._where)

    def sites(self, metric: str) -> list[str]:
        """Return the sites at which a metric was recorded."""
        return list(self._where.get(metric, ()))

    def series(self, metric: str, site: str = "") -> Series:
        """Return one metric at one site, by step; empty when it was never recorded."""
        made = self._made.get((metric, site))
        if made is None:
            made = self._made[metric, site] = self._joined(metric, site)
        return made

    def _joined(self, metric: str, site: str) -> Series:
        parts = [layout.column(position) for layout, position in self._where.get(metric, {}).get(site, ())]
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return Series(np.empty(0, dtype=np.int64), np.empty(0))
        steps = np.concatenate([part.steps for part in parts])
        order = np.argsort(steps, kind="stable")
        return Series(steps[order], np.concatenate([part.values for part in parts])[order])

    def each(self, metric: str) -> Iterator[tuple[str, Series]]:
        """Yield each site of a metric with its series."""
        for site in self.sites(metric):
            yield site, self.series(metric, site)

    def last(self, metric: str, site: str = "") -> float:
        """Return the newest value; NaN when it was never recorded."""
        values = self.series(metric, site).values
        return float(values[-1]) if len(values) else float("nan")


class Store:
    """The SQLite file of a run. Writes are committed at least once a second."""

    COMMIT_EVERY = 0.5  # seconds

    def __init__(self, path: Path) -> None:
        self.path = path
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.execute("PRAGMA journal_mode=WAL")
        # A killed process loses nothing that was committed; only a power cut may cost the last commits.
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.executescript(SCHEMA)
        self._layouts: dict[Columns, int] = {}
        self._begun = time.monotonic()
        self._committed = self._begun
        self._db.execute("BEGIN")

    def rewind(self, step: int) -> None:
        """Forget everything that was recorded from `step` on, and go on with what the file holds."""
        self._db.execute("DELETE FROM steps WHERE step >= ?", (step,))
        self._db.execute("DELETE FROM remarks WHERE kind NOT IN (?, ?)", (FACT, STAGE))
        if step == 0:
            self._db.execute("DELETE FROM columns")
        kept: dict[int, list[tuple[str, str]]] = {}
        rows = self._db.execute("SELECT layout, metric, site FROM columns ORDER BY layout, position")
        for layout, metric, site in rows:
            kept.setdefault(layout, []).append((metric, site))
        self._layouts = {tuple(names): layout for layout, names in kept.items()}
        (seconds,) = self._db.execute("SELECT max(seconds) FROM steps").fetchone()
        self._begun -= seconds or 0.0
        self.commit()

    def write(self, step: int, row: Row) -> None:
        """Write the metrics of a step."""
        layout = self._layouts.get(row.columns)
        if layout is None:
            layout = self._layouts[row.columns] = len(self._layouts)
            rows = [(layout, i, metric, site) for i, (metric, site) in enumerate(row.columns)]
            self._db.executemany("INSERT INTO columns VALUES (?, ?, ?, ?)", rows)
        now = time.monotonic()
        self._db.execute(
            "INSERT INTO steps VALUES (?, ?, ?, ?)", (step, layout, now - self._begun, row.values.tobytes())
        )
        if now - self._committed > self.COMMIT_EVERY:
            self.commit()

    def write_order(self, order: dict[str, int]) -> None:
        """Write the place of each site in the forward pass."""
        self._db.executemany("INSERT OR REPLACE INTO sites VALUES (?, ?)", list(order.items()))

    def remark(self, kind: str, name: str, text: str) -> None:
        """Write a remark: a fact about the run, or why a probe was set aside."""
        self._db.execute("INSERT OR REPLACE INTO remarks VALUES (?, ?, ?)", (kind, name, text))

    def forget(self, kind: str, name: str) -> None:
        """Remove a remark."""
        self._db.execute("DELETE FROM remarks WHERE kind = ? AND name = ?", (kind, name))

    def commit(self) -> None:
        """Make everything written so far safe."""
        self._db.execute("COMMIT")
        self._db.execute("BEGIN")
        self._committed = time.monotonic()

    def close(self) -> None:
        """Commit and close."""
        self._db.execute("COMMIT")
        self._db.close()


def read_history(path: Path) -> History:
    """Read back what a run recorded, also while it runs or after it was killed.

    Raises:
        BadInput: The file is no metric store.
    """
    if not path.is_file():
        raise BadInput(f"{path}: no such file; a run folder holds one of this name")
    history = History()
    try:
        db = _connect(path)
        try:
            db.execute("BEGIN")  # one moment of a store that is being written to
            layouts: dict[int, list[tuple[str, str]]] = {}
            for layout, metric, site in db.execute(
                "SELECT layout, metric, site FROM columns ORDER BY layout, position"
            ):
                layouts.setdefault(layout, []).append((metric, site))
            columns = {layout: tuple(names) for layout, names in layouts.items()}
            for step, layout, data in db.execute("SELECT step, layout, data FROM steps ORDER BY rowid"):
                names, values = columns.get(layout, ()), np.frombuffer(data, dtype=np.float64)
                if len(values) != len(names):
                    raise ValueError(f"step {step}: {len(values)} values in {len(names)} columns")
                history.add(step, Row(names, values))
            history.order = dict(db.execute("SELECT site, place FROM sites"))
            for kind, name, text in db.execute("SELECT kind, name, text FROM remarks"):
                if kind in (SET_ASIDE, DECLINED):
                    history.reasons[name] = text
                elif kind == FACT:
                    history.facts[name] = text
                elif kind == STAGE and (stage := Stage.read(text)) is not None:
                    history.stages[name] = stage
        finally:
            db.close()
    except (sqlite3.DatabaseError, ValueError, TypeError, OverflowError) as error:
        raise BadInput(f"{path}: not a metric store of the lab, or damaged: {error}") from None
    return history


def read_seconds(path: Path) -> Series:
    """Read back when each step was recorded, in seconds since the start; of several records of a step the first.

    Raises:
        BadInput: The file is no metric store.
    """
    if not path.is_file():
        raise BadInput(f"{path}: no such file; a run folder holds one of this name")
    try:
        with contextlib.closing(_connect(path)) as db:
            rows = db.execute("SELECT step, min(seconds) FROM steps GROUP BY step ORDER BY step").fetchall()
    except sqlite3.DatabaseError as error:
        raise BadInput(f"{path}: not a metric store of the lab, or damaged: {error}") from None
    return Series(np.array([step for step, _ in rows], dtype=np.int64), np.array([at for _, at in rows], dtype=float))


def _connect(path: Path) -> sqlite3.Connection:
    """Open for reading. A folder that cannot be written to has no room for the WAL's index: read a copy then."""
    db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
    try:
        db.execute("SELECT 1 FROM steps LIMIT 1")
    except sqlite3.OperationalError as error:
        db.close()
        if "readonly" not in str(error) and "unable to open" not in str(error):
            raise
        return _copied(path)
    return db


def _copied(path: Path) -> sqlite3.Connection:
    """Copy a store into memory, with what a killed run left in its WAL."""
    with tempfile.TemporaryDirectory() as folder:
        for part in (path, path.with_name(f"{path.name}-wal")):
            if part.exists():
                (Path(folder) / part.name).write_bytes(part.read_bytes())
        with contextlib.closing(sqlite3.connect(Path(folder) / path.name)) as copy:
            db = sqlite3.connect(":memory:")
            copy.backup(db)
    return db
