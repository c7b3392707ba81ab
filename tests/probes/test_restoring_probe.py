"""Weights that are put back: told where they were never kept apart from the model, and nowhere else."""

from __future__ import annotations

import copy
import io
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lab

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def trained(folder: Path, keep: Callable[[nn.Module], Any], *, at: int = 10, back: int | None = None) -> lab.Diagnosis:
    """Train for 24 steps; keep the weights after step `at`, and put them back after step `back`, or at the end."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    best: Any = None
    with lab.watch(model, optimizer, out=folder) as watching:
        for step in range(24):
            x = torch.randn(16, 6)
            optimizer.zero_grad()
            F.cross_entropy(model(x), x[:, :4].argmax(1)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            best = keep(model) if step == at else best
            if step == back:
                model.load_state_dict(best)
        if back is None:
            model.load_state_dict(best)
    return watching.diagnosis


@pytest.mark.parametrize("back", [None, 17, 20])
def test_a_state_dict_that_is_no_copy_is_named(tmp_path: Path, back: int | None) -> None:
    diagnosis = trained(tmp_path / "run", lambda model: model.state_dict(), back=back)
    assert [(cause.id, cause.at) for cause in diagnosis.causes] == [("loading.no_copy", "model")]
    assert diagnosis.unexplained == ()


def through_a_file(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize(
    "keep",
    [
        lambda model: copy.deepcopy(model.state_dict()),
        lambda model: {name: value.clone() for name, value in model.state_dict().items()},
        through_a_file,
    ],
)
def test_a_copy_is_silent(tmp_path: Path, keep: Callable[[nn.Module], Any]) -> None:
    assert trained(tmp_path / "run", keep).symptoms == ()


def test_what_is_put_back_at_once_is_silent(tmp_path: Path) -> None:
    assert trained(tmp_path / "run", lambda model: model.state_dict(), back=10).symptoms == ()


def test_the_methods_of_modules_are_put_back(tmp_path: Path) -> None:
    before = nn.Module.state_dict, nn.Module.load_state_dict
    trained(tmp_path / "run", lambda model: model.state_dict())
    assert (nn.Module.state_dict, nn.Module.load_state_dict) == before
