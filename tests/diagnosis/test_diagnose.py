"""From symptoms to causes, by hand-made histories, and by real runs with a decoy in their scenario."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lab
from lab.catalogue import Catalogue
from lab.diagnosis.diagnose import diagnose, explain, judge
from lab.diagnosis.model import Cause, Phase, Symptom
from lab.store import History, Row

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import SmallRun

    from lab import Run


def symptom(id: str, at: str = "", since: int = 0, order: int = 0, phase: Phase = "forward", **more: Any) -> Symptom:
    return Symptom(at, since, 1.0, "0", f"{id} at {at}", id=id, basis="theory", phase=phase, order=order, **more)


LEAK = Cause("leak", "", must=("future",), cannot=("blind",), may=("low",), repair="", locate=("local",))
INVERTED = Cause("inverted", "", must=("blind", "future"), may=("low", "local"), repair="")
NAN = Cause("nan", "", must=("nonfinite",), may=("*",), repair="")
CAUSES = (LEAK, INVERTED, NAN)


def test_the_most_upstream_site_is_blamed() -> None:
    seen = [symptom("nonfinite", f"blocks.{i}", since=3, order=i) for i in (2, 1, 3)]
    findings, unexplained = explain(seen, CAUSES)
    assert [(f.id, f.at, f.since_step, f.also_at) for f in findings] == [
        ("nan", "blocks.1", 3, ("blocks.2", "blocks.3"))
    ]
    assert unexplained == []


def test_earlier_steps_are_upstream_of_earlier_sites() -> None:
    seen = [symptom("nonfinite", "blocks.0", since=4, order=0), symptom("nonfinite", "blocks.5", since=3, order=5)]
    assert explain(seen, CAUSES)[0][0].at == "blocks.5"


def test_backward_the_last_site_is_upstream() -> None:
    cause = Cause("grad", "", must=("grad",), repair="")
    seen = [symptom("grad", f"blocks.{i}", order=i, phase="backward") for i in range(3)]
    assert explain(seen, [cause])[0][0].at == "blocks.2"


def test_what_a_cause_cannot_show_refutes_it() -> None:
    assert [f.id for f in explain([symptom("future")], CAUSES)[0]] == ["leak"]
    assert [f.id for f in explain([symptom("future"), symptom("blind", "x")], CAUSES)[0]] == ["inverted"]


def test_a_cause_that_lacks_what_it_must_show_is_not_named() -> None:
    findings, unexplained = explain([symptom("blind")], CAUSES)
    assert findings == []
    assert [s.id for s in unexplained] == ["blind"]


def test_unknown_is_an_answer() -> None:
    findings, unexplained = explain([symptom("strange"), symptom("future")], CAUSES)
    assert [f.id for f in findings] == ["leak"]
    assert [s.id for s in unexplained] == ["strange"]


def test_a_symptom_before_the_site_blamed_is_not_explained_by_it() -> None:
    findings, unexplained = explain([symptom("strange", since=1), symptom("nonfinite", "a", since=2)], CAUSES)
    assert [f.id for f in findings] == ["nan"]
    assert [s.id for s in unexplained] == ["strange"]


def test_two_causes_at_once_are_both_found() -> None:
    seen = [symptom("future", since=0), symptom("nonfinite", "a", since=9), symptom("low", since=1)]
    assert {f.id for f in explain(seen, CAUSES)[0]} == {"leak", "nan"}


def test_a_locating_symptom_says_where() -> None:
    assert explain([symptom("future"), symptom("local", "blocks.1.attn", since=1)], CAUSES)[0][0].at == "blocks.1.attn"


IDS = ("future", "blind", "low", "local", "nonfinite", "strange")


@given(st.lists(st.tuples(st.sampled_from(IDS), st.sampled_from(("", "a", "b")), st.integers(0, 3), st.integers(0, 3))))
def test_every_symptom_is_explained_or_listed_and_scores_are_shares(drawn: list[tuple[str, str, int, int]]) -> None:
    seen = [symptom(id, at, since, order) for id, at, since, order in drawn]
    findings, unexplained = explain(seen, CAUSES)
    assert all(s in seen for s in unexplained)
    assert sum(f.score for f in findings) <= 1.01
    assert all(0 < f.score <= 1 for f in findings)
    assert len({f.id for f in findings}) == len(findings)
    assert not seen or findings or unexplained


def history(steps: int = 3, **metrics: float) -> History:
    made = History()
    columns = tuple((name, "") for name in metrics)
    for step in range(steps):
        made.add(step, Row(columns, np.array(list(metrics.values()))))
    made.facts["ended"] = "yes"
    return made


def with_rule(judge: Any, *reads: str) -> Catalogue:
    rule = lab.rule("r", title="the rule", reads=reads, basis="theory")(judge)
    return Catalogue(rules={"r": rule})


def test_health_lists_what_was_checked_and_a_missing_metric_is_not_a_pass() -> None:
    found = diagnose(history(loss=1.0), with_rule(lambda h: [], "loss"))
    assert (found.verdict, found.checked) == ("healthy", {"r": "the rule"})
    found = diagnose(history(loss=1.0), with_rule(lambda h: [], "grad"))
    assert found.verdict == "inconclusive"
    assert "grad" in found.not_checked["r"]


def test_a_rule_that_raises_is_not_a_pass() -> None:
    def broken(_: History) -> Iterator[Symptom]:
        raise KeyError("oops")

    found = diagnose(history(loss=1.0), with_rule(broken, "loss"))
    assert found.verdict == "inconclusive"
    assert "oops" in found.not_checked["r"]


def test_a_rule_that_raises_beside_others_that_do_not_is_no_health() -> None:
    def broken(_: History) -> Iterator[Symptom]:
        raise KeyError("oops")

    rules = with_rule(lambda h: [], "loss").rules | {"bad": with_rule(broken, "loss").rules["r"]}
    found = diagnose(history(loss=1.0), Catalogue(rules=rules))
    assert found.verdict == "inconclusive"


def test_a_run_that_was_cut_off_is_not_called_healthy() -> None:
    cut = history(loss=1.0)
    del cut.facts["ended"]
    cut.facts["steps"] = "400"
    found = diagnose(cut, with_rule(lambda h: [], "loss"))
    assert found.verdict == "inconclusive"
    assert "3 of 400" in found.not_checked["the rest of the run"]


@lab.fault("decoy.nothing", title="Does nothing", cause="mask.future_leak", moves="loss", repair="")
class Decoy(lab.Fault):
    """Claims a cause, carries the name of a fault, and breaks nothing."""

    at: str = "blocks.0.attn"

    def lab_start(self, run: Run) -> None:
        self.replace(run, f"{self.at}.mask", lambda mask: mask)


def test_a_fault_that_breaks_nothing_is_not_diagnosed(small_run: SmallRun) -> None:
    diagnosis, _ = small_run(Decoy(), expect={"verdict": "faulty", "cause": "mask.future_leak", "at": "blocks.0.attn"})
    assert diagnosis.verdict == "healthy"
    assert diagnosis.symptoms == ()


def test_what_is_broken_is_named_whatever_the_scenario_says(small_run: SmallRun) -> None:
    diagnosis, _ = small_run(
        faults=[{"id": "mask.inverted", "at": "blocks.1.attn"}], expect={"cause": "loop.no_zero_grad", "at": "loop"}
    )
    assert [(c.id, c.at) for c in diagnosis.causes] == [("mask.inverted", "blocks.1.attn")]


PAIRS = [
    ({"id": "mask.future_leak", "at": "blocks.0.attn"}, {"id": "optimizer.missing_parameter", "at": "head.weight"}),
    ({"id": "loop.no_zero_grad"}, {"id": "mask.inverted", "at": "blocks.1.attn"}),
    ({"id": "init.too_large"}, {"id": "optimizer.missing_parameter", "at": "blocks.0.attn.qkv.weight"}),
    ({"id": "mask.future_leak", "at": "blocks.1.attn"}, {"id": "numerics.nonfinite", "at": "norm.out", "from_step": 6}),
]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "+".join(f["id"] for f in pair))
def test_two_faults_at_once_are_both_named(small_run: SmallRun, pair: tuple[dict[str, object], ...]) -> None:
    diagnosis, _ = small_run(faults=list(pair))
    assert {c.id for c in diagnosis.causes} == {fault["id"] for fault in pair}


def test_a_rule_that_wants_another_look_is_a_suspect_and_not_checked() -> None:
    def unsure(_: History) -> list[Symptom]:
        raise lab.LookAgain("one look more")

    catalogue = Catalogue(rules={"a.b": lab.rule("a.b", title="t", reads=(), basis="theory")(unsure)})
    found = judge(History(), catalogue)
    assert found.suspects == ("a.b",)
    assert found.not_checked == {"a.b": "one look more"}
    assert not found.raised
