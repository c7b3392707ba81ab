"""Layers that are computed with a copy of their weights, and the cause behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lab import BadInput, Cause, Fault, fault

if TYPE_CHECKING:
    from torch import nn

    from lab import Run

STALE_COPY = Cause(
    id="precision.stale_copy",
    title="A layer is computed with an old copy of its weights",
    must=("stale.same",),
    module=False,
    repair="Let torch.autocast begin and end with each forward pass: within one context weights are cast once, and the "
    "copies are kept until it ends, whatever the optimiser does (cache_enabled=False keeps none). Refresh any other "
    "copy, merged or quantised, after optimizer.step().",
    refute="What the layer gives out for one and the same input changes from step to step.",
    look="Where autocast is entered: around the whole loop, or around a step; and every cast of a weight that is kept.",
    source="PyTorch documentation: torch.amp, autocast, cache_enabled; X-GenGroup/Flow-Factory#186",
)


@fault(
    "precision.stale_copy",
    title="A layer keeps the copies of its weights in bfloat16 that were made first",
    cause="precision.stale_copy",
    moves="stale.same",
    repair=STALE_COPY.repair,
)
class StaleCopy(Fault):
    """Computes a layer with its weights as they were when the run began, in bfloat16; gradients reach the real ones."""

    at: str = "blocks.0.mlp.up"

    def lab_start(self, run: Run) -> None:
        self.from_the_start()
        layer = dict(run.model.named_modules()).get(self.at)
        real = {} if layer is None else {n: p for n, p in layer._parameters.items() if p is not None}  # noqa: SLF001
        if layer is None or "weight" not in real or real["weight"].dim() != 2:
            raise BadInput(f"precision.stale_copy: at = {self.at!r} is no layer with a weight matrix")
        if not all(p.requires_grad for p in real.values()):
            raise BadInput(f"precision.stale_copy: {self.at} does not learn")
        old = {name: p.detach().bfloat16().to(p.dtype) for name, p in real.items()}

        def put_in(layer: nn.Module, _args: object) -> None:
            for name, p in real.items():
                used: Any = old[name] + (p - p.detach())  # the copy, as a function of the weight
                layer._parameters[name] = used  # noqa: SLF001

        def put_back(layer: nn.Module, _args: object, _out: object) -> None:
            layer._parameters.update(real)  # noqa: SLF001

        run.cleanup.callback(layer.register_forward_pre_hook(put_in).remove)
        run.cleanup.callback(layer.register_forward_hook(put_back, always_call=True).remove)
