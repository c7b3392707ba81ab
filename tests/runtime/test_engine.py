"""The engine: a run is its scenario and its seed, and leaves nothing behind."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import lab
from lab.projects.backprop.component import AdamW, clip_gradients, learning_rate
from lab.projects.decoder.component import Decoder
from lab.runtime.data import make_source
from lab.runtime.run import run_once, run_scenario
from lab.scenario import Scenario, make_faults

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from lab import History, Run, Step
    from lab.catalogue import Catalogue


def tiny(*faults: str, **changes: Any) -> Scenario:
    return Scenario.model_validate(
        {
            "title": "tiny",
            "project": "decoder",
            "steps": 4,
            "model": {"layers": 1, "width": 16, "heads": 2, "context": 16},
            "data": {"source": "markov", "batch": 4},
            "fault": [{"id": id} for id in faults],
            **changes,
        }
    )


@lab.plugin("test.keeper", title="Keeps the run, its losses and its final weights")
class Keeper(lab.Plugin):
    run: Run

    def __init__(self) -> None:
        self.losses: list[Tensor] = []

    def lab_start(self, run: Run) -> None:
        self.run = run

    def lab_step_end(self, step: Step) -> None:
        assert step.loss is not None
        self.losses.append(step.loss.detach().clone())

    def lab_end(self, run: Run) -> None:
        self.weights = {name: p.detach().clone() for name, p in run.model.named_parameters()}
        self.at_end(run)

    def at_end(self, run: Run) -> None:
        """Look at a run that is over and still stands."""


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[Path]:
    return (tmp_path / str(number) for number in itertools.count())


@pytest.fixture
def once(folders: Iterator[Path], catalogue: Catalogue) -> Callable[..., tuple[Keeper, History]]:
    """Run one training without its twin."""

    def run(scenario: Scenario, keeper: Keeper | None = None) -> tuple[Keeper, History]:
        keeper = keeper or Keeper()
        faults = make_faults(scenario, catalogue, "tiny")
        _, history = run_once("tiny", scenario, catalogue, next(folders), faults, torch.device("cpu"), [keeper])
        return keeper, history

    return run


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit, NaN included."""
    return a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


def same_weights(a: Keeper, b: Keeper) -> bool:
    return list(a.weights) == list(b.weights) and all(same(a.weights[name], b.weights[name]) for name in a.weights)


def same_losses(a: Keeper, b: Keeper) -> bool:
    return len(a.losses) == len(b.losses) and all(map(same, a.losses, b.losses))


def differing(a: History, b: History) -> list[tuple[str, str]]:
    """The metrics that differ, of those that a run records; memory and time are those of the machine."""
    names = {(metric, site) for history in (a, b) for metric in history.metrics for site in history.sites(metric)}
    return sorted(
        (metric, site)
        for metric, site in names
        if not metric.startswith(("memory.process", "loader."))
        and not (
            np.array_equal(a.series(metric, site).steps, b.series(metric, site).steps)
            and np.array_equal(a.series(metric, site).values, b.series(metric, site).values, equal_nan=True)
        )
    )


# ---------------------------------------------------------------- a run is its scenario and its seed


@pytest.mark.parametrize("source", ["markov", "arithmetic"])
@pytest.mark.parametrize("faults", [(), ("mask.future_leak",)], ids=["healthy", "faulty"])
def test_the_same_scenario_and_seed_give_the_same_metrics_and_weights_bit_for_bit(
    folders: Iterator[Path], catalogue: Catalogue, source: str, faults: tuple[str, ...]
) -> None:
    keepers: list[Keeper] = []

    def tools() -> list[lab.Plugin]:
        keepers.append(Keeper())
        return [keepers[-1]]

    scenario = tiny(*faults, data={"source": source, "batch": 4})
    outcomes = []
    for other in (1, 2):
        torch.manual_seed(other)  # whatever the process drew before
        outcomes.append(run_scenario("tiny", scenario, catalogue, next(folders), tools=tools))
    runs = 1 + len(faults)  # with the twin
    assert len(keepers) == 2 * runs
    for first, second in zip(keepers[:runs], keepers[runs:], strict=True):
        assert same_losses(first, second)
        assert same_weights(first, second)
        assert len(first.run.history.metrics) > 20
        assert differing(first.run.history, second.run.history) == []
    left_out = ("run", "seconds")
    said, again = ({k: v for k, v in o.to_dict().items() if k not in left_out} for o in outcomes)
    assert said == again


def test_another_seed_gives_other_data_weights_and_losses(once: Callable[..., tuple[Keeper, History]]) -> None:
    keepers = [once(tiny(seed=seed))[0] for seed in (0, 1)]
    assert not same_losses(*keepers)
    assert not same(keepers[0].weights["head.weight"], keepers[1].weights["head.weight"])
    tables = [keeper.run.data.table for keeper in keepers]
    assert not torch.equal(*tables)


