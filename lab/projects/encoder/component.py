"""Project 9: the encoder (Vaswani et al., 2017, section 3.1), padding, and hidden tokens (Devlin et al., 2019)."""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab.context import IGNORED
from lab.errors import BadInput
from lab.projects.activations.component import FeedForward
from lab.projects.linear.component import Linear
from lab.projects.normalisation.component import LayerNorm
from lab.projects.positions.component import Embedding, LearnedPositions
from lab.sites import Component


def split_heads(x: Tensor, heads: int) -> Tensor:  # [B T C] -> [B H T D]
    """Give each head its slice of the width."""
    b, t, c = x.shape
    return x.view(b, t, heads, c // heads).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:  # [B H T D] -> [B T C]
    """Put the slices side by side again."""
    b, h, t, d = x.shape
    return x.transpose(1, 2).reshape(b, t, h * d)


class FullAttention(Component):
    """``softmax(q k^T / sqrt(D) + mask) v``, where every query sees every key that is a token, earlier or later.

    Two paths, equal within float tolerance, as in project 7: the fused kernel; and the explicit one, which is taken
    where a fault replaces what is inside, and computed aside for the first row where a probe reads it. A row of the
    batch with no token at all gives 0 on both.
    """

    SITES = MappingProxyType({"scores": "B H T S", "pattern": "B H T S"})
    transparent = True

    def forward(self, q: Tensor, k: Tensor, v: Tensor, present: Tensor | None = None) -> Tensor:
        """Attend: q [B H T D], k and v [B H S D], present [B S], True where a key is a token -> [B H T D]."""
        if self.replaced(*self.SITES):
            return self.explicit(q, k, v, present)
        if self.wanted(*self.SITES):
            first = None if present is None else present[:1]
            with torch.no_grad():
                self.explicit(q[:1].detach(), k[:1].detach(), v[:1].detach(), first)
        seen = None if present is None else present[:, None, None, :]  # [B 1 1 S], for all heads and queries
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)

    def explicit(self, q: Tensor, k: Tensor, v: Tensor, present: Tensor | None = None) -> Tensor:
        """The formula, step by step; shapes as in `forward`."""
        scores = self.tap("scores", q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5)  # [B H T S]
        hidden = scores
        if present is not None:
            hidden = scores.masked_fill(~present[:, None, None, :], float("-inf"))  # [B H T S]
        top = hidden.amax(dim=-1, keepdim=True).detach().clamp_min(torch.finfo(scores.dtype).min)  # [B H T 1]
        weights = (hidden - top).exp()  # [B H T S]
        total = weights.sum(dim=-1, keepdim=True)  # [B H T 1]
        pattern = self.tap("pattern", weights / total.clamp_min(torch.finfo(scores.dtype).tiny))  # [B H T S]
        return pattern @ v  # [B H T D]


class SelfAttention(Component):
    """Multi-head attention in both directions, to whatever is no padding.

    At padded positions the output is an average as elsewhere: finite, and of no meaning. A row with no token at all
    averages nothing: 0, to which the output projection adds its bias.

    Args:
        width: C, a multiple of `heads`.
        heads: H; each has width D = C / H.
        gain: Of the output projection, whose output is added to the residual stream.

    Raises:
        BadInput: `width` is no multiple of `heads`.
    """

    SITES = MappingProxyType({"q": "B H T D", "k": "B H T D", "v": "B H T D", "out": "B T C"})

    def __init__(self, width: int, heads: int, *, gain: float = 1.0) -> None:
        super().__init__()
        if width % heads:
            raise BadInput(f"model.width = {width} is no multiple of model.heads = {heads}")
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.core = FullAttention()
        self.proj = Linear(width, width, gain=gain)

    def forward(self, x: Tensor, present: Tensor | None = None) -> Tensor:  # [B T C], [B T] -> [B T C]
        """Project, split, attend, merge, project. `present` is True where a token is; None is everywhere."""
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))  # [B H T D] each
        q, k, v = self.tap("q", q), self.tap("k", k), self.tap("v", v)
        mixed = self.core(q, k, v, present)  # [B H T D]
        return self.tap("out", self.proj(merge_heads(mixed)))  # [B T C]


