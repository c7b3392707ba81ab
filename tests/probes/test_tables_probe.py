"""Tables of nothing that changes: counted exactly, and silent where they are small, kept, drawn or given."""

from __future__ import annotations

import copy
import importlib
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lab
from lab import History, Row

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import SmallRun

tables = importlib.import_module("lab.probes.tables")

HEALTHY: list[dict[str, Any]] = [
    {"model": {"layers": 4, "width": 32, "heads": 4, "context": 40, "positions": "alibi"}, "data": {"batch": 1}},
    {"model": {"layers": 1, "width": 32, "heads": 2, "context": 64, "positions": "rope"}, "data": {"batch": 1}},
    {"model": {"layers": 0, "width": 32, "heads": 1, "context": 8}},
    {"model": {"layers": 2, "width": 32, "mixer": "lstm", "positions": "sinusoidal", "context": 24}},
    {"train": {"objective": "masked"}},
    {"train": {"objective": "seq2seq"}},
]


@pytest.mark.parametrize("changes", HEALTHY)
def test_it_is_silent_on_healthy_models(small_run: SmallRun, changes: dict[str, Any]) -> None:
    diagnosis, history = small_run(steps=2, **{**changes, "data": {"source": "markov", **changes.get("data", {})}})
    assert not [s for s in diagnosis.symptoms if s.id == "tables.rebuilt"]
    assert "tables.rebuilt" in diagnosis.checked
    assert history.last("tables.share") < 0.2


class Model(nn.Module):
    """An embedding, something in the middle, and a head."""

    def __init__(self, middle: Callable[[Tensor, nn.Module], Tensor]) -> None:
        super().__init__()
        self.tokens, self.middle, self.head = nn.Embedding(16, 32), Middle(middle), nn.Linear(32, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.middle(self.tokens(tokens)))  # type: ignore[no-any-return]


class Middle(nn.Module):
    """What a function makes of vectors [B T C]."""

    angles: Tensor

    def __init__(self, function: Callable[[Tensor, nn.Module], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("angles", torch.rand(200, 32))
        self.plain = torch.rand(200, 32)
        self.attention = nn.MultiheadAttention(32, 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self)


def sines(length: int, width: int = 32) -> Tensor:
    """As PyTorch's tutorial of the Transformer makes them, [length width]."""
    places = torch.arange(length)[:, None]
    rates = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    table = torch.zeros(length, width)
    table[:, 0::2] = torch.sin(places * rates)
    table[:, 1::2] = torch.cos(places * rates)
    return table


def kept(x: Tensor, module: Any) -> Tensor:
    if not hasattr(module, "table"):
        module.table = sines(60_000)
    return x + module.table[: x.shape[1]]  # type: ignore[no-any-return]


def attended(x: Tensor, module: Any) -> Tensor:
    mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
    return x + module.attention(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]  # type: ignore[no-any-return]


def per_row(x: Tensor, _: Any) -> Tensor:
    rows = [row + sines(3000)[: x.shape[1]] for row in x]
    return torch.stack(rows)


SILENT: dict[str, tuple[Callable[[Tensor, Any], Tensor], tuple[int, int]]] = {
    "as long as the row": (lambda x, _: x + sines(x.shape[1]), (8, 24)),
    "kept after the first call": (kept, (8, 24)),
    # One row, one layer, one head, narrow and long: as large as a mask gets beside the rest.
    "a mask in a small model of long rows": (attended, (1, 1024)),
    "drawn": (lambda x, _: x + torch.randn(60_000, 32).sin().cos().sin()[: x.shape[1]], (8, 24)),
    "of a buffer": (lambda x, m: x + m.angles.repeat(300, 1).sin().cos()[: x.shape[1]], (8, 24)),
    "of what only Python holds": (lambda x, m: x + m.plain.repeat(300, 1).sin().cos()[: x.shape[1]], (8, 24)),
    "written to": (lambda x, _: x + torch.zeros(60_000, 32).add_(x.mean()).sin().cos()[: x.shape[1]], (8, 24)),
    "only filled": (lambda x, _: x + torch.zeros(200_000, 32)[: x.shape[1]], (8, 24)),
}
WRONG: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "for the longest row that could come": lambda x, _: x + sines(60_000)[: x.shape[1]],
    "in a loop over rows": per_row,
    "a mask": lambda x, _: x.masked_fill(torch.ones(2048, 2048).triu(1).bool().diagonal()[: x.shape[1], None], 0),
}


def watched(folder: Path, middle: Callable[[Tensor, Any], Tensor], size: tuple[int, int]) -> lab.Diagnosis:
    model = Model(middle)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with lab.watch(model, optimizer, out=folder) as watching:
        for _ in range(2):
            optimizer.zero_grad()
            logits = model(torch.randint(16, size)).flatten(0, 1)
            F.cross_entropy(logits, torch.randint(16, size).flatten()).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    assert "tables.rebuilt" in watching.diagnosis.checked
    return watching.diagnosis


@pytest.mark.parametrize("name", SILENT)
def test_it_is_silent_on_what_is_small_or_may_change(tmp_path: Path, name: str) -> None:
    middle, size = SILENT[name]
    assert "tables.rebuilt" not in [s.id for s in watched(tmp_path / "run", middle, size).symptoms]


@pytest.mark.parametrize("name", WRONG)
def test_it_finds_and_places_what_is_not(tmp_path: Path, name: str) -> None:
    diagnosis = watched(tmp_path / "run", WRONG[name], (8, 24))
    assert [(s.at, s.since) for s in diagnosis.symptoms if s.id == "tables.rebuilt"] == [("middle", 0)]
    assert diagnosis.causes[0].id == "performance.tables_rebuilt"


def test_the_numbers_are_counted() -> None:
    model = Model(lambda x, _: x + torch.arange(50.0)[:, None].mul(torch.ones(32)).sin()[: x.shape[1]])
    work, inputs = tables.Work(), torch.randint(16, (2, 12))
    plain = copy.deepcopy(model)(inputs)
    made: list[Tensor] = []
    with torch.no_grad():
        work.follow(model, lambda: made.append(model(inputs)))
    assert torch.equal(made[0], plain)
    assert work.tables == {"middle": 2 * 50 * 32}  # a product and a sine; what is only filled is not counted
    assert work.rest == 2 * 12 * (32 + 32 + 16)  # the embedding, the sum, the head
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_fused_attention_computes_inside_counts() -> None:
    q = torch.randn(2, 3, 4, 5)
    work, model = tables.Work(), nn.Identity()
    with torch.no_grad():
        work.follow(model, lambda: F.scaled_dot_product_attention(q, q, q))
    assert work.rest >= q.numel() + 2 * 2 * 3 * 4 * 4


def test_the_rule_on_made_histories(catalogue: Any) -> None:
    judge = catalogue.rules["tables.rebuilt"].judge
    assert not list(judge(made(0.5, {"a": 0.5})))
    assert [(s.at, s.seen) for s in judge(made(0.7, {"a": 0.3, "b": 0.1, "c": 0.3}))] == [("a", 0.7), ("c", 0.7)]


def made(whole: float, parts: dict[str, float]) -> History:
    history = History()
    columns = (("tables.share", ""), *(("tables.share", name) for name in parts))
    history.add(0, Row(columns, np.array([whole, *parts.values()])))
    return history
