"""What a pattern says of the scores and of the mask: silent on health, each rule on its own fault."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from attach_loops import train
from judging import told

import lab
from lab.context import Step
from lab.errors import NotChecked
from lab.store import Row

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import SmallRun

probes = importlib.import_module("lab.probes.scores")
CAUSAL = {"scores.finite", "scores.multiplied"}
ALL = {"scores.empty_row", "scores.ignored", "scores.half", "scores.tied"}


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"layers": 1, "width": 32, "heads": 1, "context": 4}},
        {"model": {"layers": 12, "width": 32, "heads": 8, "context": 24}, "train": {"lr": 0.1, "warmup": 0}},
        {"model": {"layers": 2, "width": 32, "heads": 4, "kv_heads": 1, "positions": "rope", "context": 24}},
        {"model": {"layers": 2, "width": 32, "heads": 4, "positions": "alibi", "norm_at": "post", "context": 24}},
        {"train": {"lr": 0.0}},
        {"train": {"lr": 1.0, "warmup": 0, "accumulate": 4}, "steps": 32},
    ],
)
def test_healthy_attention_is_silent(small_run: SmallRun, changes: dict[str, Any]) -> None:
    diagnosis, history = small_run(**changes)
    assert not [s for s in diagnosis.symptoms if s.id.startswith("scores.")]
    assert set(diagnosis.checked) >= CAUSAL | ALL - {"scores.ignored"}
    assert all((series.values == 0).all() for _, series in history.each("scores.open"))


@pytest.mark.parametrize("objective", ["masked", "seq2seq"])
def test_encoders_are_silent(small_run: SmallRun, objective: str) -> None:
    diagnosis, _ = small_run(train={"objective": objective})
    assert diagnosis.symptoms == ()
    assert set(diagnosis.checked) >= ALL
    assert ("scores.padding" in diagnosis.checked) == (objective == "masked")


def test_a_model_of_anybody_s_is_not_asked(tmp_path: Path) -> None:
    watch = train(tmp_path / "run", steps=12).watch
    assert watch is not None
    assert watch.diagnosis.symptoms == ()
    assert "no attention in this model" in watch.diagnosis.not_checked["scores.tied"]


@pytest.mark.parametrize("positions", ["learned", "rope", "alibi"])
@pytest.mark.parametrize("fault", [{"id": "mask.finite", "value": -3.0}, {"id": "mask.multiplied"}])
def test_a_mask_that_hides_too_little_is_named(small_run: SmallRun, fault: dict[str, object], positions: str) -> None:
    model = {"layers": 2, "width": 32, "heads": 2, "context": 24, "positions": positions}
    diagnosis, _ = small_run(faults=[{**fault, "at": "blocks.1.attn"}], model=model)
    assert [(cause.id, cause.at) for cause in diagnosis.causes] == [(fault["id"], "blocks.1.attn")]
    assert diagnosis.unexplained == ()


def test_a_mask_that_is_shifted_is_neither(small_run: SmallRun) -> None:
    for offset in (1, 24):
        diagnosis, _ = small_run(faults=[{"id": "mask.future_leak", "at": "blocks.1.attn", "offset": offset}])
        assert [cause.id for cause in diagnosis.causes] == ["mask.future_leak"]


def test_an_empty_row_is_told_from_other_nan(small_run: SmallRun) -> None:
    diagnosis, _ = small_run(faults=[{"id": "mask.empty_row", "at": "blocks.1.attn"}])
    assert [(cause.id, cause.at) for cause in diagnosis.causes] == [("mask.empty_row", "blocks.1.attn")]
    assert diagnosis.unexplained == ()
    diagnosis, history = small_run(faults=[{"id": "numerics.nonfinite", "at": "blocks.1.attn.scores"}])
    assert [cause.id for cause in diagnosis.causes] == ["numerics.nonfinite"]
    assert history.series("scores.empty_rows", "blocks.1.attn.pattern").values.max() == 0


def test_padding_that_is_silenced_is_told_from_padding_that_is_not(small_run: SmallRun) -> None:
    for id in ("mask.padding_wrong_axis", "mask.padding_seen"):
        diagnosis, _ = small_run(
            train={"objective": "masked"},
            faults=[{"id": id, "at": "blocks.1.attn"}],
            steps=24,
            data={"source": "markov"},
        )
        assert [(cause.id, cause.at) for cause in diagnosis.causes] == [(id, "blocks.1.attn")]
        assert diagnosis.unexplained == ()


@pytest.mark.parametrize("id", ["attention.scores_half", "attention.uniform", "attention.heads_tied"])
@pytest.mark.parametrize("mode", [{}, {"train": {"objective": "masked"}}])
def test_scores_that_are_rounded_ignored_or_repeated(small_run: SmallRun, id: str, mode: dict[str, Any]) -> None:
    diagnosis, _ = small_run(faults=[{"id": id, "at": "blocks.1.attn"}], **mode)
    assert [(cause.id, cause.at) for cause in diagnosis.causes] == [(id, "blocks.1.attn")]
    assert diagnosis.unexplained == ()


# ---------------------------------------------------------------- in numbers


def recorded(q: torch.Tensor, k: torch.Tensor, scores: torch.Tensor, pattern: torch.Tensor) -> dict[str, float]:
    """What is recorded of one causal layer; all [H T ...]."""
    site = SimpleNamespace(match=lambda name: [SimpleNamespace(module="a")], read=lambda *_, **__: [])
    run: Any = SimpleNamespace(sites=site, step=Step(0), plugins=SimpleNamespace(guard=lambda _, see: see))
    probe = probes.Scores()
    probe.lab_start(run)
    for name, value in {"q": q, "k": k, "scores": scores, "pattern": pattern}.items():
        probe._see(SimpleNamespace(name=f"a.{name}", module="a"), value[None])
    row, _ = run.step.flush()
    return {metric: value for metric, _, value in row}


def layer(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 8, 16).to(dtype)
    return q, k, q @ k.transpose(-2, -1) / 4


LATER = torch.ones(8, 8, dtype=torch.bool).triu(1)


@pytest.mark.parametrize("number", [-0.5, -9.0])
def test_what_a_softmax_was_given_is_read_off_its_weights(number: float) -> None:
    q, k, right = layer()
    found = recorded(q, k, right, right.masked_fill(LATER, number).softmax(-1))
    assert found["scores.open"] == 1
    assert found["scores.set"] == pytest.approx(number, abs=1e-4)
    assert found["scores.set_spread"] < found["scores.rounding"] < 1e-3
    assert found["scores.added_spread"] > 1
    found = recorded(q, k, right, (right + number * LATER).softmax(-1))
    assert found["scores.added"] == pytest.approx(number, abs=1e-4)
    assert found["scores.added_spread"] < found["scores.rounding"] < found["scores.set_spread"]


def history(site: str, *looks: dict[str, float]) -> lab.History:
    made = lab.History()
    for index, values in enumerate(looks):
        made.add(index * 10, Row(tuple((name, site) for name in values), np.array([*values.values()])))
    return made


def ahead(**changes: float) -> dict[str, float]:
    names = {"open": 1.0, "ahead": 0.2, "rounding": 1e-4, "set": 0.0, "set_spread": 2.0, "added": 0.0}
    return {f"scores.{name}": value for name, value in {**names, "added_spread": 0.0, **changes}.items()}


@pytest.mark.parametrize(
    ("changes", "finite", "multiplied"),
    [
        ({}, 0, 0),  # nothing was added: there is no mask
        ({"added": -8.0}, 1, 0),
        ({"added": -8.0, "added_spread": 0.1}, 0, 0),  # a bias of distance
        ({"added": -8.0, "set_spread": 1e-4}, 0, 0),  # scores that differ too little to tell
        ({"added": -8.0, "ahead": 1e-7}, 0, 0),  # as good as hidden
        ({"added": -8.0, "open": 0.1}, 0, 0),
        ({"added": 5e-4}, 0, 0),  # neither 0 nor far from it
        ({"set_spread": 0.0, "added_spread": 2.0}, 0, 1),
        ({"set_spread": 0.0, "added_spread": 2.0, "set": -8.0}, 1, 0),
        ({"added_spread": np.nan, "set_spread": np.inf}, 0, 0),
    ],
)
def test_one_constant_at_all_later_keys(changes: dict[str, float], finite: int, multiplied: int) -> None:
    made = history("a.pattern", ahead(**changes), ahead(**changes))
    assert len([*probes.scores_finite.judge(made)]) == finite
    assert len([*probes.scores_multiplied.judge(made)]) == multiplied
    assert not [*probes.scores_finite.judge(history("a.pattern", ahead(**changes)))]  # one look


def test_positions_that_look_at_nothing_need_padding_that_is_seen() -> None:
    def judged(padding: float) -> int:
        made = history("a.pattern", *[{"scores.silent": 0.2}] * 2)
        made.add(20, Row((("mixing.padding", ""),), np.array([padding])))
        return len([*probes.scores_padding.judge(made)])

    assert (judged(0.1), judged(0.0)) == (1, 0)
    with pytest.raises(NotChecked, match="told of padding"):
        judged(-1.0)


def test_scores_in_numbers() -> None:
    q, k, right = layer()
    pattern = right.masked_fill(LATER, -torch.inf).softmax(-1)
    found = recorded(q, k, right, pattern)
    assert found["scores.heeded"] == pytest.approx(1, abs=1e-4)
    assert (found["scores.half"], found["scores.tied"], found["scores.empty_rows"], found["scores.open"]) == (0,) * 4
    even = (pattern != 0) / (pattern != 0).sum(-1, keepdim=True)
    assert recorded(q, k, right, even)["scores.heeded"] < 1e-6
    one_head = torch.cat([pattern[:1], even[1:]])
    assert recorded(q, k, right, one_head)["scores.heeded"] < 1e-6
    assert recorded(q, k, right * 1e-3, even)["scores.heeded"] == -1
    assert recorded(q, k, right.half().float(), pattern)["scores.half"] > 0.9
    assert recorded(q, k, (right * 1.01).half().float(), pattern)["scores.half"] == 0  # other scores
    ones = torch.ones_like(q)
    assert recorded(ones, ones, right * 0 + 4, pattern)["scores.half"] == 0  # 4 is a number of float16
    assert recorded(q * 1e4, k * 1e4, (right * 1e8).half().float(), pattern)["scores.half"] > 0.9  # infinite
    assert recorded(q, k, right[[0, 0]], pattern)["scores.tied"] == 1
    assert recorded(q * 0, k, right * 0, even)["scores.tied"] == 0


def test_coarse_queries_make_coarse_scores() -> None:
    q, k, right = layer(torch.float16)
    assert "scores.half" not in recorded(q, k, right, right.float().softmax(-1))
    q, k, right = layer(torch.bfloat16)
    found = recorded(q, k, right, right.masked_fill(LATER, -torch.inf).softmax(-1))
    assert found["scores.open"] == found["scores.tied"] == 0
    assert found["scores.heeded"] == pytest.approx(1, abs=0.05)


def test_heads_that_begin_alike_may_part() -> None:
    site, tied, parted = "a.scores", {"scores.tied": 1.0}, {"scores.tied": 0.0}
    assert not told(probes.scores_tied.judge(history(site, tied, tied)))
    assert not told(probes.scores_tied.judge(history(site, tied, tied, parted)))
    assert [found.seen for found in probes.scores_tied.judge(history(site, tied, tied, tied))] == [1.0]


def test_scores_that_do_not_differ_say_nothing_of_weights() -> None:
    with pytest.raises(NotChecked, match="differ enough"):
        [*probes.scores_ignored.judge(history("a.pattern", {"scores.heeded": -1.0}))]
    assert [*probes.scores_ignored.judge(history("a.pattern", *[{"scores.heeded": 0.0}] * 2))]
    assert not [*probes.scores_ignored.judge(history("a.pattern", *[{"scores.heeded": 0.02}] * 2))]
