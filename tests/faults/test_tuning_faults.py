"""Faults of adapters do what they say, are named, and are undone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import lab
from lab.errors import BadInput

if TYPE_CHECKING:
    from conftest import SmallRun

    from lab import Run, Step

IDS = ("tuning.adapter_dead", "tuning.adapter_unused", "tuning.base_not_frozen", "tuning.merged_stale")
AT = "blocks.1.mlp.up"
ADAPTERS = {"lora_rank": 2}


@lab.plugin("test.layer", title="Keeps one adapted layer and its gradients")
class Layer(lab.Plugin):
    def lab_start(self, run: Run) -> None:
        self.run = run
        self.module: Any = run.model.get_submodule(AT)
        self.start = {name: p.detach().clone() for name, p in self.module.named_parameters()}
        self.gradients: list[dict[str, float | None]] = []

    def lab_before_update(self, run: Run, step: Step) -> None:
        norms = {n: None if p.grad is None else float(p.grad.norm()) for n, p in self.module.named_parameters()}
        self.gradients.append(norms)

    @property
    def moved(self) -> set[str]:
        return {name for name, p in self.module.named_parameters() if not torch.equal(p, self.start[name])}


@pytest.mark.parametrize("id", IDS)
def test_an_adapter_s_fault_is_named_where_it_is(small_run: SmallRun, id: str) -> None:
    diagnosis, _ = small_run(faults=[{"id": id, "at": AT}], train=ADAPTERS, steps=24)
    assert [(cause.id, cause.at) for cause in diagnosis.causes] == [(id, AT)]
    assert diagnosis.unexplained == ()


def test_a_dead_adapter_never_has_a_gradient_and_never_moves(small_run: SmallRun) -> None:
    layer = Layer()
    small_run(layer, faults=[{"id": IDS[0], "at": AT}], train=ADAPTERS)
    assert all(norms["a"] == norms["b"] == 0 for norms in layer.gradients)
    assert not any(bool(layer.module.get_parameter(name).any()) for name in "ab")
    assert layer.moved == set()


def test_an_adapter_is_used_until_the_fault_s_step(small_run: SmallRun) -> None:
    layer = Layer()
    small_run(layer, faults=[{"id": IDS[1], "at": AT, "from_step": 4}], train=ADAPTERS, probes=False)
    assert [norms["b"] is not None for norms in layer.gradients] == [True] * 4 + [False] * 8


def test_a_base_that_is_not_frozen_moves_and_is_frozen_again_afterwards(small_run: SmallRun) -> None:
    layer = Layer()
    small_run(layer, faults=[{"id": IDS[2], "at": AT}], train=ADAPTERS)
    assert "base.weight" in layer.moved
    assert "base.bias" not in layer.moved
    assert not layer.module.base.weight.requires_grad


@pytest.mark.parametrize("id", IDS)
def test_a_model_without_adapters_is_refused(small_run: SmallRun, id: str) -> None:
    with pytest.raises(BadInput, match=f"{id}: needs a layer with an adapter"):
        small_run(faults=[{"id": id}])


@pytest.mark.parametrize("id", [IDS[0], IDS[2]])
def test_what_acts_when_the_run_is_built_refuses_a_step(small_run: SmallRun, id: str) -> None:
    with pytest.raises(BadInput, match="from_step"):
        small_run(faults=[{"id": id, "from_step": 3}], train=ADAPTERS)


def test_stale_factors_answer_in_evaluation_only(small_run: SmallRun) -> None:
    layer, seen = Layer(), []

    @lab.plugin("test.modes", title="Calls the layer in both modes")
    class Modes(lab.Plugin):
        def lab_step_end(self, step: Step) -> None:
            if step.index == 11:
                x = torch.ones(1, layer.module.a.shape[1])
                for mode in (True, False):
                    layer.module.train(mode)
                    seen.append((layer.module(x) - layer.module.base(x)).detach())
                layer.module.train()

    small_run(layer, Modes(), faults=[{"id": IDS[3], "at": AT}], train=ADAPTERS)
    trained, evaluated = seen
    assert float(trained.abs().max()) > 0
    assert float(evaluated.abs().max()) == 0  # merged at the start, when B was 0
    assert layer.moved == {"a", "b"}  # the layer has its own factors back
