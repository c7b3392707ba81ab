"""A run that is stopped, by any means, goes on to the numbers that it would have had."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from lab.files import CHECKPOINT, FINDINGS, METRICS
from lab.projects.pretraining.component import load_checkpoint
from lab.runtime.run import run_scenario
from lab.scenario import Scenario
from lab.store import read_history

if TYPE_CHECKING:
    from pathlib import Path

    from lab import History
    from lab.catalogue import Catalogue

STEPS = 40


def scenario(**changes: Any) -> Scenario:
    return Scenario.model_validate(
        {
            "title": "resumed",
            "project": "pretraining",
            "steps": STEPS,
            "model": {"layers": 1, "width": 16, "heads": 2, "context": 16},
            "data": {"source": "markov", "batch": 4},
            "train": {"checkpoint_every": 8, "evaluate_every": 10},
            **changes,
        }
    )


class Stopped(BaseException):
    """As when somebody presses Ctrl-C."""


def stop_at(step: int) -> Any:
    import lab

    @lab.plugin("test.stop", title="Stops a run")
    class Stop(lab.Plugin):
        def lab_start(self, run: Any) -> None:
            self.run = run

        def lab_update(self, step: Any) -> None:
            if step.index == wanted:
                raise Stopped

    wanted = step
    return Stop()


def same(a: Any, b: Any) -> bool:
    """Whether two nested states are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def assert_same_run(straight: Path, stopped: Path) -> None:
    assert same(load_checkpoint(straight / CHECKPOINT), load_checkpoint(stopped / CHECKPOINT))
    a, b = read_history(straight / METRICS), read_history(stopped / METRICS)
    assert a.last_step == b.last_step == STEPS - 1
    for metric in ("loss", "loss.held_out", "gradient.total", "causality.future", "weight.norm"):
        for site in a.sites(metric):
            np.testing.assert_array_equal(a.series(metric, site).steps, b.series(metric, site).steps)
            np.testing.assert_array_equal(a.series(metric, site).values, b.series(metric, site).values)
    assert a.facts["sample"] == b.facts["sample"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, catalogue: Catalogue) -> Path:
    folder = tmp_path_factory.mktemp("straight") / "run"
    run_scenario("straight", scenario(), catalogue, folder)
    return folder


@pytest.mark.parametrize("step", [3, 8, 30])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(
    tmp_path: Path, catalogue: Catalogue, straight: Path, step: int
) -> None:
    folder = tmp_path / "run"
    # A plugin that raises is set aside, but not by this: it is no Exception.
    with pytest.raises(Stopped):
        run_scenario("stopped", scenario(), catalogue, folder, tools=lambda: [stop_at(step)])
    assert (folder / CHECKPOINT).exists() == (step >= 8)
    outcome = run_scenario("stopped", scenario(), catalogue, folder, resume=True)
    assert outcome.diagnosis.verdict == "healthy"
    assert_same_run(straight, folder)


def test_a_run_that_ended_is_only_diagnosed_again(tmp_path: Path, catalogue: Catalogue, straight: Path) -> None:
    before = (straight / METRICS).read_bytes()
    outcome = run_scenario("straight", scenario(), catalogue, straight, resume=True)
    assert outcome.diagnosis.verdict == "healthy"
    assert (straight / METRICS).read_bytes() == before


def test_what_was_found_before_is_told_once(tmp_path: Path, catalogue: Catalogue) -> None:
    broken = scenario(fault=[{"id": "mask.future_leak"}])
    folder = tmp_path / "run"
    with pytest.raises(Stopped):
        run_scenario("stopped", broken, catalogue, folder, tools=lambda: [stop_at(30)])
    before = (folder / FINDINGS).read_text()
    assert before
    outcome = run_scenario("stopped", broken, catalogue, folder, twin=False, resume=True)
    assert outcome.diagnosis.causes[0].id == "mask.future_leak"
    assert (folder / FINDINGS).read_text() == before


def train_in_a_process(folder: Path, file: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", "from lab.cli import main; main()", "run", str(file), "--out", str(folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def killed_in_the_middle(folder: Path, file: Path) -> History:
    """Kill a run without a warning, once it has a checkpoint and before it ends."""
    process = train_in_a_process(folder, file)
    try:
        deadline = time.monotonic() + 60
        while not (folder / CHECKPOINT).exists():
            assert process.poll() is None, "it ended before it had a checkpoint"
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    history = read_history(folder / METRICS)
    assert "ended" not in history.facts
    return history


def test_kill_9_in_the_middle(tmp_path: Path) -> None:
    file = tmp_path / "long.toml"
    file.write_text(
        """
title = "long"
project = "pretraining"
steps = 150
[model]
layers = 1
width = 32
context = 32
[data]
source = "markov"
[train]
checkpoint_every = 25
""",
        encoding="utf-8",
    )
    command = [sys.executable, "-c", "from lab.cli import main; main()", "run"]
    one = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(file), "--out", str(tmp_path / "straight")], check=True, capture_output=True, env=one)
    killed_in_the_middle(tmp_path / "killed", file)
    resumed = [*command, "--resume", str(tmp_path / "killed")]
    subprocess.run(resumed, check=True, capture_output=True, env=one)
    a, b = (load_checkpoint(tmp_path / name / CHECKPOINT) for name in ("straight", "killed"))
    assert same(a, b)
    losses = [read_history(tmp_path / name / METRICS).series("loss") for name in ("straight", "killed")]
    np.testing.assert_array_equal(losses[0].steps, losses[1].steps)
    np.testing.assert_array_equal(losses[0].values, losses[1].values)
