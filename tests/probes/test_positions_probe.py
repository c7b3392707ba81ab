"""Tables of positions: silent where each position has its own vector."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from judging import told

from lab.projects.positions import component as positions
from lab.store import History, Row

if TYPE_CHECKING:
    from conftest import SmallRun

faults = importlib.import_module("lab.faults.positions")
probes = importlib.import_module("lab.probes.positions")
RULES = {"positions.same", "positions.late", "positions.early"}


@pytest.mark.parametrize(
    "model", [{"positions": "learned"}, {"positions": "sinusoidal"}, {"positions": "sinusoidal", "context": 1024}]
)
def test_positions_that_differ_are_silent(small_run: SmallRun, model: dict[str, Any]) -> None:
    diagnosis, history = small_run(model={"layers": 1, "width": 32, "heads": 2, "context": 24, **model}, steps=11)
    assert history.series("positions.repeated", "positions.out").values.max() == 0
    assert set(diagnosis.checked) >= RULES
    assert diagnosis.symptoms == ()


@pytest.mark.parametrize("positions", ["rope", "alibi", "none"])
def test_without_a_table_there_is_nothing_to_check(small_run: SmallRun, positions: str) -> None:
    model = {"layers": 1, "width": 32, "heads": 2, "context": 24, "positions": positions}
    diagnosis, _ = small_run(model=model, steps=3)
    assert all("table of positions" in diagnosis.not_checked[rule] for rule in RULES)


@pytest.mark.parametrize(
    ("fault", "share"),
    [
        ({"id": "positions.none"}, 1.0),
        ({"id": "positions.truncated", "limit": 12}, 13 / 24),
        ({"id": "positions.off_by_one"}, 2 / 24),
    ],
)
@pytest.mark.parametrize("kind", ["learned", "sinusoidal"])
def test_each_fault_is_named(small_run: SmallRun, kind: str, fault: dict[str, object], share: float) -> None:
    model = {"layers": 1, "width": 32, "heads": 2, "context": 24, "positions": kind}
    diagnosis, history = small_run(model=model, faults=[fault], steps=14)
    assert history.last("positions.repeated", "positions.out") == pytest.approx(share)
    assert [(cause.id, cause.at) for cause in diagnosis.causes] == [(fault["id"], "positions")]


def history(*steps: tuple[float, float, float]) -> History:
    made = History()
    names = tuple((f"positions.{name}", "positions.out") for name in ("repeated", "early", "late"))
    for index, values in enumerate(steps):
        made.add(index * 10, Row(names, np.array(values)))
    return made


def test_a_table_may_start_from_zeros() -> None:
    zeros, learned, rules = (
        (1.0, 1.0, 1.0),
        (0.0, 0.0, 0.0),
        [probes.positions_same, probes.positions_early, probes.positions_late],
    )
    for steps in ([zeros], [zeros, zeros], [zeros, learned], [zeros, zeros, learned]):
        assert not [symptom for rule in rules for symptom in told(rule.judge(history(*steps)))]
    assert [s.at for s in probes.positions_same.judge(history(zeros, zeros, zeros))] == ["positions.out"]


@pytest.mark.parametrize("size", [(24, 32), (20, 96), (512, 64), (33, 33)])
def test_angles_in_half_precision_are_told_from_sines_in_it(size: tuple[int, int]) -> None:
    exact = positions.SinusoidalPositions(*size).table
    wide = torch.cat([exact[:, 0::2], exact[:, 1::2]], dim=-1) if size[1] % 2 == 0 else exact  # as tensor2tensor
    for table in (exact, wide, exact.bfloat16().float(), exact.half().float()):
        circle, unevenness = probes._circles(table.double())
        assert max(float(circle), float(unevenness)) < probes.STORED
    circle, unevenness = probes._circles(faults.sines(*size, torch.bfloat16).double())
    assert float(circle) < 1e-6
    assert float(unevenness) > probes.STORED
    assert faults.sines(*size, torch.float64).equal(exact)


@pytest.mark.parametrize(("kind", "judged"), [("sinusoidal", True), ("learned", False)])
def test_angles_of_a_learned_table_are_not_asked(small_run: SmallRun, kind: str, judged: bool) -> None:
    model = {"layers": 1, "width": 32, "heads": 2, "context": 24, "positions": kind}
    diagnosis, _ = small_run(model=model, steps=3)
    assert ("positions.uneven" in diagnosis.checked) is judged
    assert judged or "no attention in this model" in diagnosis.not_checked["positions.uneven"]


def test_angles_in_half_precision_are_named(small_run: SmallRun) -> None:
    model = {"layers": 1, "width": 32, "heads": 2, "context": 24, "positions": "sinusoidal"}
    diagnosis, _ = small_run(model=model, faults=[{"id": "positions.angles_half"}], steps=3)
    assert [(cause.id, cause.at) for cause in diagnosis.causes] == [("positions.angles_half", "positions")]
    assert diagnosis.unexplained == ()
