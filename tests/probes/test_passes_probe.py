"""Backward passes: those whose gradients are cleared in vain are told, those that are for something else are not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lab

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

STEPS = 24


def net(out: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 32), nn.LayerNorm(32), nn.Tanh(), nn.Linear(32, out))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return F.cross_entropy(model(x), x[:, :4].argmax(1))


def watched(folder: Path, step: Callable[[nn.Module, Any, Tensor], None], out: int = 4) -> lab.Diagnosis:
    torch.manual_seed(0)
    model = net(out)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with lab.watch(model, optimizer, out=folder) as watching:
        for _ in range(STEPS):
            step(model, optimizer, torch.randn(16, 6))
    return watching.diagnosis


# ---------------------------------------------------------------- in vain


def forgotten(model: nn.Module, optimizer: Any, x: Tensor) -> None:
    loss_of(model, x).backward()  # type: ignore[no-untyped-call]
    optimizer.zero_grad()


def by_hand(model: nn.Module, optimizer: Any, x: Tensor) -> None:
    optimizer.zero_grad()
    loss_of(model, x).backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for p in model.parameters():
            assert p.grad is not None
            p.sub_(0.01 * p.grad)


def only_looked_at(model: nn.Module, optimizer: Any, x: Tensor) -> None:
    """What a gradient is, without an update: the model's gradients are cleared, not the optimiser's."""
    model.zero_grad()
    loss_of(model, x).backward()  # type: ignore[no-untyped-call]


def without_a_pass(model: nn.Module, optimizer: Any, x: Tensor) -> None:
    optimizer.zero_grad()
    loss_of(model, x)


def test_a_step_that_is_never_taken_is_told(tmp_path: Path) -> None:
    diagnosis = watched(tmp_path / "run", forgotten)
    assert diagnosis.verdict == "faulty"
    assert [(cause.id, cause.at, cause.since_step) for cause in diagnosis.causes] == [("loop.no_step", "loop", 0)]
    assert diagnosis.unexplained == ()


@pytest.mark.parametrize("step", [by_hand, only_looked_at, without_a_pass])
def test_loops_that_take_no_step_of_the_optimiser_are_not_judged(tmp_path: Path, step: Any) -> None:
    diagnosis = watched(tmp_path / "run", step)
    assert diagnosis.symptoms == ()
    assert diagnosis.verdict == "inconclusive"
    assert diagnosis.not_checked["the rest of the run"] == "no update was made"


def test_a_step_after_many_passes_is_silent(tmp_path: Path) -> None:
    """An optimiser with a closure clears within its step; another loop begins with passes for something else."""

    def closed(model: nn.Module, optimizer: Any, x: Tensor) -> None:
        def again() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, x)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(again)

    torch.manual_seed(0)
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=14)
    with lab.watch(model, optimizer, out=tmp_path / "closed") as watching:
        for _ in range(3):
            closed(model, optimizer, torch.randn(64, 6))
    assert watching.diagnosis.causes == ()
    model = net()
    adam = torch.optim.AdamW(model.parameters())
    with lab.watch(model, adam, out=tmp_path / "late") as watching:
        for number in range(40):
            forgotten(model, adam, torch.randn(16, 6))
            if number > 15:
                loss_of(model, torch.randn(16, 6)).backward()  # type: ignore[no-untyped-call]
                adam.step()
                adam.zero_grad()
    assert "loop.no_step" not in [cause.id for cause in watching.diagnosis.causes]


@pytest.mark.parametrize("clear", ["optimizer", "model", "zeros", "none"])
def test_parts_that_are_cleared_are_told(tmp_path: Path, clear: str) -> None:
    def step(model: nn.Module, optimizer: Any, x: Tensor) -> None:
        for part in x.chunk(4):
            if clear == "none":
                for p in model.parameters():
                    p.grad = None
            elif clear == "model":
                model.zero_grad()
            else:
                optimizer.zero_grad(set_to_none=clear != "zeros")
            (loss_of(model, part) / 4).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    diagnosis = watched(tmp_path / "run", step)
    assert [(cause.id, cause.at, cause.since_step) for cause in diagnosis.causes] == [("loop.parts_cleared", "loop", 0)]
    assert diagnosis.unexplained == ()


# ---------------------------------------------------------------- for something else


def parts(model: nn.Module, optimizer: Any, x: Tensor) -> None:
    optimizer.zero_grad()
    for part in x.chunk(4):
        (loss_of(model, part) / 4).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def adversarial(model: nn.Module, optimizer: Any, x: Tensor) -> None:
    """Goodfellow et al., 2015: the first pass is for the gradient of the inputs."""
    moved = x.clone().requires_grad_()
    loss_of(model, moved).backward()  # type: ignore[no-untyped-call]
    assert moved.grad is not None
    optimizer.zero_grad()
    loss_of(model, x + 0.05 * moved.grad.sign()).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def sharpness(model: nn.Module, optimizer: Any, x: Tensor) -> None:
    """Foret et al., 2021: the first pass is for a step upward that is taken back."""
    loss_of(model, x).backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        moves = [(p, 0.05 * p.grad.sign()) for p in model.parameters() if p.grad is not None]
        for p, move in moves:
            p.add_(move)
    optimizer.zero_grad()
    loss_of(model, x).backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for p, move in moves:
            p.sub_(move)
    optimizer.step()
    optimizer.zero_grad()


def surgery(model: nn.Module, optimizer: Any, x: Tensor) -> None:
    """Yu et al., 2020: the gradients of each task are taken apart, and put together."""
    each = []
    for part in x.chunk(2):
        optimizer.zero_grad()
        loss_of(model, part).backward()  # type: ignore[no-untyped-call]
        each.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for p, *grads in zip(model.parameters(), *each, strict=True):
        p.grad = torch.stack(grads).mean(0)
    optimizer.step()


def looked_at(model: nn.Module, optimizer: Any, x: Tensor) -> None:
    """The norm of the gradient of each of two losses of one forward pass is looked at first."""
    logits = model(x)
    losses = F.cross_entropy(logits, x[:, :4].argmax(1)), logits.square().mean()
    for loss in losses:
        optimizer.zero_grad()
        loss.backward(retain_graph=True)
    optimizer.zero_grad()
    (losses[0] + losses[1]).backward()
    optimizer.step()


@pytest.mark.parametrize("step", [parts, adversarial, sharpness, surgery, looked_at])
def test_passes_that_are_for_something_are_silent(tmp_path: Path, step: Any) -> None:
    diagnosis = watched(tmp_path / "run", step)
    assert diagnosis.symptoms == ()
    assert diagnosis.verdict == "healthy", diagnosis


@pytest.mark.parametrize("maker_first", [True, False])
def test_a_discriminator_whose_gradients_of_the_other_loss_are_cleared_is_silent(
    tmp_path: Path, maker_first: bool
) -> None:
    torch.manual_seed(1)
    maker = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 6))
    other = torch.optim.Adam(maker.parameters(), lr=1e-3)

    def make(model: nn.Module, x: Tensor) -> None:
        other.zero_grad()
        F.softplus(-model(maker(torch.randn(len(x), 3)))).mean().backward()  # type: ignore[no-untyped-call]
        other.step()

    def step(model: nn.Module, optimizer: Any, x: Tensor) -> None:
        if maker_first:
            make(model, x)
        optimizer.zero_grad()
        fake = maker(torch.randn(len(x), 3)).detach()
        (F.softplus(model(fake)) + F.softplus(-model(x))).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if not maker_first:
            make(model, x)

    assert watched(tmp_path / "run", step, out=1).symptoms == ()


def test_one_pass_in_a_step_is_not_asked(tmp_path: Path) -> None:
    def step(model: nn.Module, optimizer: Any, x: Tensor) -> None:
        optimizer.zero_grad()
        loss_of(model, x).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    diagnosis = watched(tmp_path / "run", step)
    assert "one backward pass" in diagnosis.not_checked["passes.cleared"]
