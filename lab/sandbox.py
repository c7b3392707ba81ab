"""A place to experiment on a model in the middle of its training, and leave no trace."""

from __future__ import annotations

import copy
import functools
import random
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from lab.sites import Sites


@contextmanager
def sandbox(model: nn.Module, sites: Sites) -> Iterator[None]:
    """Put back, at the end, weights, buffers, modes, gradients, attributes and random state exactly as they were.

    Of what modules keep beside tensors (a counter, a cache) that is each attribute, and what lists, dicts and sets
    hold. Inside, gradients start from None, and the taps of probes that watch stay silent. PyTorch's own transformer
    layers compute as they do in training: in evaluation they would pass through one operator, in which nothing inside
    is seen, and hand on tensors of a kind of their own. Costs one copy of weights and buffers, which is made after the
    backward pass has freed the activations.
    """
    modes = [(module, module.training) for module in model.modules()]
    tensors = [*model.parameters(), *model.buffers()]
    kept = [(t, t._version, t.detach().clone()) for t in tensors]
    gradients = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    attributes = [(module, _attributes(module)) for module in model.modules()]
    state = _random_state()
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    for p, _, _ in gradients:
        p.grad = None
    try:
        with sites.running("examine"):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, kept_attributes in attributes:
            _put_back_attributes(module, kept_attributes)
        for module, training in modes:
            module.training = training
        for tensor, version, value in kept:
            _put_back(tensor, version, value)
        for p, grad, requires in gradients:
            p.grad = grad
            p.requires_grad_(requires)
        _set_random_state(state)


def _put_back(tensor: Tensor, version: int, value: Tensor) -> None:
    """Write a value back without the autograd engine noticing, unless the experiment itself wrote in place."""
    if tensor.data_ptr() != value.data_ptr():
        tensor.data.copy_(value)
    if tensor._version != version:
        # What torch.autograd._unsafe_preserve_version_counter does when its block ends.
        torch._C._autograd._unsafe_set_version_counter((tensor,), (version,))  # noqa: SLF001


@functools.cache
def _own() -> frozenset[str]:
    """What makes a module one, and taps: put back by the means for it, or by whoever changes it."""
    return frozenset(vars(nn.Module())) | {"_taps"}


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Return what a module keeps beside tensors: each attribute, and a copy of what it holds."""
    own = ((name, value) for name, value in vars(module).items() if name not in _own())
    return {name: (value, copy.copy(value) if type(value) in (list, dict, set) else None) for name, value in own}


def _put_back_attributes(module: nn.Module, kept: dict[str, tuple[Any, Any]]) -> None:
    here = vars(module)
    for name in [name for name in here if name not in _own() and name not in kept]:
        del here[name]
    for name, (value, held) in kept.items():
        if type(value) is list:
            value[:] = held
        elif type(value) in (dict, set):
            value.clear()
            value.update(held)
        if here.get(name) is not value:
            here[name] = value


def _random_state() -> dict[str, Any]:
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    if "numpy" in sys.modules:
        import numpy as np

        state["numpy"] = np.random.get_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])
    if "numpy" in state:
        import numpy as np

        np.random.set_state(state["numpy"])
