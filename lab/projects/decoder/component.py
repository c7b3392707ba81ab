"""Project 10: the decoder-only Transformer (Radford et al., 2019), assembled from the projects before it.

And the decoder that reads what an encoder made of another sequence (Vaswani et al., 2017, section 3.1).
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from lab.context import IGNORED
from lab.errors import BadInput
from lab.projects.activations.component import FeedForward
from lab.projects.encoder.component import Encoder, FullAttention, merge_heads, split_heads
from lab.projects.linear.component import Linear
from lab.projects.multihead.component import MultiHeadAttention
from lab.projects.normalisation.component import LayerNorm
from lab.projects.positions.component import Embedding, LearnedPositions, SinusoidalPositions
from lab.projects.residuals.component import Block, Choices
from lab.sites import Component

if TYPE_CHECKING:
    from lab.projects.multihead.component import Memory


class Cached(Protocol):
    """What the layers remember of the positions before (project 14)."""

    @property
    def length(self) -> int:
        """How many positions are remembered."""
        ...

    def __getitem__(self, layer: int) -> Memory:
        """The memory of one layer."""
        ...


class Decoder(Component):
    """A language model: for each position, the logits of the token that follows.

    Args:
        vocabulary: V.
        context: The largest T.
        layers, width, heads: L, C and H.
        tied: Whether the head uses the table of the embedding (Press and Wolf, 2017).
        choices: What the blocks are made of; the defaults of `Choices` if None.
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        context: int,
        layers: int,
        width: int,
        heads: int,
        tied: bool = False,
        choices: Choices | None = None,
    ) -> None:
        super().__init__()
        self.context, self.choices = context, choices or Choices()
        self.tokens = Embedding(vocabulary, width)
        added = {"learned": LearnedPositions, "sinusoidal": SinusoidalPositions}.get(self.choices.positions)
        self.positions = added(context, width) if added else None
        self.blocks = nn.ModuleList(Block(width, heads, layers, self.choices) for _ in range(layers))
        # After norms on the stream itself there is nothing left to normalise.
        self.norm = self.choices.make_norm(width) if self.choices.norm_at == "pre" else nn.Identity()
        # Small, so that training starts from even odds: the loss is ln V + width 0.02^2 / 2.
        self.head = Linear(width, vocabulary, bias=False, gain=0.02 * width**0.5)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor, cache: Cached | None = None) -> Tensor:  # [B T] -> [B T V]
        """Embed, pass the blocks, normalise, and compare with each token. With a cache, `tokens` follow what it holds.

        Raises:
            BadInput: A cache is given to a model whose positions do not meet in attention.
        """
        if cache is not None and self.choices.mixer != "attention":
            raise BadInput(f"a cache of keys and values needs model.mixer = 'attention', not {self.choices.mixer!r}")
        x = self.embed(tokens, 0 if cache is None else cache.length)  # [B T C]
        for i, block in enumerate(self.blocks):
            x = block(x) if cache is None else block(x, cache[i])
        return self.head(self.norm(x))  # type: ignore[no-any-return]

    def embed(self, tokens: Tensor, start: int = 0) -> Tensor:  # [B T] -> [B T C]
        """Look the tokens up, and add what tells their positions from each other."""
        x = self.tokens(tokens)  # [B T C]
        if self.positions is None:
            return x  # type: ignore[no-any-return]
        return x + self.positions(tokens.shape[-1], start)  # type: ignore[no-any-return]


class CrossAttention(Component):
    """Multi-head attention whose queries come from one sequence and whose keys and values from another.

    Each position sees every token of the source. A row whose source has none averages nothing: 0, to which the
    output projection adds its bias.

    Args:
        width: C, a multiple of `heads`.
        heads: H; each has width D = C / H.
        gain: Of the output projection, whose output is added to the residual stream.

    Raises:
        BadInput: `width` is no multiple of `heads`.
    """

    SITES = MappingProxyType({"q": "B H T D", "k": "B H S D", "v": "B H S D", "out": "B T C"})

    def __init__(self, width: int, heads: int, *, gain: float = 1.0) -> None:
        super().__init__()
        if width % heads:
            raise BadInput(f"model.width = {width} is no multiple of model.heads = {heads}")
        self.heads = heads
        self.query = Linear(width, width)
        self.kv = Linear(width, 2 * width)
        self.core = FullAttention()
        self.proj = Linear(width, width, gain=gain)

    def keys_values(self, source: Tensor) -> tuple[Tensor, Tensor]:  # [B S C] -> [B H S D] x 2
        """What the source offers: the same for every position that asks, so that it can be kept while decoding."""
        k, v = self.kv(source).chunk(2, dim=-1)  # [B S C] each
        return split_heads(k, self.heads), split_heads(v, self.heads)

    def attend(self, x: Tensor, k: Tensor, v: Tensor, present: Tensor | None = None) -> Tensor:
        """Ask: x [B T C], k and v [B H S D], present [B S] -> [B T C]."""
        q = self.tap("q", split_heads(self.query(x), self.heads))  # [B H T D]
        k, v = self.tap("k", k), self.tap("v", v)
        mixed = self.core(q, k, v, present)  # [B H T D]
        return self.tap("out", self.proj(merge_heads(mixed)))  # [B T C]

    def forward(self, x: Tensor, source: Tensor, present: Tensor | None = None) -> Tensor:
        """Attend to a source: x [B T C], source [B S C], present [B S], True where a token is -> [B T C]."""
        k, v = self.keys_values(source)
        return self.attend(x, k, v, present)


