"""The errors that the lab raises on purpose, and how it helps with a misspelt name."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class LabError(Exception):
    """Any error that the lab raises on purpose. Its text is one line, written for the person at the keyboard."""


class BadInput(LabError):  # noqa: N818 - the name says what it is
    """What a person gave cannot be used. The text says what, where, and what would be right."""


class FaultFailed(LabError):  # noqa: N818 - likewise
    """A fault raised. The run ends, since a run that is half broken shows nothing."""


class FaultFound(LabError):  # noqa: N818 - likewise
    """Something was found in a loop that was to end when something is: ``lab.watch(..., on_finding="raise")``."""


class NotChecked(Exception):  # noqa: N818 - an answer rather than an error
    """Raised by a rule or an examination that cannot judge; its text is the reason that the verdict lists."""


class LookAgain(NotChecked):
    """Raised by a rule that has a suspicion and needs one look more: the next step is examined too."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` for the known word nearest to `word`, or all of them when they are few."""
    words = sorted(set(known))
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    if not words:
        return "; there are none"
    shown = ", ".join(words[:12])
    return f"; known: {shown}" + (", ..." if len(words) > 12 else "")


def shown(value: object) -> str:
    """Show what was found in a file, in few characters, whatever it is."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # tables in tables by the thousand; an integer of thousands of digits
        return f"a {type(value).__name__} too large to show"
    return text if len(text) < 60 else text[:57] + "..."


def one_line(error: BaseException) -> str:
    """Say an exception in one line: its type and the first line of its text."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
