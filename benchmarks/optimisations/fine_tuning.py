"""Generation by a model whose adapters are merged against one that computes them beside each layer."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch

from lab.projects.decoder.component import Decoder
from lab.projects.fine_tuning.component import add_lora, merge_lora
from lab.projects.kv_cache.component import generate, greedy

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn


def variants() -> dict[str, Callable[[], object]]:
    """Generate 32 tokens after one, with 4 layers of width 256 and rank 8; the first is the one to beat."""
    torch.manual_seed(0)
    model, start = Decoder(64, context=64, layers=4, width=256, heads=4), torch.zeros(1, 1, dtype=torch.long)
    add_lora(model, 8, where="blocks.**")
    merged = copy.deepcopy(model)
    merge_lora(merged)

    def run(model: nn.Module) -> Callable[[], object]:
        return lambda: generate(model, start, 32, greedy, layers=4)

    return {"adapters beside the layers": run(model), "merged": run(merged)}
