"""Runs whose numbers agree are compared by the work that they took; a time, only beyond what it varies by itself."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lab
from lab.blame import of_flags
from lab.cli import status_of
from lab.explain import explain, headline
from lab.points import Point
from lab.results import load
from lab.runtime.run import run_once
from lab.scenario import Scenario, make_faults
from lab.store import History, Row
from lab.work import GROWN, SPAN, work_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from lab.catalogue import Catalogue, Plugin
    from lab.work import Work


def history(values: dict[tuple[str, str], Sequence[float]], **stages: lab.Stage) -> History:
    """Series that begin at step 0; NaN stands for what was not recorded."""
    made = lab.History(order={"a.out": 0, "a.in.out": 1, "b.out": 2}, stages=stages)
    for step in range(max(map(len, values.values()))):
        here = {key: series[step] for key, series in values.items() if step < len(series)}
        here = {key: value for key, value in here.items() if not np.isnan(value)}
        made.add(step, Row(tuple(here), np.array([*here.values()])))
    return made


def compared(kind: Any, a: Sequence[float], b: Sequence[float], says: str = "things") -> Work:
    stages = {"m": lab.Stage("work", kind, about="data", says=says)}
    return work_of(history({("m", ""): a}, **stages), history({("m", ""): b}, **stages), {})


def test_an_exact_amount_differs_from_its_first_step_on() -> None:
    found = compared("exact", [1, np.nan, 1, 3], [1, 7, 1, 4])
    (amount,) = found.amounts
    assert (found.count, found.step, found.where) == (3, 3, "data")
    assert (amount.a, amount.b, amount.says, amount.before) == (3, 4, "things", 2)
    assert compared("exact", [1, 2], [1, 2, 3]).amounts == ()


def test_what_is_kept_for_a_while_is_no_difference_and_what_grows_is_dated_where_it_began() -> None:
    for few in ([0, 1, 2, 3, 0, 1, 2, 3] * 8, [GROWN - 1] * 64):  # as of cycles that are collected now and then
        assert compared("growing", few, [0] * 64).amounts == ()
    grows = [0, 3, 0, 0, *range(1, 40)]
    found = compared("growing", grows, [0] * len(grows))
    assert found.step == 4
    assert compared("growing", [0] * len(grows), grows).step == 4


@pytest.mark.parametrize("seed", range(20))
def test_a_time_that_varies_in_both_is_no_difference(seed: int) -> None:
    draw = np.random.default_rng(seed)
    a, b = draw.lognormal(-3, 0.5, (2, 60)).tolist()
    assert compared("timed", a, b).amounts == ()
    assert (
        compared("timed", a, [1.3 * x for x in b]).amounts == ()
    )  # nor one that is a little longer: it is within what varies


def test_a_time_beyond_what_it_varies_by_itself_is_dated_where_it_began() -> None:
    draw = np.random.default_rng(0)
    short, later = draw.uniform(0.02, 0.06, (2, 60))
    later[7:] += 0.6
    later[30] = 0.05  # one step that the system interrupted is left out
    assert compared("timed", later.tolist(), short.tolist()).step == 7
    assert compared("timed", short.tolist(), later.tolist()).step == 7
    later[50:] -= 0.6  # it is no longer so
    assert compared("timed", later.tolist(), short.tolist()).amounts == ()
    assert compared("timed", [0.9] * (SPAN - 1), [0.1] * (SPAN - 1)).amounts == ()  # too few to say


@given(st.lists(st.floats(0, 1), min_size=SPAN, max_size=40), st.sampled_from(["exact", "growing", "timed"]))
def test_nothing_differs_from_itself(values: list[float], kind: str) -> None:
    assert compared(kind, values, values).amounts == ()


def test_the_place_is_the_first_module_that_holds_no_other_that_differs() -> None:
    order, stages = {"a.out": 2, "a.in.out": 1, "b.out": 3}, {"m": lab.Stage("work", "exact", says="operators")}
    sites = ("", "a", "a.in", "b")
    one, two = (history({("m", site): [n] for site in sites}, **stages) for n in (1, 2))
    found = work_of(one, two, order)
    assert found.where == "a.in"
    assert found.amounts[0].at == "a.in"
    other = history({("m", "a"): [1], ("m", "c"): [9]}, **stages)  # a module by another name is no amount of both
    assert work_of(one, other, order).amounts == ()


def test_a_flag_of_one_run_alone_says_where_to_look_and_no_other_does() -> None:
    stages = {"f": lab.Stage("batch", "flag", about="targets", says="rows are empty")}
    first = Point(2, "batch", "hash", "", 1.0, 2.0, float("inf"), exact=True)

    def told(a: list[float], b: list[float]) -> tuple[str, str] | None:
        found = of_flags((history({("f", ""): a}, **stages), history({("f", ""): b}, **stages)), first)
        return None if found is None else (found.where, found.why)

    gap = float("nan")
    assert told([0, 0, 0.5], [0, 0, 0]) == ("targets", "first")
    assert told([0, 0, gap, 0], [0, 0, gap, 0.5]) == ("targets", "second")  # nobody looked before
    assert told([0, 0, 0.5], [0, 0, 0.25]) is None
    assert told([0, 0.5, 0.5], [0, 0, 0]) is None  # it was so before the runs part
    assert told([0, 0, 0], [0, 0, 0]) is None


def test_what_is_said_of_work_is_kept_in_a_run_folder() -> None:
    for stage in (
        lab.Stage("work", "exact", says="operators of a forward pass"),
        lab.Stage("work", "timed", about="data", says="of a step - spent waiting"),
    ):
        assert lab.Stage.read(stage.text) == stage


# ---------------------------------------------------------------- between runs


def run(folder: Path, catalogue: Catalogue, *faults: dict[str, object], plugins: tuple[Plugin, ...] = ()) -> Path:
    model = {"layers": 2, "width": 32, "heads": 4, "context": 24}
    about = {"title": "small", "project": "decoder", "steps": 3, "model": model, "fault": [*faults]}
    scenario = Scenario.model_validate({**about, "data": {"source": "markov", "batch": 4}})
    made = make_faults(scenario, catalogue, "small")
    run_once("small", scenario, catalogue, folder, made, torch.device("cpu"), [*plugins])
    return folder


def test_a_refactor_that_changes_the_work_agrees_and_is_told_so(
    tmp_path: Path, catalogue: Catalogue, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = run(tmp_path / "plain", catalogue)
    looped = run(tmp_path / "looped", catalogue, {"id": "performance.loop_over_heads", "at": "blocks.1.attn"})
    both = [str(looped), str(plain)]
    assert status_of(["diff", *both]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "their work differs at blocks.1.attn from step 0 on" in told
    assert "at step 0, where it was counted first" in told
    assert "operators of a forward pass" in told
    assert "look at blocks.1.attn" in told
    assert status_of(["diff", *both, "--json", "--work"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["equal"]
    assert (found["where"], found["work"]["equal"], found["work"]["where"]) == ("blocks.1.attn", False, "blocks.1.attn")
    assert status_of(["diff", str(plain), str(plain), "--work"]) == 0
    assert "The work that was counted is the same as well" in " ".join(capsys.readouterr().out.split())


def test_numbers_that_differ_come_first(tmp_path: Path, catalogue: Catalogue) -> None:
    a = run(tmp_path / "a", catalogue, {"id": "attention.no_scale", "at": "blocks.1.attn"})
    b = run(tmp_path / "b", catalogue, {"id": "performance.loop_over_heads", "at": "blocks.0.attn"})
    found = lab_diff(a, b)
    assert found.first is not None
    assert found.where == "blocks.1.attn.pattern"
    assert found.work.where == "blocks.0.attn"
    assert "operators" not in explain(found)
    assert "work" not in headline(found)


def lab_diff(a: Path, b: Path) -> Any:
    from lab.diff import compare

    return compare(load(a), load(b))


@lab.probe("parcels", title="Parcels", stages={"parcels": lab.Stage("work", "exact", about="post", says="parcels")})
class Parcels(lab.Probe):
    """A stranger's count of work."""

    def __init__(self, count: Callable[[int], int]) -> None:
        self.count = count

    def lab_step_end(self, step: lab.Step) -> None:
        step.record("parcels", self.count(step.index))


def test_a_plugin_counts_work_of_its_own(tmp_path: Path, catalogue: Catalogue) -> None:
    a = run(tmp_path / "a", catalogue, plugins=(Parcels(lambda step: 1),))
    b = run(tmp_path / "b", catalogue, plugins=(Parcels(lambda step: 1 + step // 2),))
    found = lab_diff(a, b)
    assert (found.first, found.where, found.work.step) == (None, "post", 2)
    assert "1 and 2 parcels" in explain(found)
