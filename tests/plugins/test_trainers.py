"""Callbacks for other libraries' trainers: found only by who asks; each library has a file of its own."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lab.manager import discover

ROOT = Path(__file__).parents[2]
LIBRARIES = ("accelerate", "lightning", "pytorch_lightning", "transformers")


def test_looking_for_plugins_imports_no_library() -> None:
    code = f"import sys; from lab.manager import discover; discover(); print(set({LIBRARIES}) & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_what_is_kept_for_who_asks_has_a_module_and_each_trainer_an_extra() -> None:
    family = importlib.import_module("lab.plugins")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    there = {path.stem for path in (ROOT / "plugins").glob("*.py")}
    assert set(family.ON_REQUEST) <= there
    assert {name for name, purpose in family.ON_REQUEST.items() if purpose == "trainer"} <= extras.keys()
    assert set(family.ON_REQUEST.values()) == {"trainer", "trace", "sample"}


def test_everything_else_in_the_family_is_found() -> None:
    catalogue = discover()
    assert {"progress", "tensorboard"} <= set(catalogue.plugins)
    assert not catalogue.broken


@pytest.mark.parametrize("name", ["accelerate", "lightning", "transformers"])
def test_a_library_that_is_not_installed_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for missing in [*LIBRARIES, "lightning.pytorch"]:
        monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, f"lab.plugins.{name}", raising=False)
    with pytest.raises(ImportError) as caught:
        importlib.import_module(f"lab.plugins.{name}")
    assert str(caught.value) == f"lab.plugins.{name} needs {name}: pip install 'breaklab[{name}]'"
