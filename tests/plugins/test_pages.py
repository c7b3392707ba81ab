"""What docs/watch.md shows for trainers of other libraries runs, and finds what it says."""

from __future__ import annotations

import re
import runpy
import warnings
from pathlib import Path

import pytest

WATCH = Path(__file__).parents[2] / "docs" / "watch.md"
SHOWN = re.compile(r"which prints `([\w.]+)`[^`]*```python\n(.*?)```", re.DOTALL)


def shown() -> list[tuple[str, str]]:
    section = WATCH.read_text(encoding="utf-8").split("\n## In a trainer of another library\n")[1].split("\n## ")[0]
    return SHOWN.findall(section)


def test_there_is_one_for_each_library() -> None:
    assert [re.findall(r"lab\.plugins\.(\w+)", text) for _, text in shown()] == [
        ["transformers"],
        ["lightning"],
        ["accelerate"],
    ]


@pytest.mark.parametrize(("cause", "text"), shown(), ids=["transformers", "lightning", "accelerate"])
def test_it_prints_what_the_page_says(
    cause: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    (tmp_path / "train.py").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of Lightning, of a loader without workers
        runpy.run_path("train.py")
    told = capsys.readouterr()
    assert told.out.strip().splitlines()[-1] == f"['{cause}']"
    assert "lab: faulty: " in told.err
