"""The learner's loop: a stub cut from the reference, hints that are counted, progress that is not lost, --use."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from lab.cli import status_of
from lab.learn.check import check
from lab.learn.hints import hints
from lab.learn.progress import FILE, read_progress
from lab.learn.stub import stub
from lab.projects import PROJECTS

if TYPE_CHECKING:
    from pathlib import Path

    from lab.projects import Project

READY = [p for p in PROJECTS if p.ready]
ATTENTION = next(p for p in READY if p.id == "attention")


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("project", READY, ids=lambda p: p.id)
def test_a_stub_has_the_references_names_and_fails_every_property_it_should_with_words_that_teach(
    project: Project, tmp_path: Path
) -> None:
    path = tmp_path / f"{project.folder.name}.py"
    path.write_text(stub(project), encoding="utf-8")
    results = list(check(project, path))
    failed = [r.failure for r in results if r.failure is not None]
    unwritten = [f for f in failed if "is not written yet" in f["text"]]
    assert unwritten
    assert len(failed) == len(results), "a property holds for a file in which nothing is written"
    assert all(f["meaning"] for f in failed)


def test_build_writes_check_counts_and_list_shows(desk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert status_of(["build", "attention"]) == 0
    assert status_of(["check", "attention"]) == 1
    assert read_progress(desk).projects["attention"].state == "begun"
    shutil.copy(ATTENTION.folder / "component.py", desk / "attention.py")
    assert status_of(["check", "attention"]) == 0
    entry = read_progress(desk).projects["attention"]
    assert (entry.state, entry.hold) == ("passed", entry.of)
    capfd.readouterr()
    assert status_of(["list", "projects"]) == 0
    assert "7. Attention  passed" in capfd.readouterr().out


def test_build_never_overwrites_resets_aside_skips_and_goes_on(desk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (desk / "attention.py").write_text("mine = 1\n", encoding="utf-8")
    assert status_of(["build", "attention"]) == 0
    assert (desk / "attention.py").read_text(encoding="utf-8") == "mine = 1\n"
    assert status_of(["build", "attention", "--reset"]) == 0
    assert (desk / "attention.1.old.py").read_text(encoding="utf-8") == "mine = 1\n"
    assert (desk / "attention.py").read_text(encoding="utf-8") == stub(ATTENTION)
    assert status_of(["build", "--skip"]) == 0  # the first: linear
    assert read_progress(desk).projects["linear"].state == "skipped"
    capfd.readouterr()
    assert status_of(["build"]) == 0
    assert READY[1].title in capfd.readouterr().out


def test_hints_come_one_at_a_time_and_are_counted(desk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    texts = hints(ATTENTION)
    assert "scores = self.tap" in "".join(texts[-6:])  # the lines come last
    for number, text in enumerate(texts, start=1):
        assert status_of(["hint", "attention"]) == 0
        assert text.splitlines()[0] in capfd.readouterr().out
        assert read_progress(desk).projects["attention"].hints == number
    assert status_of(["hint", "attention"]) == 2


def test_a_damaged_progress_file_is_told_and_left(desk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for text in ("{", json.dumps({"projects": {"attention": {"state": "gone"}}}), "[]"):
        (desk / FILE).write_text(text, encoding="utf-8")
        assert status_of(["build", "attention"]) == 2
        assert "not a progress file" in capfd.readouterr().err
        assert (desk / FILE).read_text(encoding="utf-8") == text


def test_a_bad_file_loses_no_progress(desk: Path) -> None:
    shutil.copy(ATTENTION.folder / "component.py", desk / "attention.py")
    assert status_of(["check", "attention"]) == 0
    before = (desk / FILE).read_text(encoding="utf-8")
    (desk / "attention.py").write_text("def f(:", encoding="utf-8")
    assert status_of(["check", "attention"]) == 2
    assert (desk / FILE).read_text(encoding="utf-8") == before


def lab(desk: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from lab.cli import main; main()", *arguments]
    return subprocess.run(command, cwd=desk, capture_output=True, text=True, timeout=120, check=False)


def test_a_component_of_ones_own_runs_in_the_runtime_and_its_fault_is_found(desk: Path) -> None:
    source = (ATTENTION.folder / "component.py").read_text(encoding="utf-8")
    (desk / "attention.py").write_text(source.replace(".tril(s - t)", ".tril(s - t + 1)"), encoding="utf-8")
    run = ["run", "healthy-decoder", "--use", "attention=attention.py", "--steps", "12", "--json"]
    done = lab(desk, *run)  # its mask is only used where the explicit path is: the fused one is causal
    assert "has not passed" in done.stderr
    assert json.loads(done.stdout)["run"]
    leaky = source.replace("is_causal=t == s", "is_causal=False")
    (desk / "attention.py").write_text(leaky, encoding="utf-8")
    found = json.loads(lab(desk, *run).stdout)
    assert found["verdict"] == "faulty"
    assert any(symptom["id"] == "causality.future" for symptom in found["symptoms"])


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("attention", "write --use PROJECT=FILE"),
        ("attention=none.py", "no file none.py"),
        ("atention=a.py", "did you mean 'attention'"),
        ("attention=empty.py", "lacks Attention"),
        ("attention=broken.py", "cannot be imported"),
    ],
)
def test_a_bad_use_is_one_line(desk: Path, value: str, said: str) -> None:
    (desk / "empty.py").write_text("", encoding="utf-8")
    (desk / "a.py").write_text("", encoding="utf-8")
    (desk / "broken.py").write_text("import nothing_like_this", encoding="utf-8")
    done = lab(desk, "run", "healthy-decoder", "--use", value)
    assert done.returncode == 2
    assert said in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
