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
        capacity: How many positions it can hold. The storage is made at the first `extend`.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self.keys: Tensor | None = None  # [B K capacity D]
        self.values: Tensor | None = None

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values [B K T D] of the next positions; return those of all, [B K S D].

        Raises:
            BadInput: They do not fit.
        """
        start, end = self.length, self.length + k.shape[2]
        if end > self.capacity:
            raise BadInput(f"{end} positions, but the cache has room for {self.capacity}")
        if self.keys is None or self.values is None:
            b, heads, _, d = k.shape
            self.keys, self.values = k.new_empty(b, heads, self.capacity, d), v.new_empty(b, heads, self.capacity, d)
        self.keys[:, :, start:end] = k
        self.values[:, :, start:end] = v
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def truncate(self, length: int) -> None:
        """Forget every position from `length` on."""
        self.length = min(self.length, length)

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


def greedy(logits: Tensor) -> Tensor:  # [B V] -> [B 1]
    """The likeliest token."""
    return logits.argmax(dim=-1, keepdim=True)


def keep_top_k(logits: Tensor, k: int) -> Tensor:  # [B V] -> [B V]
    """Leave the k largest logits, and those equal to the k-th; the others become -inf."""
    smallest = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]  # [B 1]
    return logits.masked_fill(logits < smallest, float("-inf"))


def keep_top_p(logits: Tensor, p: float) -> Tensor:  # [B V] -> [B V]
    """Leave the fewest tokens whose probabilities sum to at least p, the likeliest always among them."""
    ordered, places = logits.sort(dim=-1, descending=True)  # [B V]
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # [B V], what stands in front of each
    kept = (before < p).index_fill(-1, torch.zeros(1, dtype=torch.long, device=logits.device), True)
    hidden = torch.ones_like(kept).scatter(-1, places, ~kept)  # [B V], in the order of the tokens
    return logits.masked_fill(hidden, float("-inf"))


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:  # [B V] -> [B 1]
    """Draw a token from the softmax of the logits over `temperature`, of those that `top_k` and `top_p` leave.

    Raises:
        BadInput: The temperature is not above 0.
    """
    if not temperature > 0:
        raise BadInput(f"a temperature of {temperature}: it must be above 0; greedy is the limit")
    logits = logits.float() / temperature
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None:
        logits = keep_top_p(logits, top_p)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)


@torch.no_grad()
def generate(
    model: nn.Module, prompt: Tensor, length: int, choose: Choose, *, layers: int, cached: bool = True
) -> Tensor:  # [B T] -> [B T+length]
    """Add `length` tokens to the prompt, each chosen from the logits [B V] of the position before it.

    Args:
        model: ``model(tokens, cache)`` gives logits [B T V].
        prompt: At least one token a row.
        length: How many to add.
        choose: Such as `greedy`.
        layers: Of the model; as many memories are needed.
        cached: Without a cache the whole text is computed again for each token.
    """
    tokens, fresh = prompt, prompt
    cache = Cache(layers, prompt.shape[1] + length) if cached else None
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
