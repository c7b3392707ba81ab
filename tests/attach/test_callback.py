"""The base of callbacks for trainers of other libraries: what is watched, when, and what is said of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from attach_loops import LanguageModel, batches
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F

import lab

if TYPE_CHECKING:
    from pathlib import Path


class Trainer(lab.Watcher):
    """The least that a trainer of anybody's can be."""

    def fit(self, model: nn.Module, watched: nn.Module, optimizers: int = 1, *, closure: bool = False) -> None:
        made = [torch.optim.AdamW(model.parameters(), lr=1e-3) for _ in range(optimizers)]
        self._begin(watched, [(optimizer, None) for optimizer in made])
        for tokens in batches(12, 0):
            for optimizer in made:

                def compute(tokens: torch.Tensor = tokens, optimizer: torch.optim.Optimizer = optimizer) -> float:
                    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
                    optimizer.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]
                    return loss.item()

                if closure:
                    optimizer.step(compute)
                else:
                    compute()
                    optimizer.step()
        self._end()
        self._show()


def test_a_part_is_watched_by_its_name_where_only_that_is_called(tmp_path: Path) -> None:
    model = LanguageModel(causal=False)
    trainer = Trainer(out=tmp_path / "run", quiet=True)
    trainer.fit(model, nn.ModuleDict({"inner": model, "unused": nn.Linear(2, 2)}))
    assert trainer.watching is not None
    assert trainer.watching.run.model is model
    assert trainer.diagnosis is not None
    assert [(cause.id, cause.at) for cause in trainer.diagnosis.causes] == [
        ("mask.future_leak", "encoder.layers.0.self_attn")
    ]


@pytest.mark.parametrize("closure", [False, True])
def test_the_first_step_is_seen_whole(tmp_path: Path, closure: bool) -> None:
    torch.manual_seed(0)
    model = LanguageModel()
    trainer = Trainer(out=tmp_path / "run", quiet=True)
    trainer.fit(model, model, closure=closure)
    assert trainer.diagnosis is not None
    assert trainer.diagnosis.verdict == "healthy"
    history = lab.load(tmp_path / "run").history
    for metric in ("loss", "gradient.total", "gradient.carried"):
        assert list(history.series(metric).steps) == list(range(12)), metric
    assert history.series("learning_rate").values[0] == pytest.approx(1e-3)
    assert "start.loss_high" in trainer.diagnosis.checked


def test_nothing_of_it_is_left(tmp_path: Path) -> None:
    call, backward = nn.Module.__call__, torch.autograd.backward
    model = LanguageModel()
    trainer = Trainer(out=tmp_path / "run", quiet=True)
    trainer.fit(model, model)
    assert (nn.Module.__call__, torch.autograd.backward) == (call, backward)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert trainer.watching is not None
    assert not trainer.watching.run.optimizer._optimizer_step_pre_hooks


def test_a_model_that_is_never_called_is_said_to_be_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    call, trainer = nn.Module.__call__, Trainer()
    trainer.fit(LanguageModel(), nn.Linear(3, 3))
    assert trainer.diagnosis is None
    assert nn.Module.__call__ is call
    assert "lab: nothing to diagnose: no module that the optimiser trains was called" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_second_training_has_a_folder_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Trainer(out=tmp_path / "run")
    for _ in range(2):
        torch.manual_seed(0)
        model = LanguageModel()
        trainer.fit(model, model)
        assert trainer.diagnosis is not None
        assert trainer.diagnosis.verdict == "healthy"
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("lab: healthy: LanguageModel, 12 steps, ")
    assert [line for line in told if "lab diagnose" in line] == [
        f"lab: more: lab diagnose {tmp_path / 'run'}",
        f"lab: more: lab diagnose {tmp_path / 'run-2'}",
    ]


def test_what_was_found_is_printed_with_place_evidence_and_repair(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = LanguageModel(causal=False)
    trainer = Trainer(out=tmp_path / "run")
    trainer.fit(model, model)
    assert trainer.diagnosis is not None
    cause = trainer.diagnosis.causes[0]
    told = capsys.readouterr().err
    assert f"lab: 1. {cause.title} (mask.future_leak), at encoder.layers.0.self_attn" in told
    assert all(f"lab:    - {text}\n" in told for text in cause.evidence)
    assert f"lab:    repair: {cause.repair}\n" in told


def test_a_word_that_means_nothing_is_refused() -> None:
    with pytest.raises(lab.BadInput, match="on_finding = 'halt'; a function, or one of the words raise, stop"):
        Trainer(on_finding="halt")


def test_weights_in_shards_are_refused_before_a_process_waits_for_the_others() -> None:
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        model = nn.Linear(4, 4)
        fully_shard(model)
        with pytest.raises(lab.BadInput, match="each process holds a part of the weights only"):
            Trainer()._begin(model, [])
    finally:
        dist.destroy_process_group()
