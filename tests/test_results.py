"""A run folder read back: as tables, as findings, and as a diagnosis; also of a run that goes on or was killed."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lab
from lab.diagnosis.diagnose import diagnose
from lab.files import FINDINGS, METRICS, RUN
from lab.store import History, Row, Store

if TYPE_CHECKING:
    from conftest import SmallRun

    from lab.catalogue import Catalogue
    from lab.diagnosis.model import Diagnosis


TO_NAN = {"id": "numerics.nonfinite", "at": "blocks.1.mlp.out", "from_step": 4}


def same_as_history(results: lab.Results, history: History) -> None:
    """Check that the tables hold what the history holds, no more and no less."""
    metrics = results.metrics
    assert list(metrics.columns) == ["step", "metric", "site", "value"]
    assert metrics["step"].is_monotonic_increasing
    count = 0
    for metric in history.metrics:
        table = results.table(metric)
        assert set(table.columns) == set(history.sites(metric))
        for site, series in history.each(metric):
            count += len(series)
            part = metrics[(metrics["metric"] == metric) & (metrics["site"] == site)]
            assert part["step"].tolist() == series.steps.tolist()
            np.testing.assert_array_equal(part["value"].to_numpy(), series.values)
            newest = dict(zip(series.steps.tolist(), series.values.tolist(), strict=True))
            expected = [newest.get(step, math.nan) for step in table.index]
            np.testing.assert_array_equal(table[site].to_numpy(), expected)
        recorded = {step for site in history.sites(metric) for step in history.series(metric, site).steps.tolist()}
        assert table.index.tolist() == sorted(recorded)
    assert len(metrics) == count


# ---------------------------------------------------------------- a finished run


def test_the_tables_of_a_run_hold_what_it_recorded(small_run: SmallRun, tmp_path: Path) -> None:
    _, history = small_run()
    results = lab.load(tmp_path / "run-1")
    assert len(results.table("loss")) == 12
    assert results.history.order == history.order
    same_as_history(results, history)


def test_what_is_not_a_number_is_in_the_tables(small_run: SmallRun, tmp_path: Path) -> None:
    _, history = small_run(faults=[TO_NAN])
    results = lab.load(str(tmp_path / "run-1"))
    loss = results.table("loss")[""]
    assert loss[:4].notna().all()
    assert loss[4:].isna().all()
    same_as_history(results, history)


def test_a_run_says_what_it_is(small_run: SmallRun, tmp_path: Path) -> None:
    small_run(seed=7)
    about = lab.load(tmp_path / "run-1").about
    assert about["run"]["seed"] == 7
    assert about["scenario"]["model"]["width"] == 32
    assert {"versions", "machine"} <= about.keys()


def test_the_findings_are_those_of_the_diagnosis(small_run: SmallRun, tmp_path: Path, catalogue: Catalogue) -> None:
    diagnosis, _ = small_run(faults=[TO_NAN])
    results = lab.load(tmp_path / "run-1")
    found = results.findings
    assert set(zip(found["id"], found["at"], strict=True)) == {(s.id, s.at) for s in diagnosis.symptoms}
    assert found["step"].is_monotonic_increasing
    again = results.diagnosis(catalogue)
    assert (again.verdict, again.causes, again.checked) == (diagnosis.verdict, diagnosis.causes, diagnosis.checked)
    assert again.not_checked == diagnosis.not_checked


def test_a_healthy_run_has_no_findings(small_run: SmallRun, tmp_path: Path, catalogue: Catalogue) -> None:
    diagnosis, _ = small_run()
    results = lab.load(tmp_path / "run-1")
    assert results.findings.empty
    assert results.diagnosis(catalogue) == diagnosis
    assert results.diagnosis().verdict == "healthy"  # by the rules of today


def test_a_metric_that_was_not_recorded_is_named_with_the_nearest(small_run: SmallRun, tmp_path: Path) -> None:
    small_run()
    with pytest.raises(lab.BadInput, match=r"run-1: no metric 'activation.rmss'; did you mean 'activation.rms'\?"):
        lab.load(tmp_path / "run-1").table("activation.rmss")


# ---------------------------------------------------------------- a run that goes on


class Reader(lab.Plugin):
    """Reads the folder of the run that it takes part in, at the end of every step."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        self.seen: list[tuple[lab.Results, Diagnosis, int]] = []

    def lab_metrics(self, run: lab.Run, step: lab.Step) -> None:
        results = lab.load(run.folder)
        self.seen.append((results, diagnose(results.history, self.catalogue), step.index))


