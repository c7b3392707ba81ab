"""Rows sorted by length and cut into batches against one length for all: padding costs what tokens cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lab.projects.encoder.component import Encoder, present_mask

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

ROWS, BATCH, LONGEST = 64, 8, 128


def variants() -> dict[str, Callable[[], object]]:
    """Forward of 64 rows of 1 to 128 tokens in 8 batches, 2 layers of width 128; the first is the one to beat."""
    torch.manual_seed(0)
    model = Encoder(256, context=LONGEST, layers=2, width=128, heads=4)
    lengths = torch.randint(1, LONGEST + 1, (ROWS,))
    tokens = torch.randint(256, (ROWS, LONGEST))

    def run(order: Tensor, *, trim: bool) -> Callable[[], object]:
        def encode() -> object:
            out = []
            for rows in order.split(BATCH):  # type: ignore[no-untyped-call]
                held = lengths[rows]
                total = int(held.max()) if trim else LONGEST
                out.append(model.encode(tokens[rows, :total], present_mask(held, total)))
            return out

        return torch.no_grad()(encode)

    as_they_come = torch.arange(ROWS)
    return {
        "one length for all": run(as_they_come, trim=False),
        "the longest of each batch": run(as_they_come, trim=True),
        "sorted by length first": run(lengths.argsort(), trim=True),
    }
