"""What each wasteful fault does, exactly: the numbers stay as they were, and it is undone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

import lab
from lab import BadInput

if TYPE_CHECKING:
    from conftest import SmallRun

    from lab import Run, Step

# Fault, where it is, the metric that it moves, and the value of that with it; two blocks, two heads, 24 positions.
ON_THE_WAY: list[tuple[str, str, str, float]] = [
    ("performance.float64", "blocks.1.mlp", "operators.promoted", 1),
    ("performance.host_sync", "blocks.0.attn", "operators.host_reads", 1),
    ("performance.recompute", "blocks.0.mlp.up", "operators.again", 1),
    ("performance.recompute", "head", "operators.again", 1),
    ("performance.loop_over_positions", "blocks.1.mlp.down", "operators.by_position", 1),
    ("performance.quadratic_concatenation", "blocks.0.mlp", "operators.joined", (2 + 24) * 23 / 2 / 24),
    ("performance.loop_over_heads", "blocks.0.attn", "operators.slices", 2),
    # 2 x 4096^2 numbers of the mask, and three times the 144,192 that a forward pass computes beside it.
    ("performance.tables_rebuilt", "blocks.1.mlp", "tables.share", 2 * 4096**2 / (2 * 4096**2 + 3 * 144_192)),
]


@pytest.mark.parametrize(("id", "at", "metric", "value"), ON_THE_WAY)
def test_the_operators_are_others_and_the_numbers_are_not(
    small_run: SmallRun, id: str, at: str, metric: str, value: float
) -> None:
    _, healthy = small_run(steps=3)
    _, broken = small_run(steps=3, faults=[{"id": id, "at": at}])
    assert broken.series("loss").values == pytest.approx(healthy.series("loss").values, rel=1e-5)
    assert broken.last(metric, at) == pytest.approx(value)
    assert not healthy.sites(metric)[1:] or healthy.last(metric, at) < value
    # The first of its sites is the model as a whole.
    assert [site for site in broken.sites(metric) if site][:1] == [at]


@lab.plugin("test.listens", title="Keeps the run")
class Keeps(lab.Plugin):
    def lab_start(self, run: Run) -> None:
        self.run = run
        self.alive: list[Step] = []


@pytest.mark.parametrize(("id", "at"), [(id, at) for id, at, *_ in ON_THE_WAY])
def test_it_is_undone(small_run: SmallRun, id: str, at: str) -> None:
    kept = Keeps()
    small_run(kept, steps=2, faults=[{"id": id, "at": at}], probes=False)
    for name, module in kept.run.model.named_modules():
        assert not {"forward", "_taps"} & module.__dict__.keys(), name
        assert not module._forward_hooks, name


@pytest.mark.parametrize(
    ("id", "metric"), [("performance.retained_graph", "memory.graphs"), ("performance.list_grows", "memory.logits")]
)
def test_every_step_leaves_something_behind(small_run: SmallRun, id: str, metric: str) -> None:
    fault = {"id": id, "from_step": 2}
    _, healthy = small_run(steps=8)
    _, broken = small_run(steps=8, faults=[fault])
    assert broken.series("loss").values.tolist() == healthy.series("loss").values.tolist()
    assert healthy.series(metric).values.tolist() == [0] * 8
    assert broken.series(metric).values.tolist() == [0, 0, 0, 1, 2, 3, 4, 5]


def test_an_evaluation_builds_a_graph_for_each_batch(small_run: SmallRun) -> None:
    fault = {"id": "performance.gradients_at_evaluation", "from_step": 3}
    train = {"evaluate_every": 2}
    _, healthy = small_run(steps=6, train=train)
    _, broken = small_run(steps=6, train=train, faults=[fault])
    assert healthy.series("evaluation.graphs").values.tolist() == [0, 0, 0]
    assert broken.series("evaluation.graphs").values.tolist() == [0, 4, 4]
    assert broken.series("loss.held_out").values.tolist() == healthy.series("loss.held_out").values.tolist()


def test_without_a_cache_the_text_passes_again(small_run: SmallRun) -> None:
    kept = Keeps()
    _, healthy = small_run(steps=2)
    _, broken = small_run(kept, steps=2, faults=[{"id": "performance.no_cache"}])
    assert healthy.last("generation.repeated") == 0
    # A prompt of 8, and a context of 24: 16 calls grow by one, from 8 to 23; the others of the 80 slide.
    prompt = kept.run.data.prompt().shape[1]
    assert broken.last("generation.repeated") == sum(range(prompt, 24)) / 80
    assert broken.facts["sample"] == healthy.facts["sample"]
    assert all(getattr(plugin, "cached", True) for _, plugin in kept.run.plugins.list_name_plugin())


REFUSED: list[tuple[dict[str, object], dict[str, Any], str]] = [
    ({"id": "performance.recompute", "at": "blocks.0.mlp"}, {}, "needs a linear layer; .* is a FeedForward"),
    ({"id": "performance.loop_over_positions", "at": "nowhere"}, {}, "no module at 'nowhere'"),
    ({"id": "performance.loop_over_heads", "at": "blocks.0.mlp"}, {}, "needs causal attention"),
    ({"id": "performance.loop_over_heads"}, {"positions": "alibi"}, "without a bias"),
    ({"id": "performance.loop_over_heads"}, {"heads": 1}, "two heads or more"),
    ({"id": "performance.no_cache"}, {"mixer": "gru"}, "positions meet in attention"),
    ({"id": "performance.no_cache"}, {"layers": 0}, "positions meet in attention"),
    ({"id": "performance.no_cache", "from_step": 1}, {}, "leave it out"),
    ({"id": "performance.float64", "at": "nowhere"}, {}, "no site matches"),
    ({"id": "performance.tables_rebuilt", "at": "nowhere"}, {}, "no site matches"),
    ({"id": "performance.tables_rebuilt", "length": 24}, {}, "length"),
]


@pytest.mark.parametrize(("fault", "model", "text"), REFUSED)
def test_where_it_means_nothing_it_is_refused(
    small_run: SmallRun, fault: dict[str, object], model: dict[str, Any], text: str
) -> None:
    size = {"layers": 1, "width": 32, "heads": 2, "context": 24}
    with pytest.raises(BadInput, match=text):
        small_run(steps=1, model={**size, **model}, faults=[fault])
