"""Clipping: silent where it reaches the gradients that are used, and right about where it does not."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from attach_loops import train
from torch import nn
from torch.nn.utils import clip_grad_norm_ as own_name

from lab.attach.watch import watch
from lab.diagnosis.diagnose import judge
from lab.store import History, Row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from conftest import SmallRun

    import lab
    from lab.catalogue import Catalogue

RULES = {"clip.without_effect", "clip.scaled"}


def named(diagnosis: lab.Diagnosis) -> list[str]:
    return [s.id for s in diagnosis.symptoms if s.id.startswith("clip.")]


@pytest.mark.parametrize("id", ["clip.ineffective", "clip.before_unscale"])
def test_each_fault_is_named(small_run: SmallRun, id: str) -> None:
    diagnosis, _ = small_run(faults=[{"id": id}])
    assert [(cause.id, cause.at, cause.since_step) for cause in diagnosis.causes] == [(id, "clipping", 0)]
    assert diagnosis.unexplained == ()


def test_what_was_scaled_is_clipped_to_the_limit_over_the_scale(small_run: SmallRun) -> None:
    _, history = small_run(faults=[{"id": "clip.before_unscale", "power": 10}], train={"clip": 0.5}, steps=3)
    assert history.series("clip.left").values == pytest.approx(0.5 / 1024, rel=1e-4)
    _, plain = small_run(train={"clip": 0.5}, steps=3)
    assert history.series("clip.norm").values[0] == pytest.approx(1024 * plain.series("clip.norm").values[0], rel=1e-4)


@pytest.mark.parametrize("train", [{"clip": 1e-3}, {"clip": 1e6}, {"clip": 0.5, "accumulate": 4, "lora_rank": 2}])
def test_healthy_runs_are_silent(small_run: SmallRun, train: dict[str, Any]) -> None:
    diagnosis, history = small_run(train=train)
    assert named(diagnosis) == []
    assert set(diagnosis.checked) >= RULES
    assert np.all(history.series("clip.left").values <= train["clip"] * (1 + 1e-6))


def test_a_loop_by_hand_is_checked(tmp_path: Path) -> None:
    plain = torch.nn.utils.clip_grad_norm_
    watching = train(tmp_path / "run").watch
    assert torch.nn.utils.clip_grad_norm_ is plain
    assert watching is not None
    assert set(watching.diagnosis.checked) >= RULES


class Loop:
    """A loop of anybody's, whose moments are overridden."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 5))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.parameters: Iterator[nn.Parameter] = self.model.parameters()

    def before(self) -> None:
        """Between the backward pass and the update."""

    def after(self) -> None:
        """After the update."""

    def clip(self, params: Any = None, limit: float = 0.01) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters() if params is None else params, limit)

    def diagnosis(self, folder: Path) -> lab.Diagnosis:
        with watch(self.model, self.optimizer, out=folder) as watching, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(14):
                self.optimizer.zero_grad()
                (256 * self.model(torch.randn(8, 6)).square().mean()).backward()
                self.before()
                self.optimizer.step()
                self.after()
        return watching.diagnosis


class Usual(Loop):
    def before(self) -> None:
        self.clip()


class Measured(Loop):
    def before(self) -> None:
        self.clip(limit=float("inf"))


class ByItsOwnName(Loop):
    def before(self) -> None:
        own_name(self.model.parameters(), 0.01)


class ByGroups(Loop):
    def before(self) -> None:
        for layer in self.model:
            self.clip(layer.parameters())


class OneLayer(Loop):
    def before(self) -> None:
        self.clip(self.model[0].parameters())


class Noise(Loop):
    def before(self) -> None:
        self.clip()
        for p in self.model.parameters():
            assert p.grad is not None
            p.grad.add_(torch.randn_like(p), alpha=0.1)


class OfAnother(Loop):
    def before(self) -> None:
        p = nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        self.clip([p])


class Exhausted(Loop):
    def before(self) -> None:
        self.clip(self.parameters)


class TooLate(Loop):
    def after(self) -> None:
        self.clip()


class OfCopies(Loop):
    def before(self) -> None:
        kept = [p.grad for p in self.model.parameters()]
        for p in self.model.parameters():
            p.grad = None if p.grad is None else p.grad.clone()
        self.clip()
        for p, grad in zip(self.model.parameters(), kept, strict=True):
            p.grad = grad


class StillScaled(Loop):
    def before(self) -> None:
        self.clip()
        for p in self.model.parameters():
            assert p.grad is not None
            p.grad.div_(256)


@pytest.mark.parametrize("loop", [Loop, Usual, Measured, ByItsOwnName, ByGroups, OneLayer, Noise, OfAnother])
def test_what_others_do_rightly_is_silent(tmp_path: Path, loop: Callable[[], Loop]) -> None:
    assert named(loop().diagnosis(tmp_path / "run")) == []


@pytest.mark.parametrize(
    ("loop", "cause"),
    [
        (Exhausted, "clip.ineffective"),
        (TooLate, "clip.ineffective"),
        (OfCopies, "clip.ineffective"),
        (StillScaled, "clip.before_unscale"),
    ],
)
def test_each_mistake_in_anybodys_loop_is_named(tmp_path: Path, loop: Callable[[], Loop], cause: str) -> None:
    diagnosis = loop().diagnosis(tmp_path / "run")
    assert [found.id for found in diagnosis.causes] == [cause]
    assert diagnosis.unexplained == ()


COLUMNS = tuple((f"clip.{name}", "") for name in ("limit", "norm", "left", "all", "count", "late"))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([(1, 5, 1, 1, 9, 0)] * 3, set()),
        ([(1, 0.5, 0.5, 0.5, 9, 0)] * 3, set()),  # nothing to clip
        ([(1, 0, 0, 0, 9, 0)] * 3, set()),  # no gradient at all
        ([(1, 0, 0, 2, 4, 0)] * 3, set()),  # of a part that takes no part
        ([(1, 5, 5, 5, 9, 0)] * 2, set()),  # too few
        ([(1, 5, 5, 5, 9, 0)] * 3 + [(1, 5, 1, 1, 9, 0)], set()),
        ([(1, 5, 0.3, 0.3, 9, 0)] * 3, set()),  # averaged over processes
        ([(1, 5, 5, 5, 9, 0)] * 3, {"clip.without_effect"}),
        ([(1, 5, 5, 5, 9, 0)] * 3 + [(1, 0.5, 0.5, 0.5, 9, 0)], {"clip.without_effect"}),
        ([(1, 0, 0, 2, 0, 0)] * 3, {"clip.without_effect"}),
        ([(1, 5, 2.0**-k, 1, 9, 0) for k in (9, 9, 8)], {"clip.scaled"}),
        ([(1, float("nan"), float("nan"), 1, 9, 0)] * 3, set()),
        ([(1, float("inf"), 0, float("inf"), 9, 0)] * 3, set()),
    ],
)
def test_what_is_wrong_with_a_norm(catalogue: Catalogue, rows: list[tuple[float, ...]], expected: set[str]) -> None:
    history = History()
    for index, row in enumerate(rows):
        history.add(index, Row(COLUMNS, np.array(row, dtype=float)))
    assert {s.id for s in judge(history, catalogue)[0]} == expected
