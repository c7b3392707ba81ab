"""Checks of adapters: silent where adapters are as they should be, in models of the lab and of others."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import lab
from lab.errors import NotChecked
from lab.store import History, Row

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import SmallRun

probes = importlib.import_module("lab.probes.tuning")
RULES = {"adapter.dead", "adapter.unused", "adapter.base_trained", "adapter.stale"}


def history_of(metric: str, values: list[float], **others: float) -> History:
    history = History()
    for step, value in enumerate(values):
        columns = ((metric, "layer"), *((name.replace("__", "."), "layer") for name in others))
        history.add(step, Row(columns, np.array([value, *others.values()])))
    return history


@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize("train", [{"lr": 0.0}, {"lr": 0.1, "warmup": 0, "accumulate": 2}])
def test_adapters_of_any_size_are_silent(small_run: SmallRun, layers: int, rank: int, train: dict[str, Any]) -> None:
    model = {"layers": layers, "width": 32, "heads": 2, "context": 24}
    diagnosis, history = small_run(model=model, train={"lora_rank": rank, **train}, steps=4)
    assert set(diagnosis.checked) >= RULES
    assert not [s for s in diagnosis.symptoms if s.id in RULES]
    assert len(history.sites("adapter.response")) == 4 * layers + 1


@pytest.mark.parametrize("objective", ["next-token", "masked"])
def test_a_model_without_adapters_is_not_checked(small_run: SmallRun, objective: str) -> None:
    diagnosis, _ = small_run(train={"objective": objective}, steps=2)
    assert {diagnosis.not_checked[rule].split(": ")[-1] for rule in RULES} == {probes.NONE}


class Wrapped(torch.nn.Module):
    """An adapted layer as others write it: its factors are two modules in dictionaries, by the adapter's name."""

    def __init__(self, width: int, *, used: bool) -> None:
        super().__init__()
        self.base_layer = torch.nn.Linear(width, width).requires_grad_(requires_grad=False)
        self.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(width, 2, bias=False)})
        self.lora_B = torch.nn.ModuleDict({"default": torch.nn.Linear(2, width, bias=False)})
        torch.nn.init.zeros_(self.lora_B.get_parameter("default.weight"))
        self.dropout, self.used = torch.nn.Dropout(0.5), used

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base_layer(x)
        return y + 16.0 * self.lora_B["default"](self.lora_A["default"](self.dropout(x))) if self.used else y


@pytest.mark.parametrize("used", [True, False])
def test_adapters_of_others_are_found_and_checked(tmp_path: Path, used: bool) -> None:
    torch.manual_seed(0)
    embed, head = torch.nn.Embedding(11, 8), torch.nn.Linear(8, 11)
    model = torch.nn.Sequential(embed, torch.nn.LayerNorm(8), Wrapped(8, used=used), head)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with lab.watch(model, optimizer, out=tmp_path / "run") as watch:
        for _ in range(12):
            tokens = torch.randint(11, (6, 9))
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    found = [(s.id, s.at) for s in watch.diagnosis.symptoms if s.id in RULES]
    assert found == ([] if used else [("adapter.unused", "2")])


@pytest.mark.parametrize(
    ("frozen", "zero", "dead"),
    [("lora_B", "lora_B", True), ("lora_A", "lora_B", False), ("lora_A", "lora_A", True), ("", "lora_A", True)],
)
def test_a_factor_that_is_0_and_not_trained_is_named(tmp_path: Path, frozen: str, zero: str, *, dead: bool) -> None:
    torch.manual_seed(0)
    wrapped = Wrapped(8, used=True)  # of which B is 0
    model = torch.nn.Sequential(torch.nn.Linear(8, 8).requires_grad_(requires_grad=False), wrapped)
    for name, p in wrapped.named_parameters():
        if frozen and name.startswith(frozen):
            p.requires_grad = False
        if name.startswith(zero):
            torch.nn.init.zeros_(p)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with lab.watch(model, optimizer, out=tmp_path / "run") as watch:
        for _ in range(12):
            x = torch.randn(16, 8)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), x.argmax(-1)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    assert [(c.id, c.at) for c in watch.diagnosis.causes] == [("tuning.adapter_dead", "1")] * dead
    assert watch.diagnosis.unexplained == ()


def test_both_factors_at_zero_are_named() -> None:
    assert [s.since for s in probes.adapter_dead.judge(history_of("adapter.factor", [1.0, 0.0]))] == [1]
    assert [*probes.adapter_dead.judge(history_of("adapter.factor", [1.0, 1e-20]))] == []


def test_an_input_of_zeros_tells_nothing_of_an_adapter() -> None:
    with pytest.raises(NotChecked):
        [*probes.adapter_unused.judge(history_of("adapter.response", [float("nan")]))]


@pytest.mark.parametrize(("trainable", "found"), [(1.0, [1]), (0.0, [])])
def test_a_base_is_judged_only_where_it_takes_gradients(trainable: float, found: list[int]) -> None:
    history = history_of("adapter.base_moved", [0.0, 1e-9], adapter__base_trainable=trainable)
    assert [s.since for s in probes.adapter_base_trained.judge(history)] == found


class Merging(Wrapped):
    """Merges its update into the weight when it is told to evaluate, and takes it out again; or forgets to."""

    merged: torch.Tensor | None = None

    def __init__(self, *, forgets: bool) -> None:
        super().__init__(8, used=True)
        self.forgets = forgets

    def train(self, mode: bool = True) -> Merging:
        super().train(mode)
        if mode and not self.forgets:
            self.merged = None
        elif not mode and self.merged is None:
            down, up = (self.get_parameter(f"lora_{part}.default.weight") for part in "AB")
            self.merged = (self.base_layer.weight + up @ down * 16).detach()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training or self.merged is None:
            return super().forward(x)
        return torch.nn.functional.linear(x, self.merged, self.base_layer.bias)


@pytest.mark.parametrize("forgets", [False, True])
def test_a_layer_may_merge_when_it_is_told_to_evaluate(tmp_path: Path, forgets: bool) -> None:
    torch.manual_seed(0)
    layer = Merging(forgets=forgets)
    layer.eval().train()
    model = torch.nn.Sequential(torch.nn.Embedding(11, 8), layer, torch.nn.Linear(8, 11))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with lab.watch(model, optimizer, out=tmp_path / "run") as watch:
        for _ in range(12):
            tokens = torch.randint(11, (6, 9))
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    found = [(s.id, s.at) for s in watch.diagnosis.symptoms if s.id in RULES]
    assert found == ([("adapter.stale", "1")] if forgets else [])
