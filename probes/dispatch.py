"""What a forward pass computes, operator by operator, with where each number came from."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lab import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor, nn

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_dot_product")
ATTENDS = ("mm", "bmm", "_scaled_dot_product")


class Memory:
    """Names for the memory of tensors, which is held until it is cleared: a name that is freed would be given anew."""

    def __init__(self) -> None:
        self._held: dict[int, Any] = {}

    def key(self, value: Tensor) -> int:
        """The name of what a tensor lies in."""
        try:
            storage = value.untyped_storage()
        except (NotImplementedError, RuntimeError):  # it has none of its own, as a sparse one
            self._held[id(value)] = value
            return id(value)
        key = int(storage._cdata)  # noqa: SLF001
        self._held[key] = storage
        return key

    def clear(self) -> None:
        """Let go of it all."""
        self._held.clear()


@dataclass
class Call:
    """One call of a module, with all that it calls.

    Attributes:
        name: The module.
        begin: The longest chain of operators that led to what it is given.
        end: The longest that led to anything inside.
        products: How many matrix products it computes.
        operators: How many operators compute anything, for which a view of a tensor is none.
        written: How many bytes they write.
    """

    name: str
    begin: int
    end: int
    products: int = 0
    operators: int = 0
    written: int = 0

    @property
    def depth(self) -> int:
        """The longest chain of operators inside, each of which needs the one before."""
        return self.end - self.begin


@dataclass
class _Chain:
    """A concatenation of concatenations: what was written for it in all, and how often it was used."""

    written: int
    uses: int = 0


@dataclass
class Trace:
    """Follows what is computed from a batch. A memory is told from another by its storage, and all are kept alive.

    Attributes:
        length: T, the number of positions.
        calls: Of every module, in the order in which they ended.
        promoted: For each module, operators that turned a narrower tensor into float64 by meeting one of float64.
        reads: For each module, numbers computed from the batch that were read on the host.
        again: For each module, products of the same two tensors, computed before.
        slices: For each module, how many products of equal shape were computed on slices of the same two tensors.
        joined: For each module, what was written over what a single concatenation would have written.
        work: For each module, how many operators its calls took, with all that they call, and the bytes these wrote.
    """

    length: int
    calls: list[Call] = field(default_factory=list)
    promoted: dict[str, int] = field(default_factory=dict)
    reads: dict[str, int] = field(default_factory=dict)
    again: dict[str, int] = field(default_factory=dict)
    slices: dict[str, int] = field(default_factory=dict)
    joined: dict[str, float] = field(default_factory=dict)
    work: dict[str, tuple[int, int]] = field(default_factory=dict)
    _open: list[Call] = field(default_factory=list)
    _depth: dict[int, int] = field(default_factory=dict)
    _memory: Memory = field(default_factory=Memory)
    _seen: set[Any] = field(default_factory=set)
    _sliced: dict[Any, set[tuple[int, ...]]] = field(default_factory=dict)
    _chains: dict[int, _Chain] = field(default_factory=dict)
    _origin: dict[int, tuple[int, tuple[int, ...]]] = field(default_factory=dict)

    def run(self, model: nn.Module, inputs: Iterable[Tensor], call: Callable[[], Any]) -> None:
        """Call the model, and note what it does."""
        for value in inputs:
            self._depth[self._memory.key(value)] = 0
        follow(model, call, self._operator, self._begins, self._ends)

    def _begins(self, name: str, given: Any) -> None:
        depths = [self._depth.get(self._memory.key(value), 0) for value in tensors(given)]
        begin = max(depths, default=0)
        self._open.append(Call(name, begin, begin))

    def _ends(self) -> None:
        call = self._open.pop()
        self.calls.append(call)
        if self._open:
            self._open[-1].products += call.products
            self._open[-1].operators += call.operators
            self._open[-1].written += call.written
            self._open[-1].end = max(self._open[-1].end, call.end)
        if all(outer.name != call.name for outer in self._open):  # else what it took is counted there
            operators, written = self.work.get(call.name, (0, 0))
            self.work[call.name] = operators + call.operators, written + call.written

    def _operator(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        if not self._open:
            return
        given, made = tensors((args, kwargs)), tensors(out)
        self._count_work(func, given, made)
        known = [value for value in given if self._memory.key(value) in self._depth]
        if not known:
            return
        name = func.overloadpacket.__name__
        call = self._open[-1]
        if name == "_local_scalar_dense":
            if given[0].is_floating_point() and self._depth[self._memory.key(given[0])] > 0:
                _count(self.reads, call.name)
            return
        writes = func._schema.is_mutable  # noqa: SLF001 - torch offers no other way to ask
        if not writes and _promotes(known, given, made):
            _count(self.promoted, call.name)
        if name.startswith(PRODUCTS):
            self._product(name, call, given, args)
        self._concatenation(name, call, given, made)
        before = {self._memory.key(value) for value in given}
        written = {self._memory.key(value) for value in made}
        if written <= before and not writes:
            return  # a view: nothing was computed
        if not writes and len(made) == 1 and [v.shape for v in given if v.dim()] == [made[0].shape]:
            self._origin[self._memory.key(made[0])] = self._slice_of(known[0])
        depths = [self._depth[self._memory.key(v)] for v in known if not (writes and self._memory.key(v) in written)]
        depth = 1 + max(depths, default=0)
        for value in made:
            key = self._memory.key(value)
            self._depth[key] = max(depth, self._depth.get(key, 0))
            call.end = max(call.end, self._depth[key])

    def _count_work(self, func: Any, given: list[Tensor], made: list[Tensor]) -> None:
        """Count what is computed, from the batch or not."""
        mutates = func._schema.is_mutable  # noqa: SLF001 - torch offers no other way to ask
        before = set() if mutates else {self._memory.key(value) for value in given}
        written = [value for value in made if self._memory.key(value) not in before]
        if written or not made:
            self._open[-1].operators += 1
            self._open[-1].written += sum(value.numel() * value.element_size() for value in written)

    def _product(self, name: str, call: Call, given: list[Tensor], args: Any) -> None:
        call.products += 1
        layout = tuple((self._memory.key(v), v.storage_offset(), tuple(v.shape), v.stride(), v._version) for v in given)
        numbers = tuple(repr(a) for a in args if not torch.is_tensor(a))
        if (name, layout, numbers) in self._seen:
            _count(self.again, call.name)
        self._seen.add((name, layout, numbers))
        if not name.startswith(ATTENDS) or len(given) < 2 or given[0].shape[-2] != self.length:
            return
        if all(self._memory.key(value) in self._depth for value in given[:2]):
            (first, begin), (second, _) = (self._slice_of(value) for value in given[:2])
            where = (name, first, second, tuple(given[0].shape), tuple(given[1].shape))
            slices = self._sliced.setdefault(where, set())
            slices.add(begin)
            self.slices[call.name] = max(self.slices.get(call.name, 0), len(slices))

    def _slice_of(self, value: Tensor) -> tuple[int, tuple[int, ...]]:
        """The memory that a tensor is a part of, or a scaled copy of a part of, and where that part begins."""
        key = self._memory.key(value)
        root, begin = self._origin.get(key, (key, ()))
        return root, (*begin, int(value.storage_offset()))

    def _concatenation(self, name: str, call: Call, given: list[Tensor], made: list[Tensor]) -> None:
        keys = [self._memory.key(value) for value in given]
        if name == "cat" and made:
            unused = [self._chains[k] for k in keys if k in self._chains and not self._chains[k].uses]
            written = made[0].numel() + max((chain.written for chain in unused), default=0)
            self._chains[self._memory.key(made[0])] = _Chain(written)
            ratio = written / max(1, made[0].numel())
            self.joined[call.name] = max(self.joined.get(call.name, 1.0), ratio)
        elif not made or self._memory.key(made[0]) not in keys:
            for key in keys:
                if key in self._chains:
                    self._chains[key].uses += 1


def follow(
    model: nn.Module,
    call: Callable[[], Any],
    operator: Callable[[Any, Any, Any, Any], None],
    begins: Callable[[str, Any], None],
    ends: Callable[[], None],
) -> None:
    """Call a model, and tell of all that happens: each operator, and each module by name, with its arguments.

    The core of an attention layer carries the name of the layer, as its sites do.
    """
    with contextlib.ExitStack() as hooks:
        for path, module in model.named_modules():
            name = path.rpartition(".")[0] if getattr(module, "transparent", False) else path
            begin = functools.partial(lambda name, _module, *given: begins(name, given), name)
            hooks.callback(module.register_forward_pre_hook(begin, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(lambda *_: ends()).remove)
        with listening(operator):
            call()


def listening(tell: Callable[[Any, Any, Any, Any], None]) -> Any:
    """Return a block in which each operator is told of, after it ran."""

    class Listening(torch.utils._python_dispatch.TorchDispatchMode):  # type: ignore[no-untyped-call]  # noqa: SLF001
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            tell(func, args, kwargs or {}, out)
            return out

    return Listening()  # type: ignore[no-untyped-call]


def _promotes(known: list[Tensor], given: list[Tensor], made: list[Tensor]) -> bool:
    """Whether a tensor of the batch became float64 since it met one: an explicit conversion meets none."""
    narrow = any(v.is_floating_point() and v.dtype != torch.float64 and v.dim() for v in known)
    wide = any(v.dtype == torch.float64 and v.dim() for v in given)
    return narrow and wide and any(v.dtype == torch.float64 and v.numel() > 1 for v in made)


def tensors(value: Any) -> list[Tensor]:
    """Every tensor in nested tuples, lists and dictionaries."""
    if torch.is_tensor(value):
        return [value]
    if isinstance(value, dict):
        value = [*value.values()]
    return [t for part in value for t in tensors(part)] if isinstance(value, (tuple, list)) else []


def _count(counts: dict[str, int], name: str) -> None:
    counts[name] = counts.get(name, 0) + 1
