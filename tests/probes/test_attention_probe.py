"""The rules on what attention does inside: silent on health, each on its own fault."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from judging import told

from lab.errors import NotChecked
from lab.store import History, Row

if TYPE_CHECKING:
    from conftest import SmallRun

probes = importlib.import_module("lab.probes.attention")
RULES = {
    "attention.scale",
    "attention.swapped",
    "attention.columns",
    "attention.cut",
    "attention.hidden_past",
    "attention.head_silent",
    "attention.beside",
    "attention.partial",
}


def history(*steps: dict[tuple[str, str], float]) -> History:
    made = History()
    for index, values in enumerate(steps):
        made.add(index * 10, Row(tuple(values), np.array([*values.values()])))
    return made


@pytest.mark.parametrize(
    "model",
    [
        {"layers": 1, "width": 32, "heads": 1},
        {"layers": 12, "width": 32, "heads": 8},
        {"layers": 1, "width": 256, "heads": 4},
        {"layers": 2, "width": 32, "heads": 4, "kv_heads": 1, "positions": "rope", "norm": "rms"},
        {"layers": 2, "width": 32, "heads": 4, "positions": "alibi", "norm_at": "post", "tied": True},
        {"layers": 2, "width": 32, "heads": 4, "positions": "sinusoidal", "activation": "swiglu"},
        {"layers": 2, "width": 32, "heads": 2, "positions": "none"},
    ],
)
def test_healthy_attention_is_silent(small_run: SmallRun, model: dict[str, Any]) -> None:
    diagnosis, _ = small_run(model={"context": 24, **model})
    assert diagnosis.symptoms == ()
    assert set(diagnosis.checked) >= RULES


@pytest.mark.parametrize("train", [{"lr": 0.0}, {"lr": 1.0, "warmup": 0}, {"lr": 0.1, "clip": 1e6}, {"accumulate": 4}])
def test_no_learning_rate_makes_a_softmax_look_masked(small_run: SmallRun, train: dict[str, Any]) -> None:
    diagnosis, _ = small_run(train=train, steps=32)
    assert not [s for s in diagnosis.symptoms if s.id.startswith(("attention.", "mixing.", "positions."))]


@pytest.mark.parametrize(
    ("objective", "rule"), [("masked", "attention.hidden_future"), ("seq2seq", "attention.hidden_future")]
)
def test_encoders_are_silent(small_run: SmallRun, objective: str, rule: str) -> None:
    diagnosis, _ = small_run(train={"objective": objective})
    assert diagnosis.symptoms == ()
    assert rule in diagnosis.checked


@pytest.mark.parametrize(
    ("id", "rule"),
    [
        ("attention.no_scale", "attention.scale"),
        ("attention.wrong_axis", "attention.columns"),
        ("attention.mask_after_softmax", "attention.cut"),
        ("attention.wrong_merge", "attention.beside"),
        ("attention.qk_swapped", "attention.swapped"),
        ("attention.head_dead", "attention.head_silent"),
        ("mask.partial_leak", "attention.partial"),
        ("mask.blocks_past", "attention.hidden_past"),
    ],
)
def test_each_fault_is_named_where_it_is(small_run: SmallRun, id: str, rule: str) -> None:
    diagnosis, _ = small_run(faults=[{"id": id, "at": "blocks.1.attn"}], steps=24)
    assert rule in {symptom.id for symptom in diagnosis.symptoms}
    assert [(cause.id, cause.at) for cause in diagnosis.causes] == [(id, "blocks.1.attn")]
    assert diagnosis.unexplained == ()


def test_a_mask_the_wrong_way_round_stays_one_cause(small_run: SmallRun) -> None:
    diagnosis, _ = small_run(faults=[{"id": "mask.inverted", "at": "blocks.0.attn"}], steps=24)
    assert [cause.id for cause in diagnosis.causes] == ["mask.inverted"]


def test_a_multiple_of_the_scores_is_told_from_other_scores() -> None:
    scale, error = ("attention.scale", "x.scores"), ("attention.scale_error", "x.scores")
    (found,) = probes.attention_scale.judge(history({scale: 1.0, error: 0.0}, {scale: 4.0, error: 0.001}))
    assert (found.at, found.since, found.seen) == ("x.scores", 10, 4.0)
    for value, distance in ((1.03, 0.0), (4.0, 0.5), (0.0, 0.0), (np.nan, np.nan), (np.inf, np.nan)):
        assert not [*probes.attention_scale.judge(history({scale: value, error: distance}))]


def test_columns_are_asked_of_only_where_rows_are_wrong() -> None:
    row, column = ("attention.row_error", "x.pattern"), ("attention.column_error", "x.pattern")
    assert not [*probes.attention_columns.judge(history({row: 1e-6, column: 1e-6}))]  # an even pattern
    assert [*probes.attention_columns.judge(history({row: 0.3, column: 1e-6}))]


def test_values_may_start_from_weights_of_0() -> None:
    name = ("attention.head_output", "x")
    assert not told(probes.attention_head_silent.judge(history({name: 0.0})))
    assert not [*probes.attention_head_silent.judge(history({name: 0.0}, {name: 0.0}, {name: 0.1}))]
    assert [*probes.attention_head_silent.judge(history({name: 0.0}, {name: 0.0}, {name: 0.0}))]


def test_a_shifted_mask_is_no_partial_leak() -> None:
    share, causal = ("attention.reaching", "x.pattern"), ("causality.next_token", "")
    assert not [*probes.attention_partial.judge(history({share: 1.0, causal: 1.0}))]
    assert [*probes.attention_partial.judge(history({share: 0.1, causal: 1.0}))]
    with pytest.raises(NotChecked, match="need not be causal"):
        [*probes.attention_partial.judge(history({share: 0.1, causal: 0.2}))]


def test_a_model_without_a_causal_mask_says_so() -> None:
    with pytest.raises(NotChecked, match="causal mask"):
        [*probes.attention_hidden_past.judge(history({("attention.row_error", "x.pattern"): 0.0}))]
    with pytest.raises(NotChecked, match="without a causal mask"):
        [*probes.attention_hidden_future.judge(history({("attention.row_error", "x.pattern"): 0.0}))]
