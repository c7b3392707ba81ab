"""What the pages show runs, from a folder outside the package, and does what they say."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import tomllib
from pathlib import Path

import pytest

import lab
from lab.cli import status_of
from lab.scenario import Scenario, read_scenario

DOCS = Path(__file__).parents[2] / "docs"
SMALL = """
title = "small"
project = "decoder"
steps = 3
[model]
layers = 1
width = 32
heads = 2
context = 16
[data]
source = "markov"
batch = 4
"""
BROKEN = SMALL + '[[fault]]\nid = "demo.scale"\n[expect]\ncause = "demo.scale"\nat = "tokens"\nby_step = 0\n'


def blocks(page: str, language: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def run(folder: Path, scenario: str, *examples: str) -> list[str]:
    """The arguments of a run in `folder`, with copies of the examples as plugins."""
    (folder / "small.toml").write_text(scenario, encoding="utf-8")
    arguments = ["run", str(folder / "small.toml"), "--out", str(folder / "run"), "--json"]
    for example in examples:
        arguments += ["--plugin", str(shutil.copy(DOCS / "examples" / example, folder))]
    return arguments


def test_the_fault_is_named_by_the_rule_and_the_cause(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = status_of(run(tmp_path, BROKEN, "scale_embedding.py", "embedding_size.py"))
    outcome = json.loads(capsys.readouterr().out)
    assert (status, outcome["differences"]) == (0, [])
    assert [cause["id"] for cause in outcome["causes"]] == ["demo.scale"]


def test_without_the_rule_nothing_notices_the_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of([*run(tmp_path, BROKEN, "scale_embedding.py"), "--no-twin"]) == 2
    assert "no cause" in capsys.readouterr().err  # a scenario cannot expect a cause that is not there
    unexpecting = BROKEN.split("[expect]", maxsplit=1)[0]
    assert status_of([*run(tmp_path, unexpecting, "scale_embedding.py"), "--no-twin"]) == 1
    assert json.loads(capsys.readouterr().out)["verdict"] == "healthy"


def test_the_rule_is_silent_on_health(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(run(tmp_path, SMALL, "embedding_size.py")) == 0
    outcome = json.loads(capsys.readouterr().out)
    assert outcome["verdict"] == "healthy"
    assert "embedding.size" in [check["id"] for check in outcome["checked"]]


def test_the_rule_says_when_it_cannot_judge() -> None:
    rule = runpy.run_path(str(DOCS / "examples" / "embedding_size.py"))["embedding_size"]
    with pytest.raises(lab.NotChecked, match="no trainable embedding"):
        rule.judge(lab.History())


def test_the_watched_loop_prints_what_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = blocks("watch.md", "python")[0]
    (tmp_path / "loop.py").write_text(script.replace("range(40)", "range(12)"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    runpy.run_path("loop.py")
    printed = capsys.readouterr().out.strip()
    assert f"It prints `{printed}`" in (DOCS / "watch.md").read_text(encoding="utf-8")
    assert status_of(["diagnose", "runs/mine"]) == 1


def test_the_run_folder_is_read_as_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = "runs/reads-the-future-0"
    assert status_of(["run", "reads-the-future", "--steps", "2", "--out", folder, "--json"]) == 0
    capsys.readouterr()
    with_lab, without = blocks("run-folder.md", "python")
    exec(with_lab, {})
    exec(without, {})
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    loss = lab.load(folder).history.series("loss")
    assert [(int(step), float(value)) for step, value in printed] == list(zip(loss.steps, loss.values, strict=True))


@pytest.mark.parametrize("page", ["learn.md", "scenarios.md"])
def test_a_scenario_on_a_page_is_valid(tmp_path: Path, page: str) -> None:
    (text,) = blocks(page, "toml")
    (tmp_path / "shown.toml").write_text(text, encoding="utf-8")
    shown = read_scenario(tmp_path / "shown.toml")
    assert shown == Scenario.model_validate(tomllib.loads(text))
    assert shown.fault
    assert shown.check
