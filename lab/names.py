"""Patterns over dotted names: of sites, of modules, of parameters."""

from __future__ import annotations

import re


def within(name: str, pattern: str) -> bool:
    """Whether a dotted name matches a pattern, or stands inside something that does.

    ``*`` stands for any text within one part of a name, ``**`` for any number of parts.
    """
    return pattern_of(f"{pattern}.**").fullmatch(name) is not None


def pattern_of(pattern: str) -> re.Pattern[str]:
    """Compile a pattern over dotted names; see `within`."""
    parts = re.split(r"(\*\*\.|\.\*\*|\*\*|\*)", pattern)
    meaning = {"**.": r"(?:.*\.)?", ".**": r"(?:\..*)?", "**": ".*", "*": r"[^.]*"}
    return re.compile("".join(meaning.get(part) or re.escape(part) for part in parts))
