"""What a training loop does between the modules, read by intercepting the PyTorch functions that it calls.

``Tensor.backward`` is intercepted in every step, at the cost of one Python call; all others in examined steps only.
"""

from __future__ import annotations

from contextlib import contextmanager
from types import GeneratorType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextmanager
def backward_calls(tell: Callable[[Tensor], None]) -> Iterator[None]:
    """Call ``tell(loss)`` before each ``loss.backward()`` while in the block."""
    plain = Tensor.backward

    def backward(self: Tensor, *args: Any, **kwargs: Any) -> None:
        tell(self)
        plain(self, *args, **kwargs)  # type: ignore[no-untyped-call]

    Tensor.backward = backward  # type: ignore[method-assign]
    try:
        yield
    finally:
        Tensor.backward = plain  # type: ignore[method-assign]


@contextmanager
def clip_calls(tell: Callable[[tuple[Tensor, ...], float, Tensor], None]) -> Iterator[None]:
    """Call ``tell(params, limit, norm)`` after each ``torch.nn.utils.clip_grad_norm_`` by the 2-norm, in the block.

    A loop that imported the function by its own name before is not seen.
    """
    utils: Any = torch.nn.utils
    plain = utils.clip_grad_norm_

    def clip_grad_norm_(parameters: Any, max_norm: float, norm_type: float = 2.0, *args: Any, **kwargs: Any) -> Tensor:
        params = (parameters,) if isinstance(parameters, Tensor) else tuple(parameters)
        # What can be gone through once is gone. PyTorch warns of a generator that is empty, so it gets one.
        parameters = (p for p in params) if isinstance(parameters, GeneratorType) else params
        norm: Tensor = plain(parameters, max_norm, norm_type, *args, **kwargs)
        if float(norm_type) == 2.0:
            tell(params, float(max_norm), norm)
        return norm

    utils.clip_grad_norm_ = clip_grad_norm_
    try:
        yield
    finally:
        utils.clip_grad_norm_ = plain


class CrossEntropyCalls(TorchFunctionMode):
    """While it is on, calls ``tell(logits, targets)`` for each cross-entropy of classes. It changes no call."""

    def __init__(self, tell: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        self.tell = tell
        self.on = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.cross_entropy:
            given = dict(zip(("input", "target"), args, strict=False)) | kwargs
            logits, targets = given.get("input"), given.get("target")
            if isinstance(logits, Tensor) and isinstance(targets, Tensor) and targets.dtype == torch.long:
                self.tell(logits, targets)
        return func(*args, **kwargs)

    def turn(self, *, on: bool) -> None:
        """Turn it on or off. It is left on when a mode of the user's own stands above it."""
        if on and not self.on:
            self.__enter__()  # type: ignore[no-untyped-call]
            self.on = True
        elif not on and self.on and _get_current_function_mode() is self:  # type: ignore[no-untyped-call]
            self.__exit__(None, None, None)
            self.on = False
