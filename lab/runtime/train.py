"""One training, watched: what a scenario, its twin, the model it starts from, and each of several processes run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lab.catalogue import Catalogue
from lab.context import Run
from lab.errors import BadInput
from lab.files import CHECKPOINT
from lab.manager import Manager
from lab.projects.pretraining.component import Tokenizer, load_checkpoint
from lab.runtime.engine import Engine
from lab.runtime.objectives import OBJECTIVES
from lab.runtime.quantized import QuantizedEvaluation
from lab.runtime.start import find_start
from lab.session import Session

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import nn

    from lab.catalogue import Fault, Plugin
    from lab.diagnosis.model import Diagnosis
    from lab.runtime.team import Team
    from lab.scenario import Scenario


def train(
    scenario: Scenario,
    catalogue: Catalogue,
    folder: Path,
    faults: Sequence[Fault] = (),
    tools: Sequence[Plugin | type[Plugin]] = (),
    *,
    device: torch.device | None = None,
    resume: bool = False,
    team: Team | None = None,
    shown: Scenario | None = None,
) -> tuple[Diagnosis, Run]:
    """Train as a scenario says, watched, and diagnose.

    Args:
        scenario: What to train, on what, for how long.
        catalogue: The probes, rules and causes.
        folder: Where to keep what is recorded; it exists.
        faults: What breaks it.
        tools: Links to other tools. One that is a class is made here.
        device: Where the model lives; the CPU if None.
        resume: Whether to go on from the checkpoint in the folder, or from step 0 where there is none yet.
        team: What makes of this process one of several.
        shown: What plugins may know of the scenario, where its faults are to stay hidden.

    Raises:
        BadInput: What the scenario asks for cannot be built, or the checkpoint is damaged.
        FaultFailed: A fault raised.
    """
    device = device or torch.device("cpu")
    start = find_start(scenario, train_start)
    resumed: dict[str, Any] | None = None
    if resume:
        path = folder / CHECKPOINT
        resumed = load_checkpoint(path) if path.is_file() else {}
    manager = Manager()
    run = Run(folder, manager, seed=scenario.seed, steps=scenario.steps, device=device, config=shown or scenario)
    session = Session(run, catalogue, agree=team.agree if team else bool)
    chosen = catalogue.probes if scenario.probes is None else {p: catalogue.probes[p] for p in scenario.probes}
    try:
        engine = Engine(scenario, session, start, resumed)
        # The core's own, each asked before those that follow it.
        objective = OBJECTIVES.get(scenario.train.objective)
        quantized = QuantizedEvaluation(engine) if scenario.train.quantize else None
        for own in (team, quantized, objective(engine) if objective else None, engine):
            if own is not None:
                manager.add(own)
        for plugin in (*tools, *faults, *chosen.values()):
            manager.add_made(plugin)
        diagnosis: Diagnosis = run.hook.lab_run(run=run)
    except BaseException as error:
        manager.event("lab_error", run, error=error)
        raise
    finally:
        session.close()
    return diagnosis, run


def train_start(name: str, scenario: Scenario, folder: Path) -> tuple[nn.Module, Tokenizer]:
    """Train, unwatched, the model that another scenario starts from.

    Raises:
        BadInput: That scenario trains no model that reads text.
    """
    plain = {"checkpoint_every": 0, "evaluate_every": 0, "ranks": 1, "shard_optimizer": False}
    alone = scenario.model_copy(update={"train": scenario.train.model_copy(update=plain), "probes": []})
    folder.mkdir()
    _, run = train(alone, Catalogue(), folder)
    tokenizer = getattr(run.data, "tokenizer", None)
    if not isinstance(tokenizer, Tokenizer):
        raise BadInput(f"train.start: {name} trains no model that reads a text's bytes; data.tokenizer = 'bpe' does")
    return run.model, tokenizer
