"""The documentation: generated pages do not drift, links lead somewhere, and the examples run as printed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import lab
from lab.cli import status_of

if TYPE_CHECKING:
    from lab.catalogue import Catalogue

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SMALL = """
title = "small"
project = "decoder"
steps = 4
[model]
layers = 2
width = 32
heads = 2
context = 16
[data]
source = "markov"
batch = 4
"""


def test_the_reference_is_what_the_code_says() -> None:
    done = subprocess.run(
        [sys.executable, DOCS / "generate.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


PAGES = sorted([*DOCS.glob("*.md"), ROOT / "README.md"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_the_page_of_what_is_covered_names_every_fault_and_no_other(catalogue: Catalogue) -> None:
    text = (DOCS / "coverage.md").read_text(encoding="utf-8")
    table = text.partition("| family | mistake | fault |")[2].partition("\n\n")[0]
    named = re.findall(r"`([a-z_]+\.[a-z_0-9]+)`", table)
    assert sorted(named) == sorted(set(named)), "a fault stands there twice"
    assert set(named) == set(catalogue.faults)


EXAMPLES = sorted((DOCS / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_stands_in_the_page(example: Path) -> None:
    text = example.read_text(encoding="utf-8").rstrip()
    assert text in (DOCS / "plugins.md").read_text(encoding="utf-8")
    assert len([line for line in text.splitlines() if line.strip()]) < 15


def _run(folder: Path, example: str, scenario: str, capsys: pytest.CaptureFixture[str]) -> lab.Results:
    shutil.copy(DOCS / "examples" / example, folder)
    (folder / "small.toml").write_text(scenario)
    arguments = [
        "run",
        str(folder / "small.toml"),
        "--plugin",
        str(folder / example),
        "--out",
        str(folder / "run"),
        "--json",
    ]
    assert status_of(arguments) in (0, 1), capsys.readouterr().err
    return lab.load(folder / "run")


def test_the_example_probe_records_its_metric(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = _run(tmp_path, "block_means.py", SMALL, capsys)
    assert list(results.table("block.mean").columns) == ["blocks.0.out", "blocks.1.out"]
    assert len(results.table("block.mean")) == 4


def test_the_example_fault_moves_its_metric(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = _run(tmp_path, "scale_embedding.py", SMALL + '[[fault]]\nid = "demo.scale"\n', capsys)
    twin = lab.load(tmp_path / "run" / "twin")
    broken, healthy = (r.history.series("activation.rms", "tokens.out").values[0] for r in (results, twin))
    assert broken == pytest.approx(30 * healthy, rel=1e-4)
