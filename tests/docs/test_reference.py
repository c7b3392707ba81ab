"""The reference names everything that there is, and every link on every page leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lab.cli import cli
from lab.manager import HOOKS
from lab.projects import PROJECTS
from lab.scenario import Scenario

if TYPE_CHECKING:
    from lab.catalogue import Catalogue

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md"])
FENCED = re.compile(r"^```.*?^```", flags=re.MULTILINE | re.DOTALL)


def headings(page: Path) -> list[str]:
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    return [heading.strip() for heading in re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)]


def anchor(heading: str) -> str:
    """As GitHub makes it: lower case, without punctuation, spaces as hyphens."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def ids(catalogue: Catalogue) -> dict[str, set[str]]:
    return {
        "hooks": set(HOOKS),
        "faults": set(catalogue.faults),
        "probes": set(catalogue.probes),
        "checks": set(catalogue.rules),
        "causes": set(catalogue.causes),
        "plugins": set(catalogue.plugins),
        "projects": {f"{project.number}. {project.title}" for project in PROJECTS},
        "commands": {f"lab {name}" for name in cli.commands},
    }


@pytest.mark.parametrize("kind", ["hooks", "faults", "probes", "checks", "causes", "plugins", "projects", "commands"])
def test_everything_has_a_section(catalogue: Catalogue, kind: str) -> None:
    title, *sections = headings(DOCS / "reference" / f"{kind}.md")
    assert title.lower() == kind
    assert set(sections) == ids(catalogue)[kind]
    assert len(sections) == len(set(sections))


def test_a_fault_says_its_parameters_bounds_and_source(catalogue: Catalogue) -> None:
    page = (DOCS / "reference" / "faults.md").read_text(encoding="utf-8")
    _, *sections = re.split(r"^## ", page, flags=re.MULTILINE)
    for section in sections:
        fault = catalogue.faults[section.split("\n")[0]]
        assert fault.info.repair in section
        assert catalogue.causes[fault.info.cause].source in section
        assert "| `at` | string |" in section
    assert "| `offset` | integer, >= 1, <= 65,536 | `1` |" in page


def test_every_key_of_a_scenario_is_in_the_table() -> None:
    table = (DOCS / "scenarios.md").read_text(encoding="utf-8").split("## Every key")[1].split("<!-- end -->")[0]
    rows = [line.split(" | ")[0].strip("| *") for line in table.splitlines() if line.startswith("| ")][1:]
    schema = Scenario.model_json_schema(by_alias=True)
    wanted: list[str] = []
    for name, field in schema["properties"].items():
        inner = (field.get("items") or field).get("$ref", "").rpartition("/")[2]
        if inner:
            wanted.append(f"`[[{name}]]`" if "items" in field else f"`[{name}]`")
            wanted += [f"`{key}`" for key in schema["$defs"][inner]["properties"]]
        else:
            wanted.append(f"`{name}`")
    assert rows == wanted


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_a_file_and_a_heading(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, part = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        if part:
            assert part in map(anchor, headings(file)), target
