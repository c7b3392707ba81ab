"""What each fault of rotary positions makes of queries, keys and values."""

from __future__ import annotations

import importlib

import pytest
import torch

from lab.projects.positions.component import rotate

faults = importlib.import_module("lab.faults.rotary")


def test_the_angles_are_those_of_the_model_in_float32_and_others_in_bfloat16() -> None:
    x = torch.randn(1, 2, 40, 16)
    torch.testing.assert_close(faults.rotated(x, 3, 10_000.0, torch.float32), rotate(x, 3))
    assert (faults.rotated(x, 3, 10_000.0, torch.bfloat16) - rotate(x, 3)).abs().max() > 0.01


def test_queries_are_turned_in_neighbouring_channels() -> None:
    x = torch.randn(1, 1, 12, 8)
    out = faults.RopePairing().turned(x, 0, rotate)
    pairs = out.view(12, 4, 2).norm(dim=-1)
    torch.testing.assert_close(pairs, x.view(12, 4, 2).norm(dim=-1))
    angle = torch.atan2(out[0, 0, 1, 1], out[0, 0, 1, 0]) - torch.atan2(x[0, 0, 1, 1], x[0, 0, 1, 0])
    assert torch.remainder(angle, 2 * torch.pi) == pytest.approx(1.0, abs=1e-5)


def test_keys_are_turned_as_before_unless_they_are_meant() -> None:
    x = torch.randn(1, 1, 12, 8)
    for made, keys_change in ((faults.RopeBase(base=100.0), False), (faults.RopeHalf(), True)):
        turns = faults._Turns(made, rotate, lambda: True)
        turns.begin()
        assert not turns(x).equal(rotate(x))
        assert turns(x).equal(rotate(x)) is not keys_change
