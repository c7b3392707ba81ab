"""The commands as a person or a script uses them."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

import lab
from lab.cli import cli, status_of

if TYPE_CHECKING:
    from pathlib import Path

SMALL = ["--steps", "12"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def said(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> Any:
    assert status_of([*arguments, "--json"]) == status
    return json.loads(capsys.readouterr().out, parse_constant=pytest.fail)  # NaN and Infinity are no JSON


NO_TORCH = """
--help|run --help|list|list --json|list faults --json|show mask.future_leak|show attention|show reads-the-future
show --schema|show loss --json|run no-such-scenario|board nowhere
"""


@pytest.mark.parametrize("line", NO_TORCH.strip().replace("\n", "|").split("|"))
def test_what_needs_no_torch_does_not_import_it(line: str) -> None:
    code = f"import sys; from lab.cli import status_of; status = status_of({line.split()!r})"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; sys.exit(9 if 'torch' in sys.modules else status)"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (2 if line.endswith(("no-such-scenario", "nowhere")) else 0), done.stderr
    assert done.stdout or done.returncode


def test_help_names_every_command_and_keeps_its_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(["--help"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    for name in cli.commands:
        assert any(line.startswith(f"{name} ") for line in lines), name
    assert "lab board                  look at the newest run in TensorBoard" in lines
    assert not [line for line in lines if "\b" in line or "\\" in line]


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(["--version"]) == 0
    assert capsys.readouterr().out == f"lab, version {lab.__version__}\n"


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


def test_show_says_all_that_is_known_of_each_thing(capsys: pytest.CaptureFixture[str]) -> None:
    for kind, rows in said(capsys, "list").items():
        for row in rows[:3]:
            facts = said(capsys, "show", row["id"])[kind.removesuffix("s")]
            assert facts["title"] == row["title"]
            assert status_of(["show", row["id"]]) == 0
            assert row["title"][:20] in capsys.readouterr().out


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


def test_a_fault_that_cannot_be_built_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "p.py").write_text(FAULT.replace("lab_before_update(self, run, step)", "__post_init__(self)"))
    (tmp_path / "s.toml").write_text('title = "t"\nproject = "decoder"\nsteps = 3\n[[fault]]\nid = "clumsy"\n')
    assert status_of(["run", "s.toml", "--plugin", "p.py"]) == 2  # a ValueError says that a parameter is wrong
    assert capsys.readouterr().err == "lab: s.toml: fault[0]: dropped it\n"
    (tmp_path / "p.py").write_text((tmp_path / "p.py").read_text().replace("ValueError", "KeyError"))
    assert status_of(["run", "s.toml", "--plugin", "p.py"]) == 1
    assert capsys.readouterr().err == "lab: the fault clumsy raised KeyError: 'dropped it'\n"


def test_what_a_plugin_calls_itself_is_shown_as_it_stands(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    fields = "from dataclasses import field\n" + FAULT.replace('"Raises"', '"[/] [bold]x"').replace(
        "    def", "    sizes: list[int] = field(default_factory=lambda: [3])\n    def"
    )
    (tmp_path / "p.py").write_text(fields)
    assert status_of(["list", "faults", "--plugin", "p.py"]) == 0
    assert "[/] [bold]x" in capsys.readouterr().out
    assert said(capsys, "show", "clumsy", "--plugin", "p.py")["fault"]["parameters"]["sizes"].startswith("[3] ")


# ---------------------------------------------------------------- the options of `lab run`

TINY = """
title = "tiny"
project = "decoder"
seed = 5
steps = 3
[model]
layers = 1
width = 16
heads = 2
context = 16
[data]
source = "markov"
batch = 2
[[check]]
metric = "loss"
is = "finite"
on = "both"
"""
LEAK = '[[fault]]\nid = "mask.future_leak"\nat = "blocks.0.attn"\n[expect]\nverdict = "faulty"\n'


def losses(folder: str) -> list[float]:
    return [float(value) for value in lab.load(folder).table("loss")[""]]


def test_a_run_takes_seed_and_steps_from_the_file_or_from_the_options(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "s.toml").write_text(TINY)
    first = said(capsys, "run", "s.toml")
    again = said(capsys, "run", "s.toml", "--seed", "5", "--device", "cpu")
    longer = said(capsys, "run", "s.toml", "--steps", "4")
    other = said(capsys, "run", "s.toml", "--seed", "6", "--out", "deep/other")
    assert [run["run"] for run in (first, again, other)] == ["runs/s-5", "runs/s-5-2", "deep/other"]
    assert len(losses(first["run"])) == 3
    assert losses(again["run"]) == losses(first["run"])
    assert len(losses(longer["run"])) == 4
    assert losses(other["run"]) != losses(first["run"])
    assert lab.load("deep/other").about["run"]["seed"] == 6


def test_the_twin_can_be_left_out(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(TINY + LEAK)
    with_twin = said(capsys, "run", "s.toml", "--out", "two")
    without = said(capsys, "run", "s.toml", "--out", "one", "--no-twin")
    assert with_twin["as_expected"]
    assert without["as_expected"]
    assert with_twin["checks"][0]["twin_value"] > 0
    assert without["checks"][0]["twin_value"] is None
    assert lab.load("two/twin").diagnosis().verdict == "healthy"
    assert not (tmp_path / "one" / "twin").exists()


@pytest.mark.parametrize("faults", ["", LEAK])
def test_diagnose_says_what_the_run_said(capsys: pytest.CaptureFixture[str], tmp_path: Path, faults: str) -> None:
    (tmp_path / "s.toml").write_text(TINY + faults)
    printed = said(capsys, "run", "s.toml", "--out", "run")
    again = said(capsys, "diagnose", "run", status=1 if faults else 0)
    assert printed["verdict"] == ("faulty" if faults else "healthy")
    for key in ("run", "scenario", "verdict", "causes", "symptoms", "unexplained", "checked", "not_checked"):
        assert again[key] == printed[key], key
    assert again["scenario"] == "s"


def test_a_person_is_told_the_same(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(TINY + LEAK)
    assert status_of(["run", "s.toml", "--out", "run"]) == 0
    said_by_run = capsys.readouterr().out
    assert status_of(["diagnose", "run"]) == 1
    for text in (said_by_run, capsys.readouterr().out):
        assert "mask.future_leak" in text
        assert "blocks.0.attn" in text
        assert " faulty " in text
    assert "As the scenario expects." in said_by_run
    assert "lab board run" in said_by_run


RULE = """
@lab.rule("fragile.wrong", title="Nothing", reads=("fragile",), basis="theory")
def wrong(history):
    return []
