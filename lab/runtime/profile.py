"""Profiles a scenario: once unwatched, to measure it, and once watched, to say what is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lab.catalogue import Catalogue
from lab.errors import BadInput
from lab.profiling.gains import changes
from lab.profiling.profile import profile_of
from lab.profiling.recorder import Recorder
from lab.runtime.run import check_rows, find_device, run_once
from lab.runtime.start import with_start
from lab.scenario import check_names, make_faults

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lab.catalogue import Plugin
    from lab.diagnosis.model import Diagnosis
    from lab.profiling.gains import Change
    from lab.profiling.profile import Profile
    from lab.scenario import Scenario
    from lab.store import History

WATCHED = "watched"


@dataclass(frozen=True)
class Profiled:
    """A scenario that was profiled.

    Attributes:
        folder: Of the run that was measured.
        profile: What was measured.
        diagnosis: Of the same training, watched.
        history: What was recorded of that one.
        changes: What is most worth changing.
    """

    folder: Path
    profile: Profile
    diagnosis: Diagnosis
    history: History
    changes: list[Change] = field(default_factory=list)


def profile_scenario(
    scenario_id: str,
    scenario: Scenario,
    catalogue: Catalogue,
    folder: Path,
    *,
    device: str = "cpu",
    recorder: Recorder | None = None,
    tools: Sequence[Plugin] = (),
) -> Profiled:
    """Measure a scenario in `folder`, unwatched; then diagnose the same training in ``watched`` inside it.

    Args:
        scenario_id: What the run is called.
        scenario: The file, read.
        catalogue: Where faults, probes, rules and causes are found.
        folder: Where to keep the run. It must not hold one already.
        device: Any that torch knows.
        recorder: What measures; the default one if None.
        tools: More that look at the run that is measured.

    Raises:
        BadInput: Something that the scenario names is not there, or it needs several processes.
        NotChecked: It has too few steps.
    """
    if scenario.train.ranks > 1:
        raise BadInput(
            f"{scenario_id}: train.ranks = {scenario.train.ranks}; a profile is of one process: "
            "for several, torchrun ... --no-python lab exec --profile SCRIPT"
        )
    scenario = with_start(scenario)
    check_names(scenario, catalogue, scenario_id)
    check_rows(scenario)
    place = find_device(device)
    recorder = recorder or Recorder(watched=False)
    unwatched = Catalogue(catalogue.faults, plugins=catalogue.plugins, asked=catalogue.asked)
    bare = scenario.model_copy(update={"probes": []})
    run_once(
        scenario_id, bare, unwatched, folder, make_faults(scenario, catalogue, scenario_id), place, [recorder, *tools]
    )
    profile = profile_of(recorder)
    inside = folder / WATCHED
    faults = make_faults(scenario, catalogue, scenario_id)
    diagnosis, history = run_once(scenario_id, scenario, catalogue, inside, faults, place, ())
    return Profiled(folder, profile, diagnosis, history, changes(profile, diagnosis, history, catalogue))
