"""Models that ``torch.compile`` has taken over: watched from outside, and looked into by calling what was compiled.

What a hook inside a compiled module does would be compiled with it, and another graph would be trained. So in training
nothing is hung into it; experiments call the original module, with the compiler standing aside.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def original(module: nn.Module) -> nn.Module:
    """Return the module that was compiled; one that was not is its own original."""
    inner = module.__dict__.get("_modules", {}).get("_orig_mod")
    return inner if isinstance(inner, nn.Module) else module


def compiled_parts(model: nn.Module) -> set[nn.Module]:
    """Return every module that is compiled with another around it, or by itself."""
    parts: set[nn.Module] = set()
    for module in model.modules():
        if original(module) is not module:
            parts.update(original(module).modules())
        elif getattr(module, "_compiled_call_impl", None) is not None:
            parts.update(module.modules())
    return parts


@contextmanager
def uncompiled() -> Iterator[None]:
    """Let compiled modules run as they were written, and nothing be compiled, while in the block."""
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def around(module: nn.Module, before: Callable[..., Any], after: Callable[..., Any]) -> Iterator[None]:
    """Call ``before(module, args, kwargs)`` and ``after(module, args, output)`` around each call, while in the block.

    With hooks, where they run outside what is compiled; a module compiled in place (``model.compile()``) would compile
    its own hooks, so there they stand around the compiled call. PyTorch leaves that out of copies and pickles.
    """
    plain = getattr(module, "_compiled_call_impl", None)
    if plain is None:
        handles = [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        return

    def call(*args: Any, **kwargs: Any) -> Any:
        before(module, args, kwargs)
        output = plain(*args, **kwargs)
        after(module, args, output)
        return output

    module._compiled_call_impl = call  # noqa: SLF001 - the only place outside of what is compiled
    try:
        yield
    finally:
        if module._compiled_call_impl is call:  # noqa: SLF001 - not where it was compiled anew
            module._compiled_call_impl = plain  # noqa: SLF001
