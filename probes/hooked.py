"""A hook after each module of a model, for the time of an experiment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn
    from torch.utils.hooks import RemovableHandle


class Hooked:
    """While in the block, each module inside a model has a hook; a subclass says which.

    Args:
        model: Whose modules; None for no hooks.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._model = model
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for name, module in self._model.named_modules() if self._model is not None else ():
            if name:
                self._handles.append(module.register_forward_hook(self._hook(name), with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Callable[..., Any]:
        """Return what is called with the module, its arguments, those with names, and what it gave out."""
        raise NotImplementedError
