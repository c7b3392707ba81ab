"""Faults of references do what they say, and are undone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import lab
from lab.errors import BadInput
from lab.manager import discover
from lab.runtime.run import run_scenario
from lab.scenario import load_scenario

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import SmallRun

IDS = ("alignment.reference_aliased", "alignment.reference_trained")
SCENARIO = {IDS[0]: "no-opinion-after-all", IDS[1]: "the-ground-moves-along"}


@pytest.mark.parametrize("id", IDS)
def test_without_a_reference_it_is_refused(small_run: SmallRun, id: str) -> None:
    with pytest.raises(BadInput, match=f"{id}: needs a reference model"):
        small_run(faults=[{"id": id}])


@pytest.mark.parametrize("id", IDS)
def test_it_is_named_from_its_step_on(tmp_path: Path, id: str) -> None:
    name = SCENARIO[id]
    scenario = load_scenario(name)[1]
    late = scenario.fault[0].model_validate({**scenario.fault[0].model_dump(), "from_step": 6})
    short = scenario.model_copy(update={"steps": 12, "fault": [late], "check": []})
    outcome = run_scenario(name, short, discover(), tmp_path / "run", twin=False)
    assert [(cause.id, cause.at) for cause in outcome.diagnosis.causes] == [(id, "reference")]
    margin = lab.load(tmp_path / "run").history.series("preference.margin").values
    assert margin[0] == 0
    assert (margin[1:6] != 0).all()
    assert (margin[6:] == 0).all() == (id == IDS[0])


def test_a_reference_moves_by_the_share_of_the_way() -> None:
    policy, reference = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    make: Any = discover().fault(IDS[1])
    fault = make(share=0.25)

    class Holder:
        def __init__(self) -> None:
            self.reference = reference

    class Plugins:
        def list_name_plugin(self) -> list[tuple[str, object]]:
            return [("fault", fault), ("objective", Holder())]

    class ARun:
        model, plugins, step = policy, Plugins(), lab.Step(0)

    expected = 0.75 * reference.weight.detach() + 0.25 * policy.weight.detach()
    fault.lab_start(ARun())
    answer = fault.lab_update(ARun())
    next(answer)
    with pytest.raises(StopIteration):
        answer.send(True)
    torch.testing.assert_close(reference.weight.detach(), expected)
