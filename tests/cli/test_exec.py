"""``lab exec``: scripts of other people, watched and left as they are; each with a mistake, and without."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import lab
from lab.attach.script import run_script
from lab.cli import status_of

if TYPE_CHECKING:
    from collections.abc import Iterator

SCRIPTS = Path(__file__).parent.parent / "scripts"
# What each script's mistake should be called, and where it is.
MISTAKES = {
    "accumulation": ("loop.parts_cleared", "loop"),
    "additive_mask": ("mask.future_leak", "attention_layers.0"),
    "batch_first": ("attention.rows_mixed", "encoder.layers.0.self_attn"),
    "best_weights": ("loading.no_copy", "model"),
    "causal_mask": ("mask.future_leak", "transformer_encoder.layers.0.self_attn"),
    "clip_after_step": ("clip.ineffective", "clipping"),
    "dead_output": ("head.dead", "last"),
    "detached_features": ("loop.detached", "img_encoder"),
    "distillation": ("loss.kl_of_probabilities", "loss"),
    "float64_table": ("performance.float64", ""),
    "functional_dropout": ("evaluation.dropout", "pool"),
    "labels_not_shifted": ("targets.not_shifted", "targets"),
    "labels_shifted_twice": ("targets.shifted_twice", "targets"),
    "last_layer": ("model.layer_ignored", "encoder.enc_layers.0"),
    "layer_norm_axis": ("norm.wrong_axis", "layer_stack.0.slf_attn.layer_norm"),
    "linear_mlp": ("ffn.no_activation", "mlp.layers"),
    "log_of_softmax": ("numerics.nonfinite_gradient", "out"),
    "lora_zero": ("init.zero", "layers.0.attention.q.lora_A"),
    "merge_heads": ("attention.wrong_merge", "layers.0.attention"),
    "mse_broadcast": ("loss.broadcast", "loss"),
    "new_head": ("optimizer.missing_parameter", "head.weight"),
    "no_step": ("loop.no_step", "loop"),
    "normal_init": ("init.too_large", "body.layers.0.self_attn"),
    "padding_counted": ("targets.padding_counted", "targets"),
    "padding_mask": ("mask.padding_inverted", "encoder.layers.0.self_attn"),
    "plain_list": ("model.unregistered", "hids"),
    "position_axis": ("positions.along_batch", "positions"),
    "position_data": ("loop.detached", "encoder.pos_embedding"),
    "pure_bfloat16": ("precision.update_lost", "optimizer"),
    "rewrapped": ("loop.detached", "word"),
    "running_loss": ("performance.retained_graph", "loop"),
    "same_batch": ("data.iterator_anew", "data"),
    "scheduler_micro": ("schedule.per_part", "schedule"),
    "sdpa_mask": ("mask.inverted", "trf_blocks.0.att"),
    "seq2seq_shift": ("targets.not_shifted", "targets"),
    "siamese": ("numerics.nonfinite_gradient", "out"),
    "sigmoid_twice": ("loss.sigmoid_twice", "loss"),
    "softmax_axis": ("attention.wrong_axis", "blocks.0.attn"),
    "softmax_twice": ("loss.softmax_twice", "loss"),
    "stale_optimizer": ("optimizer.stale_parameters", "optimizer"),
    "tied_copy": ("weights.untied", "out_head"),
    "train_mode": ("loop.evaluation_mode", "loop"),
    "two_optimizers": ("optimizer.missing_parameter", "bridge.weight"),
    "unscale": ("clip.before_unscale", "clipping"),
    "validate_with_graph": ("performance.gradients_at_evaluation", "evaluation"),
    "warmup_epochs": ("schedule.rate_zero", "schedule"),
    "wavenet": ("convolution.not_causal", "stack.0.dilated"),
    "zero_grad": ("loop.no_zero_grad", "loop"),
}


def diagnosed(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str) -> dict[str, object]:
    """Run ``lab exec --json`` in this process; return what it says of the run."""
    assert status_of(["exec", "--json", "--out", str(folder), *arguments]) == 0
    out = capsys.readouterr().out
    found: dict[str, object] = json.loads(out[out.index('{\n  "run"') :])
    assert found == {"run": str(folder), "scenario": "exec", **json.loads((folder / "diagnosis.json").read_text())}
    return found


def test_every_script_is_listed() -> None:
    assert {path.stem for path in SCRIPTS.glob("*.py")} == set(MISTAKES)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_script_with_a_mistake_is_told_which(capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str) -> None:
    found = diagnosed(capsys, tmp_path / "run", str(SCRIPTS / f"{name}.py"), "--bug")
    causes = [(cause["id"], cause["at"]) for cause in found["causes"]]  # type: ignore[attr-defined]
    assert causes == [MISTAKES[name]]
    assert found["unexplained"] == []


@contextlib.contextmanager
def losses() -> Iterator[list[float]]:
    """Every loss that a script computes in the block, to the last bit; it begins with the same random state."""
    seen: list[float] = []
    plain = torch.Tensor.backward
    inside = False

    def backward(loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        nonlocal inside
        once_more = inside  # by a mode of functions
        if not once_more:
            seen.append(loss.detach().double().sum().item())
        inside = True
        try:
            plain(loss, *args, **kwargs)  # type: ignore[no-untyped-call]
        finally:
            inside = once_more

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", backward)
        yield seen


@pytest.mark.parametrize("name", MISTAKES)
def test_the_same_script_without_it_is_healthy_and_as_it_is_alone(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    path = str(SCRIPTS / f"{name}.py")
    with losses() as watched:
        found = diagnosed(capsys, tmp_path / "run", path)
    drawn = torch.get_rng_state()
    assert found["symptoms"] == []
    assert found["verdict"] == "healthy"
    with losses() as alone:
        assert run_script(path, (), module=False) is None
    assert len(alone) > 4
    assert np.array_equal(watched, alone, equal_nan=True)
    assert torch.equal(torch.get_rng_state(), drawn)


# ---------------------------------------------------------------- nothing of the script changes


def python(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True, check=False)


NONE_MADE = "no optimiser was made while it ran, in this process; others are watched where torchrun starts them"
EXEC = ("-c", "from lab.cli import main; main()", "exec")

TRAINING = """
import pickle, sys, torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop, self.a, self.b = nn.Dropout(0.5), nn.Linear(6, 16), nn.Linear(16, 3)
    def forward(self, x):
        return self.b(self.drop(torch.relu(self.a(x))))

