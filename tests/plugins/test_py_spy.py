"""A real py-spy on a real training; and where it may not look."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

py_spy = importlib.import_module("lab.plugins.py_spy")

TRAIN = """
import importlib, sys
from pathlib import Path
from lab.catalogue import Catalogue
from lab.runtime.train import train
from lab.scenario import load_scenario
tool = importlib.import_module("lab.plugins.py_spy").PySpy(wait=2, seconds=2.0, rate=100)
folder = Path(sys.argv[1]); folder.mkdir()
scenario = load_scenario("healthy-multihead")[1].model_copy(update={"steps": int(sys.argv[2]), "probes": []})
train(scenario, Catalogue(), folder, (), [tool])
print("said:", tool.said)
"""
# What the capability to look into other processes is taken from, before the training begins; and a process that may
# only be looked into by who has it.
REFUSED = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
PR_SET_DUMPABLE, PR_CAPBSET_DROP, CAP_SYS_PTRACE = 4, 24, 19
if len(sys.argv) == 3:
    libc.prctl(PR_CAPBSET_DROP, CAP_SYS_PTRACE, 0, 0, 0)
    os.execv(sys.executable, [sys.executable, "-c", os.environ["WHOLE"], *sys.argv[1:], "again"])
libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
"""


def trained(folder: Path, steps: int, code: str = TRAIN, **environment: str) -> str:
    command = [sys.executable, "-c", code, str(folder), str(steps)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="ptrace is Linux'")
def test_the_flame_graph_names_the_functions_of_the_runtime(tmp_path: Path) -> None:
    said = trained(tmp_path / "run", 300)
    if "ptrace" in said:
        pytest.skip("this system lets no process look into another")
    assert said.strip() == "said:"
    flame = (tmp_path / "run" / "flame.svg").read_text()
    for name in ("lab_backward", "lab_forward", "forward (lab/projects", "lab_run"):
        assert name in flame, name
    told: dict[str, Any] = json.loads((tmp_path / "run" / "speedscope.json").read_text())
    names = {frame["name"] for frame in told["shared"]["frames"]}
    assert {"Engine.lab_step", "Engine.lab_backward"} <= names
    assert any(profile["samples"] for profile in told["profiles"])


@pytest.mark.skipif(sys.platform != "linux", reason="ptrace is Linux'")
def test_where_it_may_not_look_it_says_so_and_the_training_goes_on(tmp_path: Path) -> None:
    whole = REFUSED + TRAIN
    said = trained(tmp_path / "run", 120, whole, WHOLE=whole)
    assert "not sampled by py-spy" in said
    assert "ptrace" in said
    assert len(said.strip().splitlines()) == 1
    assert (tmp_path / "run" / "diagnosis.json").is_file()
    assert not (tmp_path / "run" / "flame.svg").exists()


def test_without_py_spy_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(py_spy, "_command", lambda: None)
    tool = py_spy.PySpy()
    tool._begin(tmp_path / "flame.svg")
    assert tool.said == "not sampled by py-spy: py-spy is not installed: pip install py-spy"
    tool._end()


def test_a_training_that_is_too_short_for_both_files_is_told_so() -> None:
    tool = py_spy.PySpy(wait=100)
    tool.lab_end()
    assert tool.said == "the training ended before py-spy could write flame.svg, speedscope.json; more steps"


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ("Error: Permission Denied: Try running again with elevated permissions", "ptrace"),
        ("py-spy> Sampling process\nError: No such process", "No such process"),
        ("Error: Failed to get process executable name. Check that the process is running.", "ptrace"),
        ("", "ended before its first sample"),
    ],
)
def test_its_reason_is_one_line(told: str, reason: str) -> None:
    assert reason in py_spy._reason(told)
    assert "\n" not in py_spy._reason(told)
