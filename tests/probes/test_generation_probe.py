"""Cached against full: silent on healthy models of any kind, and on what is not the cache's fault."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lab
from lab import History, NotChecked, Row

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import SmallRun

generation_cached = importlib.import_module("lab.probes.generation").generation_cached

MODELS: list[dict[str, Any]] = [
    {"layers": 1, "width": 32, "heads": 1, "context": 8, "positions": "none"},
    {"layers": 2, "width": 32, "heads": 2, "context": 24, "positions": "rope", "kv_heads": 1},
    {"layers": 6, "width": 48, "heads": 4, "context": 24, "positions": "alibi", "norm": "rms", "tied": True},
    {"layers": 3, "width": 64, "heads": 4, "context": 16, "norm_at": "post"},
]


@pytest.mark.parametrize("model", MODELS)
def test_it_is_silent_on_healthy_models(small_run: SmallRun, model: dict[str, Any]) -> None:
    diagnosis, history = small_run(model=model, steps=3)
    assert "generation.cached" in diagnosis.checked
    assert not [s for s in diagnosis.symptoms if s.id.startswith("generation.")]
    assert 0 <= history.last("generation.cached_gap") < 1e-4


@pytest.mark.parametrize("at", ["blocks.0.attn", "blocks.1.attn"])
@pytest.mark.parametrize("id", ["cache.stale", "cache.truncated"])
def test_it_names_the_layer(small_run: SmallRun, id: str, at: str) -> None:
    best = small_run(faults=[{"id": id, "at": at}], steps=3)[0].causes[0]
    assert (best.id, best.at, best.since_step) == ("cache.inconsistent", at, 0)


def test_a_leak_is_not_laid_to_the_cache(small_run: SmallRun) -> None:
    diagnosis, _ = small_run(faults=[{"id": "mask.future_leak", "at": "blocks.1.attn"}], steps=3)
    assert "later inputs" in diagnosis.not_checked["generation.cached"]


def test_what_it_cannot_judge() -> None:
    with pytest.raises(NotChecked, match="not finite"):
        list(generation_cached.judge(made(cached_gap=np.nan)))
    with pytest.raises(NotChecked, match="without a cache"):
        list(generation_cached.judge(made(cached_gap=0.5, repeat_gap=0.4)))
    assert [s.seen for s in generation_cached.judge(made(cached_gap=0.5, repeat_gap=0.0))] == [0.5]


class Told(nn.Module):
    """A decoder that has to be told its source, and takes a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)

    def forward(self, tokens: torch.Tensor, source: torch.Tensor | None = None, cache: Any = None) -> torch.Tensor:
        if source is None:
            raise ValueError("a source, please")
        answer: torch.Tensor = self.head(self.embed(tokens) + self.embed(source).mean(1, keepdim=True))
        return answer


def test_a_decoder_that_needs_its_source_is_not_checked_and_no_probe_fails(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Told()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with lab.watch(model, optimizer, out=tmp_path / "run") as watch:
        for _ in range(12):
            x = torch.randint(11, (8, 6))
            optimizer.zero_grad()
            F.cross_entropy(model(x, source=x).flatten(0, 1), (x * 3 % 11).flatten()).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    for rule in ("generation.cached", "generation.cached_module", "requests.leaked"):
        assert "tokens alone" in watch.diagnosis.not_checked[rule]
    assert watch.diagnosis.verdict == "healthy"


def made(**values: float) -> History:
    history = History()
    columns = tuple((f"generation.{name}", "") for name in values)
    history.add(0, Row(columns, np.array([*values.values()])))
    return history
