"""The store of a run: what is written is read back, while it is written to, after a kill, and from a read-only copy."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import lab.store
from lab.errors import BadInput
from lab.store import DECLINED, FACT, SET_ASIDE, History, Row, Store, read_history

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.store import Columns

LOSS = (("loss", ""),)


def row(columns: Columns, *values: float) -> Row:
    return Row(columns, np.array(values, dtype=np.float64))


def fill(path: Path, steps: int) -> Store:
    """Open a store and write a loss of 0, 1, 2, ... into it."""
    store = Store(path)
    for step in range(steps):
        store.write(step, row(LOSS, float(step)))
    return store


def same(one: History, other: History) -> None:
    """Check that two histories are the same, to the last bit of each value."""
    assert one.metrics == other.metrics
    for metric in one.metrics:
        assert one.sites(metric) == other.sites(metric)
        for site, series in one.each(metric):
            again = other.series(metric, site)
            assert again.steps.tolist() == series.steps.tolist()
            assert again.values.tobytes() == series.values.tobytes()
    assert (one.last_step, one.order, one.facts, one.reasons) == (
        other.last_step,
        other.order,
        other.facts,
        other.reasons,
    )


# ---------------------------------------------------------------- what is written is read back

NAMES = st.text(max_size=6)
COLUMNS = st.lists(st.tuples(NAMES, NAMES), max_size=4).map(tuple)


@st.composite
def runs(draw: st.DrawFn) -> list[tuple[int, Row]]:
    """Rows of a few layouts, in the order in which they are written; steps may come twice."""
    layouts = draw(st.lists(COLUMNS, min_size=1, max_size=3))
    written = []
    for step in sorted(draw(st.lists(st.integers(0, 2**40), max_size=20))):
        columns = draw(st.sampled_from(layouts))
        values = draw(st.lists(st.floats(), min_size=len(columns), max_size=len(columns)))
        written.append((step, row(columns, *values)))
    return written


@settings(max_examples=60, deadline=None)
@given(runs(), st.dictionaries(NAMES, NAMES, max_size=3), st.dictionaries(NAMES, st.integers(0, 9), max_size=3))
@example([(0, row(LOSS, np.nan)), (1, row((), *())), (1, row(LOSS, -np.inf)), (2, row(LOSS, -0.0))], {}, {})
@example([(0, row(LOSS * 2, 1.0, 2.0)), (1, row(LOSS, 3.0))], {"a\0b": "\u2028"}, {"": 0})
def test_what_is_written_is_read_back(
    written: list[tuple[int, Row]], remarks: dict[str, str], order: dict[str, int]
) -> None:
    history = History(order=dict(order), facts=dict(remarks), reasons=dict(remarks))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.db"
        store = Store(path)
        for step, metrics in written:
            store.write(step, metrics)
            history.add(step, metrics)
        for name, text in remarks.items():
            store.remark(FACT, name, text)
            store.remark(SET_ASIDE, name, text)
        store.write_order(order)
        store.commit()
        while_open = read_history(path)
        store.close()
        closed = read_history(path)
    same(history, while_open)
    same(history, closed)


def test_a_series_goes_on_when_the_columns_change(tmp_path: Path) -> None:
    store = Store(tmp_path / "metrics.db")
    wide = (("loss", ""), ("norm", "a"))
    for step in range(40):
        store.write(step, row(wide, step, -step) if step % 3 == 0 else row(LOSS, step))
    store.close()
    history = read_history(tmp_path / "metrics.db")
    assert history.series("loss").steps.tolist() == list(range(40))
    assert history.series("loss").values.tolist() == list(range(40))
    assert history.series("norm", "a").steps.tolist() == list(range(0, 40, 3))
    assert history.last("norm", "a") == -39
    assert len(history.series("norm")) == 0
    assert history.last_step == 39


def test_a_probe_that_can_judge_again_is_forgotten(tmp_path: Path) -> None:
    store = fill(tmp_path / "metrics.db", 1)
    store.remark(DECLINED, "one", "too early")
    store.remark(DECLINED, "two", "too early")
    store.remark(SET_ASIDE, "two", "raised")
    store.forget(DECLINED, "one")
    store.close()
    assert read_history(tmp_path / "metrics.db").reasons == {"two": "raised"}


# ---------------------------------------------------------------- while it is written to


def test_what_is_committed_is_seen_while_the_run_goes_on(tmp_path: Path) -> None:
    store = fill(tmp_path / "metrics.db", 0)
    assert read_history(tmp_path / "metrics.db").last_step == -1
    for step in range(3):
        store.write(step, row(LOSS, step))
    store.commit()
    store.write(3, row(LOSS, 3))
    assert read_history(tmp_path / "metrics.db").last_step == 2
    store.commit()
    assert read_history(tmp_path / "metrics.db").last_step == 3
    store.close()


def test_a_reader_sees_one_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run records something new just when its columns have been read, and its steps have not."""
    store = fill(tmp_path / "metrics.db", 3)
    store.commit()
    connect = lab.store._connect

    def connect_and_be_overtaken(path: Path) -> sqlite3.Connection:
        db = connect(path)

        def write_now(statement: str) -> None:
            if "FROM steps" in statement:
                store.write(3, row((("new", ""),), 1.0))
                store.commit()

        db.set_trace_callback(write_now)
        return db

    with monkeypatch.context() as patch:
        patch.setattr(lab.store, "_connect", connect_and_be_overtaken)
        assert read_history(tmp_path / "metrics.db").metrics == ["loss"]
    assert read_history(tmp_path / "metrics.db").metrics == ["loss", "new"]
    store.close()


# ---------------------------------------------------------------- after a kill

