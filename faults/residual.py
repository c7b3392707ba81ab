"""Residual streams that are cut, scaled, or noisy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from annotated_types import Gt

from lab import BadInput, Cause, Fault, fault, torch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lab import Run

DROPPED = Cause(
    id="residual.dropped",
    title="A branch replaces the stream instead of being added to it",
    must=("stream.blocked",),
    locate=("stream.branch",),
    repair="Write x = x + branch(norm(x)), not x = branch(norm(x)).",
    refute="With all matrices of the branch at 0, the block gives out what it is given.",
    look="The line in the block's forward that calls the branch named.",
    source="He et al., 2016; Vaswani et al., 2017, section 3.1",
)

SCALED = Cause(
    id="residual.scaled",
    title="A block shrinks or enlarges the stream that passes it",
    must=("stream.scaled",),
    repair="Scale the branch, not the stream: x + factor * branch(norm(x)). A factor on the stream is raised to the "
    "power of the depth.",
    refute="With all matrices of the block at 0, it gives out what it is given, times 1.",
    look="Factors and dropout in the line in which the block adds a branch.",
    source="He et al., 2016b, Identity Mappings in Deep Residual Networks, section 2",
)

NOISY = Cause(
    id="residual.noisy",
    title="Noise is added to the stream, in evaluation too",
    must=("noise.stream",),
    # What two calls of the model would tell, they cannot: they differ by themselves.
    may=("evaluation.random", "evaluation.random_site", "generation.*", "mixing.*", "adapter.unused"),
    locate=("noise.stream", "evaluation.random"),
    repair="Add noise in training only: if self.training: x = x + std * torch.randn_like(x). Or remove it: dropout is "
    "regularisation enough.",
    refute="With all its parameters at 0 the block named gives the same answer twice.",
    look="randn_like, rand_like and functional dropout on the stream in the block named.",
    source="PyTorch documentation: torch.nn.Module.eval; pytorch/pytorch#26338",
)


class _Stream(Fault):
    def scale(self, run: Run, factor: float) -> None:
        """Let the stream pass a branch times `factor`: what the branch gives is less what is then added to it."""
        found = [name for name, _ in run.model.named_modules() if name and self.names(run, name)]
        if not found:
            raise BadInput(f"{self.info.id}: no branch of a block at {self.at!r}")
        for name in found:
            block = run.model.get_submodule(name.rpartition(".")[0])
            branch, norm = run.model.get_submodule(name), block.get_submodule(f"{name.rpartition('.')[2]}_norm")
            # Where the norm comes first, the stream is what it is given; where it comes after, what the branch is.
            source = norm if getattr(block, "pre", True) else branch
            stream: list[Tensor] = []

            def keep(_: nn.Module, args: tuple[Tensor, ...], stream: list[Tensor] = stream) -> None:
                stream[:] = args[:1]

            def change(_: nn.Module, _args: object, out: Tensor, stream: list[Tensor] = stream) -> Tensor:
                x = stream.pop()
                return out + (factor - 1) * x if self.active(run) else out

            run.cleanup.callback(source.register_forward_pre_hook(keep).remove)
            run.cleanup.callback(branch.register_forward_hook(change).remove)

    def names(self, run: Run, name: str) -> bool:
        """Whether a module is a branch that is named: one with a norm beside it."""
        path, _, last = name.rpartition(".")
        beside = dict(run.model.get_submodule(path).named_children())
        return self.holds(name) and f"{last}_norm" in beside


@fault(
    "residual.dropped",
    title="A branch's output takes the place of the stream",
    cause="residual.dropped",
    moves="stream.carried",
    repair=DROPPED.repair,
)
class Dropped(_Stream):
    """Takes the stream away from what a branch is added to."""

    at: str = "blocks.0.mlp"

    def lab_start(self, run: Run) -> None:
        self.scale(run, 0.0)


@fault(
    "residual.scaled",
    title="The stream is multiplied before a branch is added",
    cause="residual.scaled",
    moves="stream.factor",
    repair=SCALED.repair,
)
class Scaled(_Stream):
    """Multiplies the stream by `factor` where a branch is added to it."""

    at: str = "blocks.0.mlp"
    factor: Annotated[float, Gt(0)] = 0.1

    def lab_start(self, run: Run) -> None:
        self.scale(run, self.factor)


@fault(
    "residual.noisy",
    title="Noise is added to the stream, in evaluation too",
    cause="residual.noisy",
    moves="determinism.difference",
    repair=NOISY.repair,
)
class Noisy(Fault):
    """Adds normal noise of standard deviation `std` to what a block gives out."""

    at: str = "blocks.1"
    std: Annotated[float, Gt(0)] = 0.3

    def lab_start(self, run: Run) -> None:
        self.replace(run, f"{self.at}.out", lambda x: x + self.std * torch.randn_like(x))
