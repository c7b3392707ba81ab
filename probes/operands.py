"""What attention multiplies, operator by operator: patterns are told by where they come from and not by a name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from lab import torch

from .dispatch import Memory, follow, tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor, nn

PRODUCTS = ("mm", "bmm", "baddbmm")
FUSED = "_scaled_dot_product_"
SOFTMAX = ("_softmax", "_safe_softmax")
COPIES = ("clone", "_to_copy", "contiguous")
# What may stand between ``q k^T`` and the softmax of attention: a scale, a bias and a mask.
SCORED = (*COPIES, "mul", "div", "add", "sub", "masked_fill", "where")
EVEN = 0.05  # between what bfloat16 rounds, 2^-8 a number, and the smallest mistake that is one of kind
HIDDEN = -1e4  # added to a score in float16, it hides; larger types have larger numbers for it


class Pattern(NamedTuple):
    """A softmax of scores: over which axis of what it was taken."""

    value: Tensor
    axis: int


@dataclass
class Operands:
    """Follows scores, patterns and averages of values through a forward pass. They are kept alive until it ends.

    A pattern is the softmax of a product of two tensors that both depend on the batch, of one value for each pair of
    positions, and of the same number of both; so neither a router, nor a classifier, nor pooling has one.

    Attributes:
        uneven: By module, how far the sums of a pattern along the axis that its product with the values contracts are
            from each other at most, where what sums to 1 is another axis; else 0.
        joined: By module, 1 where heads are joined [B T H*D] of [B H T D] without exchanging heads and positions; 0
            where they are exchanged; -1 where something of that shape is neither.
        hidden: By module, which keys [B S] no query of any head sees.
    """

    rows: int
    uneven: dict[str, Tensor] = field(default_factory=dict)
    joined: dict[str, Tensor] = field(default_factory=dict)
    hidden: dict[str, Tensor] = field(default_factory=dict)
    _open: list[str] = field(default_factory=list)
    _memory: Memory = field(default_factory=Memory)
    _given: set[int] = field(default_factory=set)  # memory that depends on the batch
    _scores: set[int] = field(default_factory=set)
    _patterns: dict[int, Pattern] = field(default_factory=dict)
    _averages: dict[int, Tensor] = field(default_factory=dict)  # [B H T D]

    def run(self, model: nn.Module, inputs: Iterable[Tensor], call: Callable[[], Any]) -> None:
        """Call the model, and follow what it multiplies."""
        self._given = {self._memory.key(value) for value in inputs}
        try:
            follow(model, call, self._operator, lambda name, _: self._open.append(name), self._ends)
        finally:
            for kept in (self._memory, self._patterns, self._averages):
                kept.clear()

    def _ends(self) -> None:
        self._open.pop()

    def _operator(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        given, made = tensors((args, kwargs)), tensors(out)
        keys = [self._memory.key(value) for value in given]
        if not made or self._given.isdisjoint(keys) or any(value.is_nested for value in (*given, *made)):
            return
        name, key = func.overloadpacket.__name__, self._memory.key(made[0])
        if func._schema.is_mutable:  # noqa: SLF001 - torch offers no other way to ask
            self._written(name.rstrip("_"), key)
        elif key not in keys and name in SCORED and not self._scores.isdisjoint(keys):
            self._scores.add(key)
        if name in COPIES and made[0].numel() == given[0].numel():
            self._copied(keys[0], key)
        self._given |= {self._memory.key(value) for value in made}
        if name in SOFTMAX and keys[0] in self._scores:
            self._patterns[key] = Pattern(made[0], args[1] % made[0].dim())
        elif name in PRODUCTS:
            self._product(given[-2:], keys[-2:], made[0])
        elif name.startswith(FUSED):
            self._fused(given[:3], kwargs.get("attn_mask", kwargs.get("attn_bias", args[3:4])), made[0])
        elif key in self._averages:
            self._join(made[0], self._averages[key])

    def _written(self, name: str, key: int) -> None:
        """Forget what a tensor was, as it is written to."""
        self._patterns.pop(key, None)
        self._averages.pop(key, None)
        if name not in SCORED:
            self._scores.discard(key)

    def _copied(self, old: int, new: int) -> None:
        if old in self._patterns:
            self._patterns[new] = self._patterns[old]
        if old in self._averages:
            self._averages[new] = self._averages[old]

    @property
    def _module(self) -> str:
        return self._open[-1] if self._open else ""

    def _product(self, pair: list[Tensor], keys: list[int], made: Tensor) -> None:
        if not self._given.issuperset(keys):
            return  # one of the two is a weight
        self._scores.add(self._memory.key(made))
        found = [key in self._patterns for key in keys]
        if found.count(True) != 1:
            return
        left = found[0]
        operand, pattern = pair[0 if left else 1], self._patterns[keys[0 if left else 1]]
        contracted = -1 if left else -2
        rows, columns = operand.shape[-2:]
        # A part of a pattern need not sum to 1: it may have had a column for looking nowhere.
        if rows != columns or rows < 3 or operand.numel() != pattern.value.numel():
            return
        if left or pattern.value.dim() > 3:  # what is multiplied from the right may be a graph: X A, of nodes
            self._keep(self.uneven, _unevenness(operand, pattern, contracted))
        self._hide(operand.reshape(-1, rows, columns) > 0, contracted)
        if pattern.value.dim() == 4 and made.dim() == 3:
            average = made if left else made.transpose(1, 2)  # [B*H T D]
            heads = pattern.value.shape[:2]
            if len(average) == heads.numel():
                self._averages[self._memory.key(made)] = average.reshape(*heads, *average.shape[1:])

    def _fused(self, given: list[Tensor], mask: Any, made: Tensor) -> None:
        if len(given) < 3 or made.dim() != 4:
            return
        self._averages[self._memory.key(made)] = made
        mask = mask[0] if isinstance(mask, tuple) and mask else mask
        if torch.is_tensor(mask) and mask.is_floating_point() and mask.shape[-1] == given[1].shape[-2]:
            batch, heads, length = made.shape[:3]
            seen = (mask > HIDDEN).expand(batch, heads, length, mask.shape[-1])
            self._hide(seen.flatten(0, 1), -1)

    def _hide(self, seen: Tensor, keys: int) -> None:  # [N T S], or [N S T]
        """Note which keys nobody sees; a batch of heads has the rows of the batch outside."""
        if len(seen) % self.rows == 0:
            hidden = ~seen.any(-2 if keys == -1 else -1)  # [N S]
            self.hidden.setdefault(self._module, hidden.reshape(self.rows, -1, hidden.shape[-1]).all(1))

    def _join(self, made: Tensor, average: Tensor) -> None:
        """Compare [B T H*D] with what it should hold, where it holds as many as ``average`` [B H T D]."""
        b, h, t, d = average.shape
        if h < 2 or t < 2 or h == t or tuple(made.shape) not in ((b, t, h * d), (b * t, h * d)):
            return
        bare, right = (x.reshape(made.shape).to(made.dtype) for x in (average, average.transpose(1, 2)))
        either = torch.where((made == right).all(), 0.0, -1.0)
        self._keep(self.joined, torch.where((made == bare).all() & (made != right).any(), 1.0, either))
        self._averages = {key: x for key, x in self._averages.items() if x is not average}  # the first is the join

    def _keep(self, where: dict[str, Tensor], value: Tensor) -> None:
        before = where.get(self._module)
        where[self._module] = value if before is None else torch.maximum(before, value)


def _unevenness(operand: Tensor, pattern: Pattern, contracted: int) -> Tensor:  # -> []
    """How far the sums along the contracted axis are apart; 0 unless it is another one that sums to 1.

    That is the other axis of the matrix, or one before both: then, too, each weight is a share of something.
    """
    operand = operand.float()
    sums = operand.sum(contracted)
    across = (operand.sum(-3 - contracted) - 1).abs().amax() < 1e-2  # bfloat16 keeps 8 bits, and errors cancel
    other = across | (pattern.axis < pattern.value.dim() - 2)
    spread = sums.amax() - sums.amin()
    return torch.where(other & spread.isfinite(), spread, 0.0)