if __name__ == "__main__":
    print(sys.argv[1:], __file__, sys.path[0])
    torch.manual_seed(0)
    net = Net()
    opt = torch.optim.Adam(net.parameters(), lr=1e-2)
    for step in range(int(sys.argv[1])):
        x = torch.randn(16, 6)
        loss = nn.functional.cross_entropy(net(x), x[:, :3].argmax(1))
        opt.zero_grad(); loss.backward(); opt.step()
        print(loss.item().hex(), torch.rand(1).item().hex())
    assert pickle.loads(pickle.dumps(net)).state_dict().keys() == net.state_dict().keys()
    print(sorted(vars(net)), [dict(m._forward_hooks) for m in net.modules()] if len(sys.argv) > 2 else "")
    TAIL
"""


def script(folder: Path, tail: str = "pass") -> Path:
    path = folder / "train.py"
    path.write_text(TRAINING.replace("TAIL", tail))
    return path


def test_a_script_prints_draws_and_computes_what_it_does_alone(tmp_path: Path) -> None:
    path = script(tmp_path)
    alone = python(str(path), "12", cwd=tmp_path)
    watched = python(*EXEC, "--out", "run", str(path), "12", cwd=tmp_path)
    assert alone.returncode == watched.returncode == 0
    assert alone.stdout == watched.stdout
    assert "healthy" in watched.stderr
    assert "Net, 163 weights, Adam" in watched.stderr
    assert (tmp_path / "run" / "diagnosis.json").is_file()


def test_a_module_is_run_by_its_name(tmp_path: Path) -> None:
    script(tmp_path)
    watched = python(*EXEC, "--out", "run", "-m", "train", "12", cwd=tmp_path)
    assert watched.returncode == 0, watched.stderr
    assert watched.stdout.startswith("['12']")
    assert "healthy" in watched.stderr


@pytest.mark.parametrize(
    ("tail", "status", "said"),
    [
        ("sys.exit(7)", 7, ""),
        ("sys.exit('no more data')", 1, "no more data"),
        ("raise KeyError('epoch')", 1, "KeyError: 'epoch'"),
    ],
)
def test_a_script_ends_as_it_would_and_is_diagnosed_until_there(
    tmp_path: Path, tail: str, status: int, said: str
) -> None:
    path = script(tmp_path, tail)
    alone = python(str(path), "12", cwd=tmp_path)
    watched = python(*EXEC, "--out", "run", str(path), "12", cwd=tmp_path)
    assert alone.returncode == watched.returncode == status
    assert said in alone.stderr
    assert said in watched.stderr
    if "raise" in tail:  # the traceback is the script's own
        assert watched.stderr.startswith(alone.stderr)
    assert json.loads((tmp_path / "run" / "diagnosis.json").read_text())["verdict"] == "inconclusive"
    assert "12 steps were seen" in (tmp_path / "run" / "diagnosis.json").read_text()


def test_strict_is_for_the_training_not_for_the_script(tmp_path: Path) -> None:
    buggy = str(SCRIPTS / "zero_grad.py")
    assert python(*EXEC, "--strict", "--out", "a", buggy, "--bug", cwd=tmp_path).returncode == 1
    assert python(*EXEC, "--out", "b", buggy, "--bug", cwd=tmp_path).returncode == 0


# ---------------------------------------------------------------- what cannot be watched


def test_a_script_that_trains_nothing_is_told_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "hello.py"
    path.write_text("print('hello')")
    assert status_of(["exec", "--out", str(tmp_path / "run"), str(path)]) == 0
    told = capsys.readouterr()
    assert told.out == "hello\n"
    assert told.err.strip() == f"lab: {path}: nothing to diagnose: {NONE_MADE}"
    assert not (tmp_path / "run").exists()


COPIES = """
import torch
from torch import nn
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)).bfloat16()
copies = [p.detach().float().clone() for p in net.parameters()]
opt = torch.optim.SGD(copies, lr=0.1)
for step in range(12):
    x = torch.randn(16, 6)
    net.zero_grad()
    nn.functional.cross_entropy(net(x.bfloat16()).float(), x[:, :4].argmax(1)).backward()
    for copy, p in zip(copies, net.parameters()):
        copy.grad = p.grad.float()
    opt.step()
    for copy, p in zip(copies, net.parameters()):
        p.data.copy_(copy)
