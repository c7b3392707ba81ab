"""Compiled models: watched, and compiled as they would be without."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lab

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


class Net(nn.Module):
    b: nn.Module

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(8, 64), nn.LayerNorm(64), nn.Linear(64, 8)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.norm(self.a(x)).relu()) * self.scale
        return y


class Compiler:
    """A backend that keeps every graph that it is given, and runs it as it is."""

    def __init__(self) -> None:
        self.graphs: list[str] = []

    def __call__(self, graph: Any, _inputs: Any) -> Any:
        self.graphs.append(graph.code)
        return graph.forward


def prepare(how: str, compiler: Compiler) -> tuple[nn.Module, nn.Module]:
    """Return what was written, and what is called."""
    torch.compiler.reset()
    torch.manual_seed(0)
    net = Net()
    if how == "whole":
        return net, torch.compile(net, backend=compiler)  # type: ignore[return-value]
    if how == "in place":
        net.compile(backend=compiler)
    else:
        net.b = torch.compile(net.b, backend=compiler)  # type: ignore[assignment]
    return net, net


def losses(net: nn.Module, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    found = []
    for step in range(24):
        x = torch.randn(16, 8)
        loss = F.cross_entropy(model(x), x.argmax(1))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        found.append(loss.item())
        if step % 10 == 9:
            net.eval()
            with torch.no_grad():
                model(x)
            net.train()
    return found


@pytest.mark.parametrize("how", ["whole", "in place", "a part"])
def test_a_compiled_model_is_watched_and_its_graphs_are_those_of_an_unwatched_one(tmp_path: Path, how: str) -> None:
    alone, watched = Compiler(), Compiler()
    net, model = prepare(how, alone)
    expected = losses(net, model, torch.optim.AdamW(model.parameters(), lr=3e-3))
    net, model = prepare(how, watched)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with lab.watch(model, optimizer, out=tmp_path / "run") as watching:
        found = losses(net, model, optimizer)
    assert found == expected
    assert watched.graphs == alone.graphs
    assert len(alone.graphs) == 2  # one to train, one to evaluate
    assert watching.diagnosis.verdict == "healthy", watching.diagnosis
    # Experiments call what was written.
    assert {"evaluation.random", "ffn.linear", "movement.none"} <= set(watching.diagnosis.checked)
    assert "a.out" in watching.run.sites.names
    assert not any("_orig_mod.a" in name for name in watching.run.parameters)


@pytest.mark.parametrize("how", ["whole", "in place", "a part"])
def test_a_bug_around_a_compiled_model_is_named(tmp_path: Path, how: str) -> None:
    net, model = prepare(how, Compiler())
    optimizer = torch.optim.AdamW([p for name, p in net.named_parameters() if name != "a.weight"], lr=3e-3)
    with lab.watch(model, optimizer, out=tmp_path / "run") as watching:
        losses(net, model, optimizer)
    assert [(c.id, c.at) for c in watching.diagnosis.causes] == [("optimizer.missing_parameter", "a.weight")]


def test_a_model_compiled_in_place_is_left_without_a_trace(tmp_path: Path) -> None:
    net, model = prepare("in place", Compiler())
    before = net._compiled_call_impl
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with lab.watch(model, optimizer, out=tmp_path / "run"):
        losses(net, model, optimizer)
        twin = copy.deepcopy(net)
        again = pickle.loads(pickle.dumps(net))
    assert net._compiled_call_impl is before
    assert twin._compiled_call_impl is None
    assert again._compiled_call_impl is None
    assert twin.state_dict().keys() == net.state_dict().keys()
