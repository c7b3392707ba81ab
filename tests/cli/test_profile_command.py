"""``lab profile`` and ``lab exec --profile``, as a person and as a program meet them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lab.cli import status_of
from lab.projects.multihead import component

SCRIPT = """
import sys
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
x = torch.randn(1600, 8)
y = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
for inputs, targets in DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True):
    loss = nn.functional.cross_entropy(model(inputs), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(loss.item().hex())
print(torch.rand(1).item().hex())
"""
BARE = ("--no-trace", "--no-sample")


def lab(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from lab.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, timeout=180)


def test_a_profile_says_where_time_goes_and_what_to_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert status_of(["profile", "one-branch-too-much-work", "--steps", "30", "--out", str(folder), *BARE]) == 0
    shown = capsys.readouterr().out
    for part in (
        "a step",
        "GFLOP/s",
        "bound by",
        "blocks.*.mlp",
        "optimizer",
        "the loop itself",
        "of tensors at the peak",
    ):
        assert part in shown, part
    assert "1. The same product is computed twice" in shown
    assert {"profile.json", "roofline.png", "memory.png", "watched"} <= {path.name for path in folder.iterdir()}
    assert not (folder / "trace").exists()


def test_as_json_it_is_one_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["profile", "healthy-multihead", "--steps", "30", "--out", str(tmp_path / "run"), "--json", *BARE]
    assert status_of(arguments) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["diagnosis"]["verdict"] == "healthy"
    assert told["places"][0].keys() >= {"name", "direction", "seconds", "share", "bound", "flops_per_second", "bytes"}
    assert told["machine"]["flops"]["float32"] > 0
    assert all(change["bound"] and not change["cause"] for change in told["changes"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no-such-thing"], "no-such-thing"),
        (["healthy-multihead", "--steps", "5"], "too few steps: it takes 22"),
        (["healthy-multihead", "--device", "quantum"], "--device quantum"),
        (["healthy-parallel"], "lab exec --profile"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(["profile", *arguments, "--out", str(tmp_path / "run"), *BARE]) == 2
    told = capsys.readouterr()
    assert said in told.err
    assert len(told.err.strip().splitlines()) == 1
    assert not told.out


def test_a_script_that_is_profiled_prints_and_draws_what_it_does_alone(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    alone = subprocess.run(
        [sys.executable, "train.py"], capture_output=True, text=True, check=True, cwd=tmp_path, timeout=120
    )
    done = lab("exec", "--profile", "--out", "run", "train.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == alone.stdout
    assert "What to change first" in done.stderr
    assert "profiler_start" not in done.stderr  # PyTorch's own notes
    told = json.loads((tmp_path / "run" / "profile.json").read_text())
    places = {row["name"] for row in told["places"]}
    assert {"0", "2", "data", "loss", "optimizer"} <= places
    forward = sum(row["cost"]["flops"] for row in told["places"] if row["direction"] == "forward")
    assert forward == 2 * 16 * (8 * 32 + 32 * 4)
    assert [*(tmp_path / "run" / "trace").glob("*.pt.trace.json")]


def test_a_script_that_ends_too_early_is_diagnosed_and_told(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT.replace("torch.randn(1600, 8)", "torch.randn(160, 8)"))
    done = lab("exec", "--profile", "--out", "run", "train.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "not profiled: too few steps" in done.stderr
    assert (tmp_path / "run" / "diagnosis.json").is_file()


def test_nothing_of_it_is_imported_unless_asked_for(tmp_path: Path) -> None:
    code = (
        "import sys; from lab.cli import status_of; "
        "status_of(['run', 'reads-the-future', '--steps', '4', '--no-twin', '--out', sys.argv[1]]); "
        "ours = 'lab.profiling', 'lab.plugins.torch_profiler', 'lab.plugins.py_spy', 'matplotlib', 'torch_tb'; "
        "print([m for m in sys.modules if m.startswith(ours)])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "200"},
        timeout=120,
    )
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_a_component_of_ones_own_is_what_is_profiled(tmp_path: Path) -> None:
    """One that computes its output projection twice: its FLOPs tell."""
    source = Path(str(component.__file__)).read_text(encoding="utf-8")
    once = "self.proj(self.merge(mixed))"
    slow = source.replace(once, f"({once} + {once}) / 2")
    assert slow != source
    (tmp_path / "slow.py").write_text(slow, encoding="utf-8")
    use = ["--use", "multihead=slow.py", "--steps", "24", "--out", "run", "--json"]
    done = lab("profile", "healthy-multihead", *use, *BARE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    flops = {row["name"]: row["cost"]["flops"] for row in told["places"] if row["direction"] == "forward"}
    # Two of C x C, beside one of C x C and two of C x C / 4, of the keys and values that heads share.
    assert flops["blocks.0.attn.proj"] / flops["blocks.0.attn.qkv"] == pytest.approx(2 / 1.5)
    assert told["changes"][0]["cause"] == "performance.recompute"