"""


def test_an_optimiser_of_copies_that_get_their_gradients_is_not_taken_for_a_stale_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "copies.py"
    path.write_text(COPIES)
    assert status_of(["exec", "--out", str(tmp_path / "run"), str(path)]) == 0
    assert "no module that an optimiser trains was called while it ran" in capsys.readouterr().err


CUT = """
import torch, tempfile
from torch import distributed as dist, nn
from torch.distributed.fsdp import fully_shard
dist.init_process_group("gloo", store=dist.FileStore(tempfile.mktemp(), 1), rank=0, world_size=1)
net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
fully_shard(net, mesh=dist.init_device_mesh("cpu", (1,)))
opt = torch.optim.SGD(net.parameters(), lr=0.1)
net(torch.randn(3, 4)).square().mean().backward()
opt.step()
dist.destroy_process_group()
"""


@pytest.mark.parametrize(("pattern", "read"), [("drop", {"drop.out", "out"}), ("dorp", set())])
def test_values_are_read_where_one_asks(tmp_path: Path, pattern: str, read: set[str]) -> None:
    """A pattern that matches nothing shows when the model is found, and is no reason for the script to end."""
    (tmp_path / "train.py").write_text(TRAINING.replace("TAIL", ""))
    done = python(*EXEC, "--out", "run", "--sites", pattern, "train.py", "8", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert ("no site and no module matches 'dorp'; did you mean 'drop'?" in done.stderr) == (not read)
    assert (tmp_path / "run").exists() == bool(read)
    if read:
        assert set(lab.load(tmp_path / "run").history.sites("activation.rms")) == read


def test_weights_that_are_cut_between_processes_are_let_alone(tmp_path: Path) -> None:
    path = tmp_path / "cut.py"
    path.write_text(CUT)
    done = python(*EXEC, "--out", "run", str(path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "nothing to diagnose: each process holds a part of the weights only (FSDP, ZeRO)" in done.stderr


RANKS = """
import torch, torch.distributed as dist
from torch import nn
dist.init_process_group("gloo")
torch.manual_seed(0)
model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 4)))
opt = torch.optim.AdamW(model.parameters(), lr=3e-3)
torch.manual_seed(dist.get_rank())
for step in range(12):
    x = torch.randn(16, 6)
    opt.zero_grad()
    nn.functional.cross_entropy(model(x), x[:, :4].argmax(1)).backward()
    opt.step()
dist.destroy_process_group()
"""


def test_each_process_of_a_launcher_is_watched_and_the_first_reports(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(RANKS)
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python", sys.executable)
    done = python(*launch, *EXEC, "train.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("healthy") == 1
    (folder,) = (tmp_path / "runs").iterdir()
    for each in (folder, folder / "rank-1"):
        assert json.loads((each / "diagnosis.json").read_text())["verdict"] == "healthy"


def test_a_mistake_between_processes_is_reported_by_the_first(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(RANKS.replace("model(x)", "model.module(x)"))
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python", sys.executable)
    done = python(*launch, *EXEC, "--out", "run", "train.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    causes = json.loads((tmp_path / "run" / "diagnosis.json").read_text())["causes"]
    assert [cause["id"] for cause in causes] == ["distributed.no_sync"]
    assert done.stderr.count("Gradients are not averaged over the processes") == 1


def test_a_script_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(["exec", str(tmp_path / "none.py")]) == 2
    assert "none.py: no such script; -m takes the name of a module" in capsys.readouterr().err


def test_a_module_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(["exec", "--out", str(tmp_path / "run"), "-m", "no_such_module"]) == 2
    assert "lab: -m no_such_module: ImportError: No module named no_such_module" in capsys.readouterr().err


def test_a_folder_that_holds_a_run_is_refused_before_the_script_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marker, path = tmp_path / "marker", tmp_path / "touch.py"
    path.write_text(f"open({str(marker)!r}, 'w').close()")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.db").touch()
    assert status_of(["exec", "--out", str(tmp_path / "run"), str(path)]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert not marker.exists()
