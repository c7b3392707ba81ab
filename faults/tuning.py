"""Adapters that learn nothing, and bases that were to stay as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lab import BadInput, Cause, Fault, fault, torch

if TYPE_CHECKING:
    from collections.abc import Generator

    from torch import nn
    from torch.optim import Optimizer

    from lab import Run

DEAD = Cause(
    id="tuning.adapter_dead",
    title="An adapter cannot learn: a factor is zero",
    must=("adapter.dead",),
    may=("flow.zero", "arrival.dead"),
    repair="Draw A at random and set only B to 0. With both at 0 neither has a gradient: A's is multiplied by B, and "
    "B's by A.",
    refute="One of the two factors is not 0.",
    look="The initialiser of the adapter named, and whether a later reset of the model runs over it.",
    source="Hu et al., 2021, section 4.1",
)

UNUSED = Cause(
    id="tuning.adapter_unused",
    title="An adapter is trained and not used",
    must=("adapter.unused",),
    repair="Put the adapted layer where the model calls it, and add the update in its forward. With a library, look "
    "for adapters that are disabled or not the active ones.",
    refute="With other factors the layer named gives another output.",
    look="Which module the forward pass calls at the place named, and whether its adapter is active.",
    source="Hu et al., 2021, equation 3; Hugging Face PEFT documentation: disabling and activating adapters",
)

BASE_NOT_FROZEN = Cause(
    id="tuning.base_not_frozen",
    title="The weight beside an adapter is trained too",
    must=("adapter.base_trained",),
    repair="Set requires_grad=False for the weight that the adapter stands beside, before the optimiser is built.",
    refute="The weight named is what it was at the start.",
    look="What is unfrozen after the adapters are added, and how the optimiser's parameters are chosen.",
    source="Hu et al., 2021, section 4.1",
)

MERGED_STALE = Cause(
    id="tuning.merged_stale",
    title="Evaluation uses weights that an adapter was merged into before it was trained further",
    must=("adapter.stale",),
    may=("stale.same",),  # the layer as a whole does not change with its factors either
    repair="Merge last, and again after each further update: merge_adapter() before, unmerge_adapter() after an "
    "evaluation. Whatever keeps a merged weight has to forget it when the factors change, not when the mode does.",
    refute="In evaluation mode, too, the layer named gives another output with other factors.",
    look="What train() and eval() do in the layer named, and what it keeps between them.",
    source="Hu et al., 2021, section 4.1; Hugging Face PEFT documentation: merge_adapter, unmerge_adapter",
)


def adapters(run_model: nn.Module, fault: Fault) -> dict[str, nn.Module]:
    """Return the adapted layers that a fault names.

    Raises:
        BadInput: There is none.
    """
    found = {
        name: module
        for name, module in run_model.named_modules()
        if hasattr(module, "base") and hasattr(module, "a") and hasattr(module, "b") and fault.holds(f"{name}.a")
    }
    if not found:
        raise BadInput(f"{fault.info.id}: needs a layer with an adapter at {fault.at!r} (train.lora_rank)")
    return found


@fault(
    "tuning.adapter_dead",
    title="An adapter starts with both factors at 0",
    cause="tuning.adapter_dead",
    moves="adapter.factor",
    repair=DEAD.repair,
)
class AdapterDead(Fault):
    """Sets A to 0 when the model is built; B is 0 already."""

    at: str = "blocks.1.mlp.up"

    def lab_build_model(self) -> Generator[None, nn.Module, nn.Module]:
        self.from_the_start()
        model = yield
        with torch.no_grad():
            for layer in adapters(model, self).values():
                layer.get_parameter("a").zero_()
                layer.get_parameter("b").zero_()
        return model


@fault(
    "tuning.adapter_unused",
    title="A layer's forward leaves its adapter out",
    cause="tuning.adapter_unused",
    moves="adapter.response",
    repair=UNUSED.repair,
)
class AdapterUnused(Fault):
    """Replaces the update of an adapter by 0, without a gradient to its factors."""

    at: str = "blocks.1.mlp.up"

    def lab_start(self, run: Run) -> None:
        for name in adapters(run.model, self):
            self.replace(run, f"{name}.update", torch.zeros_like)


@fault(
    "tuning.base_not_frozen",
    title="The weight that an adapter stands beside is trained",
    cause="tuning.base_not_frozen",
    moves="adapter.base_moved",
    repair=BASE_NOT_FROZEN.repair,
)
class BaseNotFrozen(Fault):
    """Unfreezes the weight before the optimiser is built; freezes it and takes it out again when the run ends."""

    at: str = "blocks.1.mlp.up"

    def lab_build_optimizer(self, run: Run) -> Generator[None, Optimizer, Optimizer]:
        self.from_the_start()
        weights = [layer.get_parameter("base.weight") for layer in adapters(run.model, self).values()]
        for weight in weights:
            weight.requires_grad_()
            run.cleanup.callback(weight.requires_grad_, False)
        optimizer = yield
        thawed = {id(weight) for weight in weights}
        for group in optimizer.param_groups:
            kept = [p for p in group["params"] if id(p) not in thawed]
            run.cleanup.callback(group.__setitem__, "params", kept)
        return optimizer


@fault(
    "tuning.merged_stale",
    title="In evaluation mode a layer adds the update that it was once merged with",
    cause="tuning.merged_stale",
    moves="adapter.response_evaluating",
    repair=MERGED_STALE.repair,
)
class MergedStale(Fault):
    """Keeps the factors of the step in which it begins, and calls the layer with them whenever it does not train."""

    at: str = "blocks.1.mlp.up"

    def lab_start(self, run: Run) -> None:
        self.merged: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        for name, layer in adapters(run.model, self).items():
            self.begin(run, name, layer)

    def lab_zero_grad(self, run: Run) -> None:
        if self.active(run) and not self.merged:
            for name, layer in adapters(run.model, self).items():
                a, b = (layer.get_parameter(part).detach().clone() for part in "ab")
                self.merged[name] = torch.nn.Parameter(a), torch.nn.Parameter(b)

    def begin(self, run: Run, name: str, layer: Any) -> None:
        """Exchange the factors while the layer is called."""
        own = layer.a, layer.b

        def before(_layer: nn.Module, _args: Any) -> None:
            if name in self.merged and not layer.training:
                layer.a, layer.b = self.merged[name]

        def after(_layer: nn.Module, _args: Any, _output: Any) -> None:
            layer.a, layer.b = own

        run.cleanup.callback(layer.register_forward_pre_hook(before).remove)
        run.cleanup.callback(layer.register_forward_hook(after, always_call=True).remove)