def test_a_run_is_read_while_it_goes_on(small_run: SmallRun, catalogue: Catalogue) -> None:
    reader = Reader(catalogue)
    _, history = small_run(reader, faults=[TO_NAN])
    whole = history.series("loss")
    assert len(reader.seen) >= 12  # it was never set aside: it read the folder at every step
    for results, diagnosis, now in reader.seen:
        loss = results.history.series("loss")
        assert loss.steps.tolist() == whole.steps[: len(loss)].tolist()
        np.testing.assert_array_equal(loss.values, whole.values[: len(loss)])
        assert results.history.last_step <= now
        assert "steps were seen" in diagnosis.not_checked["the rest of the run"]
        assert diagnosis.verdict != "healthy"
    results, diagnosis, _ = reader.seen[-1]
    same_as_history(results, results.history)
    assert diagnosis.causes[0].id == "numerics.nonfinite"
    assert "12 steps were seen" in diagnosis.not_checked["the rest of the run"]
    assert not results.findings.empty


def test_a_run_that_has_recorded_nothing_yet_is_empty(tmp_path: Path) -> None:
    store = Store(tmp_path / METRICS)
    results = lab.load(tmp_path)
    store.close()
    assert list(results.metrics.columns) == ["step", "metric", "site", "value"]
    assert results.metrics.empty
    assert results.findings.empty
    assert results.about == {}
    assert results.diagnosis().verdict == "inconclusive"


@pytest.mark.parametrize("garbage", [b"", b"\xff\xfe\x00", b"{", b"3"])
def test_a_half_written_last_finding_is_left_out(small_run: SmallRun, tmp_path: Path, garbage: bytes) -> None:
    small_run(faults=[TO_NAN])
    results = lab.load(tmp_path / "run-1")
    path = tmp_path / "run-1" / FINDINGS
    whole = results.findings
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == len(whole) > 1
    before = whole.iloc[:-1].reset_index(drop=True)
    for cut in (1, len(lines[-1]) // 2, len(lines[-1]) - 2):
        path.write_bytes(b"".join(lines[:-1]) + lines[-1][:cut] + garbage)
        pd.testing.assert_frame_equal(results.findings, before)


# ---------------------------------------------------------------- any run at all

FLOATS = st.one_of(st.floats(), st.sampled_from([math.nan, math.inf, 1.0]))
COLUMNS = st.lists(st.tuples(st.sampled_from(["a", "b"]), st.sampled_from(["", "x", "y"])), max_size=4, unique=True)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_the_tables_hold_what_the_history_holds(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        store = Store(Path(name) / METRICS)
        for step in sorted(data.draw(st.lists(st.integers(0, 9), max_size=8))):
            columns = tuple(data.draw(COLUMNS))
            values = data.draw(st.lists(FLOATS, min_size=len(columns), max_size=len(columns)))
            store.write(step, Row(columns, np.array(values, dtype=np.float64)))
        store.close()
        results = lab.load(name)
        same_as_history(results, results.history)


# ---------------------------------------------------------------- what is no run


@pytest.mark.parametrize("text", ["seed = ", "a = 1\na = 1", "\x00", "x = " + "9" * 5000, "x = " + "[" * 5000])
def test_a_damaged_run_file_is_named(tmp_path: Path, text: str) -> None:
    Store(tmp_path / METRICS).close()
    (tmp_path / RUN).write_text(text)
    with pytest.raises(lab.BadInput, match=r"run\.toml: damaged: ") as caught:
        lab.load(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_what_is_no_run_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(lab.BadInput, match="no such folder"):
        lab.load(tmp_path / "nowhere")
    with pytest.raises(lab.BadInput, match=r"holds no metrics\.db"):
        lab.load(tmp_path)
    (tmp_path / METRICS).write_bytes(b"no database" * 1000)
    with pytest.raises(lab.BadInput, match="damaged"):
        lab.load(tmp_path)
