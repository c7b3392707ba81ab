"""`lab check`: the reference passes; a learner's bad file is told in one clear line, whatever it does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from lab.cli import status_of
from lab.errors import BadInput
from lab.learn.check import check
from lab.projects import PROJECTS

if TYPE_CHECKING:
    from pathlib import Path

ATTENTION = next(p for p in PROJECTS if p.id == "attention")
SOURCE = (ATTENTION.folder / "component.py").read_text(encoding="utf-8")
FORWARD = '        """Attend: q [B H T D], k and v [B H S D], bias [H T S] added to the scores -> [B H T D]."""\n'


def write(folder: Path, text: str) -> Path:
    path = folder / "attention.py"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_copy_of_the_reference_passes_and_a_wrong_one_is_shown_smallest_first(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, SOURCE)
    assert status_of(["check", "attention", str(path)]) == 0
    assert "all 11 properties hold" in capfd.readouterr().out
    write(tmp_path, SOURCE.replace("q.shape[-1] ** -0.5", "0.9"))
    assert status_of(["check", "attention", str(path)]) == 1
    out = capfd.readouterr().out
    assert "expected" in out
    assert "smallest case  seed = 0" in out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import nothing_like_this", "cannot be imported: ModuleNotFoundError"),
        ("def f(:", "cannot be imported: SyntaxError"),
        ("x = 1", "lacks Attention"),
        (SOURCE.replace("k: Tensor, v: Tensor", "v: Tensor, k: Tensor"), "takes (self, q, v, k, bias), expected"),
        ("import os; os._exit(3)", "while it is imported, the process ended with status 3"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(BadInput) as error:
        list(check(ATTENTION, write(tmp_path, text)))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("import os; os._exit(3)", "the process ended with status 3"),
        ("while True: pass", "not done after 3 s"),
        ("return v[..., :1]", "has shape"),
        ("return v.float()", "has dtype"),
        ("return v.to('meta')", "has device meta, expected cpu"),
        ("raise ValueError('no\\nway')", "ValueError: no (attention.py:27)"),
        ("print('x' * 10_000_000); return v", "at"),
    ],
)
def test_a_component_that_misbehaves_fails_in_one_line(tmp_path: Path, line: str, said: str) -> None:
    path = write(tmp_path, SOURCE.replace(FORWARD, f"{FORWARD}        {line}\n"))
    tried = check(ATTENTION, path, limit=3)
    text = next(r.failure["text"] for r in tried if r.failure is not None and said in r.failure["text"])
    tried.close()
    assert "\n" not in text


def test_after_a_property_that_ends_the_process_the_others_are_tried(tmp_path: Path) -> None:
    path = write(tmp_path, SOURCE.replace(FORWARD, f"{FORWARD}        if q.shape[-2] == 1: import os; os._exit(0)\n"))
    results = list(check(ATTENTION, path))
    assert len({r.name for r in results}) == len(results) == 11
    assert any(r.passed for r in results)
    assert any(not r.passed for r in results)


@pytest.mark.parametrize(
    "arguments", [["check"], ["check", "atention"], ["check", "attention", "none.py"], ["check", "--all"]]
)
def test_bad_arguments_are_one_line(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert status_of(arguments) == 2
    assert len(capfd.readouterr().err.splitlines()) == 1
