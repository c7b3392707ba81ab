"""From a run's history to a diagnosis: rules find symptoms, causes explain them.

Only the history is read: what a real run shows. The scenario, the twin and the injector are not within reach here.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from lab.diagnosis.model import Cause, Diagnosis, Finding, Symptom, Verdict
from lab.errors import LookAgain, NotChecked, one_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lab.catalogue import Catalogue, Rule
    from lab.store import History

EVIDENCE_SHOWN = 6


def diagnose(history: History, catalogue: Catalogue) -> Diagnosis:
    """Judge a run by every rule, and explain what they find."""
    symptoms, checked, not_checked, raised, _ = judge(history, catalogue)
    findings, unexplained = explain(symptoms, catalogue.causes.values())
    for name in _set_aside(history):
        not_checked[name] = f"the probe was set aside: {history.reasons.get(name, 'it raised')}"
    unseen = _unseen(history)
    if unseen:
        not_checked["the rest of the run"] = unseen
    return Diagnosis(
        verdict=_verdict(symptoms, checked, sound=not (unseen or _set_aside(history) or raised)),
        causes=tuple(findings),
        symptoms=tuple(symptoms),
        unexplained=tuple(unexplained),
        checked=checked,
        not_checked=not_checked,
    )


def _set_aside(history: History) -> list[str]:
    """Return the ids of the probes that raised."""
    return [name for name in history.facts.get("set_aside", "").split(", ") if name]


def _unseen(history: History) -> str:
    """Say what part of the run was not seen; empty when it ended."""
    if "ended" in history.facts:
        return ""
    if "unseen" in history.facts:
        return history.facts["unseen"]
    planned = history.facts.get("steps")
    of = f" of {planned}" if planned else ""
    return f"it stopped before its end; {history.last_step + 1}{of} steps were seen"


def _verdict(symptoms: list[Symptom], checked: dict[str, str], *, sound: bool) -> Verdict:
    """Health needs checks that ran, on a run seen to its end, with no probe and no rule that failed on the way."""
    if symptoms:
        return "faulty"
    return "healthy" if checked and sound else "inconclusive"


# ---------------------------------------------------------------- symptoms


class Judgement(NamedTuple):
    """What the rules say of a run so far.

    Attributes:
        symptoms: Most upstream first.
        checked: Rule id to its title, for each rule that could judge.
        not_checked: Rule id to the reason, for the others.
        raised: Those of them that raised.
        suspects: Those of them that have a suspicion, and need one look more.
    """

    symptoms: list[Symptom]
    checked: dict[str, str]
    not_checked: dict[str, str]
    raised: dict[str, str]
    suspects: tuple[str, ...]


def judge(history: History, catalogue: Catalogue) -> Judgement:
    """Apply every rule."""
    symptoms: list[Symptom] = []
    checked: dict[str, str] = {}
    not_checked: dict[str, str] = {}
    raised: dict[str, str] = {}
    suspects: list[str] = []
    for rule in catalogue.rules.values():
        try:
            found, reason = _apply(rule, history, catalogue.beside(rule))
        except LookAgain as suspicion:
            found, reason = [], str(suspicion)
            suspects.append(rule.id)
        except Exception as error:  # noqa: BLE001 - a stranger's rule may raise anything; the others still count
            found, reason = [], f"the rule raised {one_line(error)}"
            raised[rule.id] = reason
        symptoms += found
        if reason:
            not_checked[rule.id] = reason
        else:
            checked[rule.id] = rule.title
    return Judgement(sorted(symptoms, key=lambda s: s.when), checked, not_checked, raised, tuple(suspects))


def _apply(rule: Rule, history: History, probes: Sequence[str]) -> tuple[list[Symptom], str]:
    """Apply one rule; return its symptoms, and why it could not judge (empty when it could)."""
    reasons = [f"{name}: {history.reasons[name]}" for name in probes if name in history.reasons]
    missing = [metric for metric in rule.reads if not history.sites(metric)]
    if missing:
        return [], "; ".join(reasons) or f"nothing recorded {missing[0]}"
    found: list[Symptom] = []
    try:
        for symptom in rule.judge(history):
            found.append(_complete(symptom, rule, history))  # noqa: PERF401 - what came before the end is kept
    except NotChecked as reason:
        if not found and isinstance(reason, LookAgain):
            raise
        if not found:
            return [], str(reason)
    return found, "" if found else "; ".join(reasons)


def _complete(symptom: Symptom, rule: Rule, history: History) -> Symptom:
    return dataclasses.replace(
        symptom, id=rule.id, basis=rule.basis, phase=rule.phase, order=_order(symptom.at, history.order)
    )


def _order(at: str, order: dict[str, int]) -> int:
    """Return the place of a site, a module or a parameter in the forward pass; the run as a whole comes before all."""
    if not at:
        return -1
    names = (at, f"{at}.out", f"{at.rpartition('.')[0]}.out")
    return next((order[name] for name in names if name in order), len(order))


# ---------------------------------------------------------------- causes


@dataclass(frozen=True)
class _Candidate:
    cause: Cause
    anchor: Symptom
    explains: tuple[Symptom, ...]

    @property
    def weight(self) -> float:
        return sum(symptom.weight for symptom in self.explains)


def explain(symptoms: Sequence[Symptom], causes: Iterable[Cause]) -> tuple[list[Finding], list[Symptom]]:
    """Explain symptoms by as few causes as will do; return the causes, best first, and what stays unexplained.

    The cause that explains the most evidence is taken first, then the one that explains most of what is left. Of
    equals, the one that demands more comes first, then the more upstream one. A cause that explains nothing new is
    not named: a symptom downstream of an explained site does not call for a second explanation.
    """
    remaining = list(symptoms)
    total = sum(symptom.weight for symptom in symptoms)
    causes = list(causes)
    findings: list[Finding] = []
    while remaining:
        candidates = [c for cause in causes if (c := _candidate(cause, remaining, symptoms)) is not None]
        if not candidates:
            break
        best = min(candidates, key=lambda c: (-c.weight, -len(c.cause.must), c.anchor.when, c.cause.id))
        findings.append(_finding(best, symptoms, total))
        remaining = [symptom for symptom in remaining if symptom not in best.explains]
        causes.remove(best.cause)
    return findings, remaining


def _candidate(cause: Cause, remaining: Sequence[Symptom], symptoms: Sequence[Symptom]) -> _Candidate | None:
    """Return what a cause would explain, or None when it lacks a symptom that it demands or is refuted."""
    if not all(_of(symptoms, (pattern,)) for pattern in cause.must) or _of(symptoms, cause.cannot):
        return None
    if not _of(remaining, cause.must[:1]):
        return None
    anchor = min(_of(remaining, (*cause.must, *cause.locate)), key=lambda s: s.when)
    explains = [s for s in _of(remaining, (*cause.must, *cause.may, *cause.locate)) if s.when >= anchor.when]
    return _Candidate(cause, anchor, tuple(explains))


def _of(symptoms: Iterable[Symptom], patterns: Sequence[str]) -> list[Symptom]:
    """Return the symptoms whose id is one of `patterns`, where ``*`` stands for any text."""
    tests = [re.compile(re.escape(pattern).replace(r"\*", ".*")) for pattern in patterns]
    return [symptom for symptom in symptoms if any(test.fullmatch(symptom.id) for test in tests)]


def _finding(candidate: _Candidate, symptoms: Sequence[Symptom], total: float) -> Finding:
    cause, anchor = candidate.cause, candidate.anchor
    blamed = min(_of(candidate.explains, cause.must[:1]), key=lambda s: s.when)
    for pattern in cause.locate:
        places = [s for s in _of(symptoms, (pattern,)) if s.at]
        if places:
            blamed = min(places, key=lambda s: s.when)
            break
    same = [s.at for s in _of(candidate.explains, (blamed.id,)) if s.at and s.at != blamed.at]
    at = blamed.at or cause.place
    shown = sorted(candidate.explains, key=lambda s: (-s.weight, s.when))[:EVIDENCE_SHOWN]
    texts = [s.text for s in shown]
    if len(candidate.explains) > len(shown):
        texts.append(f"and {len(candidate.explains) - len(shown)} more symptoms downstream of these")
    return Finding(
        id=cause.id,
        title=cause.title,
        at=at.rpartition(".")[0] if cause.module and "." in at else at,
        since_step=anchor.since,
        score=round(candidate.weight / total, 3),
        evidence=tuple(texts),
        repair=cause.repair,
        refute=cause.refute,
        look=cause.look,
        also_at=tuple(dict.fromkeys(same)),
    )
