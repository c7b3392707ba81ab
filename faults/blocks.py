"""Blocks that are left out, read the stream beside their norm, or make all tokens alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab import BadInput, Cause, Fault, fault, torch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lab import Run

SKIPPED = Cause(
    id="model.layer_skipped",
    title="A layer is left out of the forward pass",
    must=("path.skipped",),
    repair="Loop over all of self.layers: for layer in self.layers. Look for a slice or a range that ends one too "
    "early, an early return, and a ModuleList that was lengthened after its length was stored.",
    refute="A hook on the layer named is called in a forward pass.",
    look="The loop over the layers; p.grad is None for each of the parameters named.",
    source="PyTorch documentation: DistributedDataParallel, find_unused_parameters",
)

NORM_UNUSED = Cause(
    id="norm.unused",
    title="A branch reads the stream beside its norm",
    must=("path.unheard",),
    repair="Give the branch what the norm returns: x = x + branch(norm(x)). A call whose result is not assigned, or "
    "is assigned to a name that is not read, changes nothing: norms do not work in place.",
    refute="The gain of the norm named has a gradient.",
    look="The line after the call of the norm: which name is given to the branch.",
    source="Xiong et al., 2020, On Layer Normalization in the Transformer Architecture, figure 1",
)

COLLAPSED = Cause(
    id="residual.collapsed",
    title="A block gives every token the same vector",
    must=("stream.collapsed",),
    may=("generation.*",),  # token by token, each is the first of what it is given
    repair="Keep the position: look for a mean or a pick x[:, 0] over positions that is broadcast back, and for a "
    "missing dimension (keepdim, unsqueeze) that lets [B 1 C] stand where [B T C] is meant.",
    refute="What the block gives out at two positions differs.",
    look="Reductions over dim 1 in the block named, and shapes that broadcast.",
    source="Dong, Cordonnier and Loukas, 2021, Attention is not all you need: pure attention loses rank",
)


IGNORED = Cause(
    id="model.layer_ignored",
    title="What a layer gives out is not used",
    must=("path.ignored",),
    repair="Hand on what the layer before gave: for layer in self.layers: x = layer(x). A loop that calls each layer "
    "with the same input, or does not assign what it returns, keeps the last one only.",
    refute="The weights of the layer named have a gradient.",
    look="What each layer is given in the loop over the layers, and the name to which its output is assigned.",
    source="Atcold/NYU-DLSP20 issue 270; PyTorch documentation: ModuleList",
)


@fault(
    "model.layer_skipped",
    title="A layer passes its input on, and nothing in it is called",
    cause="model.layer_skipped",
    moves="path.skipped",
    repair=SKIPPED.repair,
)
class LayerSkipped(Fault):
    """Lets a block return what it is given, before anything else."""

    at: str = "blocks.1"

    def lab_start(self, run: Run) -> None:
        lists = [m for m in run.model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) > 1]
        blocks = {id(block) for found in lists for block in found}
        named = [m for name, m in run.model.named_modules() if name == self.at and id(m) in blocks]
        if not named:
            raise BadInput(f"model.layer_skipped: no block at {self.at!r} that is one of several")
        for block in named:
            self.patch(run, block)

    def patch(self, run: Run, block: nn.Module) -> None:
        """Put another method in the place of `forward`, until the run ends."""
        right = block.forward

        def forward(x: Tensor, *others: object) -> Tensor:  # [B T C] -> [B T C]
            return x if self.active(run) else right(x, *others)

        block.__dict__["forward"] = forward
        run.cleanup.callback(block.__dict__.pop, "forward", None)


@fault(
    "norm.unused",
    title="A branch is given the stream, and its norm's output is dropped",
    cause="norm.unused",
    moves="path.unheard",
    repair=NORM_UNUSED.repair,
)
class NormUnused(Fault):
    """Gives a branch what its norm is given."""

    at: str = "blocks.0.mlp"

    def lab_start(self, run: Run) -> None:
        modules = dict(run.model.named_modules())
        named = [name for name in modules if name and name == self.at and f"{name}_norm" in modules]
        named = [name for name in named if getattr(modules[name.rpartition(".")[0]], "pre", True)]
        if not named:
            raise BadInput(f"norm.unused: no branch at {self.at!r} with a norm before it")
        for name in named:
            stream: list[Tensor] = []

            def keep(_: nn.Module, args: tuple[Tensor, ...], stream: list[Tensor] = stream) -> None:
                stream[:] = args[:1]

            def give(_: nn.Module, args: tuple[Tensor, ...], stream: list[Tensor] = stream) -> tuple[Tensor, ...]:
                x = stream.pop()
                return (x, *args[1:]) if self.active(run) else args

            run.cleanup.callback(modules[f"{name}_norm"].register_forward_pre_hook(keep).remove)
            run.cleanup.callback(modules[name].register_forward_pre_hook(give).remove)


@fault(
    "residual.collapsed",
    title="Every position is given the vector of the first",
    cause="residual.collapsed",
    moves="stream.alike",
    repair=COLLAPSED.repair,
)
class Collapsed(Fault):
    """Gives out the vector of a row's first position at all of them."""

    at: str = "blocks.1"

    def lab_start(self, run: Run) -> None:
        self.replace(run, f"{self.at}.out", lambda x: x[:, :1].expand_as(x))
