"""Project 13: the residual block (He et al., 2016), normalised before each branch (Xiong et al., 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from torch import nn

from lab.errors import BadInput, nearest
from lab.projects.activations.component import FeedForward, GatedFeedForward
from lab.projects.convolution.component import ConvMixer
from lab.projects.multihead.component import MultiHeadAttention
from lab.projects.normalisation.component import LayerNorm, RMSNorm
from lab.projects.positions.component import alibi_bias, rotate
from lab.projects.recurrent.component import RecurrentMixer
from lab.sites import Component

if TYPE_CHECKING:
    from torch import Tensor

    from lab.projects.multihead.component import Memory

MIXERS = ("attention", "convolution", "rnn", "gru", "lstm", "none")
NORMS: MappingProxyType[str, type[LayerNorm | RMSNorm]] = MappingProxyType({"layer": LayerNorm, "rms": RMSNorm})
NORM_PLACES = ("pre", "post")
POSITIONS = ("learned", "sinusoidal", "rope", "alibi", "none")


@dataclass(frozen=True)
class Choices:
    """What a block is made of.

    Attributes:
        mixer: What lets positions meet: ``attention``, ``convolution``, ``rnn``, ``gru``, ``lstm`` or ``none``.
        kv_heads: Of attention: heads of keys and values; as many as of queries if None.
        positions: ``learned`` and ``sinusoidal`` are added to the tokens, ``rope`` and ``alibi`` act in attention.
        norm: ``layer`` or ``rms``.
        norm_at: ``pre``, on the way into a branch, or ``post``, on the stream after it.
        activation: Of the feed-forward layer; ``swiglu`` is the gated one.
        dropout: The share of what a branch gives out that is left out in training (Srivastava et al., 2014).
    """

    mixer: str = "attention"
    kv_heads: int | None = None
    positions: str = "learned"
    norm: str = "layer"
    norm_at: str = "pre"
    activation: str = "gelu"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise BadInput(f"model.dropout: found {self.dropout}; it must be at least 0 and below 1")
        for name, known in (("mixer", MIXERS), ("positions", POSITIONS), ("norm", NORMS), ("norm_at", NORM_PLACES)):
            value = getattr(self, name)
            if value not in known:
                raise BadInput(f"model.{name}: found {value!r}{nearest(value, known)}; known: {', '.join(known)}")

    def make_mixer(self, width: int, heads: int, gain: float) -> MultiHeadAttention | ConvMixer | RecurrentMixer | None:
        """Build the branch in which positions meet."""
        if self.mixer == "none":
            return None
        if self.mixer == "convolution":
            return ConvMixer(width, gain=gain)
        if self.mixer != "attention":
            return RecurrentMixer(width, kind=self.mixer, gain=gain)
        turn = rotate if self.positions == "rope" else None
        bias = alibi_bias if self.positions == "alibi" else None
        return MultiHeadAttention(width, heads, kv_heads=self.kv_heads, gain=gain, turn=turn, bias=bias)

    def make_norm(self, width: int) -> LayerNorm | RMSNorm:
        """Build a norm."""
        return NORMS[self.norm](width)

    def make_mlp(self, width: int, gain: float) -> FeedForward | GatedFeedForward:
        """Build the branch that computes at each position; the gated one has as many weights with 2/3 the hidden."""
        if self.activation == "swiglu":
            return GatedFeedForward(width, 8 * width // 3, gain=gain)
        return FeedForward(width, 4 * width, activation=self.activation, gain=gain)


class Block(Component):
    """Two branches, each added to the stream that passes by: one mixes positions, one computes at each position.

    Args:
        width, heads: C and H.
        layers: How many blocks the stream passes. Each branch ends in a gain of ``1 / sqrt(2 layers)``, so that the
            variance of 2 x layers sums does not grow with depth (Radford et al., 2019, section 2.3).
        choices: What the block is made of; the defaults of `Choices` if None.
    """

    SITES = MappingProxyType({"out": "B T C"})

    def __init__(self, width: int, heads: int, layers: int, choices: Choices | None = None) -> None:
        super().__init__()
        choices = choices or Choices()
        gain = (2 * layers) ** -0.5
        self.pre = choices.norm_at == "pre"
        mixes = choices.mixer != "none"
        self.attn_norm = choices.make_norm(width) if mixes else None
        self.attn = choices.make_mixer(width, heads, gain)
        self.mlp_norm = choices.make_norm(width)
        self.mlp = choices.make_mlp(width, gain)
        # Only where asked for: without it the block has no module that depends on the mode.
        self.dropout = nn.Dropout(choices.dropout) if choices.dropout else None

    def add(self, x: Tensor, norm: nn.Module, branch: nn.Module, memory: Memory | None = None) -> Tensor:
        """Add what a branch makes of the stream: [B T C] -> [B T C]."""
        inward = norm(x) if self.pre else x
        out = branch(inward) if memory is None else branch(inward, memory)
        x = x + (out if self.dropout is None else self.dropout(out))
        return x if self.pre else norm(x)

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:  # [B T C] -> [B T C]
        """Pass both branches."""
        if self.attn is not None and self.attn_norm is not None:
            x = self.add(x, self.attn_norm, self.attn, memory)
        x = self.add(x, self.mlp_norm, self.mlp)
        return self.tap("out", x)
