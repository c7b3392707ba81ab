"""What benchmarks found is kept, read back, and compared between commits; what is broken is told in one line."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lab.errors import BadInput

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
A, B = "a" * 40, "b" * 40


def _load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


history = _load("history")  # as a script of that folder finds it
compare = _load("compare")


@pytest.fixture(autouse=True)
def _a_history_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(history.FILE, str(tmp_path / "history.jsonl"))


def result(commit: str, *values: float, budget: float | None = None, **changes: Any) -> Any:
    figures = {"ratio": history.figure(values, budget)}
    about = history.Result("store", commit, False, "2026-01-01", "2.13", 1, "Linux", {"steps": 9}, figures)
    return dataclasses.replace(about, **changes)


# ---------------------------------------------------------------- the history


def test_what_is_told_is_read_back(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(history.COMMIT, A)
    figures = {"ratio": history.figure([1.0, 1.2, 1.1], 1.05), "steps": history.single(7)}
    history.tell("store", {"steps": 9}, figures)
    (found,) = history.read()
    assert found.figures == figures
    assert (found.benchmark, found.commit, found.dirty, found.settings) == ("store", A, False, {"steps": 9})
    assert found.threads == 1
    assert found.torch
    assert found.machine
    printed = capsys.readouterr().out.splitlines()
    assert "budget 1.05: not held" in printed[0]
    assert "1 to 1.2" in printed[0]
    assert "budget" not in printed[1]


def test_a_budget_is_held_at_the_budget_itself() -> None:
    assert history.single(1.05, 1.05).verdict == "budget 1.05: held"
    assert history.single(1.0500001, 1.05).verdict == "budget 1.05: not held"
    assert history.single(9.0).verdict == ""


def test_the_spread_of_many_is_that_of_stretches_in_their_order() -> None:
    drifting = history.figure([1.0] * 10 + [2.0] * 10 + [3.0] * 10 + [4.0] * 10 + [5.0] * 10)
    assert (drifting.value, drifting.low, drifting.high) == (3.0, 1.0, 5.0)
    steady = history.figure([1.0, 2.0, 3.0] * 20)  # each stretch holds all of them
    assert steady.low == steady.high == 2.0
    assert history.figure([4.0]) == history.single(4.0)


def test_a_change_of_tracked_files_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "git", lambda *arguments: " M lab/store.py" if arguments[0] == "status" else A)
    history.append("store", {}, {"ratio": history.single(1.0)})
    monkeypatch.setattr(history, "git", lambda *arguments: "" if arguments[0] == "status" else A)
    history.append("store", {}, {"ratio": history.single(1.0)})
    assert [found.dirty for found in history.read()] == [True, False]


GOOD = '{"benchmark":"store","commit":"x","dirty":false,"date":"d","torch":"2","threads":1,"machine":"m","settings":{},'
BROKEN = {
    "cut off": '{"benchmark": "sto',
    "no object": "[1, 2]",
    "a key is missing": '{"benchmark": "store"}',
    "a figure is no number": GOOD + '"figures":{"r":{"value":"one","low":1,"high":1}}}',
    "a figure lacks its spread": GOOD + '"figures":{"r":{"value":1}}}',
    "empty": "",
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_a_broken_line_is_named(tmp_path: Path, text: str) -> None:
    history.append("store", {}, {"ratio": history.single(1.0)})
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write(text + "\n")
    with pytest.raises(BadInput, match=r"history\.jsonl:2: not a result") as caught:
        history.read()
    assert "\n" not in str(caught.value)


def test_no_history_is_said() -> None:
    with pytest.raises(BadInput, match="no history yet"):
        history.read()


def test_what_the_repository_keeps_can_be_read() -> None:
    assert all(found.figures for found in history.read(BENCHMARKS / "history.jsonl"))


def test_each_in_turn_and_as_often_as_the_others() -> None:
    called: list[str] = []
    times = history.in_turn({name: lambda name=name: called.append(name) for name in "abc"}, rounds=3, warm=1)
    assert "".join(called) == "abcbcacababc"
    assert {name: len(each) for name, each in times.items()} == dict.fromkeys("abc", 3)
    assert history.against({"a": [2.0, 9.0], "b": [1.0, 3.0]}, "a", "b") == [2.0, 3.0]


# ---------------------------------------------------------------- two commits


def told(*results: Any) -> str:
    lines = compare.compare(results, A, B)
    alone = len(results) == 2
    assert ("one process" in lines[-1]) == alone
    assert len(lines) == 2 + alone
    return str(lines[1])


def test_a_change_beyond_all_repeats_is_told_and_one_within_is_not() -> None:
    assert "1.500x  beyond" in told(result(A, 1.0, 1.1, 0.9), result(B, 1.5, 1.6, 1.4))
    assert "within" in told(result(A, 1.0, 1.45, 0.9), result(B, 1.5, 1.6, 1.4))
    assert "0.500x  beyond" in told(result(A, 2.0, 2.1, 1.9), result(B, 1.0, 1.1, 0.9))


def test_one_measurement_alone_has_no_spread() -> None:
    assert "once" in told(result(A, 1.0), result(B, 1.5))
    assert "equal" in told(result(A, 0.0), result(B, 0.0))


def test_of_several_measurements_their_values_are_the_repeats() -> None:
    wide = 0.5, 1.0, 1.5  # within one process
    first = [*[result(A, *wide)] * 3, result(A, 1.01)]
    assert "beyond" in told(*first, *[result(B, 1.1)] * 4)
    assert "within" in told(*first, result(B, 1.005), *[result(B, 1.1)] * 3)
    assert "few" in told(*first[1:], *[result(B, 1.1)] * 3)


def test_of_commits_without_a_difference_few_are_told_apart() -> None:
    chance, trials, count = random.Random(0), 3000, 0
    for _ in range(trials):
        one, other = ([history.single(chance.lognormvariate(0, 0.1)) for _ in range(compare.ROUNDS)] for _ in "ab")
        count += compare.judged(one, other) == "beyond"
    expected = 2 / 70
    assert abs(count / trials - expected) < 4 * math.sqrt(expected / trials)


def test_a_budget_stands_beside_the_newer_figure() -> None:
    assert told(result(A, 1.0), result(B, 1.5, budget=1.2)).endswith("budget 1.2: not held")


@pytest.mark.parametrize(
    "changes",
    [{"settings": {"steps": 8}}, {"torch": "2.12"}, {"threads": 2}, {"machine": "Darwin"}, {"benchmark": "x"}],
)
def test_other_conditions_are_not_compared(changes: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="share no benchmark"):
        compare.compare([result(A, 1.0), result(B, 1.0, **changes)], A, B)


def test_files_that_no_commit_holds_do_not_count() -> None:
    with pytest.raises(BadInput, match=r"no result of bbbbbbbbb.*no commit held"):
        compare.compare([result(A, 1.0), result(B, 1.0, dirty=True)], A, B)


def script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "compare.py"), *arguments]
    env = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["no-such-commit", "HEAD"], "no-such-commit"),
        (["HEAD", "HEAD", "--run", "stor"], "'store'"),
        (["HEAD", "HEAD"], "no history yet"),
        (["HEAD", "HEAD", "--run", "store", "--rounds", "0"], "--rounds"),
    ],
)
def test_bad_input_is_told_in_one_line(arguments: list[str], word: str) -> None:
    done = script(*arguments)
    assert done.returncode == 2, done
    assert word in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not (BENCHMARKS.parent / ".git").exists(), reason="no checkout of a repository")
def test_a_commit_is_measured_in_a_folder_of_its_own_with_its_own_code(tmp_path: Path) -> None:
    head = history.git("rev-parse", "HEAD")
    code = "import lab, lab.faults, lab.scenarios; print(lab.__file__, lab.faults.__file__, lab.scenarios.__file__)"
    with compare.checked_out(head, tmp_path / "tree") as tree:
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        command = [sys.executable, "-c", code]
        found = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=tmp_path)
        assert all(Path(file).is_relative_to(tree) for file in found.stdout.split())
    assert not (tmp_path / "tree").exists()
    assert str(tmp_path) not in history.git("worktree", "list")
