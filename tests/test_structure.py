"""The house: arrows point one way, and plugins use only what `lab` exports."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import lab

ROOT = Path(__file__).parent.parent
# Each part of the core, from the bottom up: it may import from its own level and from those before it.
LEVELS = [
    {"errors", "lazy", "names", "files", "ranks", "stages"},
    {"diagnosis.model", "projects", "shelf", "hookspecs"},
    {"catalogue", "store"},
    {"manager", "sites", "context", "sandbox", "scenario", "spec"},
    {"diagnosis.diagnose"},  # and every part of a project
    {
        "session",
        "profiling",
        "results",
        "processes",
        "points",
        "tolerance",
        "judging",
        "paired",
        "recipe",
        "comparison",
        "recorded",
        "where",
        "blame",
        "explain",
        "work",
        "unshared",
        "difference",
        "diff",
        "commits",
        "bisect",
        "learn",
    },
    {"runtime", "attach"},
    {"matrix"},
    {"cli"},
]
COMPONENTS = 4


def imports(path: Path) -> set[str]:
    """The modules that a file imports when it runs: what stands under TYPE_CHECKING is only read by type checkers."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(node)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and isinstance(test.test, ast.Name) and test.test.id == "TYPE_CHECKING"
        for child in test.body
        for node in ast.walk(child)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or path.parts[-2] in ("faults", "probes", "plugins"), f"{path}: relative import"
            found |= {
                f"{node.module}.{alias.name}" if node.module == "lab" else f"{node.module}" for alias in node.names
            }
    return found


def level_of(module: str) -> int | None:
    """The level of a module of the core, by its name without `lab.`."""
    if module.startswith("projects.") and module.endswith((".component", ".spec", ".measures")):
        return COMPONENTS
    for number, names in enumerate(LEVELS):
        if any(module == name or module.startswith(f"{name}.") for name in names):
            return number
    return None


CORE = sorted(path for path in (ROOT / "lab").rglob("*.py") if path.name != "__init__.py" or path.parent.name == "cli")


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_point_one_way(path: Path) -> None:
    own = ".".join(path.relative_to(ROOT / "lab").with_suffix("").parts).removesuffix(".__init__")
    level = level_of(own)
    assert level is not None, f"{own} has no level: say where it belongs"
    for name in imports(path):
        if name.startswith("lab."):
            target = level_of(name.removeprefix("lab."))
            assert target is None or target <= level, f"{own} imports {name}, which stands above it"


def test_attach_and_runtime_do_not_know_each_other() -> None:
    for here, there in (("attach", "lab.runtime"), ("runtime", "lab.attach")):
        for path in (ROOT / "lab" / here).glob("*.py"):
            assert not any(name.startswith(there) for name in imports(path)), path


@pytest.mark.parametrize("family", ["faults", "probes", "plugins"])
def test_plugins_import_only_what_lab_exports(family: str) -> None:
    for path in (ROOT / family).glob("*.py"):
        for name in imports(path):
            if name.startswith("lab."):
                assert name.removeprefix("lab.") in lab.__all__, f"{path.name} imports {name}"
            assert name.split(".")[0] not in {"faults", "probes", "plugins", "scenarios"}, path


def test_the_core_names_no_concrete_fault_or_probe() -> None:
    from lab.manager import discover

    catalogue = discover()
    words = {f'"{name}"' for kind in (catalogue.faults, catalogue.rules, catalogue.causes) for name in kind}
    for path in (ROOT / "lab").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not [word for word in words if word in text], path


@pytest.mark.parametrize("family", ["faults", "probes", "plugins", "scenarios"])
def test_a_family_refuses_its_bare_name(family: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import {family}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert f"lab.{family}" in done.stderr


def test_the_wheel_holds_the_tree(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("lab", "faults", "probes", "plugins", "scenarios"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", str(tmp_path), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if not name.startswith("breaklab-")}
    tree = {str(path.relative_to(ROOT)) for path in (ROOT / "lab").rglob("*.py")} | {"lab/py.typed"}
    tree |= {str(path.relative_to(ROOT)) for path in (ROOT / "lab" / "projects").glob("*/maths.md")}
    for family in ("faults", "probes", "plugins", "scenarios"):
        files = [p for p in (ROOT / family).rglob("*") if p.suffix in (".py", ".toml")]
        tree |= {f"lab/{path.relative_to(ROOT)}" for path in files}
    assert held == tree
