"""Generation in the runtime: with the cache as without, token for token, and as many passes as theory says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

import lab
from lab.runtime.engine import SAMPLE_LENGTH, Engine
from lab.runtime.run import run_scenario
from lab.scenario import Scenario

if TYPE_CHECKING:
    from pathlib import Path

    from lab import Run, Step
    from lab.catalogue import Catalogue


@lab.plugin("test.passes", title="Counts the tokens that pass the model in generation")
class Passes(lab.Plugin):
    def __init__(self) -> None:
        self.count = 0

    def lab_forward(self, run: Run, step: Step) -> None:
        if step.mode == "generate":
            assert step.batch is not None
            assert step.batch.inputs is not None
            self.count += step.batch.inputs.shape[1]


def sample(folder: Path, catalogue: Catalogue, context: int, **model: Any) -> tuple[str, int]:
    sections = {"model": {"layers": 2, "width": 16, "heads": 4, "context": context, **model}}
    scenario = Scenario.model_validate(
        {"title": "t", "project": "decoder", "steps": 3, "data": {"batch": 2}, **sections}
    )
    passes = Passes()
    outcome = run_scenario("t", scenario, catalogue, folder, tools=lambda: [passes])
    return outcome.facts["sample"], passes.count


@pytest.mark.parametrize(
    ("context", "model"),
    [
        (128, {}),
        (24, {}),  # the window slides
        (128, {"positions": "rope", "kv_heads": 2}),
        (128, {"positions": "alibi"}),
        (128, {"mixer": "gru"}),  # nothing to keep
    ],
    ids=str,
)
def test_with_a_cache_the_same_text_is_written(
    tmp_path: Path, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch, context: int, model: dict[str, Any]
) -> None:
    text, passes = sample(tmp_path / "cached", catalogue, context, **model)
    monkeypatch.setattr(Engine, "cached", False)
    plain, all_passes = sample(tmp_path / "plain", catalogue, context, **model)
    assert text == plain
    if context == 128 and "mixer" not in model:
        assert passes == 8 + SAMPLE_LENGTH - 1
        assert all_passes == sum(8 + i for i in range(SAMPLE_LENGTH))
    else:
        assert passes <= all_passes
