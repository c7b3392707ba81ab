"""A scenario that starts from a trained model: trained once, kept, and that very model."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest
import torch

import lab
from lab import BadInput
from lab.runtime import start
from lab.runtime.run import run_scenario
from lab.runtime.train import train_start
from lab.scenario import Scenario, load_scenario

if TYPE_CHECKING:
    from pathlib import Path

    from lab import Run
    from lab.catalogue import Catalogue

BASE = """
title = "base"
project = "pretraining"
steps = 12
[model]
layers = 1
width = 32
heads = 2
context = 24
[data]
tokenizer = "bytes"
batch = 4
"""


@pytest.fixture(autouse=True)
def _a_cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(start.HOME, str(tmp_path / "cache"))
    (tmp_path / "base.toml").write_text(BASE, encoding="utf-8")


def scenario(tmp_path: Path, **train: Any) -> Scenario:
    section = {"objective": "sft", "start": str(tmp_path / "base.toml"), **train}
    data = {"source": "arithmetic", "batch": 4}
    return Scenario.model_validate(
        {"title": "tuned", "project": "fine-tuning", "steps": 6, "data": data, "train": section}
    )


@lab.plugin("test.begin", title="Keeps the weights with which a run begins")
class Begin(lab.Plugin):
    def lab_start(self, run: Run) -> None:
        self.weights = {name: p.detach().clone() for name, p in run.model.named_parameters()}
        self.trained = sum(p.numel() for p in run.parameters.values())


def test_it_begins_with_the_weights_of_the_other(tmp_path: Path, catalogue: Catalogue) -> None:
    begin = Begin()
    run_scenario("tuned", scenario(tmp_path), catalogue, tmp_path / "run", tools=lambda: [begin])
    model, _ = train_start("base", load_scenario(str(tmp_path / "base.toml"))[1], tmp_path / "again")
    assert begin.weights.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        assert torch.equal(p, begin.weights[name]), name


def test_it_is_trained_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def train(name: str, base: Scenario, folder: Path) -> Any:
        calls.append(name)
        return train_start(name, base, folder)

    asked = start.with_start(scenario(tmp_path))
    first = start.find_start(asked, train)
    second = start.find_start(asked, train)
    assert len(calls) == 1
    assert first is not None
    assert second is not None
    assert all(torch.equal(first.weights[name], second.weights[name]) for name in first.weights)
    (tmp_path / "base.toml").write_text(BASE.replace("steps = 12", "steps = 13"), encoding="utf-8")
    start.find_start(asked, train)
    assert len(calls) == 2  # another scenario makes another model
    (tmp_path / "base.toml").write_text(BASE.replace('"base"', '"renamed"'), encoding="utf-8")
    start.find_start(asked, train)
    assert len(calls) == 2  # a title changes no weight
    monkeypatch.setenv(start.HOME, "/proc/nowhere")
    with pytest.raises(BadInput, match=r"cannot be kept.*LAB_CACHE"):
        start.find_start(asked, train)


def test_adapters_alone_are_trained(tmp_path: Path, catalogue: Catalogue) -> None:
    begin = Begin()
    outcome = run_scenario("tuned", scenario(tmp_path, lora_rank=2), catalogue, tmp_path / "run", tools=lambda: [begin])
    assert outcome.diagnosis.verdict == "healthy"
    whole = sum(p.numel() for p in begin.weights.values())
    # Rank 2 beside qkv, proj, up, down and head of widths 32, 32, 96, 128 and 256.
    assert begin.trained == 2 * ((32 + 96) + (32 + 32) + (32 + 128) + (128 + 32) + (32 + 256))
    assert begin.trained < whole / 5


def test_a_damaged_model_is_told_in_a_line(tmp_path: Path, catalogue: Catalogue) -> None:
    asked = scenario(tmp_path)
    run_scenario("tuned", asked, catalogue, tmp_path / "run")
    (kept,) = (tmp_path / "cache").glob("*.pt")
    content = bytearray(kept.read_bytes())
    content[len(content) // 2] ^= 1
    kept.write_bytes(bytes(content))
    with pytest.raises(BadInput, match=str(kept)):
        run_scenario("tuned", asked, catalogue, tmp_path / "again")


def test_one_that_starts_from_itself(tmp_path: Path, catalogue: Catalogue) -> None:
    path = tmp_path / "base.toml"
    path.write_text(BASE + f'[train]\nstart = "{path}"\n', encoding="utf-8")
    with pytest.raises(BadInput, match="starts from itself"):
        run_scenario("tuned", scenario(tmp_path), catalogue, tmp_path / "run")


@pytest.mark.parametrize("name", ["healthy-fine-tuning", "healthy-alignment"])
def test_the_shipped_starts_are_made_within_a_minute(tmp_path: Path, name: str) -> None:
    begun = time.monotonic()
    found = start.find_start(start.with_start(load_scenario(name)[1]), train_start)
    assert found is not None
    assert time.monotonic() - begun < 60
