"""The blind challenge: a run whose fault is hidden until somebody has said what it is."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lab.errors import BadInput, nearest
from lab.names import within
from lab.scenario import ExpectSection, LearnSection, Scenario, load_scenario
from lab.shelf import find_scenarios

if TYPE_CHECKING:
    from pathlib import Path

    from lab.catalogue import Catalogue
    from lab.diagnosis.model import Diagnosis

SEALED, ANSWER = "sealed.json", "answer.json"
HEALTHY = "healthy"
HEALTHY_SHARE = 1 / 5  # of the draws: who always answers "faulty" is wrong now and then


@dataclass(frozen=True)
class Answer:
    """What a learner says of a run.

    Attributes:
        cause: The id of a cause, or of a fault with that cause; or ``healthy``.
        at: The place; empty when none is named.
        evidence: The metrics that show it.
    """

    cause: str
    at: str = ""
    evidence: tuple[str, ...] = ()


@dataclass(frozen=True)
class Mark:
    """One thing that an answer is marked on: what was said, what is so, and whether that is right."""

    subject: str
    said: str
    true: str
    right: bool


def draw(project: str, seed: int, catalogue: Catalogue) -> tuple[str, Scenario]:
    """Draw a scenario by a seed: one of those with a fault, or, now and then, the same without it.

    Raises:
        BadInput: The project has no scenario with a fault.
    """
    names = []
    for name, entry in find_scenarios().items():
        if project and entry.project != project:
            continue
        scenario = load_scenario(name)[1]
        # Several processes tell each other the whole scenario in a file of the run folder.
        if scenario.fault and scenario.train.ranks == 1 and all(s.id in catalogue.faults for s in scenario.fault):
            names.append(name)
    if not names:
        raise BadInput(f"--project {project}: no scenario with a fault to draw from")
    chance = random.Random(f"blind {seed}")  # noqa: S311 - reproducible, not secret
    name = chance.choice(sorted(names))
    scenario = load_scenario(name)[1].model_copy(update={"seed": seed})
    return name, scenario.model_copy(update={"fault": []}) if chance.random() < HEALTHY_SHARE else scenario


def shown(scenario: Scenario) -> Scenario:
    """What may be known of a drawn scenario: the model, the data and the training; neither its name nor its fault."""
    hidden = {
        "title": "blind",
        "about": "",
        "fault": [],
        "check": [],
        "expect": ExpectSection(),
        "learn": LearnSection(),
    }
    return scenario.model_copy(update=hidden)


def seal(folder: Path, name: str, scenario: Scenario) -> None:
    """Keep what was drawn, unreadable at a glance, with a hash of it."""
    drawn = {"name": name, "scenario": scenario.model_dump(mode="json", by_alias=True, exclude_none=True)}
    text = json.dumps(drawn, sort_keys=True).encode()
    kept = {"sha256": hashlib.sha256(text).hexdigest(), "sealed": base64.b64encode(zlib.compress(text)).decode()}
    (folder / SEALED).write_text(json.dumps({**kept, "hints": 0}), encoding="utf-8")


def is_sealed(folder: Path) -> bool:
    """Whether a run is blind and has not been answered."""
    return (folder / SEALED).is_file() and not (folder / ANSWER).is_file()


def unseal(folder: Path) -> tuple[str, Scenario, int]:
    """Return what was drawn: its name, the scenario, and how many hints were asked for.

    Raises:
        BadInput: The run is not blind, or the seal is broken.
    """
    path = folder / SEALED
    if not path.is_file():
        raise BadInput(f"{folder}: no blind run; `lab run --blind` makes one")
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        text = zlib.decompress(base64.b64decode(kept["sealed"]))
        same = hashlib.sha256(text).hexdigest() == kept["sha256"]
        drawn = json.loads(text)
        found = str(drawn["name"]), Scenario.model_validate(drawn["scenario"]), int(kept["hints"])
    except (OSError, ValueError, KeyError, TypeError, zlib.error) as error:
        raise BadInput(f"{path}: the seal is broken: {error}") from None
    if not same:
        raise BadInput(f"{path}: the seal is broken: its hash is another")
    return found


def next_hint(folder: Path) -> str:
    """Return the next hint of a blind run, and count it.

    Raises:
        BadInput: There are no more, or the run is not blind.
    """
    _, scenario, asked = unseal(folder)
    hints = scenario.learn.hints if scenario.fault else ["Is there anything at all that is not as it should be?"]
    if asked >= len(hints):
        raise BadInput(f"{folder}: no more than {len(hints)} hints; lab answer {folder} --give-up shows what it was")
    path = folder / SEALED
    kept = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**kept, "hints": asked + 1}), encoding="utf-8")
    return hints[asked]


def check_answer(answer: Answer, catalogue: Catalogue) -> str:
    """Return the cause that an answer means.

    Raises:
        BadInput: It names neither a cause nor a fault.
    """
    if answer.cause == HEALTHY or answer.cause in catalogue.causes:
        return answer.cause
    if answer.cause in catalogue.faults:
        return catalogue.faults[answer.cause].info.cause
    known = [HEALTHY, *catalogue.causes]
    raise BadInput(f"--cause {answer.cause}: no such cause{nearest(answer.cause, known)}; lab list causes")


def marks(answer: Answer, scenario: Scenario, catalogue: Catalogue, diagnosis: Diagnosis) -> list[Mark]:
    """Mark an answer: whether anything is wrong, what, where, and on what evidence.

    A place is right when it is the true one, holds it, or is held by it. Evidence is right when a check that found
    something reads it, or when it is what the fault moves.
    """
    said, faulty = check_answer(answer, catalogue), bool(scenario.fault)
    found = [
        Mark("detection", "healthy" if said == HEALTHY else "faulty", _verdict(faulty), (said != HEALTHY) == faulty)
    ]
    if not faulty:
        return found
    info = catalogue.faults[scenario.fault[0].id].info
    found.append(Mark("cause", said, info.cause, said == info.cause))
    at = scenario.expect.at
    if at:
        found.append(Mark("place", answer.at, at, bool(answer.at) and (within(answer.at, at) or within(at, answer.at))))
    reads = {metric for symptom in diagnosis.symptoms for metric in catalogue.rules[symptom.id].reads} | {info.moves}
    right = bool(answer.evidence) and all(metric in reads for metric in answer.evidence)
    found.append(Mark("evidence", ", ".join(answer.evidence), ", ".join(sorted(reads)), right))
    return found


def _verdict(faulty: bool) -> str:
    return "faulty" if faulty else "healthy"


def keep(folder: Path, answer: Answer | None, found: list[Mark], hints: int) -> None:
    """Keep an answer, or that it was given up; from here on the run is not hidden any more."""
    told: dict[str, Any] = {"given_up": answer is None, "hints": hints, "marks": [vars(mark) for mark in found]}
    (folder / ANSWER).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
