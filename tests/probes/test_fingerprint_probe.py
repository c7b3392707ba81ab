"""Fingerprints: two numbers of a tensor, the same however a batch is split, from which every change of it shows."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lab
from lab.diff import compare

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from lab.results import Results


signs = importlib.import_module("lab.probes.signs")
LARGE, Signs, Sum = signs.LARGE, signs.Signs, signs.Sum


def expected(x: Tensor) -> tuple[float, float]:
    """What `Signs.sums` is to give, written out: in float64, and whole."""
    made, rows = Signs(), x.reshape(-1, x.shape[-1]).double()
    across = made.get(0, 0, rows.shape[1], torch.float64, x.device)
    along = made.get(1, 0, rows.shape[0], torch.float64, x.device)
    return float((rows**2).sum()), float((rows * across * along[:, None]).sum())


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 4), (1, 1), (LARGE // 64 + 3, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_sums_are_those_of_squares_and_of_elements_with_their_signs(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    square, signed = Signs().sums(x)
    size = float((x.double() ** 2).sum()) ** 0.5
    assert (square.dtype, signed.dtype) == (torch.float64, torch.float64)
    assert float(square) == pytest.approx(expected(x)[0], rel=1e-6)
    assert float(signed) == pytest.approx(expected(x)[1], abs=1e-6 * size)


def test_signs_have_no_pattern_and_are_the_same_however_many_are_asked_for() -> None:
    one, other, cpu = Signs(), Signs(), torch.device("cpu")
    many = one.get(0, 0, 10_000, torch.float32, cpu)
    assert set(many.tolist()) == {-1.0, 1.0}
    assert abs(float(many.mean())) < 4 / 10_000**0.5
    assert abs(float((many[1:] * many[:-1]).mean())) < 4 / 10_000**0.5
    assert torch.equal(other.get(0, 500, 3000, torch.float32, cpu), many[500:3500])


def test_what_passes_in_parts_has_the_fingerprint_of_the_whole() -> None:
    x, made = torch.randn(6, 5, 4), Signs()
    whole, parts = Sum(), Sum()
    whole.add(x, made)
    for part in torch.chunk(x, 3):
        parts.add(part, made)
    assert parts.count == whole.count == x.numel()
    assert float(parts.square) == pytest.approx(float(whole.square))
    assert float(parts.signed) == pytest.approx(float(whole.signed))
    parts.scale(torch.tensor(0.5, dtype=torch.float64))
    assert float(parts.signed) == pytest.approx(2 * float(whole.signed))
    assert float(parts.square) == pytest.approx(4 * float(whole.square))


# ---------------------------------------------------------------- a loop of anybody's, its batch in parts


def trained(folder: Path, parts: int, *, divided: bool = True) -> Results:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    draw = torch.Generator().manual_seed(1)
    with lab.watch(model, optimizer, out=folder):
        for _ in range(4):
            x = torch.randn(8, 16, generator=draw)
            optimizer.zero_grad()
            for rows in torch.chunk(x, parts):
                loss = F.cross_entropy(model(rows), rows[:, :5].argmax(-1))
                (loss / parts if divided else loss).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return lab.load(folder)


def test_the_loss_of_a_batch_in_parts_is_that_of_the_whole(tmp_path: Path) -> None:
    whole, parts = trained(tmp_path / "whole", 1), trained(tmp_path / "parts", 4)
    assert parts.history.series("fingerprint.parts").values.tolist() == [4.0] * 3
    losses = [run.history.series("fingerprint.loss").values.tolist() for run in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    # What the loop sends back last is a quarter of it, or so: that is no difference between the two.
    assert parts.history.series("loss").values[0] < whole.history.series("loss").values[0] / 2
    found = compare(whole, parts)
    assert found.first is None, found.first
    assert "loss" in {agreed.part for agreed in (*found.earlier, *found.before)}


def test_parts_whose_loss_is_not_divided_differ_in_it(tmp_path: Path) -> None:
    found = compare(trained(tmp_path / "whole", 1), trained(tmp_path / "parts", 4, divided=False))
    assert found.first is not None
    assert (found.first.step, found.first.metric, found.where) == (0, "fingerprint.loss", "loss")
    assert found.first.b == pytest.approx(4 * found.first.a, rel=1e-5)
