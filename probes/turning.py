"""How a layer turns what is the same at every position: the arithmetic behind the probe of rotary positions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from lab import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

# Between what bfloat16 rounds, 2^-8 a number, and the smallest mistake that is one of kind.
SAME = 0.05


class Turning:
    """How vectors [L H T D] that are the same but for their position are turned.

    Attributes:
        w: Of each pair, its value over that at the first position: [L T D/2], of the head in which the pair is largest.
        halves, neighbours: How far ``|w|`` is from 1, in either way to pair channels: [L].
    """

    def __init__(self, x: Tensor, like: Turning | None = None) -> None:
        x = x.double()
        halves = _quotients(*x.chunk(2, dim=-1))
        neighbours = _quotients(x[..., 0::2], x[..., 1::2])
        self.halves, self.neighbours = (largest(w.abs() - 1) for w in (halves, neighbours))
        first = self.halves <= self.neighbours if like is None else like.halves <= like.neighbours  # [L]
        self.w = torch.where(first[:, None, None], halves, neighbours)

    @property
    def is_halves(self) -> Tensor:
        """Whether it is turned in halves and not in neighbours: [L]."""
        return (self.halves < SAME) & (self.neighbours > 2 * SAME)

    @property
    def is_neighbours(self) -> Tensor:
        """Whether it is turned in neighbours and not in halves: [L]."""
        return (self.neighbours < SAME) & (self.halves > 2 * SAME)


def _quotients(a: Tensor, b: Tensor) -> Tensor:  # [L H T D/2] each -> [L T D/2]
    z = torch.complex(a, b)
    best = z[:, :, :1].abs().argmax(1, keepdim=True).expand(-1, -1, z.shape[2], -1)  # [L 1 T D/2]
    z = z.gather(1, best).squeeze(1)  # [L T D/2]
    first = z[:, :1]
    return torch.where(first == 0, torch.ones_like(z), z / torch.where(first == 0, torch.ones_like(first), first))


def largest(x: Tensor) -> Tensor:  # [L T D/2] -> [L]
    """Return the largest absolute value of each layer."""
    return x.abs().amax((1, 2))


class Same:
    """While in the block, layers get the first position's vector everywhere. What parts of suspects get is kept."""

    def __init__(self, model: nn.Module, layers: list[str], suspects: list[str]) -> None:
        self.model, self.layers, self.suspects = model, layers, suspects
        self._given: dict[str, list[Tensor]] = {name: [] for name in suspects}
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        for name in self.layers:
            layer = self.model.get_submodule(name)
            self._handles.append(layer.register_forward_pre_hook(_repeated))
            for part in layer.children() if name in self.suspects else ():
                self._handles.append(part.register_forward_pre_hook(self._keep(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _keep(self, name: str) -> Any:
        def keep(_part: nn.Module, args: tuple[Any, ...]) -> None:
            if args and torch.is_tensor(args[0]) and args[0].dim() == 3:
                self._given[name].append(args[0][0].detach())

        return keep

    def distance(self, name: str, mixed: Tensor) -> Tensor:  # [T C] -> []
        """How far the nearest input of a part is from the average of the values, relatively."""
        found = [(x - mixed).norm() / mixed.norm() for x in self._given[name] if x.shape == mixed.shape]
        return torch.stack(found).amin() if found else mixed.new_full((), float("inf"))


def _repeated(_layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    if not args or not torch.is_tensor(args[0]) or args[0].dim() != 3:
        return None
    return (args[0][:, :1].expand_as(args[0]).contiguous(), *args[1:])
