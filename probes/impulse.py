"""What a module's output at one position takes from each position of its input: shared by two probes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from lab import NotChecked, torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from lab import Batch, Run


class Call(NamedTuple):
    """One call of a module.

    Attributes:
        given, made: What went in and came out, as they are.
        axis: Of positions, in both.
    """

    given: Tensor
    made: Tensor
    axis: int

    def row(self, value: Tensor) -> Tensor:
        """The first row of a value, positions first: [T ...]."""
        return value.movedim(self.axis, 0).select(1, 0)


def calls(run: Run, batch: Batch, modules: dict[str, nn.Module]) -> dict[str, Call]:
    """Call the model; return by name what went into each module and came out of it.

    What goes in is cut off from the modules before, so that one backward pass asks each module alone.
    """
    found: dict[str, Call] = {}
    given: dict[str, Tensor] = {}
    handles: list[Any] = []
    for name, module in modules.items():
        # The first to look on the way in and the last on the way out: what a hook does to a module belongs to it.
        handles.append(module.register_forward_pre_hook(_cut(given, name), prepend=True))
        handles.append(module.register_forward_hook(_keep(found, given, name)))
    try:
        run.call(batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


def shares(found: dict[str, Call], places: dict[str, int]) -> dict[str, Tensor]:
    """Differentiate each output at a position by its module's input; return the norm at every position, [T]."""
    asked = {name: call for name, call in found.items() if call.made.requires_grad and call.given.requires_grad}
    if not asked:
        raise NotChecked("no module of this kind can be differentiated by its input")
    total = torch.stack([_directed(call.row(call.made)[places[name]]) for name, call in asked.items()]).sum()
    grads = torch.autograd.grad(total, [call.given for call in asked.values()], allow_unused=True)
    return {
        name: call.row(grad).float().flatten(1).norm(dim=-1)
        for (name, call), grad in zip(asked.items(), grads, strict=True)
        if grad is not None
    }


def _directed(out: Tensor) -> Tensor:  # [C] -> []
    """The product with a direction that no symmetry of a module cancels."""
    return (out.float() * torch.cos(torch.arange(out.numel(), device=out.device)).view(out.shape)).sum()


def _axis(module: nn.Module, came: Tensor, made: Tensor) -> int | None:
    """Which axis holds positions; None where a module around a convolution leaves it open."""
    if isinstance(module, torch.nn.Conv1d):
        return 2
    inner = [m for m in module.modules() if isinstance(m, torch.nn.Conv1d)]
    if len(inner) == 1:
        channels = inner[0].in_channels, inner[0].out_channels
        first, last = ((came.shape[axis], made.shape[axis]) == channels for axis in (1, 2))
        return None if first == last else 2 if first else 1
    return 1 if getattr(module, "batch_first", True) else 0


def _cut(given: dict[str, Tensor], name: str) -> Callable[..., Any]:
    def hook(_module: nn.Module, args: tuple[Any, ...]) -> Any:
        if not args or not torch.is_tensor(args[0]) or args[0].dim() != 3 or not args[0].is_floating_point():
            return None
        given[name] = args[0].detach().requires_grad_(torch.is_grad_enabled())
        return (given[name], *args[1:])

    return hook


def _keep(found: dict[str, Call], given: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        made = output[0] if isinstance(output, tuple) and output else output
        came = given.get(name)
        if came is None or not torch.is_tensor(made) or made.dim() != 3:
            return
        axis = _axis(module, came, made)
        if axis is not None and made.shape[axis] == came.shape[axis]:
            found[name] = Call(came, made, axis)

    return hook
