"""The file that a learner begins with: the reference with its bodies removed. Never a second copy."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lab.projects import Project

Function = ast.FunctionDef | ast.AsyncFunctionDef


def stub(project: Project) -> str:
    """Return the source that a learner completes: signatures, shapes and docstrings; each body raises."""
    source = (project.folder / "component.py").read_text(encoding="utf-8")
    lines = source.splitlines()
    for owner, function in reversed(_functions(ast.parse(source))):
        first = _first_after_docstring(function)
        if first is None:
            continue
        end = function.end_lineno or function.lineno
        lines[first - 1 : end] = _replacement(owner, function)
    title = f'"""Project {project.number}: {project.title}. Yours to write.\n'
    how = f"Check it as often as you like: lab check {project.id}. A hint: lab hint {project.id}.\n"
    docstring = ast.get_docstring(ast.parse(source), clean=False) or ""
    text = "\n".join(lines) + "\n"
    return text.replace(f'"""{docstring}"""', f'{title}\n{docstring.strip()}\n\n{how}"""', 1)


def _functions(tree: ast.Module) -> list[tuple[str, Function]]:
    """Return the functions and methods, in order, each with the name of its class."""
    found: list[tuple[str, Function]] = []
    for node in tree.body:
        if isinstance(node, Function):
            found.append(("", node))
        elif isinstance(node, ast.ClassDef):
            found += [(node.name, child) for child in node.body if isinstance(child, Function)]
    return found


def _first_after_docstring(function: Function) -> int | None:
    """Return the line at which the code begins; None where there is none to write (a protocol's ``...``)."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    nothing = all(isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant) and n.value.value is ... for n in body)
    if nothing or (body and body[0].lineno == function.lineno):
        return None
    return (function.body[0].end_lineno or 0) + 1 if ast.get_docstring(function) is not None else body[0].lineno


def _replacement(owner: str, function: Function) -> list[str]:
    """Say what the body sets and taps, and raise."""
    indent = " " * (function.col_offset + 4)
    sets, taps = _sets(function), _taps(function)
    said = [f"{indent}# sets {', '.join(sets)}"] if sets else []
    if taps:
        said.append(f"{indent}# taps {', '.join(taps)}, in this order")
    if owner and function.name == "__init__":
        said.append(f"{indent}super().__init__()") if _calls_super(function) else None
    name = f"{owner}.{function.name}" if owner else function.name
    return [*said, f'{indent}raise NotImplementedError("{name} is not written yet")']


def _calls_super(function: Function) -> bool:
    return "super().__init__()" in ast.unparse(function)


def _sets(function: Function) -> list[str]:
    """Return the attributes that it assigns to ``self``, in order."""
    found = [
        f"self.{node.attr}"
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    ]
    return list(dict.fromkeys(found))


def _taps(function: Function) -> list[str]:
    """Return the sites that it taps, in order."""
    calls = [
        node
        for node in ast.walk(function)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "tap"
        and node.args
        and isinstance(node.args[0], ast.Constant)
    ]
    calls.sort(key=lambda call: (call.lineno, call.col_offset))
    names = [str(call.args[0].value) for call in calls if isinstance(call.args[0], ast.Constant)]
    return list(dict.fromkeys(names))
