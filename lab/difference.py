"""How two runs differ, as it was found: what agrees, the first number that does not, and the place to look at."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lab.work import Work

if TYPE_CHECKING:
    from lab.blame import Blame
    from lab.points import Point
    from lab.stages import Part


@dataclass(frozen=True)
class Agreed:
    """A part of a step in which the runs agree.

    Attributes:
        part: Which.
        count: How many numbers.
        closest: The largest distance among them.
        allowed: The most that rounding may have moved any of them.
    """

    part: Part
    count: int
    closest: float
    allowed: float

    def with_(self, other: Agreed) -> Agreed:
        """Join what agrees in other steps."""
        most = max(self.closest, other.closest), max(self.allowed, other.allowed)
        return Agreed(self.part, self.count + other.count, *most)


@dataclass(frozen=True)
class Difference:
    """How two runs differ.

    Attributes:
        first: The first number that differs; None if none does.
        place: The first number at a place in the model that differs: `first`, or at a later step, where values inside
            were not recorded before.
        where: The place to look at: that of `first`; what only one run has just upstream of it; or, where it is no
            place in the model, the part of the loop that makes it. Where all numbers agree, that of `work`.
        after: The site that agrees last before `first`, where that is a value: what makes them differ is between them.
        before: What agrees in the step of `first`, upstream of it; in the last step if nothing differs.
        earlier: What agrees in the steps before that one.
        beside: How many numbers of the part of `first` differ in that step, and how many there are.
        settings: What the two were told to do, by key, where they were not told the same.
        only: Places that one of them has, and the other has not, in the order of the forward pass.
        steps: How many steps each recorded.
        compared: The steps in which values inside were compared.
        lost: The first step from which on rounding alone may have moved most numbers by half; None if there is none.
        coarser: The first site at which rounding moves the value much further in one run than in the other, and how
            far in each: one of them computes in another format. None if there is none.
        tolerance: What was to count as equal; None for what rounding was measured to do.
        measured: Whether that was measured.
        blame: What the loop did, where that can be told.
        work: How their work compares, which is no matter of numbers.
    """

    first: Point | None
    place: Point | None
    where: str
    after: str
    before: tuple[Agreed, ...]
    earlier: tuple[Agreed, ...]
    beside: tuple[int, int]
    settings: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    only: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    steps: tuple[int, int] = (0, 0)
    compared: tuple[int, ...] = ()
    lost: int | None = None
    coarser: tuple[str, float, float] | None = None
    tolerance: float | None = None
    measured: bool = True
    blame: Blame | None = None
    work: Work = field(default_factory=Work)

    @property
    def count(self) -> int:
        """How many numbers agree before the first that does not."""
        return sum(agreed.count for agreed in (*self.earlier, *self.before))

    def to_dict(self) -> dict[str, Any]:
        """Give this as JSON types."""
        return {
            "equal": self.first is None,
            "first": None if self.first is None else vars(self.first),
            "place": None if self.place is None else vars(self.place),
            "where": self.where,
            "blame": None if self.blame is None else vars(self.blame),
            "after": self.after,
            "before": [vars(agreed) for agreed in self.before],
            "earlier": [vars(agreed) for agreed in self.earlier],
            "beside": {"differ": self.beside[0], "of": self.beside[1]},
            "settings": {key: [*both] for key, both in self.settings.items()},
            "only": [[*sites] for sites in self.only],
            "steps": [*self.steps],
            "compared": [*self.compared],
            "lost": self.lost,
            "coarser": None if self.coarser is None else [*self.coarser],
            "tolerance": self.tolerance,
            "measured": self.measured,
            "work": {
                "equal": not self.work.amounts,
                "count": self.work.count,
                "where": self.work.where,
                "amounts": [vars(amount) for amount in self.work.amounts],
            },
        }


@dataclass(frozen=True)
class Compared:
    """What two run folders were found to hold.

    Attributes:
        found: How they differ; of several processes, that of the earliest and most upstream difference.
        process: In which process that was.
        of: How many were compared.
    """

    found: Difference
    process: int
    of: int

    def to_dict(self) -> dict[str, Any]:
        """Give this as JSON types."""
        return {**self.found.to_dict(), "process": self.process}
