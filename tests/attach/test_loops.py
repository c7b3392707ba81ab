"""Ways to write a loop: closures, scalers, casts, and what `lab exec` finds of each by itself."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lab
from lab.cli import status_of

if TYPE_CHECKING:
    from pathlib import Path


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 8))


def scaled(model: nn.Module, optimizer: torch.optim.Optimizer, first: float) -> tuple[list[float], int]:
    """Train in float16 under a scaler; return the losses, and how many updates were skipped."""
    scaler = torch.amp.GradScaler("cpu", init_scale=first)
    found, skipped = [], 0
    for _ in range(40):
        x = torch.randn(16, 8)
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(model(x), x.argmax(1))
        optimizer.zero_grad()
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        was = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        skipped += scaler.get_scale() < was
        found.append(loss.item())
    return found, skipped


@pytest.mark.parametrize("first", [2.0**10, 2.0**24])
def test_a_scaler_that_skips_updates_is_right(tmp_path: Path, first: float) -> None:
    model = net()
    expected, skipped = scaled(model, torch.optim.AdamW(model.parameters(), lr=3e-3), first)
    assert (skipped > 3) == (first > 2.0**20)
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with lab.watch(model, optimizer, out=tmp_path / "run") as watching:
        assert scaled(model, optimizer, first)[0] == expected
    assert watching.diagnosis.verdict == "healthy", watching.diagnosis
    # The loss is recorded as it was before the scaler; a skipped update is no step of the run.
    recorded = watching.run.history.series("loss").values.tolist()
    assert recorded == expected[skipped:]


def test_the_model_is_called_again_as_it_was_cast(tmp_path: Path) -> None:
    """A model in bfloat16 by autocast only: without it, the experiments would see another model."""
    seen = set()
    model = net()
    model[2].register_forward_hook(lambda _m, _i, out: seen.add(out.dtype))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with lab.watch(model, optimizer, out=tmp_path / "run") as watching:
        for _ in range(12):
            x = torch.randn(16, 8)
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(x), x.argmax(1))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    assert watching.diagnosis.verdict == "healthy", watching.diagnosis
    assert watching.run.autocast == ("cpu", torch.bfloat16)
    assert "stale.same" in watching.diagnosis.checked


@pytest.mark.parametrize("kind", ["argument", "keyword", "LBFGS"])
def test_closures_are_read_when_they_have_made_the_gradients(tmp_path: Path, kind: str) -> None:
    model = net()
    optimizer: Any = (
        torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
        if kind == "LBFGS"
        else torch.optim.AdamW(model.parameters(), lr=3e-3)
    )
    norms = []
    with lab.watch(model, optimizer, out=tmp_path / "run") as watching:
        for _ in range(12):
            x = torch.randn(16, 8)
            calls: list[float] = []

            def closure(x: torch.Tensor = x, calls: list[float] = calls) -> torch.Tensor:
                optimizer.zero_grad()
                for part in x.chunk(2):
                    (F.cross_entropy(model(part), part.argmax(1)) / 2).backward()  # type: ignore[no-untyped-call]
                calls.append(float(sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None)) ** 0.5)
                return F.cross_entropy(model(x), x.argmax(1)).detach()

            if kind == "keyword":
                optimizer.step(closure=closure)
            else:
                optimizer.step(closure)
            norms.append(calls[0])
    assert watching.diagnosis.symptoms == ()
    norm = watching.run.history.series("gradient.norm", "")
    assert norm.values.tolist() == pytest.approx([norms[step] for step in norm.steps], rel=1e-5)


SCHEDULED = """
import sys, torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(8, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 8))
opt = torch.optim.AdamW(net.parameters(), lr=3e-3)
sched = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 200)
for epoch in range(4):
    for step in range(10):
        for part in range(2):
            x = torch.randn(16, 8)
            (nn.functional.cross_entropy(net(x), x.argmax(1)) / 2).backward()
            if sys.argv[1] == "part": sched.step()
        if sys.argv[1] == "after":
            opt.step()
            clip_grad_norm_(net.parameters(), 0.01)
        else:
            clip_grad_norm_(net.parameters(), 0.01)
            opt.step()
        opt.zero_grad()
        if sys.argv[1] == "update": sched.step()
    if sys.argv[1] in ("epoch", "after"): sched.step()
"""


@pytest.mark.parametrize(
    ("how", "causes"),
    [
        ("update", []),
        ("epoch", []),
        ("never", []),  # it may count epochs that are longer than the run
        ("part", ["schedule.per_part"]),
        ("after", ["clip.ineffective"]),
    ],
)
def test_the_schedule_and_the_clipping_are_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str, causes: list[str]
) -> None:
    path = tmp_path / "train.py"
    path.write_text(SCHEDULED)
    assert status_of(["exec", "--out", str(tmp_path / "run"), str(path), how]) == 0
    diagnosis = json.loads((tmp_path / "run" / "diagnosis.json").read_text())
    assert [cause["id"] for cause in diagnosis["causes"]] == causes
    assert diagnosis["unexplained"] == []
    assert {"schedule.stepped_often", "clip.without_effect"} <= {check["id"] for check in diagnosis["checked"]}


def test_an_optimiser_that_is_made_anew_is_followed(tmp_path: Path) -> None:
    model, steps = net(), 30
    optimizer = torch.optim.Adam(model[3].parameters(), lr=1e-3)
    with lab.watch(model, optimizer, out=tmp_path / "run", probes=None) as watching:
        for step in range(steps):
            if step == 10:  # all of it is trained from here on
                optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
            x = torch.randn(16, 8)
            optimizer.zero_grad()
            F.cross_entropy(model(x), x.argmax(1)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    history = watching.run.history
    assert history.last_step == steps - 1
    assert history.series("update.calls").values.tolist() == [1.0] * steps
    assert watching.run.optimizer is optimizer


def test_a_second_optimiser_of_other_weights_is_not_followed(tmp_path: Path) -> None:
    model, head = net(), nn.Linear(8, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    other = torch.optim.Adam(head.parameters(), lr=1e-3)
    with lab.watch(model, optimizer, out=tmp_path / "run") as watching:
        for _ in range(12):
            x = torch.randn(16, 8)
            other.zero_grad()
            optimizer.zero_grad()
            F.cross_entropy(head(model(x)), x[:, :3].argmax(1)).backward()  # type: ignore[no-untyped-call]
            other.step()
            optimizer.step()
    assert watching.run.history.last_step == 11
    assert watching.run.optimizer is optimizer
    assert watching.diagnosis.symptoms == ()
