"""Which module of a training is the one that is trained: what is called, and whose weights an optimiser holds."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lab.attach.intercept import after_closure, closure_of
from lab.errors import BadInput

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch.optim import Optimizer

    from lab.attach.intercept import Arguments
    from lab.attach.watch import Watch

SHARE = 0.1  # of an optimiser's weights have to be in a module for it to be what the optimiser trains
WHOLE = "each process holds a part of the weights only (FSDP, ZeRO): that cannot be watched yet"


class Search(contextlib.ExitStack):
    """While open, offers each module that is called in training mode, with gradients on, until one is watched.

    The first one offered is the outermost. Nothing is slower but the calls before it is found, by one function call
    each. Whatever is called again afterwards is called as PyTorch calls it.

    Args:
        take: Is given a module; returns what watches it, or why the module that is trained cannot be watched; None to
            go on looking.
        rests: Is told of each optimiser that is about to step without a closure, as long as nothing is found.

    Attributes:
        watching: What was found; None until then.
        why_not: Why what was found cannot be watched; empty if nothing was found that cannot be.
    """

    def __init__(
        self, take: Callable[[nn.Module], Watch | BadInput | None], rests: Callable[[Optimizer], None] = lambda _: None
    ) -> None:
        super().__init__()
        self.watching: Watch | None = None
        self.why_not = ""
        self._take, self._rests = take, rests
        self._searching = True
        plain = nn.Module.__call__

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            # What is compiled keeps this function for good, since that is how a module was called when it was compiled.
            # The compiler knows that it is compiling, and leaves the rest out.
            if not torch.compiler.is_compiling() and self._searching and module.training and torch.is_grad_enabled():
                self._offer(module)
            return plain(module, *args, **kwargs)

        self.callback(setattr, nn.Module, "__call__", plain)
        self.callback(register_optimizer_step_pre_hook(self._stepping).remove)
        nn.Module.__call__ = call  # type: ignore[method-assign]

    def _offer(self, module: nn.Module) -> None:
        self._searching = False  # what is done to watch it is none of its calls
        try:
            found = self._take(module)
        except BaseException:
            self.close()
            raise
        if found is None:
            self._searching = True
            return
        self.close()  # everybody's call is PyTorch's own again
        if isinstance(found, BadInput):
            self.why_not = str(found)
        else:
            self.watching = found

    def _stepping(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        """Where a closure calls the model, it is found within the optimiser's step, whose hooks have run by then."""
        if closure_of(args, kwargs) is not None:
            return after_closure(args, kwargs, lambda: self._read(optimizer))
        self._rests(optimizer)
        return None

    def _read(self, optimizer: Optimizer) -> None:
        if self.watching is not None and self.watching.run.optimizer is optimizer:
            self.watching.gradients_made(self.watching.run.step)


def trained_by(module: nn.Module, optimizers: Iterable[Optimizer]) -> Optimizer | None:
    """The optimiser that holds most of a module, if it is the module that it trains."""
    mine = {id(p) for p in module.parameters() if p.requires_grad}
    best: tuple[int, Optimizer | None] = (0, None)
    for optimizer in optimizers if mine else ():
        held = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        inside = sum(p.numel() for p in held if id(p) in mine)
        if inside > best[0] and inside >= SHARE * sum(p.numel() for p in held):
            best = inside, optimizer
    return best[1]


def check_whole(model: nn.Module) -> None:
    """Refuse a model of which each process holds a part: an experiment in one process would wait for the others.

    Raises:
        BadInput: It is one.
    """
    kinds = {type(part).__name__ for part in (*model.parameters(), *model.modules())}
    cut = kinds & {"DTensor", "FlatParameter", "FullyShardedDataParallel"}
    if cut or any(hasattr(p, "ds_id") for p in model.parameters()):
        raise BadInput(WHOLE)
