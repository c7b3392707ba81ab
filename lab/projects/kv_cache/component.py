"""Project 14: a cache of keys and values, incremental decoding, and sampling.

Shazeer, 2019 (the cost of decoding); Fan et al., 2018 (top-k); Holtzman et al., 2020 (top-p).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lab.errors import BadInput

if TYPE_CHECKING:
    from torch import nn

Choose = Callable[[Tensor], Tensor]


class Memory:
    """The keys and values of one layer, for the positions until now.

    Args:
        capacity: How many positions it can hold. The storage is made at the first `extend`; an empty memory takes any.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self.keys: Tensor | None = None  # [B K capacity D]
        self.values: Tensor | None = None

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values [B K T D] of the next positions; return those of all, [B K S D].

        Raises:
            BadInput: They do not fit: too many positions, or not the rows, heads, width, dtype or device of those held.
        """
        self.check(k, v)
        start, end = self.length, self.length + k.shape[2]
        if end > self.capacity:
            raise BadInput(f"{end} positions, but the cache has room for {self.capacity}")
        if self.keys is None or self.values is None or not self.length:
            b, heads, _, d = k.shape
            self.keys, self.values = k.new_empty(b, heads, self.capacity, d), v.new_empty(b, heads, self.capacity, d)
        self.keys[:, :, start:end] = k
        self.values[:, :, start:end] = v
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def check(self, k: Tensor, v: Tensor) -> None:
        """Raise `BadInput` where keys and values are not of one shape, or not like those held."""
        if k.dim() != 4 or k.shape != v.shape:
            raise BadInput(f"keys {list(k.shape)} and values {list(v.shape)}: expected both of one shape [B K T D]")
        for name, new, held in (("keys", k, self.keys), ("values", v, self.values)):
            # Assigned as they are, one row would be repeated for all, and another dtype converted.
            if held is not None and self.length and kind(new) != kind(held):
                raise BadInput(f"{name} of {kind(new)}; but the cache holds {kind(held)}")

    def truncate(self, length: int) -> None:
        """Forget every position from `length` on.

        Raises:
            BadInput: The length is below 0.
        """
        if length < 0:
            raise BadInput(f"a cache cannot be cut to {length} positions")
        self.length = min(self.length, length)

    def reorder(self, rows: Tensor) -> None:
        """Let row i of the batch be what row ``rows[i]`` was; an empty memory stays as it is.

        Args:
            rows: [B'], indices. A row may be taken more than once, or not at all.

        Raises:
            BadInput: An index is not that of a row.
        """
        if rows.dim() != 1 or rows.dtype not in (torch.int32, torch.int64):
            raise BadInput(f"rows of shape {list(rows.shape)} and dtype {rows.dtype}: expected indices, [B]")
        if self.keys is None or self.values is None or not self.length:
            return
        rows, count = rows.to(self.keys.device), self.keys.shape[0]
        if bool(((rows < 0) | (rows >= count)).any()):
            raise BadInput(f"rows {rows.tolist()}: the cache holds {count}, 0 to {count - 1}")
        self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)

    @property
    def bytes(self) -> int:
        """What keys and values take, in bytes; 0 before the first."""
        return sum(x.numel() * x.element_size() for x in (self.keys, self.values) if x is not None)


class Cache:
    """A memory for each layer.

    Args:
        layers, capacity: How many memories, and how many positions each can hold.
    """

    def __init__(self, layers: int, capacity: int) -> None:
        self.memories = [Memory(capacity) for _ in range(layers)]

    def __getitem__(self, layer: int) -> Memory:
        return self.memories[layer]

    @property
    def length(self) -> int:
        """How many positions are held."""
        return self.memories[0].length if self.memories else 0

    @property
    def bytes(self) -> int:
        """What all memories take, in bytes."""
        return sum(memory.bytes for memory in self.memories)

    def truncate(self, length: int) -> None:
        """Forget every position from `length` on, in every layer."""
        for memory in self.memories:
            memory.truncate(length)

    def reorder(self, rows: Tensor) -> None:
        """Pick the rows of the batch anew, [B'] indices, in every layer, as beam search does with the texts it keeps.

        Raises:
            BadInput: An index is not that of a row.
        """
        for memory in self.memories:
            memory.reorder(rows)


def kind(x: Tensor) -> str:  # [B K T D]
    """Say what keys or values must share with those of the other positions."""
    b, k, _, d = x.shape
    return f"{b} rows, {k} heads, width {d}, {x.dtype} on {x.device}"


def largest(logits: Tensor) -> Tensor:  # [B V] -> [B 1]
    """Return the largest logit of each row.

    Raises:
        BadInput: It is NaN, inf or -inf: the row has no softmax. Single logits of -inf are tokens that cannot come.
    """
    top = logits.amax(dim=-1, keepdim=True)  # NaN if one logit is
    if not bool(top.isfinite().all()):
        row = int((~top.isfinite()).flatten().nonzero()[0])
        raise BadInput(f"the largest logit of row {row} is {float(top.flatten()[row])}: there is nothing to choose by")
    return top


def greedy(logits: Tensor) -> Tensor:  # [B V] -> [B 1]
    """The likeliest token; the first of those that are equally likely.

    Raises:
        BadInput: The largest logit of a row is not finite.
    """
    largest(logits)
    return logits.argmax(dim=-1, keepdim=True)


def keep_top_k(logits: Tensor, k: int) -> Tensor:  # [B V] -> [B V]
    """Leave the k largest logits, and those equal to the k-th; the others become -inf.

    Raises:
        BadInput: k is below 1: no token would be left.
    """
    if not k >= 1:
        raise BadInput(f"top_k = {k}: it must be at least 1, or no token is left")
    smallest = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]  # [B 1]
    return logits.masked_fill(logits < smallest, float("-inf"))


def keep_top_p(logits: Tensor, p: float) -> Tensor:  # [B V] -> [B V]
    """Leave the fewest tokens whose probabilities sum to at least p; all for p = 1. Of equals, the first stay.

    Raises:
        BadInput: p is not in (0, 1], or the largest logit of a row is not finite.
    """
    if not 0 < p <= 1:
        raise BadInput(f"top_p = {p}: it must be above 0 and at most 1")
    top = largest(logits)
    if p == 1:
        return logits
    ordered, places = (logits.double() - top).sort(dim=-1, descending=True, stable=True)  # [B V]
    # In float32 the sum over a wide vocabulary is wrong by more than what stands at its end.
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # [B V], what stands in front of each; 0 for the first
    enough = p * (1 - 1e-12)  # a sum that is p but for rounding has reached it
    hidden = torch.empty_like(before, dtype=torch.bool).scatter(-1, places, before >= enough)  # in the order of tokens
    return logits.masked_fill(hidden, float("-inf"))


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:  # [B V] -> [B 1]
    """Draw a token from the softmax of the logits over `temperature`, of those that `top_k`, then `top_p` leave.

    Raises:
        BadInput: The temperature is not above 0 or not finite, `top_k` is below 1, `top_p` is not in (0, 1], or the
            largest logit of a row is not finite.
    """
    if not 0 < temperature < float("inf"):
        raise BadInput(f"a temperature of {temperature}: it must be above 0 and finite; greedy is the limit")
    # The largest becomes 0 before it is divided, and stays 0 however small the temperature: the limit is greedy. One of
    # less than `tiny` has no finite reciprocal.
    logits = (logits.double() - largest(logits)) / max(temperature, torch.finfo(torch.float64).tiny)
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None:
        logits = keep_top_p(logits, top_p)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)


@torch.no_grad()
def generate(
    model: nn.Module,
    prompt: Tensor,
    length: int,
    choose: Choose,
    *,
    layers: int,
    cached: bool = True,
    capacity: int | None = None,
) -> Tensor:  # [B T] -> [B T+length]
    """Add `length` tokens to the prompt, each chosen from the logits [B V] of the position before it.

    Args:
        model: ``model(tokens, cache)`` gives logits [B T V].
        prompt: At least one token a row.
        length: How many to add.
        choose: Such as `greedy`.
        layers: Of the model; as many memories are needed.
        cached: Without a cache the whole text is computed again for each token.
        capacity: How many positions the cache has room for. None is as many as the text will have.

    Raises:
        BadInput: The prompt is empty, the length is below 0, or the cache has no room for all tokens but the last.
    """
    if prompt.dim() != 2 or prompt.shape[1] == 0:
        raise BadInput(f"a prompt of shape {list(prompt.shape)}: expected [B T], at least one token a row")
    if length < 0:
        raise BadInput(f"{length} tokens to add: it must be 0 or more")
    capacity = prompt.shape[1] + length if capacity is None else capacity
    needed = token_passes(prompt.shape[1], length, cached=True)
    if cached and capacity < needed:
        raise BadInput(f"{needed} tokens will pass the model, but the cache has room for {capacity}")
    tokens, fresh = prompt, prompt
    cache = Cache(layers, capacity) if cached else None
    for _ in range(length):
        logits = model(tokens) if cache is None else model(fresh, cache)  # [B T V]
        fresh = choose(logits[:, -1])  # [B 1]
        tokens = torch.cat([tokens, fresh], dim=1)
    return tokens


def token_passes(prompt: int, length: int, *, cached: bool) -> int:
    """How many tokens pass the model while `length` are generated after `prompt`."""
    if length == 0:
        return 0
    return prompt + length - 1 if cached else length * prompt + length * (length - 1) // 2


def cache_bytes(layers: int, kv_heads: int, head_width: int, length: int, itemsize: int, batch: int = 1) -> int:
    """What a cache takes: keys and values, ``2 L K D T`` numbers a sequence."""
    return 2 * layers * kv_heads * head_width * length * itemsize * batch
