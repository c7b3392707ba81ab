"""The sandbox: whatever an experiment does in it, the model is as it was."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lab.sandbox import sandbox
from lab.sites import Sites


class Counting(nn.Module):
    """A model whose forward pass keeps things beside tensors, as people's do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.calls = 0
        self.seen: list[float] = [1.0]
        self.cache: dict[str, Any] = {"kept": 1}
        self.shapes: set[tuple[int, ...]] = {(2, 4)}

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(float(x.sum()))
        self.cache["last"] = self.seen
        self.shapes.add(tuple(x.shape))
        self.made_here = True
        y: Tensor = self.norm(self.layer(x))
        return y


def test_everything_is_put_back() -> None:
    torch.manual_seed(0)
    model = Counting()
    model(torch.randn(3, 4)).sum().backward()
    del model.made_here
    seen, state = model.seen, {k: v.clone() for k, v in model.state_dict().items()}
    before = {name: repr(value) for name, value in vars(model).items() if not name.startswith("_")}
    gradient = model.layer.weight.grad
    drawn = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]
    versions = [p._version for p in model.parameters()]
    with sandbox(model, Sites()):
        model.eval()
        model.layer.weight.data.mul_(2)
        model.norm.reset_running_stats()
        model.layer.weight.requires_grad_(False)
        model(torch.randn(5, 4)).sum().backward()
        model.cache = {}
        random.random()
        np.random.rand()
    assert {name: repr(value) for name, value in vars(model).items() if not name.startswith("_")} == before
    assert model.seen is seen
    assert model.training
    assert model.layer.weight.requires_grad
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert model.layer.weight.grad is gradient
    assert [p._version for p in model.parameters()] == versions
    assert random.getstate() == drawn[0]
    assert np.random.get_state()[1].tolist() == drawn[1]  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), drawn[2])


def test_what_hangs_in_modules_for_the_lab_stays() -> None:
    """A tap that an experiment is the first to ask for is kept by the sites, and has to stay in the module."""
    from lab.projects.linear.component import Linear
    from lab.sites import sites_of

    model = Linear(4, 4)
    sites = sites_of(model)
    with sandbox(model, sites), sites.capture("*") as first:
        model(torch.randn(2, 4))
    with sandbox(model, sites), sites.capture("*") as second:
        model(torch.randn(2, 4))
    assert first.keys() == second.keys()
    assert first


def test_layers_of_pytorch_compute_as_in_training() -> None:
    """In evaluation they would skip the modules inside, and give out a nested tensor where rows are padded."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1)
    inside: list[str] = []
    encoder.layers[0].linear1.register_forward_hook(lambda *_: inside.append("linear1"))
    x, padding = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with sandbox(encoder, Sites()), torch.no_grad():
        encoder.eval()
        assert not encoder(x, src_key_padding_mask=padding).is_nested
        assert inside == ["linear1"]
    assert torch.backends.mha.get_fastpath_enabled()
