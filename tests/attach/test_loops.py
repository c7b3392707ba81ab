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


def two_parts(folder: Path, *, clear: bool) -> lab.Diagnosis:
    """An auto-encoder whose halves are called one after the other; the optimiser holds both."""
    torch.manual_seed(0)
    encoder, decoder = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3)), nn.Linear(3, 8)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-3)
    with lab.watch(encoder, optimizer, out=folder) as watching:
        for _ in range(24):
            x = torch.randn(16, 8)
            if clear:
                optimizer.zero_grad()
            F.mse_loss(decoder(encoder(x)), x).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return watching.diagnosis


def test_a_part_of_what_is_trained_is_not_blamed_for_the_gradients_of_the_rest(tmp_path: Path) -> None:
    assert two_parts(tmp_path / "right", clear=True).symptoms == ()
    assert [cause.id for cause in two_parts(tmp_path / "wrong", clear=False).causes] == ["loop.no_zero_grad"]


class Wrapped(nn.Module):
    """As Lightning wraps a model: its call is a step of training, which calls the module itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 32), nn.Linear(32, 20)
        self.stepping = False

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.stepping:
            self.stepping = False
            logits = self(tokens[:, :-1])
            loss: torch.Tensor = F.cross_entropy(logits.log_softmax(-1).exp().flatten(0, 1), tokens[:, 1:].flatten())
            return loss
        answer: torch.Tensor = self.head(self.embed(tokens))
        return answer


def test_of_a_module_called_within_its_own_call_the_inner_is_the_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Wrapped()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with lab.watch(model, optimizer, out=tmp_path / "run") as watching:
        for _ in range(24):
            tokens = (torch.randint(20, (8, 1)) + torch.arange(17)) % 20
            model.stepping = True
            loss = model(tokens)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert [cause.id for cause in watching.diagnosis.causes] == ["loss.softmax_twice"]


CLOSURES = """
import torch
from torch import nn
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(8, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 8))
opt = torch.optim.AdamW(net.parameters(), lr=3e-3)
for step in range(24):
    x = torch.randn(16, 8)
    def closure():
        opt.zero_grad()
        loss = nn.functional.cross_entropy(net(x), x.argmax(1))
        loss.backward()
        return loss
    opt.step(closure)
"""


def test_a_model_that_is_first_called_within_the_step_of_the_optimiser_is_seen_whole(tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    path.write_text(CLOSURES)
    assert status_of(["exec", "--out", str(tmp_path / "run"), str(path)]) == 0
    diagnosis = json.loads((tmp_path / "run" / "diagnosis.json").read_text())
    assert diagnosis["verdict"] == "healthy", diagnosis["not_checked"]
    assert 0 in lab.load(tmp_path / "run").history.series("learning_rate").steps


@pytest.mark.parametrize("how", ["graphs", "no_grad", "gradients", "once"])
def test_graphs_that_an_evaluation_builds_in_vain_are_told(tmp_path: Path, how: str) -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with lab.watch(model, optimizer, out=tmp_path / "run") as watching:
        for step in range(24):
            x = torch.randn(16, 8)
            optimizer.zero_grad()
            F.cross_entropy(model(x), x.argmax(1)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if step % 5 == 4 and (how != "once" or step == 4):
                model.eval()
                with torch.set_grad_enabled(how != "no_grad"):
                    answer = model(x.requires_grad_(how == "gradients"))
                    if how == "gradients":
                        torch.autograd.grad(answer.sum(), x)
                model.train()
    named = [cause.id for cause in watching.diagnosis.causes]
    assert named == (["performance.gradients_at_evaluation"] if how == "graphs" else [])
    assert watching.diagnosis.unexplained == ()


class Stateful(nn.Module):
    """Keeps its state from batch to batch, as truncated backpropagation does: it takes 16 rows, no fewer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cell, self.head = nn.Embedding(20, 16), nn.GRU(16, 16, batch_first=True), nn.Linear(16, 20)
        self.state: torch.Tensor | None = None

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden, self.state = self.cell(self.embed(tokens), self.state.detach() if self.state is not None else None)
        answer: torch.Tensor = self.head(hidden)
        return answer


def test_a_model_that_cannot_take_fewer_rows_is_not_a_broken_probe(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Stateful()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    text = (torch.randint(20, (16, 1)) + torch.arange(24 * 8 + 1)) % 20
    with lab.watch(model, optimizer, out=tmp_path / "run") as watching:
        for step in range(24):
            tokens = text[:, step * 8 : step * 8 + 9]
            optimizer.zero_grad()
            F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    assert watching.diagnosis.verdict == "healthy", watching.diagnosis.not_checked
    assert any("cannot be called as in this experiment" in why for why in watching.diagnosis.not_checked.values())


class WithLoss(nn.Module):
    """Answers with its loss alone, as models do that are made for one objective."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.image, self.scale = nn.Linear(8, 16), nn.Linear(6, 16), nn.Parameter(torch.tensor(1.0))

    def forward(self, text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        a, b = F.normalize(self.text(text), dim=-1), F.normalize(self.image(image), dim=-1)
        return F.cross_entropy(self.scale.exp() * a @ b.T, torch.arange(len(text)))


def test_a_model_that_answers_with_its_loss_is_watched(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, mixed = WithLoss(), torch.randn(8, 6)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with lab.watch(model, optimizer, out=tmp_path / "run") as watching:
        for _ in range(24):
            text = torch.randn(16, 8)
            optimizer.zero_grad()
            model(text, text @ mixed).backward()
            optimizer.step()
    assert watching.diagnosis.verdict == "healthy", watching.diagnosis.not_checked


def test_a_part_that_is_evaluated_while_watching_rests_is_let_alone(tmp_path: Path) -> None:
    """Also in a step that is examined: in evaluation an encoder takes another path when it has hooks."""
    torch.manual_seed(0)
    body = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True), 2)
    model = nn.Sequential(body, nn.Linear(16, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with lab.watch(model, optimizer, out=tmp_path / "run") as watching:
        for _ in range(3):
            x = torch.randn(4, 5, 16)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        assert any(module._forward_hooks for module in model.modules())
        watching.pause()
        assert not any(module._forward_hooks for module in body.modules())
        model(x).square().mean().backward()
        assert any(module._forward_hooks for module in body.modules())
