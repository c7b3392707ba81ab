"""A learner's file: imported, and compared with the reference by names and signatures."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

from lab.errors import BadInput, LabError, one_line
from lab.projects import PROJECTS

if TYPE_CHECKING:
    from lab.projects import Project


def load(file: str, name: str = "learner") -> ModuleType:
    """Import a learner's file, as a module of this name.

    Raises:
        BadInput: It raises.
    """
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise BadInput(f"{file}: not a .py file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # noqa: BLE001 - whatever a learner's file raises is what is reported
        raise BadInput(f"{file}: cannot be imported: {one_line(error)}") from None
    return module


def use(project: Project, file: str) -> None:
    """Let a learner's file stand for the reference, for everything that is imported from now on.

    Raises:
        BadInput: There is no such file, it cannot be imported, lacks a name, or has another signature.
        LabError: The runtime is imported already, with the reference in it.
    """
    if "lab.runtime.engine" in sys.modules:
        raise LabError(f"--use {project.id}: the runtime is already imported with the lab's own component")
    name = f"{project.module}.component"
    package, reference = importlib.import_module(project.module), importlib.import_module(name)
    built = load(file, name)
    compare(reference, built, file)
    package.component = built  # type: ignore[attr-defined]


def used() -> dict[str, str]:
    """Return the files that stand for the lab's components now, by the id of the project."""
    found = {}
    for project in PROJECTS:
        module = sys.modules.get(f"{project.module}.component")
        file = getattr(module, "__file__", None)
        if file and Path(file) != project.folder / "component.py":
            found[project.id] = file
    return found


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