"""


def test_what_a_raising_probe_measured_is_kept_and_its_checks_are_not_passed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "s.toml").write_text(TINY.replace("steps = 3", "steps = 9"))
    (tmp_path / "p.py").write_text(
        PROBE.replace("        if", '        step.record("fragile", 1.0)\n        if') + RULE
    )
    printed = said(capsys, "run", "s.toml", "--plugin", "p.py", "--out", "run", status=1)
    assert "expected healthy" in printed["differences"][0]
    reasons = {row["id"]: row["reason"] for row in printed["not_checked"]}
    assert reasons["fragile.wrong"] == "fragile: ValueError: out of ideas"
    assert "out of ideas" in reasons["fragile"]
    assert "fragile.wrong" not in {row["id"] for row in printed["checked"]}
    assert lab.load("run").table("fragile").index.tolist() == [0, 1, 2, 3, 4, 5]
    assert len(losses("run")) == 9
    again = said(capsys, "diagnose", "run", "--plugin", "p.py", status=1)
    assert (again["verdict"], again["not_checked"]) == ("inconclusive", printed["not_checked"])
    assert status_of(["diagnose", "run", "--plugin", "p.py"]) == 1
    assert "out of ideas" in capsys.readouterr().out


TOOL = """
import lab
@lab.plugin("leaky", title="Raises")
class Leaky(lab.Plugin):
    def lab_metrics(self, step):
        raise OSError("no space left")
"""
UNMADE = """
import lab
@lab.probe("unmade", title="Cannot be made")
class Unmade(lab.Probe):
    def __init__(self):
        raise OSError("no such licence")
"""


def test_a_raising_tool_is_named_and_costs_no_verdict(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "p.py").write_text(TOOL)
    status_of(["run", "healthy-decoder", "--steps", "12", "--plugin", "p.py", "--json"])
    said = capsys.readouterr()
    assert json.loads(said.out)["verdict"] == "healthy"
    assert "leaky" in said.err


def test_a_probe_that_cannot_be_made_is_set_aside(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "p.py").write_text(UNMADE)
    status_of(["run", "healthy-decoder", "--steps", "12", "--plugin", "p.py", "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["verdict"] == "inconclusive"
    assert any(row["id"] == "unmade" and "no such licence" in row["reason"] for row in printed["not_checked"])


def test_what_a_run_folder_holds_as_json_is_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def refuse(text: str) -> None:
        raise ValueError(text)

    status_of(["run", "turns-to-nan", "--steps", "44", "--no-twin", "--out", "run"])
    texts = [(tmp_path / "run" / "diagnosis.json").read_text()]
    texts += (tmp_path / "run" / "findings.jsonl").read_text().splitlines()
    assert len(texts) > 5
    for text in texts:
        json.loads(text, parse_constant=refuse)
