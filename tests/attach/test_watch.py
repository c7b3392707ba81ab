"""The lab around a hand-written loop over `nn.TransformerEncoder`, which the lab did not write."""

from __future__ import annotations

import copy
import io
from typing import TYPE_CHECKING, Any

import pytest
import torch
from attach_loops import LanguageModel, train

import lab
from lab.catalogue import FaultInfo, ProbeInfo

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from lab import Diagnosis, Run, Step

MISSING = "encoder.layers.0.linear1.weight"


def diagnosis_of(folder: Path, **options: Any) -> Diagnosis:
    watch = train(folder, **options).watch
    assert watch is not None
    return watch.diagnosis


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("batch_first", [True, False])
def test_the_repaired_loop_is_healthy(tmp_path: Path, seed: int, batch_first: bool) -> None:
    diagnosis = diagnosis_of(tmp_path / "run", seed=seed, batch_first=batch_first)
    assert diagnosis.verdict == "healthy"
    assert diagnosis.symptoms == ()
    assert {"causality.future", "evaluation.random", "movement.unheld", "start.loss_high"} <= set(diagnosis.checked)
    assert "pattern" in diagnosis.not_checked["attention.rows"]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("bug", "cause", "at"),
    [
        ({"causal": False}, "mask.future_leak", "encoder.layers.0.self_attn"),
        ({"causal": False, "batch_first": False}, "mask.future_leak", "encoder.layers.0.self_attn"),
        ({"left_out": MISSING}, "optimizer.missing_parameter", MISSING),
        ({"zero_grad": False}, "loop.no_zero_grad", "loop"),
    ],
)
def test_each_bug_is_named(tmp_path: Path, bug: dict[str, Any], cause: str, at: str, seed: int) -> None:
    diagnosis = diagnosis_of(tmp_path / "run", seed=seed, **bug)
    assert diagnosis.verdict == "faulty"
    assert [(found.id, found.at) for found in diagnosis.causes] == [(cause, at)]
    assert diagnosis.causes[0].since_step <= 1
    assert diagnosis.unexplained == ()


def test_the_same_causes_and_probes_serve_a_loop_of_ones_own(tmp_path: Path) -> None:
    diagnosis_of(tmp_path / "run")
    results = lab.load(tmp_path / "run")
    assert {"activation.rms", "gradient.norm", "update.ratio", "loss", "memory.process"} <= set(results.history.metrics)
    assert "encoder.layers.1.self_attn.out" in results.table("activation.rms").columns


@pytest.mark.parametrize("options", [{}, {"zero_grad": False}, {"evaluate": True}, {"causal": False}])
def test_watching_changes_nothing(tmp_path: Path, options: dict[str, Any]) -> None:
    bare, seen = train(None, **options), train(tmp_path / "run", **options)
    assert bare.losses == seen.losses
    assert all(map(torch.equal, bare.weights, seen.weights))


