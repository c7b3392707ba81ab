"""Hints, one at a time: first the theory, then the lines. They are cut from the project's maths."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lab.projects import Project

CODE = re.compile(r"```python\n(.*?)```\n?", flags=re.DOTALL)


def hints(project: Project) -> list[str]:
    """Return the hints of a project, the mildest first: what goes wrong, the derivation by steps, the lines of code."""
    text = (project.folder / "maths.md").read_text(encoding="utf-8")
    sections = {part.partition("\n")[0]: part.partition("\n")[2] for part in text.split("\n## ")[1:]}
    mistakes = [item.strip() for item in re.split(r"^- ", sections["What goes wrong"], flags=re.MULTILINE)[1:]]
    theory = sections["Derivation"] + "\n" + sections["Stability"]
    steps = [part.strip() for part in CODE.split(theory)[::2] if part.strip()]
    lines = [block.strip() for block in CODE.findall(theory)]
    return [*mistakes, *steps, *lines]
