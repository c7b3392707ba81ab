"""Every spec: the reference passes, each plausible wrong version is caught by name, and the maths is in step."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import tomllib
import types
from pathlib import Path
from typing import Any

import pytest

from lab.projects import PROJECTS
from lab.spec import Property, measures, properties

ROOT = Path(__file__).parent.parent.parent
READY = [project.id for project in PROJECTS if project.ready]
LINES = re.compile(r"```python\n# ([\w.]+)\n(.*?)```", flags=re.DOTALL)
SECTIONS = ("Derivation", "Stability", "Cost", "What goes wrong", "Sources")


def part(project: str, name: str) -> types.ModuleType:
    return importlib.import_module(f"lab.projects.{project.replace('-', '_')}.{name}")


def folder(project: str) -> Path:
    return ROOT / "lab" / "projects" / project.replace("-", "_")


def spec_of(project: str) -> dict[str, Property]:
    return {each.name: each for each in properties(part(project, "spec"))}


def mutants(project: str) -> list[dict[str, Any]]:
    path = ROOT / "tests" / "mutants" / f"{project}.toml"
    found: list[dict[str, Any]] = tomllib.loads(path.read_text(encoding="utf-8"))["mutant"] if path.is_file() else []
    return found


@pytest.mark.parametrize(
    ("project", "name"),
    [pytest.param(project, name, id=f"{project}-{name}") for project in READY for name in spec_of(project)],
)
def test_the_reference_passes(project: str, name: str) -> None:
    assert spec_of(project)[name].check(part(project, "component")) is None


@pytest.mark.parametrize("project", READY)
def test_at_least_eight_wrong_versions_with_a_name_each(project: str) -> None:
    names = [mutant["name"] for mutant in mutants(project)]
    assert len(names) >= 8
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("project", "mutant"),
    [pytest.param(p, m, id=f"{p}-{m['name']}") for p in READY for m in mutants(p)],
)
def test_a_wrong_version_is_caught(project: str, mutant: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder(project) / "component.py"
    source = path.read_text(encoding="utf-8")
    assert mutant["old"] in source
    if not mutant.get("all"):
        assert source.count(mutant["old"]) == 1, "not clear which one is meant; quote more of the line"
    built = types.ModuleType("mutant")
    monkeypatch.setitem(sys.modules, "mutant", built)  # dataclasses look their module up
    exec(compile(source.replace(mutant["old"], mutant["new"]), "mutant.py", "exec"), vars(built))
    assert spec_of(project)[mutant["caught_by"]].check(built) is not None


@pytest.mark.parametrize("project", READY)
def test_each_property_and_measure_says_what_it_means(project: str) -> None:
    for each in spec_of(project).values():
        assert 20 < len(each.meaning) < 200, each.name
        assert each.meaning.endswith("."), each.name
    found = measures(part(project, "measures"))
    assert found
    assert all(each.title for each in found)


@pytest.mark.parametrize("project", READY)
def test_the_maths_is_in_step_with_the_code(project: str) -> None:
    text, component = (folder(project) / "maths.md").read_text(encoding="utf-8"), part(project, "component")
    quoted = LINES.findall(text)
    assert len(quoted) >= 3
    assert "$$" in text
    for heading in SECTIONS:
        assert f"\n## {heading}\n" in text
    for name, lines in quoted:
        thing: Any = component
        for step in name.split("."):
            thing = getattr(thing, step)
        source = {line.split("  # ")[0].strip() for line in inspect.getsource(thing).splitlines()}
        for line in filter(None, lines.splitlines()):
            assert line.split("  # ")[0].strip() in source, f"{name} has no line {line!r}"
