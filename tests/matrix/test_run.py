"""The matrix runs, keeps what it knows, goes on where it was, and counts rightly."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import psutil

from lab.cli import status_of
from lab.matrix.cells import Cell, cells
from lab.matrix.report import Unknown, pair_up, summarise
from lab.matrix.run import ROWS, run_cells

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

    from lab.catalogue import Catalogue


def row(fault: str, **changes: Any) -> dict[str, Any]:
    made = {
        "key": f"{fault}-{len(changes)}",
        "fault": fault,
        "project": "attention",
        "seed": 0,
        "applies": True,
        "detected": bool(fault),
        "named": bool(fault),
        "located": None,
        "delay": 0 if fault else None,
        "at": "",
        "causes": [],
        "symptoms": ["a"] if fault else [],
        "checked": [],
        "not_checked": {},
        "seconds": 1.0,
        "finite": True,
        "late": False,
        "score": 1.0,
        "verdict": "faulty" if fault else "healthy",
    }
    return {**made, **changes}


def test_counts() -> None:
    summary = summarise(
        [
            row("x"),
            row("x", named=False, located=False, delay=4, symptoms=["a", "b"]),
            row("x", located=True, delay=2, late=True),
            row("y", detected=False, named=False, delay=None, symptoms=[], not_checked={"r": "why"}),
            row("z", applies=False),
            row(""),
            row("", detected=True, symptoms=["a"], verdict="faulty"),
            row("", verdict="inconclusive"),
        ]
    )
    told = summary.to_dict()
    expected = {"faults": 2, "runs": 4, "detected": 3, "named": 2, "located": 1, "with_a_place": 2}
    assert {key: told[key] for key in expected} == expected
    assert (told["healthy_runs"], told["false_alarms"], told["not_checked"]) == (3, 1, {"r": 1})
    assert told["inconclusive"] == 1
    assert (told["delay_from_the_start"], told["delay_late"]) == (2, 2)
    first, second = summary.lines
    assert (first.fault, first.delay, first.placed, first.only) == ("x", 2, (1, 2), ["a"])
    assert (second.delay, second.only) == (None, [])
    assert len(told["rows"]) == 7


def test_a_slice_is_found_named_and_placed_and_goes_on_where_it_was(tmp_path: Path, catalogue: Catalogue) -> None:
    wanted = [
        cell
        for cell in cells(catalogue, project="attention")
        if cell.fault in ("", "mask.future_leak", "optimizer.missing_parameter")
    ]
    rows = list(run_cells(wanted, tmp_path, jobs=2))
    summary = summarise(rows)
    assert len(summary.broken) == 2
    assert len(summary.healthy) == 1
    assert not summary.false_alarms
    for found in summary.broken:
        assert (found["detected"], found["named"], found["located"]) == (True, True, True), found
    kept = (tmp_path / ROWS).read_text()
    # As when it was killed while it wrote: the last row is cut off, and is run again.
    (tmp_path / ROWS).write_text(kept[:-20])
    again = {found["key"]: found for found in run_cells(wanted, tmp_path, jobs=1)}
    assert again.keys() == {found["key"] for found in rows}
    for found in rows:
        assert {**again[found["key"]], "seconds": 0} == {**found, "seconds": 0}


def test_rows_of_another_version_of_the_code_are_run_anew(tmp_path: Path, catalogue: Catalogue) -> None:
    (cell,) = [c for c in cells(catalogue, project="linear") if not c.fault]
    (tmp_path / ROWS).write_text(json.dumps({"key": cell.key, "version": "another", "applies": True}) + "\n")
    (row,) = run_cells([cell], tmp_path, jobs=1)
    assert row["version"] != "another"
    assert row["checked"]
    assert len((tmp_path / ROWS).read_text().splitlines()) == 2
    assert list(run_cells([cell], tmp_path, jobs=1)) == [row]


def test_a_fault_without_a_place_does_not_apply(tmp_path: Path, catalogue: Catalogue) -> None:
    wanted = [cell for cell in cells(catalogue, project="linear") if cell.fault == "mask.future_leak"]
    (only,) = run_cells(wanted, tmp_path, jobs=1)
    assert not only["applies"]
    assert "no site" in only["reason"]


def test_pairs_are_counted_where_both_can_be_seen() -> None:
    good, both = row("x"), row("x + y", named=True)
    rows = [
        *(good, row("y"), both),
        *(good, row("y", named=False), both),  # one is not found alone
        *(good, row("y", finite=False), both),  # one ends the run
        *(good, row("y"), row("x + y", applies=False)),
        *(good, row("y"), row("x + y", named=False)),
        *(good, row("y"), both),
    ]
    pairs = pair_up(rows, 2)
    assert (len(pairs.rows), pairs.both_named, pairs.left_out) == (2, 1, 3)
    assert pair_up(rows, 9).both_named == 2


def test_a_name_counts_as_wrong_where_it_explains_half() -> None:
    names = [row("x", causes=["a"], score=s) for s in (0.4, 0.5)]
    assert Unknown((*names, row("x", causes=[]))).misnamed == [names[1]]


def test_a_fault_that_is_not_known_is_found_and_not_named(tmp_path: Path, catalogue: Catalogue) -> None:
    cell = Cell(("mask.blocks_past",), "attention", "healthy-attention", 1, "develop", "mask.blocks_past")
    assert catalogue.faults["mask.blocks_past"].info.cause == cell.without
    (only,) = run_cells([cell], tmp_path, jobs=1)
    assert (only["detected"], only["causes"]) == (True, [])


def test_two_faults_are_both_named(tmp_path: Path) -> None:
    faults = ("mask.future_leak", "optimizer.missing_parameter")
    (only,) = run_cells([Cell(faults, "attention", "healthy-attention", 0, "develop")], tmp_path, jobs=1)
    assert only["named"]
    assert only["fault"] == "mask.future_leak + optimizer.missing_parameter"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["matrix", "--project", "multihead", "--fault", "mask.future_leak", "--out", str(tmp_path / "m")]
    assert status_of([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    names = "faults runs detected named located healthy_runs false_alarms not_checked seconds rows"
    assert set(names.split()) <= told.keys()
    assert (told["faults"], told["runs"], told["detected"], told["named"], told["located"]) == (1, 1, 1, 1, 1)
    names = "fault project at seed detected named located delay causes not_checked"
    assert set(names.split()) <= told["rows"][0].keys() | {"project"}
    assert status_of(arguments) == 0  # from what is kept
    assert "1 found, 1 named first" in " ".join(capsys.readouterr().out.split())
    assert status_of(["matrix", "--project", "attenton"]) == 2
    assert "'attention'" in capsys.readouterr().err


def test_its_processes_end_when_it_is_killed(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        "from lab.cli import main; main()",
        "matrix",
        "--jobs",
        "2",
        "--out",
        str(tmp_path),
    ]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as matrix:
        try:
            found: list[psutil.Process] = []
            begun = time.monotonic()
            while not (tmp_path / "rows.jsonl").exists() or not (tmp_path / "rows.jsonl").read_text():
                assert time.monotonic() - begun < 120
                found = psutil.Process(matrix.pid).children(recursive=True)
                time.sleep(0.1)
            assert len(found) >= 2
        finally:
            matrix.kill()
    assert psutil.wait_procs(found, timeout=60)[1] == []
