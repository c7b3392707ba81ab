"""What each fault of masks lets through, and what it hides."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import torch

from lab.projects.encoder.component import SelfAttention, present_mask
from lab.sites import sites_of

faults = importlib.import_module("lab.faults.masks")


def causal(queries: int, keys: int) -> torch.Tensor:
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def test_a_partial_leak_opens_the_first_rows_and_no_other() -> None:
    mask = faults.PartialLeak(count=2).change(causal(6, 6))
    assert mask[:2].all()
    assert mask[2:].equal(causal(6, 6)[2:])
    assert faults.PartialLeak(count=2).change(causal(1, 6)).equal(causal(1, 6))  # the newest of six


def test_what_blocks_the_past_leaves_a_window() -> None:
    for queries in (6, 2, 1):
        mask = faults.BlocksPast(window=3).change(causal(queries, 6))
        places = torch.arange(6 - queries, 6)[:, None] - torch.arange(6)
        assert mask.equal((places >= 0) & (places < 3))


def inside(fault: Any) -> dict[str, torch.Tensor]:
    """What passes through an encoder's attention of rows of 6 and 4 tokens."""
    torch.manual_seed(0)
    layer = torch.nn.ModuleDict({"attn": SelfAttention(8, 2)})
    sites = sites_of(layer)
    fault.lab_start(SimpleNamespace(model=layer, sites=sites, step=SimpleNamespace(index=0)))
    with sites.capture("attn.*") as values:
        layer["attn"](torch.randn(2, 6, 8), present_mask(torch.tensor([6, 4]), 6))
    return values


def test_padding_that_is_seen_has_the_weight_of_its_scores() -> None:
    values = inside(faults.PaddingSeen(at="attn"))
    torch.testing.assert_close(values["attn.pattern"], values["attn.scores"].softmax(-1))


def test_a_causal_mask_in_an_encoder_hides_what_is_later_and_keeps_padding_hidden() -> None:
    values = inside(faults.CausalInEncoder(at="attn"))
    hidden = ~(causal(6, 6) & present_mask(torch.tensor([6, 4]), 6)[:, None, None])
    right = values["attn.scores"].masked_fill(hidden, float("-inf")).softmax(-1)
    torch.testing.assert_close(values["attn.pattern"], right)
