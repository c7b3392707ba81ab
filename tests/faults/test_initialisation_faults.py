"""Weights that start as copies, or at 0."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

import lab
from lab.errors import BadInput

if TYPE_CHECKING:
    from conftest import SmallRun

    from lab import Run


@lab.plugin("first", title="Keeps the weights that a run starts with")
class First(lab.Plugin):
    weights: dict[str, Any]

    def lab_start(self, run: Run) -> None:
        self.weights = {name: p.detach().clone() for name, p in run.model.named_parameters()}


@pytest.mark.parametrize("id", ["init.symmetric", "init.zero"])
def test_a_start_is_what_its_fault_says_and_is_named(small_run: SmallRun, id: str) -> None:
    plain, first = First(), First()
    small_run(plain, probes=False)
    diagnosis, _ = small_run(first, faults=[{"id": id, "at": "blocks.1.mlp"}], steps=22)
    for name, p in first.weights.items():
        if not name.startswith("blocks.1.mlp") or p.dim() < 2:
            assert p.equal(plain.weights[name])
        elif id == "init.zero":
            assert not p.any()
        else:
            assert p.any()
            assert (p == (p[:, :1] if "down" in name else p[:1])).all()
    assert diagnosis.causes[0].id == id
    assert diagnosis.causes[0].at.startswith("blocks.1.mlp.up")
    assert (len(diagnosis.causes), diagnosis.unexplained) == (1, ())


@pytest.mark.parametrize("id", ["init.symmetric", "init.zero"])
def test_a_place_that_does_not_fit_and_a_later_start_are_refused(small_run: SmallRun, id: str) -> None:
    with pytest.raises(BadInput, match="at 'nowhere'"):
        small_run(faults=[{"id": id, "at": "nowhere"}])
    with pytest.raises(BadInput, match="from_step"):
        small_run(faults=[{"id": id, "from_step": 3}])
