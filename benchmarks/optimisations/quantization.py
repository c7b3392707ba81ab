"""All rows quantized in one call against a loop over rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lab.projects.quantization.component import quantize

if TYPE_CHECKING:
    from collections.abc import Callable


def variants() -> dict[str, Callable[[], object]]:
    """A weight of 1024 x 1024 to int8, a scale a row, and back; the first is the one to beat."""
    torch.manual_seed(0)
    weight = torch.randn(1024, 1024)

    def row_by_row() -> torch.Tensor:
        return torch.stack([quantize(row, 8, group="tensor").dequantize() for row in weight])

    def all_at_once() -> torch.Tensor:
        return quantize(weight, 8, group="row").dequantize()

    return {"row by row": row_by_row, "all rows": all_at_once}
