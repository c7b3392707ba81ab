"""What a training loop does between the modules, read by intercepting the PyTorch functions that it calls.

Those that a loop calls once or twice in a step are intercepted in every step, at the cost of one Python call each;
`LossCalls`, which sees every operator, in examined steps only.
"""

from __future__ import annotations

import contextlib
import functools
import re
from types import GeneratorType
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils.data import DataLoader

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.optim import Optimizer


class Listener(Protocol):
    """Who is told what a loop does."""

    def backward(self, loss: Tensor) -> None:
        """Before ``loss.backward()``; of a loss that a scaler multiplied, the loss before that."""

    def propagated(self) -> None:
        """After ``loss.backward()``."""

    def iterates(self) -> None:
        """A loader that has several batches begins anew."""

    def differentiated(self) -> None:
        """Before gradients of anything are computed, by ``backward`` or by ``torch.autograd.grad``."""

    def clipped(self, params: tuple[Tensor, ...], limit: float, norm: Tensor) -> None:
        """After gradients were clipped by their joint 2-norm."""

    def scaler_stepped(self, optimizer: Optimizer) -> None:
        """After ``scaler.step(optimizer)``, whether it made an update or skipped it."""


class Calls:
    """While in the block, tells a listener of the calls that a loop makes.

    A loop that imported ``clip_grad_norm_`` by its own name before the block is not seen to clip.

    Attributes:
        listener: Who is told; None for nobody.
    """

    def __init__(self, listener: Listener | None = None) -> None:
        self.listener = listener
        self._scaled: tuple[Tensor, Tensor] | None = None
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._replace(torch.autograd, "backward", self._backward)  # which Tensor.backward calls
        self._replace(torch.autograd, "grad", self._grad)
        self._replace(DataLoader, "__iter__", self._iterate)
        scaler = torch.amp.GradScaler
        self._replace(scaler, "scale", self._scale)
        self._replace(scaler, "step", self._scaler_step)
        for module in (torch.nn.utils, torch.nn.utils.clip_grad):
            self._replace(module, "clip_grad_norm_", self._clip)
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()
        self._scaled = None

    def _replace(self, owner: Any, name: str, make: Callable[[Any], Callable[..., Any]]) -> None:
        plain = getattr(owner, name)
        self._undo.callback(setattr, owner, name, plain)
        setattr(owner, name, functools.wraps(plain)(make(plain)))

    def _backward(self, plain: Any) -> Callable[..., None]:
        def backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
            listener, loss = self.listener, _only(tensors)
            scaled, self._scaled = self._scaled, None
            if listener is not None:
                listener.differentiated()
            if listener is None or loss is None or kwargs.get("inputs") is not None:
                plain(tensors, *args, **kwargs)
                return
            listener.backward(scaled[1] if scaled is not None and scaled[0] is loss else loss)
            del scaled  # it holds the graph
            plain(tensors, *args, **kwargs)
            listener.propagated()

        return backward

    def _grad(self, plain: Any) -> Callable[..., Any]:
        def grad(*args: Any, **kwargs: Any) -> Any:
            if self.listener is not None:
                self.listener.differentiated()
            return plain(*args, **kwargs)

        return grad

    def _iterate(self, plain: Any) -> Callable[..., Any]:
        def iterate(loader: Any) -> Any:
            with contextlib.suppress(TypeError):  # some do not know their length
                if self.listener is not None and len(loader) > 1:
                    self.listener.iterates()
            return plain(loader)

        return iterate

    def _scale(self, plain: Any) -> Callable[..., Any]:
        def scale(scaler: Any, outputs: Any) -> Any:
            scaled = plain(scaler, outputs)
            if isinstance(outputs, Tensor) and isinstance(scaled, Tensor):
                self._scaled = scaled, outputs
            return scaled

        return scale

    def _scaler_step(self, plain: Any) -> Callable[..., Any]:
        def step(scaler: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            answer = plain(scaler, optimizer, *args, **kwargs)
            if self.listener is not None:
                self.listener.scaler_stepped(optimizer)
            return answer

        return step

    def _clip(self, plain: Any) -> Callable[..., Tensor]:
        def clip_grad_norm_(
            parameters: Any, max_norm: float, norm_type: float = 2.0, *args: Any, **kwargs: Any
        ) -> Tensor:
            params = (parameters,) if isinstance(parameters, Tensor) else tuple(parameters)
            # What can be gone through once is gone. PyTorch warns of a generator that is empty, so it gets one.
            parameters = (p for p in params) if isinstance(parameters, GeneratorType) else params
            norm: Tensor = plain(parameters, max_norm, norm_type, *args, **kwargs)
            if self.listener is not None and float(norm_type) == 2.0:
                self.listener.clipped(params, float(max_norm), norm)
            return norm

        return clip_grad_norm_


def _only(tensors: Any) -> Tensor | None:
    """Return the tensor that is differentiated, where it is one."""
    if isinstance(tensors, (tuple, list)) and len(tensors) == 1:
        tensors = tensors[0]
    return tensors if isinstance(tensors, Tensor) else None


Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def closure_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any] | None:
    """Return the closure with which an optimiser is asked for a step. As in its hooks, `args` begin with itself."""
    found: Callable[..., Any] | None = args[1] if len(args) > 1 else kwargs.get("closure")
    return found


