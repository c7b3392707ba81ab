"""The commands as a person or a script uses them."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from lab.cli import status_of

if TYPE_CHECKING:
    from pathlib import Path

SMALL = ["--steps", "12"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def said(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> Any:
    assert status_of([*arguments, "--json"]) == status
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["list"], ["list", "faults", "--json"], ["show", "mask.future_leak"], ["run", "--help"]]
)
def test_what_needs_no_torch_does_not_import_it(arguments: list[str]) -> None:
    code = f"import sys; from lab.cli import status_of; status_of({arguments!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("kind", ["projects", "faults", "probes", "causes", "scenarios", "plugins", "checks"])
def test_list_prints_each_kind(capsys: pytest.CaptureFixture[str], kind: str) -> None:
    printed = said(capsys, "list", kind)
    assert list(printed) == [kind]
    assert printed[kind]
    assert all({"id", "title"} <= row.keys() for row in printed[kind])
    status_of(["list", kind])
    text = capsys.readouterr().out
    assert all(row["id"] in text for row in printed[kind])


def test_twenty_projects_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert [row["number"] for row in said(capsys, "list", "projects")["projects"]] == list(range(1, 21))


def test_run_prints_one_object(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    printed = said(capsys, "run", "reads-the-future", *SMALL, "--seed", "3", "--out", "run")
    assert printed["run"] == "run"
    assert printed["scenario"] == "reads-the-future"
    assert printed["verdict"] == "faulty"
    assert printed["as_expected"] is True
    assert printed["seconds"] > 0
    assert {"id", "title", "at", "since_step", "score", "evidence", "repair"} <= printed["causes"][0].keys()
    assert all({"metric", "at", "is", "value", "passed"} <= check.keys() for check in printed["checks"])
    assert {"symptoms", "not_checked"} <= printed.keys()
    assert "seed = 3" in (tmp_path / "run" / "run.toml").read_text()

    again = said(capsys, "diagnose", "run", status=1)
    assert (again["verdict"], again["causes"]) == (printed["verdict"], printed["causes"])


def test_what_is_not_a_number_is_null(capsys: pytest.CaptureFixture[str]) -> None:
    printed = said(capsys, "run", "turns-to-nan", "--steps", "44", "--no-twin", "--out", "run")
    assert printed["checks"][0]["value"] is None
    assert not printed["checks"][0]["twin_value"]


def test_the_exit_status_says_whether_it_is_as_expected(capsys: pytest.CaptureFixture[str]) -> None:
    printed = said(capsys, "run", "turns-to-nan", "--steps", "12", "--no-twin", status=1)  # NaN comes at step 40
    assert printed["verdict"] == "healthy"
    assert printed["as_expected"] is False
    assert "expected faulty" in printed["differences"][0]


def test_run_folders_do_not_collide(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folders = {said(capsys, "run", "healthy-decoder", "--steps", "2", status=1)["run"] for _ in range(3)}
    assert len(folders) == 3


PROBE = """
import lab
@lab.probe("fragile", title="Raises at step 5")
class Fragile(lab.Probe):
    def lab_step_end(self, step):
        if step.index == 5:
            raise ValueError("out of ideas")
"""
FAULT = """
import lab
@lab.fault("clumsy", title="Raises", cause="clumsy", moves="loss", repair="-")
class Clumsy(lab.Fault):
    def lab_before_update(self, run, step):
        raise ValueError("dropped it")
"""


def test_a_raising_probe_is_set_aside_and_the_run_goes_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "p.py").write_text(PROBE)
    printed = said(capsys, "run", "healthy-decoder", *SMALL, "--plugin", "p.py", status=1)
    assert printed["verdict"] == "inconclusive"
    assert any(row["id"] == "fragile" and "out of ideas" in row["reason"] for row in printed["not_checked"])


def test_a_raising_fault_ends_the_run_and_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "p.py").write_text(FAULT)
    (tmp_path / "s.toml").write_text('title = "t"\nproject = "decoder"\nsteps = 3\n[[fault]]\nid = "clumsy"\n')
    assert status_of(["run", "s.toml", "--plugin", "p.py"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "clumsy" in lines[0]
    assert "dropped it" in lines[0]
