"""Project 7: scaled dot-product attention with a causal mask (Vaswani et al., 2017, section 3.2.1)."""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

from lab.sites import Component


class Attention(Component):
    """``softmax(q k^T / sqrt(D) + mask) v``, where position t sees the positions s <= t.

    Two paths, equal within float tolerance. The fused kernel never holds the T x S scores in memory. The explicit
    path is taken where a fault replaces what is inside. A probe that reads what is inside has it computed aside,
    without gradient, for the first row of the batch; the training's own path stays the same.
    """

    SITES = MappingProxyType({"mask": "T S", "scores": "B H T S", "pattern": "B H T S"})
    transparent = True

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        """Attend: q [B H T D], k and v [B H S D], bias [H T S] added to the scores -> [B H T D]."""
        t, s = q.shape[-2], k.shape[-2]
        # With fewer queries than keys the kernel's own mask begins at the first key; ours are the last positions. A
        # single one, the newest, sees every key: it needs no mask.
        if self.replaced(*self.SITES) or (t != s and (t > 1 or bias is not None)):
            return self.explicit(q, k, v, bias)
        if self.wanted(*self.SITES):
            with torch.no_grad():
                self.explicit(q[:1].detach(), k[:1].detach(), v[:1].detach(), bias)
        if bias is not None:
            hidden = torch.ones(t, s, dtype=torch.bool, device=q.device).triu(1)  # [T S]
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.masked_fill(hidden, float("-inf")))
        return F.scaled_dot_product_attention(q, k, v, is_causal=t == s)

    def explicit(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        """The formula, step by step; shapes as in `forward`. A row that may see nothing gives 0 rather than NaN."""
        t, s = q.shape[-2], k.shape[-2]
        mask = torch.ones(t, s, dtype=torch.bool, device=q.device).tril(s - t)  # [T S], True where it may look
        mask = self.tap("mask", mask)
        scores = self.tap("scores", q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5)  # [B H T S]
        if bias is not None:
            scores = scores + bias
        hidden = scores.masked_fill(~mask, float("-inf"))  # [B H T S]
        top = hidden.amax(dim=-1, keepdim=True).detach().clamp_min(torch.finfo(scores.dtype).min)  # [B H T 1]
        weights = (hidden - top).exp()  # [B H T S]
        total = weights.sum(dim=-1, keepdim=True)  # [B H T 1]
        pattern = self.tap("pattern", weights / total.clamp_min(torch.finfo(scores.dtype).tiny))  # [B H T S]
        return pattern @ v  # [B H T D]