class EncoderBlock(Component):
    """Two branches, each normalised on its way in and added to the stream: attention, then a feed-forward layer.

    Args:
        width, heads: C and H.
        layers: How many blocks the stream passes; each branch ends in a gain of ``1 / sqrt(2 layers)`` (project 13).
    """

    SITES = MappingProxyType({"out": "B T C"})

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        gain = (2 * layers) ** -0.5
        self.attn_norm = LayerNorm(width)
        self.attn = SelfAttention(width, heads, gain=gain)
        self.mlp_norm = LayerNorm(width)
        self.mlp = FeedForward(width, 4 * width, activation="gelu", gain=gain)

    def forward(self, x: Tensor, present: Tensor | None = None) -> Tensor:  # [B T C], [B T] -> [B T C]
        """Pass both branches."""
        x = x + self.attn(self.attn_norm(x), present)
        x = x + self.mlp(self.mlp_norm(x))
        return self.tap("out", x)


class Encoder(Component):
    """A reader: each position sees the whole row. Its logits say which token stands there (Devlin et al., 2019).

    Args:
        vocabulary: V.
        context: The largest T.
        layers, width, heads: L, C and H.
    """

    def __init__(self, vocabulary: int, *, context: int, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.context = context
        self.tokens = Embedding(vocabulary, width)
        self.positions = LearnedPositions(context, width)
        self.blocks = nn.ModuleList(EncoderBlock(width, heads, layers) for _ in range(layers))
        self.norm = LayerNorm(width)
        # Small, so that training starts from even odds: the loss is ln V + width 0.02^2 / 2.
        self.head = Linear(width, vocabulary, bias=False, gain=0.02 * width**0.5)

    def encode(self, tokens: Tensor, present: Tensor | None = None) -> Tensor:  # [B T], [B T] -> [B T C]
        """Embed, pass the blocks, normalise: what each position is, given all the others.

        Raises:
            BadInput: There are more tokens than positions.
        """
        x = self.tokens(tokens) + self.positions(tokens.shape[-1])  # [B T C]
        for block in self.blocks:
            x = block(x, present)
        return self.norm(x)  # type: ignore[no-any-return]

    def forward(self, tokens: Tensor, present: Tensor | None = None) -> Tensor:  # [B T], [B T] -> [B T V]
        """Encode, and compare with each token. `present` is True where a token is; None is everywhere."""
        return self.head(self.encode(tokens, present))  # type: ignore[no-any-return]


def present_mask(lengths: Tensor, total: int) -> Tensor:  # [B] -> [B total]
    """True at the first `lengths` positions of each row, where its tokens are; the rest is padding.

    Raises:
        BadInput: A row is longer than `total`.
    """
    if bool((lengths > total).any()):
        raise BadInput(f"a row of {int(lengths.max())} tokens, but there are {total} positions")
    return torch.arange(total, device=lengths.device) < lengths[:, None]


def mask_tokens(
    tokens: Tensor,
    *,
    mask_token: int,
    vocabulary: int,
    share: float = 0.15,
    present: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:  # [B T] -> [B T], [B T]
    """Choose tokens to be predicted, and hide most of them (Devlin et al., 2019, section 3.1).

    Args:
        tokens: [B T].
        mask_token: What stands in the inputs at 80% of the chosen positions. At 10% it is any token, each as likely
            as another, and at 10% the token itself.
        vocabulary: Random tokens are below it.
        share: Of the tokens of each row, how many are chosen: rounded, but at least one, so that the mean over a
            row is defined. In a row without tokens none is.
        present: [B T], True where a token is; None is everywhere. Padding is never chosen.
        generator: What draws; on the device of `tokens`.

    Returns:
        Inputs [B T]; and targets [B T], the tokens where they are chosen, `IGNORED` elsewhere.

    Raises:
        BadInput: `share` is not above 0, or is above 1.
    """
    if not 0 < share <= 1:
        raise BadInput(f"a share of {share} of the tokens to predict: it must be above 0 and at most 1")
    if present is None:
        present = torch.ones_like(tokens, dtype=torch.bool)
    size, device = tokens.shape, tokens.device
    order = torch.rand(size, generator=generator, device=device)  # [B T], of choosing
    kind = torch.rand(size, generator=generator, device=device)  # [B T], what becomes of the chosen
    other = torch.randint(vocabulary, size, generator=generator, device=device)  # [B T]
    rank = order.masked_fill(~present, 2.0).argsort(dim=-1).argsort(dim=-1)  # [B T], padding last
    length = present.sum(dim=-1, keepdim=True)  # [B 1]
    count = (share * length).round().clamp_min(1).minimum(length)  # [B 1]
    chosen = rank < count  # [B T]
    inputs = tokens.masked_fill(chosen & (kind < 0.8), mask_token)
    inputs = torch.where(chosen & (kind >= 0.9), other.to(tokens.dtype), inputs)
    return inputs, tokens.masked_fill(~chosen, IGNORED)
