"""What faults of precision leave of the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

import lab

if TYPE_CHECKING:
    from conftest import SmallRun


@lab.plugin("test.rounded", title="Which share of the weights bfloat16 can hold, after each step")
class Rounded(lab.Plugin):
    def __init__(self) -> None:
        self.shares: list[float] = []

    def lab_step_end(self, run: lab.Run) -> None:
        flat = torch.cat([p.detach().flatten() for p in run.parameters.values()])
        self.shares.append(float((flat.bfloat16().float() == flat).double().mean()))


@pytest.mark.parametrize("from_step", [0, 5])
def test_weights_are_numbers_of_bfloat16_from_its_step_on(small_run: SmallRun, from_step: int) -> None:
    seen = Rounded()
    small_run(seen, faults=[{"id": "precision.update_lost", "from_step": from_step}], probes=False)
    assert all(share == 1 for share in seen.shares[from_step:])
    assert all(share < 0.5 for share in seen.shares[:from_step])
    again = Rounded()
    small_run(again, probes=False)
    assert all(share < 0.5 for share in again.shares)
