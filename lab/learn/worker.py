"""Checks one implementation, in a process of its own: what a learner's file does there harms nobody else.

python -m lab.learn.worker PROJECT FILE EVENTS SKIP: an empty FILE is the reference. One JSON object a line is appended
to EVENTS: ``{"begin": NAME}``, then ``{"end": NAME, "failure": null or an object}``; or ``{"refused": TEXT}``.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import json
import sys
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from lab.errors import BadInput, one_line
from lab.projects import PROJECTS
from lab.spec import properties


def load(file: str) -> ModuleType:
    """Import a learner's file.

    Raises:
        BadInput: It raises.
    """
    spec = importlib.util.spec_from_file_location("learner", file)
    if spec is None or spec.loader is None:
        raise BadInput(f"{file}: not a .py file")
    module = importlib.util.module_from_spec(spec)
    sys.modules["learner"] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # noqa: BLE001 - whatever a learner's file raises is what is reported
        raise BadInput(f"{file}: cannot be imported: {one_line(error)}") from None
    return module


def compare(reference: ModuleType, built: ModuleType, file: str) -> None:
    """Compare public names and signatures with the reference's.

    Raises:
        BadInput: One is missing, or takes other arguments.
    """
    for name, thing in vars(reference).items():
        if name.startswith("_") or getattr(thing, "__module__", "") != reference.__name__:
            continue
        mine = getattr(built, name, None)
        if mine is None:
            raise BadInput(f"{file}: lacks {name}")
        if isinstance(thing, type):
            if not isinstance(mine, type):
                raise BadInput(f"{file}: {name} is a {type(mine).__name__}, expected a class")
            for method, function in vars(thing).items():
                public = method in ("__init__", "forward") or not method.startswith("_")
                if isinstance(function, FunctionType) and public:
                    _signature(f"{name}.{method}", function, getattr(mine, method, None), file)
        elif isinstance(thing, FunctionType):
            _signature(name, thing, mine, file)


def _signature(name: str, reference: Any, built: Any, file: str) -> None:
    if not callable(built):
        raise BadInput(f"{file}: lacks {name}")
    wanted, found = _arguments(reference), _arguments(built)
    if wanted != found:
        raise BadInput(f"{file}: {name} takes ({', '.join(found)}), expected ({', '.join(wanted)})")


def _arguments(function: Any) -> list[str]:
    marks: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return [f"{marks.get(p.kind, '')}{p.name}" for p in inspect.signature(function).parameters.values()]


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
