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

    @property
    def broken(self) -> list[Row]:
        """The rows of all runs with a fault."""
        return [row for line in self.lines for row in line.rows]

    @property
    def false_alarms(self) -> list[Row]:
        """The healthy runs in which something was found."""
        return [row for row in self.healthy if row["detected"]]

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
            "healthy_runs": len(self.healthy),
            "false_alarms": len(self.false_alarms),
            "not_checked": dict(unchecked.most_common()),
            "seconds": round(self.seconds, 1),
            "rows": [{name: row[name] for name in names} for row in (*broken, *self.healthy)],
        }


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
