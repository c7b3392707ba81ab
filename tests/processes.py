"""A training in several processes that are forks of the test: torchrun takes seconds to start, these do not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lab.files import METRICS
from lab.ranks import together
from lab.runtime.team import TEAMS
from lab.runtime.train import train
from lab.scenario import Scenario, make_faults
from lab.store import read_history

if TYPE_CHECKING:
    from pathlib import Path

    from lab.catalogue import Catalogue
    from lab.diagnosis.model import Diagnosis
    from lab.store import History

SMALL: dict[str, Any] = {
    "title": "processes",
    "project": "distributed",
    "steps": 12,
    "model": {"layers": 2, "width": 32, "heads": 2, "context": 24},
    "data": {"source": "markov", "batch": 16},
}


def in_processes(
    folder: Path, catalogue: Catalogue, *faults: dict[str, Any], train_: dict[str, Any], **changes: Any
) -> tuple[Diagnosis, list[History]]:
    """Train a small model; return the diagnosis of the first process, and what each recorded."""
    asked = {**SMALL, "fault": [*faults], "train": {"ranks": 2, **train_}, **changes}
    scenario = Scenario.model_validate(asked)
    folders = [folder / f"{rank}" for rank in range(scenario.train.ranks)]

    def work(rank: int) -> Diagnosis:
        folders[rank].mkdir(parents=True)
        team = TEAMS[scenario.train.parallel](scenario)
        made = make_faults(scenario, catalogue, "processes")
        return train(scenario, catalogue, folders[rank], made, team=team)[0]

    diagnoses = together(scenario.train.ranks, work, timeout=600.0)
    return diagnoses[0], [read_history(one / METRICS) for one in folders]
