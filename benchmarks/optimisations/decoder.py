"""The source's keys and values made once and kept, against made anew for each token that is decoded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lab.projects.decoder.component import CrossAttention

if TYPE_CHECKING:
    from collections.abc import Callable


def variants() -> dict[str, Callable[[], object]]:
    """Cross-attention of width 128 for 32 tokens, one at a time, to 4 sources of 256; the first is the one to beat."""
    torch.manual_seed(0)
    made, source, tokens = CrossAttention(128, 4), torch.randn(4, 256, 128), torch.randn(32, 4, 1, 128)

    def anew() -> object:
        return [made(x, source) for x in tokens]

    def kept() -> object:
        k, v = made.keys_values(source)
        return [made.attend(x, k, v) for x in tokens]

    return {"anew for each token": torch.no_grad()(anew), "made once": torch.no_grad()(kept)}
