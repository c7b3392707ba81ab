"""The matrix in numbers: by fault and in total, and which check carried each verdict."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lab.matrix.run import Row


@dataclass
class Line:
    """What is known of one fault over all projects and seeds."""

    fault: str
    rows: list[Row] = field(default_factory=list)

    def count(self, what: str) -> int:
        """How many rows have this."""
        return sum(bool(row[what]) for row in self.rows)

    @property
    def placed(self) -> tuple[int, int]:
        """How many were placed rightly, of those that have a place."""
        asked = [row["located"] for row in self.rows if row["located"] is not None]
        return sum(asked), len(asked)

    @property
    def delay(self) -> float | None:
        """The median of the steps until it was seen."""
        delays = [row["delay"] for row in self.rows if row["delay"] is not None]
        return statistics.median(delays) if delays else None

    @property
    def only(self) -> list[str]:
        """The checks without which some of its runs would have been called healthy."""
        return sorted({row["symptoms"][0] for row in self.rows if len(row["symptoms"]) == 1})


@dataclass(frozen=True)
class Summary:
    """The whole matrix.

    Attributes:
        lines: By fault.
        healthy: The rows of the healthy runs.
        seconds: All runs together.
    """

    lines: tuple[Line, ...]
    healthy: tuple[Row, ...]
    seconds: float

    def delay(self, *, late: bool) -> float | None:
        """The median of the steps until something was told, of faults that begin late or of those from the start."""
        delays = [row["delay"] for row in self.broken if row["delay"] is not None and row["late"] == late]
        return statistics.median(delays) if delays else None

    @property
    def broken(self) -> list[Row]:
        """The rows of all runs with a fault."""
        return [row for line in self.lines for row in line.rows]

    @property
    def false_alarms(self) -> list[Row]:
        """The healthy runs in which something was found."""
        return [row for row in self.healthy if row["detected"]]

    @property
    def inconclusive(self) -> list[Row]:
        """The healthy runs that were not called healthy either: a probe or a rule raised."""
        return [row for row in self.healthy if row["verdict"] == "inconclusive"]

    def to_dict(self) -> dict[str, Any]:
        """Give this as JSON types: the object that ``lab matrix --json`` prints."""
        broken = self.broken
        placed = [row["located"] for row in broken if row["located"] is not None]
        unchecked = Counter(rule for row in (*broken, *self.healthy) for rule in row["not_checked"])
        names = ("fault", "project", "at", "seed", "detected", "named", "located", "delay", "causes", "not_checked")
        return {
            "faults": len(self.lines),
            "runs": len(broken),
            "detected": sum(row["detected"] for row in broken),
            "named": sum(row["named"] for row in broken),
            "located": sum(placed),
            "with_a_place": len(placed),
            "delay_from_the_start": self.delay(late=False),
            "delay_late": self.delay(late=True),
            "healthy_runs": len(self.healthy),
            "false_alarms": len(self.false_alarms),
            "inconclusive": len(self.inconclusive),
            "not_checked": dict(unchecked.most_common()),
            "seconds": round(self.seconds, 1),
            "rows": [{name: row[name] for name in names} for row in (*broken, *self.healthy)],
        }


def compatible(alone: Sequence[Row]) -> bool:
    """Whether two faults can be asked for together: each alone is named, and the loss stays finite.

    Where the loss is no number any more, nothing else can be measured, and no second fault be seen.
    """
    return all(row["applies"] and row["named"] and row["finite"] for row in alone)


@dataclass(frozen=True)
class Pairs:
    """Two faults in one run.

    Attributes:
        rows: Of the compatible pairs that were asked for.
        left_out: How many were drawn and are not compatible.
    """

    rows: tuple[Row, ...]
    left_out: int

    @property
    def both_named(self) -> int:
        """How many have both causes among the first three."""
        return sum(row["named"] for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Give this as JSON types."""
        names = ("fault", "project", "seed", "detected", "named", "causes")
        rows = [{name: row[name] for name in names} for row in self.rows]
        return {"pairs": len(self.rows), "both_named": self.both_named, "left_out": self.left_out, "rows": rows}


def pair_up(rows: Sequence[Row], wanted: int) -> Pairs:
    """Take the first compatible pairs of rows that come as one fault, another, and both."""
    kept: list[Row] = []
    left_out = 0
    for first, second, both in zip(rows[0::3], rows[1::3], rows[2::3], strict=True):
        if len(kept) == wanted:
            break
        if both["applies"] and compatible((first, second)):
            kept.append(both)
        else:
            left_out += 1
    return Pairs(tuple(kept), left_out)


CONFIDENT = 0.5  # the share of the evidence from which on a name is more than a guess


@dataclass(frozen=True)
class Unknown:
    """Faults whose cause the diagnosis did not know."""

    rows: tuple[Row, ...]

    @property
    def misnamed(self) -> list[Row]:
        """Those that were called something else, by a cause that explains half of the evidence or more."""
        return [row for row in self.rows if row["causes"] and row["score"] >= CONFIDENT]

    def to_dict(self) -> dict[str, Any]:
        """Give this as JSON types."""
        names = ("fault", "project", "seed", "detected", "causes", "score")
        rows = [{name: row[name] for name in names} for row in self.rows]
        detected = sum(row["detected"] for row in self.rows)
        return {"unknown": len(self.rows), "detected": detected, "misnamed": len(self.misnamed), "rows": rows}


def summarise(rows: Sequence[Row]) -> Summary:
    """Put rows together. Those in which the fault does not apply are left out."""
    lines: dict[str, Line] = {}
    healthy = []
    for row in rows:
        if not row["applies"]:
            continue
        if row["fault"]:
            lines.setdefault(row["fault"], Line(row["fault"])).rows.append(row)
        else:
            healthy.append(row)
    ordered = tuple(lines[name] for name in sorted(lines))
    return Summary(ordered, tuple(healthy), sum(row.get("seconds", 0.0) for row in rows))