# Writes rows as fast as it can, and notes beside the store which step was written last, and when.
WRITER = """
import os, struct, sys, time
from pathlib import Path
import numpy as np
from lab.store import Row, Store
folder = Path(sys.argv[1])
store = Store(folder / "metrics.db")
columns = tuple(("metric", f"site{i}") for i in range(300))
note = os.open(folder / "note", os.O_RDWR | os.O_CREAT)
for step in range(10**9):
    store.write(step, Row(columns, np.full(300, float(step))))
    os.pwrite(note, struct.pack("qd", step, time.monotonic() - store._begun), 0)
    time.sleep(0.0005)
"""


def noted(folder: Path) -> tuple[int, float]:
    """The step that was written last, and the seconds since the store was opened; step -1 before the first."""
    with contextlib.suppress(OSError, struct.error):
        step, seconds = struct.unpack("qd", (folder / "note").read_bytes())
        return step, seconds
    return -1, 0.0


def stored(folder: Path) -> float:
    """The seconds since the store was opened at which the last row that can be read was written."""
    with contextlib.closing(sqlite3.connect(folder / "metrics.db")) as db:
        return float(db.execute("SELECT ifnull(max(seconds), 0) FROM steps").fetchone()[0])


def test_a_killed_process_loses_at_most_about_a_second(tmp_path: Path) -> None:
    waits = [0.1, 0.9, 1.4]
    folders = [tmp_path / str(wait) for wait in waits]
    for folder in folders:
        folder.mkdir()
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(folder)]) for folder in folders]
    try:
        deadline = time.monotonic() + 60
        while any(noted(folder)[0] < 0 for folder in folders):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        begun = time.monotonic()
        for wait, writer in zip(waits, writers, strict=True):
            time.sleep(max(0.0, begun + wait - time.monotonic()))
            writer.kill()  # SIGKILL, in the middle of a write as like as not
            writer.wait()
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    kept = -1
    for folder in folders:
        kept = (history := read_history(folder / "metrics.db")).last_step
        for site, series in history.each("metric"):
            assert series.steps.tolist() == list(range(kept + 1)), site
            assert series.values.tolist() == series.steps.tolist()
        last, seconds = noted(folder)
        assert kept <= last + 1  # a row may be stored and not noted yet
        assert seconds - stored(folder) < 1.5
    assert kept > 0


# ---------------------------------------------------------------- from a read-only copy


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nothing in the folder can be written, even by root: the process takes another user's place in the block."""
    for path in folder.iterdir():
        path.chmod(0o444)
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        with pytest.raises(PermissionError):
            (folder / "new").touch()
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that any user may enter."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


def test_a_finished_store_is_read_from_a_read_only_folder(public: Path) -> None:
    fill(public / "metrics.db", 5).close()
    with read_only(public):
        history = read_history(public / "metrics.db")
    assert history.series("loss").values.tolist() == [0, 1, 2, 3, 4]


def test_a_killed_store_is_read_from_a_read_only_folder(public: Path, tmp_path: Path) -> None:
    """All that it recorded may stand in the WAL, which SQLite cannot use where it cannot write."""
    store = fill(tmp_path / "metrics.db", 5)
    store.commit()
    for name in ("metrics.db", "metrics.db-wal"):
        shutil.copy(tmp_path / name, public / name)
    store.close()
    with read_only(public):
        history = read_history(public / "metrics.db")
        assert {path.name for path in public.iterdir()} == {"metrics.db", "metrics.db-wal"}
    assert history.series("loss").values.tolist() == [0, 1, 2, 3, 4]


# ---------------------------------------------------------------- what is no store


def refused(path: Path) -> str:
    with pytest.raises(BadInput) as caught:
        read_history(path)
    text = str(caught.value)
    assert len(text.splitlines()) == 1, text
    assert str(path) in text
    return text


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "metrics.db")
    (tmp_path / "metrics.db").mkdir()
    assert "no such file" in refused(tmp_path / "metrics.db")


@pytest.mark.parametrize(
    "statement",
    [
        "DROP TABLE steps",
        "DROP TABLE columns",
        "DELETE FROM columns",
        "UPDATE columns SET layout = 7",
        "INSERT INTO columns VALUES (0, 1, 'more', '')",
        "UPDATE steps SET data = NULL",
        "UPDATE steps SET data = 'text'",
        "UPDATE steps SET data = x'00'",
        "UPDATE steps SET data = zeroblob(16)",
        "UPDATE steps SET step = 'one'",
        "UPDATE steps SET step = NULL",
        "UPDATE steps SET step = 1e300",
        "UPDATE columns SET metric = CAST(x'ff' AS TEXT)",
    ],
)
def test_a_store_that_makes_no_sense_is_refused(tmp_path: Path, statement: str) -> None:
    path = tmp_path / "metrics.db"
    fill(path, 2).close()
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute(statement)
    assert "damaged" in refused(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a store."""
    path = tmp_path_factory.mktemp("whole") / "metrics.db"
    store = fill(path, 60)
    store.write_order({"a": 0})
    store.remark(FACT, "steps", "60")
    store.close()
    return path.read_bytes()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_store_is_read_or_refused_in_one_line(tmp_path: Path, whole: bytes, data: st.DataObject) -> None:
    place = st.integers(0, len(whole) - 1)
    damaged = bytearray(whole)
    for where, value in data.draw(st.lists(st.tuples(place, st.integers(0, 255)), max_size=40)):
        damaged[where] = value
    cut = data.draw(st.one_of(st.just(len(whole)), place))
    path = tmp_path / "metrics.db"
    path.write_bytes(bytes(damaged[:cut]))
    try:
        history = read_history(path)
    except BadInput:
        refused(path)
    else:
        assert isinstance(history, History)
