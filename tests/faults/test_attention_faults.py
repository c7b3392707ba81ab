"""What each fault of attention makes of the numbers inside."""

from __future__ import annotations

import contextlib
import importlib
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from lab.errors import LabError
from lab.projects.multihead.component import MultiHeadAttention
from lab.sites import sites_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from lab import Fault

faults = importlib.import_module("lab.faults.attention")
B, H, T, D = 3, 2, 6, 4


class Layer(torch.nn.Module):
    """An attention layer at the site ``attn``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = MultiHeadAttention(H * D, H)


def inside(make: Callable[..., Fault] | None, **options: Any) -> tuple[dict[str, Tensor], Layer]:
    """What passes through a layer with a fault; and the layer, with the fault undone."""
    layer, undo = Layer(), contextlib.ExitStack()
    sites = sites_of(layer)
    run: Any = SimpleNamespace(model=layer, sites=sites, step=SimpleNamespace(index=0), cleanup=undo)
    if make is not None:
        made: Any = make(at="attn", **options)
        made.lab_start(run)
    x = torch.randn(B, T, H * D, generator=torch.Generator().manual_seed(1))
    with sites.capture("attn.*") as values:
        layer.attn(x)
    sites.detach()
    undo.close()
    return values, layer


@pytest.fixture(scope="module")
def right() -> dict[str, Tensor]:
    layer = Layer()
    x = torch.randn(B, T, H * D, generator=torch.Generator().manual_seed(1))
    sites = sites_of(layer)
    # A writer that changes nothing has the whole batch computed step by step.
    sites.replace("attn.pattern", lambda pattern: pattern)
    with sites.capture("attn.*") as values:
        layer.attn(x)
    return {name.rpartition(".")[2]: value for name, value in values.items()}


def test_no_scale_multiplies_scores_by_the_root_of_the_width(right: dict[str, Tensor]) -> None:
    values, _ = inside(faults.NoScale)
    torch.testing.assert_close(values["attn.scores"], right["scores"] * D**0.5)


def test_the_wrong_axis_makes_columns_sum_to_1(right: dict[str, Tensor]) -> None:
    pattern = inside(faults.WrongAxis)[0]["attn.pattern"]
    torch.testing.assert_close(pattern.sum(-2), torch.ones(B, H, T))
    assert (pattern == 0).equal(right["pattern"] == 0)
    hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
    torch.testing.assert_close(pattern, right["scores"].masked_fill(hidden, float("-inf")).softmax(-2))


def test_a_mask_after_the_softmax_leaves_rows_short(right: dict[str, Tensor]) -> None:
    pattern = inside(faults.MaskAfterSoftmax)[0]["attn.pattern"]
    torch.testing.assert_close(pattern, right["scores"].softmax(-1).tril())
    assert (pattern.sum(-1)[..., :-1] < 1).all()


def test_a_wrong_merge_is_a_plain_reshape_and_is_undone(right: dict[str, Tensor]) -> None:
    values, layer = inside(faults.WrongMerge)
    mixed = right["pattern"] @ right["v"]
    torch.testing.assert_close(values["attn.out"], layer.attn.proj(mixed.reshape(B, T, H * D)))
    assert "merge" not in vars(layer.attn)


def test_a_wrong_merge_waits_for_its_step(right: dict[str, Tensor]) -> None:
    values, _ = inside(faults.WrongMerge, from_step=5)
    torch.testing.assert_close(values["attn.out"], right["out"])


def test_swapped_queries_and_keys_transpose_the_scores(right: dict[str, Tensor]) -> None:
    torch.testing.assert_close(inside(faults.QKSwapped)[0]["attn.scores"], right["scores"].transpose(-2, -1))


def test_a_dead_head_has_values_of_0_and_the_others_their_own(right: dict[str, Tensor]) -> None:
    v = inside(faults.HeadDead, head=1)[0]["attn.v"]
    assert v[:, 0].equal(right["v"][:, 0])
    assert (v[:, 1] == 0).all()


def test_a_head_that_is_not_there_is_refused() -> None:
    with pytest.raises(LabError, match="there are 2 heads"):
        inside(faults.HeadDead, head=2)


def test_rows_take_their_share_from_the_row_before(right: dict[str, Tensor]) -> None:
    out = inside(faults.RowsMixed, share=0.25)[0]["attn.out"]
    torch.testing.assert_close(out[1], 0.75 * right["out"][1] + 0.25 * right["out"][0])
    torch.testing.assert_close(out[0], 0.75 * right["out"][0] + 0.25 * right["out"][2])
