"""A loop in several processes: each is watched by itself, and the first compares what all have seen."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import lab
from lab.ranks import together

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

STEPS = 12


class Judged(NamedTuple):
    verdict: str
    causes: list[tuple[str, int]]
    checked: set[str]
    not_checked: dict[str, str]


def train(folder: Path, *, how: str, rank: int) -> Judged | None:
    """Train a classifier of two processes, rightly or with a mistake that people make."""
    torch.manual_seed(rank if how == "own weights" else 0)
    net = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 4))
    bare = how in ("own weights", "averaged by hand", "one lags")
    model: nn.Module = net if bare else DistributedDataParallel(net)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    draw = torch.Generator().manual_seed(0 if how in ("same rows", "one batch") else rank)
    x = torch.randn(16, 6, generator=draw)
    watching = contextlib.nullcontext() if how == "one watches" and rank else lab.watch(model, optimizer, out=folder)
    with watching as watch:
        for _ in range(STEPS):
            if how != "one batch":
                x = torch.randn(16, 6, generator=draw)
            optimizer.zero_grad()
            loss = F.cross_entropy((net if how == "around the wrapper" else model)(x), x[:, :4].argmax(1))
            loss.backward()  # type: ignore[no-untyped-call]
            if bare:
                for p in net.parameters():
                    assert p.grad is not None
                    dist.all_reduce(p.grad)
                    p.grad /= 2
            if how == "clipped":
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            before = [p.detach().clone() for p in net.parameters()]
            optimizer.step()
            if how == "one lags" and rank:
                with torch.no_grad():
                    for p, old in zip(net.parameters(), before, strict=True):
                        p.copy_(old)
    if watch is None:
        return None
    found = watch.diagnosis
    causes = [(cause.id, cause.since_step) for cause in found.causes]
    return Judged(found.verdict, causes, set(found.checked), found.not_checked)


def trained(folder: Path, how: str) -> list[Judged | None]:
    return together(2, lambda rank: train(folder, how=how, rank=rank), timeout=120.0)


class TwoAnswers(nn.Module):
    """Gives its loss beside logits and more that no loss uses, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.head, self.beside = nn.Linear(6, 32), nn.Linear(32, 4), nn.Linear(32, 2)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden = self.net(x).tanh()
        logits = self.head(hidden)
        loss = F.cross_entropy(logits, labels)
        return {"logits": logits.float() * 1.0, "loss": loss, "beside": self.beside(hidden.detach())}


def test_outputs_that_no_loss_uses_are_given_no_gradient(tmp_path: Path) -> None:
    """DistributedDataParallel calls their hooks with None, where it looks for weights that are not used."""

    def work(_: int) -> tuple[str, dict[str, str]]:
        torch.manual_seed(0)
        model = DistributedDataParallel(TwoAnswers(), find_unused_parameters=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        with lab.watch(model.module, optimizer, out=tmp_path / "run") as watch:
            for _ in range(12):
                x = torch.randn(16, 6)
                optimizer.zero_grad()
                model(x, x[:, :4].argmax(1))["loss"].backward()
                optimizer.step()
        return watch.diagnosis.verdict, watch.run.plugins.set_aside

    assert together(1, work, timeout=120.0) == [("healthy", {})]


RULES = {"ranks.drift", "ranks.gradients", "ranks.apart", "shards.same_batch"}


@pytest.mark.parametrize("how", ["right", "averaged by hand", "clipped"])
def test_a_right_one_is_healthy_and_the_processes_are_compared(tmp_path: Path, how: str) -> None:
    first, second = trained(tmp_path / "run", how)
    assert first is not None
    assert second is not None
    assert (first.verdict, second.verdict) == ("healthy", "healthy")
    assert first.checked >= RULES
    assert not second.checked & RULES
    assert list(lab.load(tmp_path / "run").history.others) == ["rank-1"]
    assert set(lab.load(tmp_path / "run").diagnosis().checked) == first.checked


@pytest.mark.parametrize(
    ("how", "cause"),
    [
        ("around the wrapper", "distributed.no_sync"),
        ("same rows", "distributed.same_shard"),
        ("one lags", "distributed.drift"),
        ("own weights", "distributed.initialised_apart"),
    ],
)
def test_a_mistake_between_processes_is_named_by_the_first(tmp_path: Path, how: str, cause: str) -> None:
    first, second = trained(tmp_path / "run", how)
    assert first is not None
    assert second is not None
    assert [name for name, _ in first.causes] == [cause]
    assert second.verdict == "healthy"


def test_one_batch_on_purpose_is_the_same_everywhere(tmp_path: Path) -> None:
    first, _ = trained(tmp_path / "run", "one batch")
    assert first is not None
    assert first.verdict == "healthy"
    assert first.not_checked["shards.same_batch"] == "every batch is the same"


def test_where_only_the_first_is_watched_nobody_waits(tmp_path: Path) -> None:
    first, second = trained(tmp_path / "run", "one watches")
    assert first is not None
    assert second is None
    assert first.verdict == "healthy"
    assert not first.checked & RULES
