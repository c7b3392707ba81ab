"""A request after another: silent on healthy models and on other mistakes with a cache, and a leak is named."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from lab import History, NotChecked, Row

if TYPE_CHECKING:
    from conftest import SmallRun

requests_leaked = importlib.import_module("lab.probes.requests").requests_leaked

MODELS: list[dict[str, Any]] = [
    {"layers": 1, "width": 32, "heads": 1, "context": 8, "positions": "none"},
    {"layers": 2, "width": 32, "heads": 2, "context": 24, "positions": "rope", "kv_heads": 1},
    {"layers": 5, "width": 48, "heads": 4, "context": 24, "positions": "alibi", "norm": "rms", "tied": True},
]


@pytest.mark.parametrize("model", MODELS)
def test_it_is_silent_on_healthy_models(small_run: SmallRun, model: dict[str, Any]) -> None:
    diagnosis, history = small_run(model=model, steps=3)
    assert "requests.leaked" in diagnosis.checked
    assert history.last("requests.gap") == history.last("requests.repeat") == 0
    assert not [s for s in diagnosis.symptoms if s.id.startswith(("requests.", "generation."))]


@pytest.mark.parametrize("id", ["cache.stale", "cache.truncated", "cache.corrupt", "cache.off_by_one"])
def test_another_mistake_is_no_leak(small_run: SmallRun, id: str) -> None:
    diagnosis, _ = small_run(faults=[{"id": id, "at": "blocks.1.attn"}], steps=3)
    assert [(cause.id, cause.at) for cause in diagnosis.causes] == [("cache.inconsistent", "blocks.1.attn")]
    assert "requests.leaked" in diagnosis.checked


@pytest.mark.parametrize("model", MODELS)
def test_a_leak_is_named(small_run: SmallRun, model: dict[str, Any]) -> None:
    diagnosis, _ = small_run(faults=[{"id": "cache.leaked"}], model=model, steps=3)
    found = [(cause.id, cause.at, cause.since_step) for cause in diagnosis.causes]
    assert found == [("cache.leaked", "cache", 0)]
    assert diagnosis.unexplained == ()


def test_without_a_cache_it_is_not_checked(small_run: SmallRun) -> None:
    model = {"layers": 1, "width": 32, "mixer": "gru", "context": 12}
    diagnosis, _ = small_run(model=model, steps=2)
    assert "cache" in diagnosis.not_checked["requests.leaked"]


def test_what_it_cannot_judge() -> None:
    with pytest.raises(NotChecked, match="not finite"):
        list(requests_leaked.judge(made(gap=np.nan, repeat=np.nan)))
    with pytest.raises(NotChecked, match="random"):
        list(requests_leaked.judge(made(gap=0.5, repeat=0.4)))
    assert [s.seen for s in requests_leaked.judge(made(gap=0.5, repeat=0.0))] == [0.5]
    assert not list(requests_leaked.judge(made(gap=1e-5, repeat=1e-5)))


def made(**values: float) -> History:
    history = History()
    columns = tuple((f"requests.{name}", "") for name in values)
    history.add(0, Row(columns, np.array([*values.values()])))
    return history
