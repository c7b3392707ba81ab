"""What an operator costs by theory: floating-point operations, and bytes that it must read and write.

FLOPs are those of products (a multiplication and an addition each), as the mathematics of the projects counts them:
what is done element by element is bounded by the bytes it moves. Of attention's fused kernel the products of the
algorithm count, two forward and four backward; that the kernel computes one of them again on the way back is its own
affair. Bytes are those of every tensor read and every tensor written, once: what a kernel keeps in a cache besides
makes it faster than its bytes allow, never slower.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

if TYPE_CHECKING:
    from collections.abc import Sequence

# They give memory, and write nothing into it.
ALLOCATES = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
# They read as many rows of their table as they are asked for.
LOOKS_UP = ("embedding", "index_select", "gather", "index", "slice_scatter")
# The host has to know what they find before it goes on.
WAITED_FOR = ("_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2")
ATTENTION = "scaled_dot_product"


@dataclass
class Cost:
    """What was computed.

    Attributes:
        calls: Operators that computed something.
        views: Operators that only look at memory another way: they compute nothing, and take a moment all the same.
        products: Operators of them that multiply matrices.
        waits: Operators for which the host waits: they read a number, or need one to know the shape of their answer.
        flops: Of products.
        read, written: Bytes.
    """

    calls: int = 0
    views: int = 0
    products: int = 0
    waits: int = 0
    flops: int = 0
    read: int = 0
    written: int = 0

    @property
    def bytes(self) -> int:
        """Bytes moved."""
        return self.read + self.written

    def add(self, other: Cost) -> None:
        """Add what else was computed."""
        self.calls += other.calls
        self.views += other.views
        self.products += other.products
        self.waits += other.waits
        self.flops += other.flops
        self.read += other.read
        self.written += other.written


def cost_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Cost:
    """The cost of one call of an ATen operator, by what it was given and what it answered."""
    name = func.overloadpacket.__name__
    given, made = tensors((args, kwargs)), tensors(out)
    mutable = func._schema.is_mutable  # noqa: SLF001 - torch offers no other way to ask
    memory = {_key(value) for value in given}
    fresh = [value for value in made if _key(value) not in memory]
    if name in ALLOCATES or not (fresh or mutable):
        return Cost(views=1)
    written = sum(map(size_of, fresh)) + (sum(map(size_of, _changed(func, args, kwargs))) if mutable else 0)
    read = sum(map(size_of, given))
    if name in LOOKS_UP and given:
        read = read - size_of(given[0]) + min(size_of(given[0]), written)
    if name in ("zero_", "fill_", "zeros_like", "ones_like", "full_like", "copy_"):
        read = sum(map(size_of, given[1:]))
    flops = _flops(func, name, args, kwargs, out)
    return Cost(1, 0, int(flops > 0), _waits(name, given), flops, read, written)


def _waits(name: str, given: Sequence[Tensor]) -> int:
    return int(name in WAITED_FOR and any(value.device.type != "cpu" for value in given))


def _flops(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    if ATTENTION in name:
        return _attention(name, tensors(args))
    count = flop_registry.get(func.overloadpacket)
    return 0 if count is None else int(count(*args, **kwargs, out_val=out))


def _attention(name: str, given: Sequence[Tensor]) -> int:
    """Two products of the queries [B H T D] with as many positions S; on the way back twice as many."""
    backward = "backward" in name
    q, k, v = given[1:4] if backward else given[:3]  # the gradient comes first
    rows, t, s = math.prod(q.shape[:-2]), q.shape[-2], k.shape[-2]
    return (2 if backward else 1) * 2 * rows * t * s * (q.shape[-1] + v.shape[-1])


def size_of(value: Tensor) -> int:
    """Bytes of a tensor, each element once: what is only repeated by its strides is one element."""
    if value.layout != torch.strided or value.is_nested:
        return value.numel() * value.element_size() if not value.is_nested else 0
    numbers = math.prod(n for n, stride in zip(value.shape, value.stride(), strict=True) if stride)
    return (numbers if value.numel() else 0) * value.element_size()


def _changed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """What an operator writes into, of what it is given."""
    found = []
    for index, argument in enumerate(func._schema.arguments):  # noqa: SLF001
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += tensors(args[index] if index < len(args) else kwargs.get(argument.name))
    return found


def _key(value: Tensor) -> int:
    try:
        return int(value.untyped_storage()._cdata)  # noqa: SLF001
    except (NotImplementedError, RuntimeError):  # it has none of its own, as a sparse one
        return id(value)


def tensors(value: Any) -> list[Tensor]:
    """Every tensor in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = [*value.values()]
    return [t for part in value for t in tensors(part)] if isinstance(value, (tuple, list)) else []
