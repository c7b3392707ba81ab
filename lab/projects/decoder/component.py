"""Project 10: the decoder-only Transformer (Radford et al., 2019), assembled from the projects before it."""

from __future__ import annotations

from torch import Tensor, nn

from lab.projects.linear.component import Linear
from lab.projects.normalisation.component import LayerNorm
from lab.projects.positions.component import Embedding, LearnedPositions
from lab.projects.residuals.component import Block
from lab.sites import Component


class Decoder(Component):
    """A language model: for each position, the logits of the token that follows.

    Args:
        vocabulary: V.
        context: The largest T.
        layers, width, heads: L, C and H.
        tied: Whether the head uses the table of the embedding (Press and Wolf, 2017).
    """

    def __init__(
        self, vocabulary: int, *, context: int, layers: int, width: int, heads: int, tied: bool = False
    ) -> None:
        super().__init__()
        self.tokens = Embedding(vocabulary, width)
        self.positions = LearnedPositions(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, layers) for _ in range(layers))
        self.norm = LayerNorm(width)
        # Small, so that training starts from even odds: the loss is ln V + width 0.02^2 / 2.
        self.head = Linear(width, vocabulary, bias=False, gain=0.02 * width**0.5)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:  # [B T] -> [B T V]
        """Embed, pass the blocks, normalise, and compare with each token."""
        x = self.tokens(tokens) + self.positions(tokens.shape[-1])  # [B T C]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]