def test_a_run_is_the_loop_that_one_would_write_by_hand(once: Callable[..., tuple[Keeper, History]]) -> None:
    scenario = tiny(steps=6, seed=3, train={"warmup": 2, "clip": 0.5, "lr": 1e-2})
    keeper, _ = once(scenario)
    m, t = scenario.model, scenario.train
    torch.manual_seed(3)
    data = make_source(scenario.data, m.context, 3)
    model = Decoder(data.vocabulary, context=m.context, layers=m.layers, width=m.width, heads=m.heads)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": t.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = AdamW(groups, lr=t.lr)
    losses = []
    for step in range(6):
        batch = data.batch(step, "train")
        assert batch.targets is not None
        optimizer.zero_grad()
        loss = F.cross_entropy(model(*batch.args).flatten(0, 1), batch.targets.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        clip_gradients(model.parameters(), t.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, peak=t.lr, warmup=t.warmup, total=6)
        optimizer.step()
        losses.append(loss.detach())
    assert all(map(same, keeper.losses, losses))
    assert all(same(keeper.weights[name], p.detach()) for name, p in model.named_parameters())


def test_the_symptoms_that_a_cause_names_are_rules_and_the_metrics_that_rules_read_are_recorded(
    once: Callable[..., tuple[Keeper, History]], catalogue: Catalogue
) -> None:
    for cause in catalogue.causes.values():
        for symptom in (*cause.must, *cause.may, *cause.cannot, *cause.locate):
            assert symptom in catalogue.rules or symptom.endswith("*"), (cause.id, symptom)
    _, history = once(tiny())
    for rule in catalogue.rules.values():
        if not any(probe in history.reasons for probe in catalogue.beside(rule)):  # it has said why it cannot measure
            assert set(rule.reads) <= set(history.metrics), rule.id


def test_what_cannot_be_built_is_said_as_it_was_said(once: Callable[..., tuple[Keeper, History]]) -> None:
    with pytest.raises(lab.BadInput, match=r"^model.width = 16 is no multiple of model.heads = 3$"):
        once(tiny(model={"layers": 1, "width": 16, "heads": 3, "context": 16}))


# ---------------------------------------------------------------- evaluation


def test_the_held_out_loss_is_the_mean_over_four_held_out_batches(
    once: Callable[..., tuple[Keeper, History]],
) -> None:
    found: list[float] = []

    class Recomputes(Keeper):
        def at_end(self, run: Run) -> None:
            with torch.no_grad():
                for i in range(4):
                    batch = run.data.batch(i, "held-out")
                    logits = run.model(*batch.args)
                    found.append(float(F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())))

    _, history = once(tiny(), Recomputes())
    assert history.last("loss.held_out") == pytest.approx(np.mean(found), rel=1e-6)
    assert list(history.series("loss.held_out").steps) == [3]


def test_evaluating_more_often_changes_nothing_else(once: Callable[..., tuple[Keeper, History]]) -> None:
    seldom, _ = once(tiny())
    often, history = once(tiny(train={"evaluate_every": 1}))
    assert list(history.series("loss.held_out").steps) == [0, 1, 2, 3]
    assert same_losses(seldom, often)
    assert same_weights(seldom, often)


def test_evaluation_and_generation_put_back_the_mode_of_each_module(
    once: Callable[..., tuple[Keeper, History]],
) -> None:
    class Freezes(Keeper):
        def lab_start(self, run: Run) -> None:
            self.run = run
            run.model.get_submodule("blocks.0.mlp").eval()

    keeper, _ = once(tiny(train={"evaluate_every": 1}), Freezes())
    in_training = {name for name, module in keeper.run.model.named_modules() if module.training}
    assert "blocks.0.attn" in in_training
    assert "blocks.0.mlp" not in in_training


# ---------------------------------------------------------------- generation


class Generates(Keeper):
    """Generates twice after a prompt of 5 tokens for each of 3 rows."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def at_end(self, run: Run) -> None:
        self.prompt = run.data.batch(0, "held-out").args[0][:3, :5]
        step = lab.Step(3, mode="generate")
        self.texts = [
            run.hook.lab_generate(run=run, step=step, prompt=self.prompt, length=self.length) for _ in range(2)
        ]


@pytest.mark.parametrize("length", [0, 1, 11, 30])  # the context is 16
def test_generation_returns_the_prompt_and_as_many_tokens_as_were_asked_for(
    once: Callable[..., tuple[Keeper, History]], length: int
) -> None:
    generated = Generates(length)
    once(tiny(), generated)
    text = generated.texts[0]
    assert text.shape == (3, 5 + length)
    assert torch.equal(text[:, :5], generated.prompt)
    assert int(text.min()) >= 0
    assert int(text.max()) < generated.run.data.vocabulary
    assert torch.equal(*generated.texts)
    assert generated.run.model.training
    assert generated.run.sites.mode == "train"


class Sure(Generates):
    """Generates from a model that is sure of the token whose number is one higher, place by place."""

    def at_end(self, run: Run) -> None:
        last = run.data.batch(0, "held-out").args[0][:3, 4]
        self.expected = [last]

        def certain(logits: Tensor) -> Tensor:
            self.expected.append((self.expected[-1] + 1) % logits.shape[-1])
            return logits * 0 + 1e4 * F.one_hot(self.expected[-1], logits.shape[-1])[:, None]

        run.sites.replace("head.out", certain, lambda: len(self.expected) <= self.length)
        super().at_end(run)


def test_a_model_that_is_sure_generates_what_it_is_sure_of(once: Callable[..., tuple[Keeper, History]]) -> None:
    sure = Sure(20)
    once(tiny(), sure)
    assert len(sure.expected) == 21
    assert torch.equal(sure.texts[0][:, 4:], torch.stack(sure.expected, dim=1))


def test_tokens_past_the_context_are_drawn_independently(once: Callable[..., tuple[Keeper, History]]) -> None:
    generated = Generates(200)
    # Untrained, the odds are nearly even whatever came before: 16 tokens, 189 draws past the context.
    once(tiny(steps=1, train={"lr": 0.0}), generated)
    for row in generated.texts[0]:
        assert len(set(row[16:].tolist())) > 10


def test_a_sample_is_kept_as_text(once: Callable[..., tuple[Keeper, History]]) -> None:
    keeper, history = once(tiny(data={"source": "arithmetic", "batch": 4}))
    sample = history.facts["sample"]
    assert len(sample) == 8 + 80
    start = keeper.run.data.batch(0, "held-out").args[0][0, :8].tolist()
    assert sample.startswith(keeper.run.data.decode(start))
