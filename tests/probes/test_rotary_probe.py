"""Rotary positions: silent wherever scores depend on distances, and right about where they do not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from lab.attach.watch import watch
from lab.projects.multihead.component import MultiHeadAttention
from lab.projects.positions.component import rotate

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import SmallRun
    from torch import Tensor

RULES = {"rotary.pairing", "rotary.rates", "rotary.uneven", "rotary.values"}
FAULTS = [
    ("positions.rope_pairing", "rotary.unlike"),
    ("positions.rope_base", "rotary.apart"),
    ("positions.rope_half", "rotary.unevenness"),
    ("positions.rope_on_values", "rotary.value_change"),
]
ROPE: dict[str, object] = {"layers": 2, "width": 32, "heads": 2, "context": 24, "positions": "rope"}


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"context": 512, "layers": 1},
        {"heads": 8, "kv_heads": 2},  # 4 channels a head, in groups
        {"heads": 16},  # a single pair: halves are neighbours
        {"norm_at": "post", "layers": 6, "tied": True},
    ],
)
def test_healthy_rotations_are_silent(small_run: SmallRun, model: dict[str, object]) -> None:
    diagnosis, history = small_run(model=ROPE | model, train={"lr": 0.02, "warmup": 0})
    assert diagnosis.symptoms == ()
    assert set(diagnosis.checked) >= RULES
    assert max(series.values.max() for _, series in history.each("rotary.unevenness")) < 1e-4


@pytest.mark.parametrize(
    "model", [{"positions": "learned"}, {"positions": "sinusoidal"}, {"positions": "alibi"}, {"mixer": "gru"}]
)
def test_without_turning_there_is_nothing_to_check(small_run: SmallRun, model: dict[str, object]) -> None:
    diagnosis, _ = small_run(model=ROPE | model, steps=3)
    assert diagnosis.verdict == "healthy"
    assert all("no attention in this model turns" in diagnosis.not_checked[rule] for rule in RULES)


@pytest.mark.parametrize(("fault", "metric"), FAULTS)
@pytest.mark.parametrize("layer", [0, 1])
def test_each_fault_is_named_in_its_layer(small_run: SmallRun, fault: str, metric: str, layer: int) -> None:
    at = f"blocks.{layer}.attn"
    diagnosis, history = small_run(model=ROPE, faults=[{"id": fault, "at": at}])
    assert [(cause.id, cause.at) for cause in diagnosis.causes] == [(fault, at)]
    assert diagnosis.unexplained == ()
    healthy = max(series.values.max() for site, series in history.each(metric) if f"blocks.{1 - layer}." in site)
    assert healthy < 1e-4


def test_a_foreign_encoder_has_no_sites_for_it(tmp_path: Path) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    assert _watched(model, tmp_path) == (False, [])


@pytest.mark.parametrize("turn", ["neighbours", "part", "grown", "halves in bfloat16"])
def test_other_healthy_turns_are_silent(tmp_path: Path, turn: str) -> None:
    assert _watched(_Layers(_TURNS[turn]), tmp_path) == (turn != "part", [])


def test_values_that_are_turned_back_are_silent(tmp_path: Path) -> None:
    assert _watched(_Layers(rotate, kind=_TurnedBack), tmp_path) == (True, [])


def _neighbours(x: Tensor, start: int = 0) -> Tensor:
    halves = rotate(torch.cat([x[..., 0::2], x[..., 1::2]], -1), start)
    return torch.stack(halves.chunk(2, -1), -1).flatten(-2)


_TURNS: dict[str, Any] = {
    "neighbours": _neighbours,
    "part": lambda x, start=0: torch.cat([rotate(x[..., :4], start), x[..., 4:]], -1),  # Black et al., 2022
    "grown": lambda x, start=0: 1.2 * rotate(x, start, 1e6),  # as of YaRN
    "halves in bfloat16": lambda x, start=0: rotate(x.bfloat16(), start),
}


class _TurnedBack(MultiHeadAttention):
    """Values are turned with their keys, and what attention gives is turned back by the queries' positions."""

    def forward(self, x: Tensor, memory: Any = None) -> Tensor:
        q, k, v = (self.split(part) for part in self.qkv(x).chunk(3, dim=-1))
        q, k, v = (self.tap(name, rotate(y)) for name, y in (("q", q), ("k", k), ("v", v)))
        mixed = self.core(q, k, v)  # [B H T D]
        a, b = mixed.chunk(2, -1)
        back = rotate(torch.cat([a, -b], -1))  # the conjugate, turned on
        a, b = back.chunk(2, -1)
        return self.tap("out", self.proj(self.merge(torch.cat([a, -b], -1))))


class _Layers(nn.Module):
    def __init__(self, turn: Any, kind: type[MultiHeadAttention] = MultiHeadAttention) -> None:
        super().__init__()

        self.tokens = nn.Embedding(8, 32)
        self.attn = kind(32, 4, turn=turn)
        self.autocast = turn is _TURNS["halves in bfloat16"]

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            mixed: Tensor = x + self.attn(x)
        return mixed


def _watched(model: nn.Module, folder: Path) -> tuple[bool, list[str]]:
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with watch(model, optimizer, out=folder / "run") as watching:
        for _ in range(3):
            optimizer.zero_grad()
            given = torch.randn(4, 9, 16) if isinstance(model, nn.TransformerEncoder) else torch.randint(8, (4, 20))
            model(given).square().mean().backward()
            optimizer.step()
    judged = "rotary.pairing" in watching.diagnosis.checked
    return judged, [s.id for s in watching.diagnosis.symptoms if s.id.startswith("rotary")]
