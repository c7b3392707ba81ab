"""Faults of what is on the path do what they say, and are named."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import lab
from lab.errors import BadInput

if TYPE_CHECKING:
    from conftest import SmallRun

    from lab import Run


@lab.plugin("around", title="Keeps what a module is given and gives out in training")
class Around(lab.Plugin):
    def __init__(self, name: str) -> None:
        self.name = name
        self.module: Any = None
        self.pairs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def lab_start(self, run: Run) -> None:
        self.module = run.model.get_submodule(self.name)

        def hook(_module: Any, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
            if run.sites.mode == "train":
                self.pairs[run.step.index] = args[0].detach().clone(), out.detach().clone()

        self.module.register_forward_hook(hook)


AIMS = {
    "model.layer_skipped": ("blocks.1", "blocks.1"),
    "norm.unused": ("blocks.1.mlp", "blocks.1.mlp_norm"),
    "residual.collapsed": ("blocks.1", "blocks.1"),
}


@pytest.mark.parametrize("id", AIMS)
def test_a_fault_does_what_it_says_and_is_named(small_run: SmallRun, id: str) -> None:
    at, place = AIMS[id]
    around, norm = Around(at), Around("blocks.1.mlp_norm")
    diagnosis, _ = small_run(around, norm, faults=[{"id": id, "at": at, "from_step": 5}], steps=31)
    for step, (x, out) in around.pairs.items():
        if id == "model.layer_skipped":
            assert torch.equal(x, out) == (step >= 5)
        elif id == "norm.unused":
            assert torch.equal(x, norm.pairs[step][0]) == (step >= 5)
            assert torch.equal(x, norm.pairs[step][1]) == (step < 5)
        else:
            assert bool((out == out[:, :1]).all()) == (step >= 5)
    assert [(c.id, c.at) for c in diagnosis.causes] == [(id, place)]
    assert 5 <= diagnosis.causes[0].since_step <= 11
    assert diagnosis.unexplained == ()
    assert "forward" not in vars(around.module)
    assert not around.module._forward_pre_hooks


@pytest.mark.parametrize(
    ("id", "at", "text"),
    [
        ("model.layer_skipped", "blocks.0", "one of several"),
        ("norm.unused", "blocks.0.mlp", "a norm before it"),
        ("residual.collapsed", "blocks.7", "no site"),
    ],
)
def test_a_place_that_does_not_fit_is_refused(small_run: SmallRun, id: str, at: str, text: str) -> None:
    model = {"layers": 1, "width": 32, "heads": 2, "context": 16, "norm_at": "post"}
    with pytest.raises(BadInput, match=text):
        small_run(faults=[{"id": id, "at": at}], model=model)
