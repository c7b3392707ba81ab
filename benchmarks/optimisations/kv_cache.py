"""Generation with a cache of keys and values against the whole text again for each token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lab.projects.decoder.component import Decoder
from lab.projects.kv_cache.component import generate, greedy

if TYPE_CHECKING:
    from collections.abc import Callable


def variants() -> dict[str, Callable[[], object]]:
    """Generate 255 tokens after one, with 4 layers of width 128; the first is the one to beat."""
    torch.manual_seed(0)
    model, start = Decoder(64, context=256, layers=4, width=128, heads=4), torch.zeros(1, 1, dtype=torch.long)

    def run(*, cached: bool) -> Callable[[], object]:
        return lambda: generate(model, start, 255, greedy, layers=4, cached=cached)

    return {"the whole text each time": run(cached=False), "cached": run(cached=True)}
