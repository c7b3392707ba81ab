"""A scenario, profiled: the tables add up, and what they say follows from what was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from lab.catalogue import Catalogue
from lab.errors import BadInput, NotChecked
from lab.manager import discover
from lab.profiling.costs import Cost
from lab.profiling.gains import amdahl, changes, possible
from lab.profiling.keep import MEMORY, NUMBERS, ROOFLINE, keep
from lab.profiling.machine import Machine, measure
from lab.profiling.memory import KINDS
from lab.profiling.places import LOOP, Place
from lab.profiling.profile import Profile, Row, grouped_name, profile_of
from lab.profiling.recorder import NEEDED, Recorder
from lab.runtime.profile import Profiled, profile_scenario
from lab.runtime.train import train
from lab.scenario import load_scenario

if TYPE_CHECKING:
    from pathlib import Path

    from lab.scenario import Scenario

MACHINE = Machine({"float32": 100e9, "bfloat16": 200e9}, 10e9, 1e-6, 1, "cpu")


def short(name: str, **train: object) -> Scenario:
    """A scenario, no longer than a profile needs."""
    loaded = load_scenario(name)[1]
    section = loaded.train.model_copy(update=train)
    return loaded.model_copy(update={"steps": NEEDED + 2, "train": section})


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> Profiled:
    """One profile, of a decoder that computes a layer twice."""
    folder = tmp_path_factory.mktemp("profile") / "run"
    return profile_scenario("x", short("one-branch-too-much-work", evaluate_every=10), discover(), folder)


def test_all_of_a_step_is_somewhere(profiled: Profiled) -> None:
    profile = profiled.profile
    assert sum(row.seconds for row in profile.rows) + profile.loop == pytest.approx(profile.step)
    assert sum(row.share for row in profile.rows) == pytest.approx(profile.named)
    assert profile.named > 0.5  # a clock is no matter for a test; benchmarks print what it is
    assert all(row.seconds >= 0 for row in profile.rows)


def test_the_flops_of_a_step_are_those_of_theory(profiled: Profiled) -> None:
    scenario = load_scenario("one-branch-too-much-work")[1]
    model, rows, length = scenario.model, profiled.profile.shape[0], profiled.profile.shape[1]
    c, positions = model.width, rows * length
    block = 24 * positions * c * c + 4 * rows * length * length * c
    twice = 8 * positions * c * c  # one linear layer of a feed-forward, which is computed again
    head = sum(row.cost.flops for row in profiled.profile.rows if row.name.startswith("head"))
    whole = sum(row.cost.flops for row in profiled.profile.rows)
    assert whole - head == 3 * (model.layers * block + twice)


def test_parts_of_the_loop_are_told_apart(profiled: Profiled) -> None:
    names = {row.name for row in profiled.profile.rows if not row.direction}
    assert names >= {"data", "loss", "clip", "optimizer", "zero_grad"}
    assert LOOP.name not in names
    assert profiled.profile.part("optimizer").cost.calls > 0


def test_operators_are_counted_and_timed(profiled: Profiled) -> None:
    operators = {each.name: each for each in profiled.profile.operators}
    assert operators["addmm"].cost.flops > 0
    assert sum(each.cost.flops for each in operators.values()) == sum(r.cost.flops for r in profiled.profile.rows)
    seconds = [each.seconds for each in profiled.profile.operators]
    assert seconds == sorted(seconds, reverse=True)
    assert min(seconds) > 0


def test_an_evaluation_is_beside_the_steps(profiled: Profiled) -> None:
    assert len(profiled.profile.scopes["evaluation"].times) == 3
    assert profiled.profile.whole("generation") > 0
    assert all(row.direction != "no gradient" for row in profiled.profile.rows)


def test_what_is_wrong_is_first_with_what_it_costs(profiled: Profiled) -> None:
    first = profiled.changes[0]
    assert profiled.diagnosis.causes[0].id == first.cause == "performance.recompute"
    row = profiled.profile.at(first.at)
    assert first.seconds == pytest.approx(row.seconds / 2)  # one of two products
    assert first.gain == pytest.approx(amdahl(profiled.profile.step, first.seconds))
    assert not first.bound


def test_it_is_kept(profiled: Profiled, tmp_path: Path) -> None:
    keep(profiled.profile, profiled.changes, tmp_path)
    told = json.loads((tmp_path / NUMBERS).read_text())
    assert told["changes"][0]["cause"] == "performance.recompute"
    assert {row["bound"] for row in told["places"]} <= {"compute", "memory", "dispatch", "kernel", "Python", "loader"}
    assert told["memory"]["peak_bytes"] == sum(told["memory"]["peak_by_kind"].values())
    for picture in (ROOFLINE, MEMORY):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert [*(tmp_path / "tensorboard").iterdir()]


def test_a_profiled_training_is_the_same_training(tmp_path: Path) -> None:
    """To the last bit, although hooks, clocks and a counter were in it."""
    weights = []
    for name, tools in (("alone", []), ("measured", [Recorder(watched=False)])):
        (tmp_path / name).mkdir()
        _, run = train(
            short("healthy-multihead").model_copy(update={"probes": []}), Catalogue(), tmp_path / name, (), tools
        )
        weights.append([p.detach().clone() for p in run.model.parameters()])
        assert all(not module._forward_hooks for module in run.model.modules())
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_a_training_that_is_too_short_is_told_so(tmp_path: Path) -> None:
    recorder = Recorder(watched=False)
    few = short("healthy-multihead").model_copy(update={"steps": 6, "probes": []})
    (tmp_path / "run").mkdir()
    train(few, Catalogue(), tmp_path / "run", (), [recorder])
    with pytest.raises(NotChecked, match=f"too few steps: it takes {NEEDED}"):
        profile_of(recorder)


def test_several_processes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="lab exec --profile"):
        profile_scenario("x", short("healthy-multihead", ranks=2), discover(), tmp_path / "run")


# ---------------------------------------------------------------- what follows from a table


def profile_with(*rows: Row, loop: float = 0.0) -> Profile:
    """A profile that found this."""
    step = sum(row.seconds for row in rows) + loop
    none = {kind: [0] for kind in KINDS}
    return Profile(step, step, [*rows], loop, [], MACHINE, none, {}, [], [], 0, {}, (), 0, 1.0)


def test_each_bound_is_told_from_the_others() -> None:
    def bound(seconds: float, cost: Cost, **formats: int) -> str:
        row = Row("layer", "forward", seconds, cost=cost, formats=formats)
        return profile_with(row).at("layer").bound

    assert bound(1e-3, Cost(calls=1, flops=90_000_000), float32=90_000_000) == "compute"
    assert bound(1e-3, Cost(calls=1, read=4_000_000, written=4_000_000)) == "memory"
    assert bound(1e-3, Cost(calls=600, views=300)) == "dispatch"
    assert bound(1e-3, Cost(calls=20)) == "Python"
    assert bound(1e-3, Cost(calls=20, waits=1)) == "host sync"
    assert bound(1e-3, Cost(calls=1, read=1_000_000)) == "kernel"
    assert profile_with(Row("data", "", 1e-3)).part("data").bound == "loader"


def test_what_waits_for_its_data_is_told_so() -> None:
    layer = Row("layer", "forward", 1e-3, cost=Cost(flops=10**8), formats={"bfloat16": 10**8})
    first = possible(profile_with(Row("data", "", 3e-3, cost=Cost(1)), layer))[0]
    assert (first.at, first.seconds) == ("data", 3e-3)
    assert first.gain == pytest.approx(4.0)
    assert first.bound


def test_idle_cores_are_told_of_where_a_pass_was_quicker_on_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lab.profiling.gains.cores", lambda: 2)
    layer = Row("layer", "forward", 1e-3, cost=Cost(flops=2 * 10**8), formats={"bfloat16": 2 * 10**8})
    profile = replace(profile_with(layer), fair=0.6)
    [change] = possible(profile)
    monkeypatch.setattr("lab.profiling.gains.cores", lambda: 1)
    assert possible(profile) == []
    assert change.seconds == pytest.approx(0.4e-3)
    assert "1.67 times as long in 1 thread as with one for each core" in change.why


def test_a_training_at_its_roof_is_told_nothing() -> None:
    layer = Row("layer", "forward", 1e-3, cost=Cost(flops=2 * 10**8), formats={"bfloat16": 2 * 10**8}, bound="compute")
    assert possible(profile_with(layer)) == []


def test_a_cause_without_a_price_is_left_out(profiled: Profiled) -> None:
    found = changes(profiled.profile, profiled.diagnosis, profiled.history, Catalogue())
    assert all(not change.cause for change in found)


def test_layers_are_joined_by_name() -> None:
    assert grouped_name("blocks.12.attn.0") == "blocks.*.attn.*"
    assert grouped_name("conv1d.h2") == "conv1d.h2"
    rows = [Row(f"blocks.{i}.attn", "forward", 1e-3, 0.5, cost=Cost(flops=5)) for i in range(2)]
    [joined] = profile_with(*rows).grouped()
    assert (joined.name, joined.seconds, joined.cost.flops) == ("blocks.*.attn", 2e-3, 10)


def test_the_machine_is_measured_without_drawing() -> None:
    state = torch.random.get_rng_state()
    found = measure(torch.device("cpu"), (torch.float64,))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert found.flops["float64"] < found.flops["float32"] * 1.5
    assert found.seconds(1e9, 0) == pytest.approx(1e9 / found.flops["float32"])


def test_a_place_is_what_it_is_called() -> None:
    assert Place("a", "forward") != Place("a", "backward")