def after_closure(args: tuple[Any, ...], kwargs: dict[str, Any], tell: Callable[[], None]) -> Arguments:
    """Return the same arguments, with a closure that calls `tell` when it has been called the first time."""
    closure = closure_of(args, kwargs)
    assert closure is not None
    waiting = [tell]

    def closed(*more: Any, **named: Any) -> Any:
        answer = closure(*more, **named)
        while waiting:
            waiting.pop()()
        return answer

    return ((args[0], closed, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": closed})


DISTANCES = (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss)  # each entry with the one at the same place


SCORES = (F.binary_cross_entropy_with_logits, F.kl_div)  # they take logits, and logarithms of probabilities
# What hands values on as they are: to follow a tensor back to the operator that made its values.
HANDING_ON = re.compile(
    r"(Unsafe)?View|ReshapeAlias|Squeeze|Unsqueeze|Permute|Transpose|T|Select|Slice|Index|Clone|ToCopy|Expand|Alias"
)


def maker(value: Tensor) -> str:
    """The name of the operator by which the values of a tensor were made, as its derivative knows it; or nothing."""
    node = value.grad_fn
    while node is not None:
        name = node.name().partition("Backward")[0]
        if not HANDING_ON.fullmatch(name):
            return name
        node = node.next_functions[0][0] if node.next_functions else None
    return ""


class LossCalls(TorchFunctionMode):
    """While it is on, tells of the losses that are computed. It changes no call.

    Args:
        classes: Told ``(logits, targets)`` of each cross-entropy of classes.
        distance: Told ``(input, target)`` of each mean or sum of distances.
        scores: Told the name and the input of each loss that takes logits or logarithms of probabilities.
    """

    def __init__(
        self,
        classes: Callable[[Tensor, Tensor], None],
        distance: Callable[[Tensor, Tensor], None],
        scores: Callable[[str, Tensor], None],
    ) -> None:
        super().__init__()
        self.classes, self.distance, self.scores = classes, distance, scores
        self.on = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in SCORES:
            given = args[0] if args else kwargs.get("input")
            if isinstance(given, Tensor):
                self.scores(func.__name__, given)
        elif func is F.cross_entropy or func in DISTANCES:
            given = dict(zip(("input", "target"), args, strict=False)) | kwargs
            outputs, targets = given.get("input"), given.get("target")
            if isinstance(outputs, Tensor) and isinstance(targets, Tensor):
                if func is not F.cross_entropy:
                    if given.get("reduction", "mean") != "none" and given.get("reduce") is not False:
                        self.distance(outputs, targets)
                elif targets.dtype == torch.long:
                    self.classes(outputs, targets)
        return func(*args, **kwargs)

    def turn(self, *, on: bool) -> None:
        """Turn it on or off. It is left on when a mode of the user's own stands above it."""
        if on and not self.on:
            self.__enter__()  # type: ignore[no-untyped-call]
            self.on = True
        elif not on and self.on and _get_current_function_mode() is self:  # type: ignore[no-untyped-call]
            self.__exit__(None, None, None)
            self.on = False
