"""Project 10: the decoder-only Transformer (Radford et al., 2019), assembled from the projects before it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

from lab.errors import BadInput
from lab.projects.linear.component import Linear
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
