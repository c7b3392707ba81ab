"""What each fault of this family makes of a mask, in closed form."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lab import BadInput
from lab.projects.encoder.component import SelfAttention, present_mask
from lab.projects.multihead.component import MultiHeadAttention
from lab.projects.positions.component import alibi_bias
from lab.sites import sites_of

faults = importlib.import_module("lab.faults.visibility")
CAUSAL = torch.ones(6, 6, dtype=torch.bool).tril()


def start(fault: Any, layer: torch.nn.Module) -> tuple[torch.nn.ModuleDict, Any]:
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"attn": layer})
    sites = sites_of(model)
    fault.lab_start(SimpleNamespace(model=model, sites=sites, step=SimpleNamespace(index=0)))
    return model, sites


def causal(fault: Any, **choices: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The pattern of a causal layer with a fault, and what the scores would be without one."""
    model, sites = start(fault, MultiHeadAttention(16, 2, **choices))
    with sites.capture("attn.*") as values:
        model["attn"](torch.randn(2, 6, 16))
    return values["attn.pattern"], values["attn.q"] @ values["attn.k"].transpose(-2, -1) * 8**-0.5


@pytest.mark.parametrize("bias", [None, alibi_bias])
def test_hidden_scores_become_a_number(bias: Any) -> None:
    pattern, scores = causal(faults.Finite(at="attn", value=-3.0), bias=bias)
    added = torch.zeros(1) if bias is None else bias(2, 6, 6)
    torch.testing.assert_close(pattern, (scores.masked_fill(~CAUSAL, -3.0) + added).softmax(-1))


def test_hidden_scores_become_0() -> None:
    pattern, scores = causal(faults.Multiplied(at="attn"))
    torch.testing.assert_close(pattern, (scores * CAUSAL).softmax(-1))


def test_the_newest_position_sees_all_that_is_kept() -> None:
    for fault in (faults.Finite(at="attn"), faults.Multiplied(at="attn")):
        fault.keep(torch.ones(1, 6, dtype=torch.bool))
        scores = torch.randn(2, 2, 1, 6)
        assert fault.other(scores).equal(scores)


def test_a_row_with_nothing_to_see_is_that_of_a_plain_softmax() -> None:
    pattern, scores = causal(faults.EmptyRow(at="attn", count=2))
    open_rows = CAUSAL & (torch.arange(6) >= 2)[:, None]
    plain = scores.masked_fill(~open_rows, float("-inf")).softmax(-1)
    assert plain[:, :, :2].isnan().all()
    torch.testing.assert_close(pattern, plain, equal_nan=True)


def test_an_empty_row_is_counted_from_the_first_position_when_generating() -> None:
    fault = faults.EmptyRow(count=2)
    assert not fault.hide(torch.ones(1, 2, dtype=torch.bool)).any()
    assert fault.hide(torch.ones(1, 3, dtype=torch.bool)).all()


def test_padding_asks_nothing_and_is_seen() -> None:
    model, sites = start(faults.PaddingWrongAxis(at="attn"), SelfAttention(16, 2))
    present = present_mask(torch.tensor([6, 4]), 6)
    with sites.capture("attn.*") as values:
        model["attn"](torch.randn(2, 6, 16), present)
    torch.testing.assert_close(values["attn.pattern"], values["attn.scores"].softmax(-1) * present[:, None, :, None])


def test_layers_with_a_causal_mask_have_no_mask_of_padding() -> None:
    with pytest.raises(BadInput, match="causal mask"):
        start(faults.PaddingWrongAxis(at="attn"), MultiHeadAttention(16, 2))
