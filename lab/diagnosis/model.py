"""What a diagnosis is made of: symptoms, causes, and the diagnosis itself. Plain data, no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

    from lab.profiling.profile import Profile
    from lab.store import History

Phase = Literal["forward", "loss", "backward", "update", "run"]
PHASES: tuple[Phase, ...] = ("forward", "loss", "backward", "update", "run")

Basis = Literal["experiment", "theory", "history"]
# How much a symptom counts: an experiment with a known right answer, above a number from theory,
# above a departure from the run's own past.
WEIGHT: dict[Basis, float] = {"experiment": 3.0, "theory": 2.0, "history": 1.0}

Verdict = Literal["healthy", "faulty", "inconclusive"]


@dataclass(frozen=True)
class Symptom:
    """A metric that a rule finds wrong.

    Attributes:
        at: The site, parameter or module; ``""`` for the run as a whole.
        since: The first step at which it was seen.
        seen: The value.
        expected: What would be right, in words.
        text: One sentence for a person.
        id, basis, phase, order: Filled in from the rule, and from the place of `at` in the forward pass.
    """

    at: str
    since: int
    seen: float
    expected: str
    text: str
    id: str = ""
    basis: Basis = "history"
    phase: Phase = "run"
    order: int = 0

    @property
    def when(self) -> tuple[int, int, int]:
        """Earlier is more upstream: by step, then phase, then the order in which the pass meets the site."""
        order = -self.order if self.phase == "backward" else self.order
        return (self.since, PHASES.index(self.phase), order)

    @property
    def weight(self) -> float:
        """How much this counts as evidence."""
        return WEIGHT[self.basis]

    def to_dict(self) -> dict[str, Any]:
        """Give this as JSON types."""
        return {k: v for k, v in asdict(self).items() if k not in ("order", "phase")}


@dataclass(frozen=True)
class Cause:
    """A kind of mistake, and how it shows. Data only: registering one is naming it at the top of a plugin module.

    Attributes:
        id: ``family.name``.
        title: What is wrong, in one short sentence.
        must: Symptoms that have to be there, every one. The site blamed is that of the first, most upstream.
        may: Symptoms that it can bring about; downstream of the site they are explained by it. A trailing
            ``*`` stands for anything.
        cannot: Symptoms that refute it.
        locate: Symptoms whose site is blamed rather than that of the first `must`, in order of preference.
        module: Blame the module that holds the site, rather than the site.
        place: What to blame when no symptom has a site.
        repair: What to do about it.
        refute: What would show that it is not this.
        look: What to look at next.
        source: The paper, section or issue that it comes from.
        saves: What repairing it would save, from a profile, from what was recorded, and from the place that is blamed;
            it may raise `NotChecked`.
    """

    id: str
    title: str
    must: tuple[str, ...]
    repair: str
    may: tuple[str, ...] = ()
    cannot: tuple[str, ...] = ()
    locate: tuple[str, ...] = ()
    module: bool = False
    place: str = ""
    refute: str = ""
    look: str = ""
    source: str = ""
    saves: Callable[[Profile, History, str], Saving] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Saving:
    """What repairing something would save.

    Attributes:
        seconds: Of each step, evaluation, or token that is generated, as `of` says.
        why: What was measured, in one line.
        of: ``step``, ``evaluation`` or ``generation``.
        bytes: Of memory.
    """

    seconds: float
    why: str
    of: str = "step"
    bytes: float = 0.0


@dataclass(frozen=True)
class Finding:
    """A cause that was found in a run: where, since when, and on what evidence."""

    id: str
    title: str
    at: str
    since_step: int
    score: float
    evidence: tuple[str, ...]
    repair: str
    refute: str = ""
    look: str = ""
    also_at: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Give this as JSON types."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong with a run, on what evidence, and what was not checked.

    Attributes:
        causes: Ranked, the best explanation first.
        symptoms: All, the most upstream first.
        unexplained: The symptoms that no cause found here explains.
        checked: Rule id to its title, for each rule that had what it needs.
        not_checked: Rule id to the reason.
    """

    verdict: Verdict
    causes: tuple[Finding, ...] = ()
    symptoms: tuple[Symptom, ...] = ()
    unexplained: tuple[Symptom, ...] = ()
    checked: dict[str, str] = field(default_factory=dict)
    not_checked: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Give this as JSON types."""
        return {
            "verdict": self.verdict,
            "causes": [cause.to_dict() for cause in self.causes],
            "symptoms": [symptom.to_dict() for symptom in self.symptoms],
            "unexplained": [symptom.to_dict() for symptom in self.unexplained],
            "checked": [{"id": k, "title": v} for k, v in self.checked.items()],
            "not_checked": [{"id": k, "reason": v} for k, v in self.not_checked.items()],
        }
