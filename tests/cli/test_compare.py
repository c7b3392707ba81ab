"""``lab compare``: what is slower is told, and what is not is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from lab.cli import status_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SMALL = """
title = "small"
project = "backprop"
steps = 40
[model]
layers = 2
width = 32
heads = 2
context = 24
[data]
source = "markov"
batch = 8
"""
TWICE = SMALL + '[[fault]]\nid = "performance.forward_twice"\n'
FOREIGN = """
import torch
import lab
torch.manual_seed(0)
model = torch.nn.Linear(4, 4)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
with lab.watch(model, optimizer, out={out!r}):
    for _ in range(12):
        loss = model(torch.randn(8, 4)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
"""


@pytest.fixture(autouse=True)
def _in_a_folder_with_scenarios(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text(SMALL)
    (tmp_path / "twice.toml").write_text(TWICE)


@pytest.fixture
def _on_one_core() -> Iterator[None]:
    """All that is compared has the same core, so that what else a busy machine does slows all alike."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    yield
    os.sched_setaffinity(0, cores)


def compared(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert status_of(["compare", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def lines(found: Any, measure: str) -> dict[str, Any]:
    return {line["run"]: line for each in found["measures"] if each["measure"] == measure for line in each["runs"]}


@pytest.mark.usefixtures("_on_one_core")
def test_a_second_forward_pass_costs_time_and_memory_and_the_same_again_does_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In two rounds, which start six processes; what is told of six is a matter of arithmetic, and tested as such."""
    found = compared(capsys, "small.toml", "twice.toml", "--repeats", "2")
    assert found["runs"] == ["small.toml", "small.toml, again", "twice.toml"]
    assert (found["repeated"], found["repeats"]) == (True, 2)
    steps = lines(found, "step")
    assert steps["twice.toml"]["change"]["median"] > 1.02  # a third forward of two backward and one: 4/3
    assert steps["twice.toml"]["said"] == "too few repeats to tell"
    # The same numbers are computed, whatever the time: with each round's own seed, and no other.
    losses = lines(found, "loss")
    assert losses["small.toml, again"]["change"]["low"] == losses["small.toml, again"]["change"]["high"] == 0
    assert losses["twice.toml"]["change"]["median"] == 0
    assert lines(found, "memory")["twice.toml"]["change"]["low"] > 1  # the activations of a second graph


def test_a_run_is_made_again_from_its_folder_and_one_alone_beside_its_twin(capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(["run", "twice.toml", "--steps", "6", "--out", "run"]) in (0, 1)
    capsys.readouterr()
    found = compared(capsys, "run", "--repeats", "1")
    assert found["runs"] == ["run, its twin", "run, its twin, again", "run"]
    recorded = json.loads(_held_out("run"))
    assert lines(found, "loss")["run"]["median"] == pytest.approx(recorded, rel=1e-6)
    assert all(line["said"] in ("", "one timing is no proof") for line in lines(found, "step").values())


def _held_out(folder: str) -> str:
    code = f"import lab; print(lab.load({folder!r}).history.last('loss.held_out'))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_two_components_of_ones_own_stand_beside_each_other(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from lab.projects.losses import component

    source = open(component.__file__, encoding="utf-8").read()  # noqa: PTH123, SIM115 - a path as text
    for name, body in (("one", source), ("two", source + "\nimport time\n" + SLOW)):
        (tmp_path / f"{name}.py").write_text(body)
        command = ["run", "small.toml", "--steps", "6", "--use", f"losses={name}.py", "--out", name]
        done = subprocess.run(
            [sys.executable, "-c", "from lab.cli import main; main()", *command], capture_output=True, check=False
        )
        assert done.returncode != 2, done.stderr
    found = compared(capsys, "one", "two", "--repeats", "1")
    assert lines(found, "step")["two"]["median"] > lines(found, "step")["one"]["median"] + 0.05


SLOW = """
_quick = cross_entropy
def cross_entropy(logits, targets, ignore=-100):
    time.sleep(0.06)
    return _quick(logits, targets, ignore)
"""


def test_training_the_model_to_start_from_counts_for_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))
    base = SMALL.replace('"markov"', '"python-docs"\ntokenizer = "bytes"').replace("steps = 40", "steps = 4")
    (tmp_path / "base.toml").write_text(base.replace("batch = 8", "batch = 512"))
    (tmp_path / "one.toml").write_text(NO_MODEL + '[data]\nbatch = 2\n[train]\nstart = "base.toml"\n')
    found = compared(capsys, "one.toml", "one.toml", "--repeats", "1")  # the first of the three trains it
    used = [line["median"] for line in lines(found, "memory").values()]
    assert max(used) < 2 * min(used) + 2**22
    assert list((tmp_path / "cache").iterdir())


NO_MODEL = """
title = "starts from another"
project = "backprop"
steps = 6
"""


def test_what_cannot_be_made_again_is_compared_as_it_was_recorded(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("a", "b"):
        code = FOREIGN.format(out=str(tmp_path / name))
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    found = compared(capsys, "a", "b")
    assert (found["repeated"], found["repeats"], found["runs"]) == (False, 1, ["a", "b"])
    step = lines(found, "step")["b"]
    assert step["median"] > 0
    assert step["said"] == "one timing is no proof"
    assert lines(found, "training_loss")["a"]["median"] == lines(found, "training_loss")["b"]["median"] > 0
    assert status_of(["compare", "a", "b"]) == 0
    assert "One timing is no proof." in capsys.readouterr().out


BAD = {
    "nothing": ([], "at least two"),
    "one without a fault": (["small.toml"], "no twin"),
    "no such scenario": (["small.toml", "smal.toml"], "smal.toml"),
    "no run in a folder": (["small.toml", "empty"], "holds no run"),
    "too few steps": (["small.toml", "twice.toml", "--steps", "3"], "the first 3 do not count"),
    "several processes": (["small.toml", "ranks.toml"], "train.ranks = 2"),
    "no such fault": (["small.toml", "unknown.toml"], "performance.forward_twic"),
    "no such device": (["small.toml", "twice.toml", "--device", "tpu9"], "--device tpu9"),
    "a fault that finds no place": (["small.toml", "nowhere.toml"], "blocks.7.attn"),
    "a component that is gone": (["small.toml", "gone"], "gone.py"),
}


@pytest.mark.parametrize(("arguments", "word"), BAD.values(), ids=BAD)
def test_bad_input_is_told_in_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], word: str
) -> None:
    from lab.files import write_run_file
    from lab.scenario import read_scenario

    (tmp_path / "empty").mkdir()
    (tmp_path / "gone").mkdir()
    dumped = read_scenario(tmp_path / "small.toml").model_dump(by_alias=True, exclude_none=True)
    write_run_file(tmp_path / "gone", "small", dumped, 0, use={"losses": "gone.py"})
    (tmp_path / "ranks.toml").write_text(SMALL + "[train]\nranks = 2\n")
    (tmp_path / "unknown.toml").write_text(TWICE.replace("twice", "twic"))
    (tmp_path / "nowhere.toml").write_text(SMALL + '[[fault]]\nid = "mask.future_leak"\nat = "blocks.7.attn"\n')
    assert status_of(["compare", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1, said.err
    assert said.err.startswith("lab: ")
    assert word in said.err
