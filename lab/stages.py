"""The parts of a training step, in the order in which it goes through them: how two runs are compared.

A probe says of its metrics where in a step they belong (``@lab.probe(stages={"loss": lab.Stage("loss")})``), the run
folder keeps it, and ``lab.diff`` reads it there: so a plugin's metrics are compared too, and where it is not installed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Part = Literal[
    "setting",
    "weight",
    "random",
    "mode",
    "held",
    "rate",
    "batch",
    "value",
    "beside",
    "loss",
    "gradient",
    "norm",
    "clip",
    "update",
    "evaluation",
    "experiment",
    "work",
]
# In the order in which a step goes through them, and what a person calls each.
PARTS: dict[Part, str] = {
    "setting": "settings",
    "weight": "weights before the step",
    "random": "random state",
    "mode": "training mode",
    "held": "weights that the optimiser holds",
    "rate": "learning rate",
    "batch": "batch",
    "value": "value",
    "beside": "what the loss is given beside",
    "loss": "loss",
    "gradient": "gradient",
    "norm": "gradient norm before clipping",
    "clip": "scale by which gradients were clipped",
    "update": "weights after the update",
    "evaluation": "evaluation",
    "experiment": "experiments",
    "work": "work",
}
Kind = Literal["number", "signed", "share", "exact", "growing", "timed", "newest", "parts", "rounding", "drift", "flag"]
NONE = "-"  # stands in a run folder for what a stage does not say


@dataclass(frozen=True)
class Stage:
    """Where in a step a metric belongs, and how two values of it are compared.

    Attributes:
        part: The part of a step that makes it.
        kind: ``number``: two are as far apart as their difference over the larger one. ``signed``: over `size`, for
            what may be near 0. ``share``: as they are, for what is relative already. ``exact``: they are equal or not,
            as counts and hashes are; nothing rounds them. ``growing``: a count of what should have been let go;
            ``timed``: a time, as a share of another (see `lab.work` for both). ``newest``: a number of the newest of
            the parts in which a batch passes the model; two are compared where it passes in as many, which ``parts``
            counts. ``rounding``: is not compared, but says how far, relatively, rounding alone moves what this part
            records at that site; ``drift``: how far it does so after an update. ``flag``: is not compared either; it
            is 0 unless what `says` tells is so, and where that is so in one of the runs alone, this is why its part
            differs.
        size: Of a ``signed`` metric, the metric that gives its size at the same site and step.
        about: The place to look at where it differs and has no site, such as ``cache``; by default, what its part is
            called.
        says: Of an amount of work, what it counts, as in "12 ..."; of a ``flag``, a clause.
    """

    part: Part
    kind: Kind = "number"
    size: str = ""
    about: str = ""
    says: str = ""

    @property
    def text(self) -> str:
        """What a run folder keeps."""
        told = [self.part, self.kind, self.size or NONE, self.about or NONE, self.says]
        while told[-1] in ("", NONE):
            told.pop()
        return " ".join(told)

    @classmethod
    def read(cls, text: str) -> Stage | None:
        """Read that back; None if a later version wrote it, and it means nothing here."""
        part, kind, size, about, says, *_ = [*text.split(maxsplit=4), "", "", "", "", ""]
        if part not in PARTS or kind not in get_args(Kind):
            return None
        size, about = ("" if each == NONE else each for each in (size, about))
        return cls(part, kind, size, about, says)  # type: ignore[arg-type]  # both were just looked up
