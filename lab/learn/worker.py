"""Checks one implementation, in a process of its own: what a learner's file does there harms nobody else.

python -m lab.learn.worker PROJECT FILE EVENTS SKIP: an empty FILE is the reference. One JSON object a line is appended
to EVENTS: ``{"begin": NAME}``, then ``{"end": NAME, "failure": null or an object}``; or ``{"refused": TEXT}``.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from lab.errors import BadInput
from lab.learn.component import compare, load
from lab.projects import PROJECTS
from lab.spec import properties


def main(project_id: str, file: str, events: str, skip: str) -> None:
    """Check each property but those to skip."""
    project = next(p for p in PROJECTS if p.id == project_id)

    def say(**event: Any) -> None:
        with Path(events).open("a", encoding="utf-8") as out:
            out.write(json.dumps(event) + "\n")

    reference = importlib.import_module(f"{project.module}.component")
    try:
        say(begin="import")
        built = load(file) if file else reference
        compare(reference, built, file)
    except BadInput as error:
        say(refused=str(error))
        return
    say(end="import", failure=None)
    for each in properties(importlib.import_module(f"{project.module}.spec")):
        if each.name not in skip.split(","):
            say(begin=each.name)
            failure = each.check(built, file)
            say(end=each.name, failure=None if failure is None else dataclasses.asdict(failure))


if __name__ == "__main__":
    main(*sys.argv[1:])
