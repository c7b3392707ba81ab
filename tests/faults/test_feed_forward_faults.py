"""Faults of feed-forward layers do what they say, and are named."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import lab
from lab.errors import BadInput

if TYPE_CHECKING:
    from conftest import SmallRun

    from lab import Run

FAULTS = ["ffn.dead", "ffn.neurons_dropped", "ffn.no_activation", "ffn.saturated"]


@lab.plugin("inside", title="Keeps what stands between the two matrices of one layer")
class Inside(lab.Plugin):
    layer: Any = None

    def __init__(self) -> None:
        self.given: dict[int, torch.Tensor] = {}
        self.made: dict[int, torch.Tensor] = {}

    def lab_start(self, run: Run) -> None:
        self.layer = run.model.get_submodule("blocks.1.mlp")

        def up(_m: Any, _args: Any, out: torch.Tensor) -> None:
            if run.sites.mode == "train":
                self.given[run.step.index] = out.detach().clone()

        def down(_m: Any, args: tuple[torch.Tensor]) -> None:
            if run.sites.mode == "train":
                self.made[run.step.index] = args[0].detach().clone()

        self.layer.up.register_forward_hook(up)
        self.layer.down.register_forward_pre_hook(down)


MEANT: dict[str, Any] = {
    "ffn.no_activation": lambda x: x,
    "ffn.dead": lambda x: 0 * x,
    "ffn.saturated": lambda x: torch.nn.functional.gelu(x).clamp(-0.001, 0.001),
}


@pytest.mark.parametrize("id", FAULTS)
@pytest.mark.parametrize("start", [0, 10])
def test_a_fault_does_what_it_says_and_is_named(small_run: SmallRun, id: str, start: int) -> None:
    inside = Inside()
    fault: dict[str, object] = {"id": id, "at": "blocks.1.mlp", "from_step": start}
    if id == "ffn.dead" and start:
        with pytest.raises(BadInput, match="from_step"):
            small_run(faults=[fault])
        return
    diagnosis, _ = small_run(inside, faults=[fault], steps=31)
    for step, x in inside.given.items():
        made = inside.made[step]
        if id in MEANT:
            whole = torch.nn.functional.gelu(x) if step < start else MEANT[id](x)
            torch.testing.assert_close(made, whole)
        else:
            assert bool((made == 0).all(0).all(0).any()) == (step >= start)
    assert [(c.id, c.at, c.since_step) for c in diagnosis.causes] == [(id, "blocks.1.mlp", start)]
    assert diagnosis.unexplained == ()
    assert inside.layer.activation(torch.tensor(2.0)) == torch.nn.functional.gelu(torch.tensor(2.0))


@pytest.mark.parametrize("id", ["ffn.no_activation", "ffn.dead"])
def test_a_gated_layer_is_refused(small_run: SmallRun, id: str) -> None:
    model = {"layers": 1, "width": 32, "heads": 2, "context": 16, "activation": "swiglu"}
    with pytest.raises(BadInput, match="no feed-forward layer"):
        small_run(faults=[{"id": id, "at": "blocks.0.mlp"}], model=model)


def test_an_activation_with_a_slope_everywhere_does_not_die(small_run: SmallRun) -> None:
    model = {"layers": 1, "width": 32, "heads": 2, "context": 16, "activation": "sigmoid"}
    with pytest.raises(BadInput, match="whose activation is 0"):
        small_run(faults=[{"id": "ffn.dead", "at": "blocks.0.mlp"}], model=model)
