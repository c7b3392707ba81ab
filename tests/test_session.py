"""When a run is examined and judged."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lab

if TYPE_CHECKING:
    from conftest import SmallRun

    from lab import Run, Step


@lab.plugin("when", title="Keeps which steps are examined")
class When(lab.Plugin):
    def lab_start(self, run: Run) -> None:
        self.steps: list[int] = []

    def lab_step_end(self, run: Run, step: Step) -> None:
        if step.examined:
            self.steps.append(step.index)


def test_a_healthy_run_is_examined_more_and_more_seldom(small_run: SmallRun) -> None:
    when = When()
    small_run(when, probes=False, steps=140, data={"source": "markov", "batch": 2})
    assert when.steps == [0, 5, 10, 20, 30, 45, 67, 100, 139]


def test_a_suspicion_calls_for_a_look_at_the_next_step_and_is_told_after_three(small_run: SmallRun) -> None:
    when = When()
    diagnosis, _ = small_run(when, faults=[{"id": "targets.not_shifted", "from_step": 7}], steps=24)
    # The symptom is new at 12: one look more. Its own date is that of the first look that shows it.
    assert when.steps[1:6] == [5, 10, 11, 12, 13]
    assert [(cause.id, cause.since_step) for cause in diagnosis.causes] == [("targets.not_shifted", 10)]


@lab.probe("dear", title="Keeps when it is asked", examines=True, seldom=True)
class Dear(lab.Probe):
    def lab_start(self, run: Run) -> None:
        self.steps: list[int] = []

    def lab_examine(self, run: Run, step: Step) -> None:
        self.steps.append(step.index)


def test_what_costs_much_is_made_seldom_and_where_something_is_suspected(small_run: SmallRun) -> None:
    dear = Dear()
    small_run(dear, steps=140, data={"source": "markov", "batch": 2})
    assert dear.steps == [0, 5, 10, 30, 100, 139]
    dear = Dear()
    small_run(dear, faults=[{"id": "targets.not_shifted", "from_step": 35}], steps=50)
    assert dear.steps == [0, 5, 10, 30, 46, 47, 48, 49]
