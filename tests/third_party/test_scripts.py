"""``lab exec`` on scripts that train models of `transformers`: each with a mistake, and without."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from lab.cli import status_of

SCRIPTS = Path(__file__).parent / "scripts"
MISTAKES = {
    "finetune_gpt2": ("targets.padding_counted", "targets"),
    "images_vit": ("optimizer.missing_parameter", "classifier.weight"),
    "summarize_t5": ("targets.not_shifted", "targets"),
}


def test_every_script_is_listed() -> None:
    assert {path.stem for path in SCRIPTS.glob("*.py")} == set(MISTAKES)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_script_with_a_mistake_is_told_which(tmp_path: Path, name: str) -> None:
    assert status_of(["exec", "--out", str(tmp_path / "run"), str(SCRIPTS / f"{name}.py"), "--bug"]) == 0
    found = json.loads((tmp_path / "run" / "diagnosis.json").read_text())
    assert [(cause["id"], cause["at"]) for cause in found["causes"]] == [MISTAKES[name]]
    assert found["unexplained"] == []


@pytest.mark.parametrize("name", MISTAKES)
def test_the_same_script_without_it_is_healthy_and_prints_what_it_prints_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = str(SCRIPTS / f"{name}.py")
    monkeypatch.setattr(sys, "argv", [path])
    runpy.run_path(path, run_name="__main__")
    alone = capsys.readouterr().out
    assert status_of(["exec", "--out", str(tmp_path / "run"), path]) == 0
    assert capsys.readouterr().out == alone
    found = json.loads((tmp_path / "run" / "diagnosis.json").read_text())
    assert found["symptoms"] == []
    assert found["verdict"] == "healthy"
