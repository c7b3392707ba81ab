"""A run that is killed in the middle is read back, and what could not be checked is said."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

import lab

if TYPE_CHECKING:
    from pathlib import Path

LAB = [sys.executable, "-c", "from lab.cli import main; main()"]


def steps_recorded(folder: Path) -> int:
    try:
        return int(lab.load(folder).history.last_step)
    except lab.BadInput:
        return -1


@pytest.mark.parametrize(("scenario", "verdict"), [("healthy-decoder", "inconclusive"), ("reads-the-future", "faulty")])
def test_a_run_killed_in_the_middle_is_diagnosed_as_far_as_it_went(tmp_path: Path, scenario: str, verdict: str) -> None:
    folder = tmp_path / "run"
    command = [*LAB, "run", scenario, "--steps", "100000", "--out", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while steps_recorded(folder) < 20 and time.monotonic() < deadline:
            time.sleep(0.2)
        before = steps_recorded(folder)
        assert before >= 20
        time.sleep(1.5)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    after = lab.load(folder)
    steps = after.table("loss").index
    assert steps[-1] > before  # what was recorded in the second and a half before the kill is there, but for the last
    assert list(steps) == list(range(len(steps)))

    done = subprocess.run([*LAB, "diagnose", str(folder), "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    said = json.loads(done.stdout)
    assert said["verdict"] == verdict
    assert f"{len(steps)} of 100000 steps were seen" in said["not_checked"][-1]["reason"]
    if verdict == "faulty":
        assert (said["causes"][0]["id"], said["causes"][0]["at"]) == ("mask.future_leak", "blocks.1.attn")
