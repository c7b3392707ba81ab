"""A step of DPO with the reference's log-probabilities kept from before, against one that computes them each time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lab.projects.alignment.component import dpo_loss, frozen_copy, sequence_log_probability
from lab.projects.decoder.component import Decoder

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

VOCABULARY, CONTEXT, ROWS = 512, 64, 16


def variants() -> dict[str, Callable[[], object]]:
    """Forward and backward of a batch of 8 pairs through 4 layers of 128; the first is the one to beat."""
    torch.manual_seed(0)
    model = Decoder(VOCABULARY, context=CONTEXT, layers=4, width=128, heads=4)
    reference = frozen_copy(model)
    tokens = torch.randint(VOCABULARY, (ROWS, CONTEXT + 1))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    @torch.no_grad()
    def before() -> Tensor:
        return sequence_log_probability(reference(inputs), targets)

    kept = before()

    def step(old: Callable[[], Tensor]) -> None:
        model.zero_grad(set_to_none=True)
        policy, then = sequence_log_probability(model(inputs), targets), old()
        loss = dpo_loss(policy[0::2], policy[1::2], then[0::2], then[1::2])
        loss.backward()  # type: ignore[no-untyped-call]

    return {"reference each step": lambda: step(before), "reference kept": lambda: step(lambda: kept)}
