"""What each fault of this family makes of the scores, the heads and the pattern, in closed form."""

from __future__ import annotations

import contextlib
import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lab import BadInput
from lab.projects.multihead.component import MultiHeadAttention
from lab.sites import sites_of

faults = importlib.import_module("lab.faults.scores")
evaluation = importlib.import_module("lab.faults.evaluation")
CAUSAL = torch.ones(6, 6, dtype=torch.bool).tril()


def inside(fault: Any, heads: int = 4, **choices: Any) -> dict[str, torch.Tensor]:
    """What passes through a layer with a fault, by name, and its input."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"attn": MultiHeadAttention(16, heads, **choices)})
    sites = sites_of(model)
    with contextlib.ExitStack() as cleanup:
        fault.lab_start(SimpleNamespace(model=model, sites=sites, step=SimpleNamespace(index=0), cleanup=cleanup))
        with sites.capture("**") as values:
            model["attn"](torch.randn(2, 6, 16))
    assert "split" not in vars(model["attn"])
    return {name.removeprefix("attn."): value for name, value in values.items()}


def test_scores_have_the_bits_of_float16() -> None:
    values = inside(faults.ScoresHalf(at="attn"))
    right = values["q"] @ values["k"].transpose(-2, -1) / 2
    assert values["scores"].equal(right.half().float())
    assert not values["scores"].equal(right)


def test_all_keys_that_are_seen_weigh_alike() -> None:
    pattern = inside(faults.Uniform(at="attn"))["pattern"]
    torch.testing.assert_close(pattern, (CAUSAL / CAUSAL.sum(-1, keepdim=True)).expand_as(pattern))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_head_repeats_another_and_the_others_are_their_own(kv_heads: int) -> None:
    pattern = inside(faults.HeadsTied(at="attn", head=3, copy=1), kv_heads=kv_heads)["pattern"]
    equal = {(i, j) for i in range(4) for j in range(i) if pattern[:, i].equal(pattern[:, j])}
    assert equal == {(3, 1)}


def test_a_head_that_is_not_there_is_refused() -> None:
    with pytest.raises(BadInput, match="of 1 heads"):
        inside(faults.HeadsTied(at="attn"), heads=1)
    with pytest.raises(BadInput, match="itself"):
        inside(faults.HeadsTied(at="attn", copy=0))


def test_a_bare_view_keeps_the_memory_as_it_is() -> None:
    values = inside(faults.WrongSplit(at="attn"))
    for name, part in zip(("q", "k", "v"), values["qkv.out"].chunk(3, dim=-1), strict=True):
        assert values[name].equal(part.reshape(2, 4, 6, 4))
    with pytest.raises(BadInput, match="single head"):
        inside(faults.WrongSplit(at="attn"), heads=1)


def test_a_share_is_dropped_and_the_rest_enlarged() -> None:
    fault = evaluation.Dropout(share=0.25)
    torch.manual_seed(0)
    x = fault.change(torch.ones(10_000))
    assert set(x.tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert x.mean().item() == pytest.approx(1, abs=0.02)
