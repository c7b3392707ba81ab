"""The blind challenge: nothing in the run folder names the fault, and an answer is marked fairly."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from lab.cli import status_of
from lab.errors import BadInput
from lab.learn.blind import ANSWER, SEALED, Answer, draw, marks, unseal
from lab.results import load
from lab.scenario import load_scenario

if TYPE_CHECKING:
    from pathlib import Path

    from lab.catalogue import Catalogue


def seed_that_draws(catalogue: Catalogue, project: str, *, faulty: bool) -> int:
    return next(seed for seed in range(200) if bool(draw(project, seed, catalogue)[1].fault) == faulty)


@pytest.fixture
def blind(tmp_path: Path, catalogue: Catalogue, capsys: pytest.CaptureFixture[str]) -> Path:
    folder = tmp_path / "blind"
    seed = seed_that_draws(catalogue, "attention", faulty=True)
    arguments = ["run", "--blind", "--project", "attention", "--seed", str(seed), "--steps", "12", "--out", str(folder)]
    assert status_of(arguments) == 0
    assert "lab answer" in capsys.readouterr().out
    return folder


def test_nothing_in_the_folder_names_what_is_hidden(blind: Path, catalogue: Catalogue) -> None:
    name, scenario, _ = unseal(blind)
    words = {name, scenario.title, *(section.id for section in scenario.fault), *catalogue.causes}
    for path in blind.rglob("*"):
        assert not any(word in path.name for word in words)
        if path.is_file():
            content = path.read_bytes()
            for word in words:
                assert word.encode() not in content, f"{path.name} holds {word}"


def test_it_cannot_be_diagnosed_before_it_is_answered(blind: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(["diagnose", str(blind)]) == 2
    assert "lab answer" in capsys.readouterr().err
    assert status_of(["answer", str(blind), "--give-up"]) == 1
    capsys.readouterr()
    assert status_of(["diagnose", str(blind)]) == 1
    assert status_of(["answer", str(blind), "--cause", "healthy"]) == 2
    assert "answered already" in capsys.readouterr().err


def test_a_right_answer_is_right_by_cause_or_fault(
    blind: Path, catalogue: Catalogue, capsys: pytest.CaptureFixture[str]
) -> None:
    _, scenario, _ = unseal(blind)
    info = catalogue.faults[scenario.fault[0].id].info
    diagnosis = load(blind).diagnosis(catalogue)
    for cause in (info.cause, info.id):
        found = marks(Answer(cause, scenario.expect.at, (info.moves,)), scenario, catalogue, diagnosis)
        assert [mark.subject for mark in found] == ["detection", "cause", "place", "evidence"]
        assert all(mark.right for mark in found), found
    deeper = Answer(info.cause, f"{scenario.expect.at}.out", (info.moves,))
    assert all(mark.right for mark in marks(deeper, scenario, catalogue, diagnosis))
    wrong = marks(Answer("healthy"), scenario, catalogue, diagnosis)
    assert not any(mark.right for mark in wrong)
    half = marks(Answer(info.cause, "blocks.0.mlp", ("memory.process",)), scenario, catalogue, diagnosis)
    assert [mark.right for mark in half] == [True, True, False, False]
    arguments = ["answer", str(blind), "--cause", info.cause, "--at", scenario.expect.at, "--evidence", info.moves]
    assert status_of(arguments) == 0
    assert "4 of 4, with 0 hints" in " ".join(capsys.readouterr().out.split())


def test_hints_come_one_at_a_time_and_are_counted(blind: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, scenario, _ = unseal(blind)
    for hint in scenario.learn.hints:
        assert status_of(["answer", str(blind), "--hint"]) == 0
        assert capsys.readouterr().out.strip() == hint
    assert status_of(["answer", str(blind), "--hint"]) == 2
    assert status_of(["answer", str(blind), "--cause", "healthy"]) == 1
    assert json.loads((blind / ANSWER).read_text())["hints"] == len(scenario.learn.hints)


def test_now_and_then_nothing_is_broken(catalogue: Catalogue) -> None:
    drawn = [draw("", seed, catalogue)[1] for seed in range(100)]
    assert 8 <= sum(not scenario.fault for scenario in drawn) <= 35
    _, scenario = load_scenario("healthy-decoder")
    from lab.diagnosis.model import Diagnosis

    nothing = Diagnosis("healthy", (), (), (), {}, {})
    assert [mark.right for mark in marks(Answer("healthy"), scenario, catalogue, nothing)] == [True]
    assert [mark.right for mark in marks(Answer("mask.inverted"), scenario, catalogue, nothing)] == [False]
    assert draw("", 7, catalogue) == draw("", 7, catalogue)


def test_bad_input(blind: Path, tmp_path: Path, catalogue: Catalogue, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, word in (
        (["answer", str(blind), "--cause", "mask.futur_leak"], "'mask.future_leak'"),
        (["answer", str(blind)], "--give-up"),
        (["answer", str(tmp_path / "nowhere"), "--give-up"], "no blind run"),
        (["run", "--blind", "reads-the-future"], "--blind"),
        (["run", "--blind", "--project", "attenton"], "'attention'"),
        (["run", "reads-the-future", "--project", "attention"], "--blind"),
    ):
        assert status_of(arguments) == 2, arguments
        assert word in capsys.readouterr().err
    assert not (blind / ANSWER).exists()  # what was refused is no answer
    kept = (blind / SEALED).read_text()
    (blind / SEALED).write_text(kept.replace('"sha256": "', '"sha256": "0'))
    with pytest.raises(BadInput, match="the seal is broken"):
        unseal(blind)