def test_a_watched_model_is_left_without_a_trace(tmp_path: Path) -> None:
    model = LanguageModel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    backward, before = torch.autograd.backward, [dict(vars(m)) for m in model.modules()]
    hooks = [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]
    with lab.watch(model, optimizer, out=tmp_path / "run"):
        assert torch.autograd.backward is not backward
    assert torch.autograd.backward is backward
    assert [dict(vars(m)).keys() for m in model.modules()] == [kept.keys() for kept in before]
    assert [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_copy_of_a_watched_model_is_not_watched(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LanguageModel(dropout=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tokens = torch.randint(50, (2, 8))
    with lab.watch(model, optimizer, out=tmp_path / "run") as watch:
        model(tokens).square().mean().backward()
        optimizer.step()
        twin = copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(model.encoder, file)
        seen = len(watch.run.step._scalars)
        twin(tokens)
        assert len(watch.run.step._scalars) == seen
    assert watch.diagnosis.verdict in ("healthy", "inconclusive")


def test_a_loop_that_crashes_is_diagnosed_until_there(tmp_path: Path) -> None:
    model = LanguageModel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watching = lab.watch(model, optimizer, out=tmp_path / "run")

    def loop() -> None:
        with watching:
            model(torch.randint(50, (2, 8))).square().mean().backward()
            optimizer.step()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        loop()
    assert watching.diagnosis.verdict == "inconclusive"
    assert "1 step" in watching.diagnosis.not_checked["the rest of the run"]


def test_a_model_that_is_not_one_of_language_is_watched(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with lab.watch(model, optimizer, out=tmp_path / "run") as watch:
        for _ in range(15):
            x = torch.randn(8, 4)
            optimizer.zero_grad()
            (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
            optimizer.step()
    assert watch.diagnosis.verdict == "healthy"
    assert "tokens" in watch.diagnosis.not_checked["causality.future"]
    assert "movement.unheld" in watch.diagnosis.checked


class Burst(lab.Fault):
    """A fault aimed at a module that the lab did not write."""

    info = FaultInfo("test.burst", "", "numerics.nonfinite", "activation.rms", "")

    def lab_start(self, run: Run) -> None:
        self.replace(run, "encoder.layers.1.linear1.out", self.change)

    def change(self, value: Tensor) -> Tensor:
        return value.masked_fill(torch.ones_like(value, dtype=torch.bool), float("inf"))


def test_a_fault_can_be_aimed_at_any_module(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LanguageModel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lab.watch(model, optimizer, out=tmp_path / "run", plugins=[Burst(from_step=2)]) as watch:
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randint(50, (2, 8))).square().mean().backward()
            optimizer.step()
    best = watch.diagnosis.causes[0]
    assert (best.id, best.at, best.since_step) == ("numerics.nonfinite", "encoder.layers.1.linear1.out", 2)


def test_accumulated_gradients_are_not_taken_for_a_missing_zero_grad(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LanguageModel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with lab.watch(model, optimizer, out=tmp_path / "run") as watch:
        for _ in range(6):
            for _ in range(3):
                model(torch.randint(50, (2, 8))).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    assert watch.diagnosis.verdict == "healthy"


def test_two_optimisers_that_share_a_graph_are_not_taken_for_a_missing_zero_grad(tmp_path: Path) -> None:
    """A generator's loss runs back through the discriminator, whose own gradients are cleared only later."""
    torch.manual_seed(0)
    judge = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    maker = torch.nn.Linear(2, 4)
    optimizer = torch.optim.Adam(judge.parameters(), lr=1e-2)
    other = torch.optim.Adam(maker.parameters(), lr=1e-2)
    with lab.watch(judge, optimizer, out=tmp_path / "run") as watch:
        for _ in range(12):
            made = maker(torch.randn(8, 2))
            other.zero_grad()
            judge(made).mean().backward()
            other.step()
            optimizer.zero_grad()
            (judge(torch.randn(8, 4)).mean() - judge(made.detach()).mean()).square().backward()
            optimizer.step()
    assert watch.diagnosis.symptoms == ()


@pytest.mark.parametrize("other_first", [True, False])
def test_what_a_second_optimiser_trains_is_not_missing_from_the_first(tmp_path: Path, other_first: bool) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.05)
    other = torch.optim.SGD(model[0].parameters(), lr=0.05)
    with lab.watch(model, optimizer, out=tmp_path / "run") as watch:
        for _ in range(4):
            model.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            for each in (other, optimizer) if other_first else (optimizer, other):
                each.step()
    assert watch.diagnosis.symptoms == ()
    assert watch.diagnosis.verdict == "healthy"
    assert "movement.unheld" in watch.diagnosis.checked


class Raises(lab.Probe):
    info = ProbeInfo("test.raises", "", 1, "", examines=False)

    def lab_step_end(self, step: Step) -> None:
        if step.index == 2:
            raise RuntimeError("out of ideas")


def test_a_raising_probe_is_named_and_the_loop_goes_on(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LanguageModel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with lab.watch(model, optimizer, out=tmp_path / "run", plugins=[Raises()]) as watch:
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randint(50, (2, 8))).square().mean().backward()
            optimizer.step()
    assert watch.diagnosis.verdict == "inconclusive"
    assert "out of ideas" in watch.run.plugins.set_aside["test.raises"]


# ---------------------------------------------------------------- told at once


def broken_loop(folder: Path, on_finding: Any) -> int:
    """Train a model that sees the future; return how many steps it came to."""
    torch.manual_seed(0)
    model = LanguageModel(causal=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    done = 0
    with lab.watch(model, optimizer, out=folder, on_finding=on_finding):
        for _ in range(8):
            tokens = torch.randint(50, (8, 17))
            optimizer.zero_grad()
            logits = model(tokens[:, :-1])
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            done += 1
    return done


def test_a_function_is_given_each_symptom_once(tmp_path: Path) -> None:
    found: list[lab.Symptom] = []
    assert broken_loop(tmp_path / "run", found.append) == 8
    assert found[0].id == "causality.future"
    assert len({(symptom.id, symptom.at) for symptom in found}) == len(found)


def test_a_loop_ends_when_something_is_found(tmp_path: Path) -> None:
    with pytest.raises(lab.FaultFound, match=r"^causality.future: .* in later tokens, at step 0"):
        broken_loop(tmp_path / "run", "raise")
    results = lab.load(tmp_path / "run")
    assert results.history.last_step == 0
    assert results.diagnosis().causes[0].id == "mask.future_leak"


def test_what_is_found_is_warned_of_or_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.warns(UserWarning, match="^causality.future: "):
        broken_loop(tmp_path / "warned", "warn")
    broken_loop(tmp_path / "logged", "log")
    assert [record.name for record in caplog.records if "causality.future: " in record.getMessage()] == ["lab"]
    with pytest.raises(lab.BadInput, match="on_finding = 'warm'; a function, or one word; did you mean 'warn'"):
        broken_loop(tmp_path / "neither", "warm")


def test_values_are_read_where_one_asks_and_experiments_are_as_they_were(tmp_path: Path) -> None:
    watch = train(tmp_path / "run", sites=["encoder.layers.*.linear1", "head.**"], causal=False).watch
    assert watch is not None
    read = {site for metric in ("activation.rms", "gradient.site") for site in watch.run.history.sites(metric)}
    assert read == {"encoder.layers.0.linear1.out", "encoder.layers.1.linear1.out", "head.out", "out"}
    assert [cause.id for cause in watch.diagnosis.causes] == ["mask.future_leak"]


def test_a_pattern_that_matches_nothing_is_refused_before_there_is_a_folder(tmp_path: Path) -> None:
    model = LanguageModel()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(lab.BadInput, match=r"no site and no module matches 'hed'; did you mean 'head'\?"):
        lab.watch(model, optimizer, out=tmp_path / "run", sites=["hed"])
    assert not (tmp_path / "run").exists()