class CrossBlock(Component):
    """Three branches, each normalised on its way in: causal self-attention, cross-attention, a feed-forward layer.

    Args:
        width, heads: C and H.
        layers: How many blocks the stream passes; each branch ends in a gain of ``1 / sqrt(3 layers)``, so that the
            variance of 3 x layers sums does not grow with depth (project 13).
    """

    SITES = MappingProxyType({"out": "B T C"})

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        gain = (3 * layers) ** -0.5
        self.attn_norm = LayerNorm(width)
        self.attn = MultiHeadAttention(width, heads, gain=gain)
        self.cross_norm = LayerNorm(width)
        self.cross = CrossAttention(width, heads, gain=gain)
        self.mlp_norm = LayerNorm(width)
        self.mlp = FeedForward(width, 4 * width, activation="gelu", gain=gain)

    def forward(self, x: Tensor, source: Tensor, present: Tensor | None = None) -> Tensor:
        """Pass the branches: x [B T C], source [B S C] as it comes, present [B S] -> [B T C]."""
        x = x + self.attn(self.attn_norm(x))
        x = x + self.cross(self.cross_norm(x), source, present)
        x = x + self.mlp(self.mlp_norm(x))
        return self.tap("out", x)


class EncoderDecoder(Component):
    """A model of one sequence given another: an encoder reads the source, a decoder writes the target.

    Args:
        vocabulary: V, of both.
        context: The largest S, and the largest T.
        layers, width, heads: L, C and H, of both.
    """

    def __init__(self, vocabulary: int, *, context: int, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.context = context
        self.encoder = Encoder(vocabulary, context=context, layers=layers, width=width, heads=heads)
        # Its own head would have no part in the loss: weights that never learn.
        self.encoder.add_module("head", nn.Identity())
        self.tokens = Embedding(vocabulary, width)
        self.positions = LearnedPositions(context, width)
        self.blocks = nn.ModuleList(CrossBlock(width, heads, layers) for _ in range(layers))
        self.norm = LayerNorm(width)
        self.head = Linear(width, vocabulary, bias=False, gain=0.02 * width**0.5)

    def forward(self, source: Tensor, targets_in: Tensor, present: Tensor | None = None) -> Tensor:
        """Encode, decode: source [B S], targets_in [B T], present [B S], True where a token is -> [B T V].

        Args:
            source: What is read.
            targets_in: The target shifted by one (`shift_right`): logits t are those of the token that follows.
            present: Of the source; None is everywhere.

        Raises:
            BadInput: There are more tokens than positions.
        """
        return self.decode(targets_in, self.encoder.encode(source, present), present)

    def decode(self, targets_in: Tensor, encoded: Tensor, present: Tensor | None = None) -> Tensor:
        """Decode from what is encoded already: targets_in [B T], encoded [B S C], present [B S] -> [B T V]."""
        x = self.tokens(targets_in) + self.positions(targets_in.shape[-1])  # [B T C]
        for block in self.blocks:
            x = block(x, encoded, present)
        logits: Tensor = self.head(self.norm(x))
        return logits


def shift_right(targets: Tensor, start: int) -> Tensor:  # [B T] -> [B T]
    """What a decoder is told while it trains: `start`, then all targets but the last (Williams and Zipser, 1989).

    Targets that are `IGNORED` are no tokens: `start` stands in their place.
    """
    inputs = torch.full_like(targets, start)
    inputs[:, 1:] = targets[:, :-1].masked_fill(targets[:, :-1] == IGNORED, start)
    return inputs
