"""What a rule tells of a history; a suspicion is not told yet."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lab

if TYPE_CHECKING:
    from collections.abc import Iterable


def told(found: Iterable[lab.Symptom]) -> list[lab.Symptom]:
    """Return the symptoms; none where the rule asks for another look."""
    try:
        return list(found)
    except lab.LookAgain:
        return []
