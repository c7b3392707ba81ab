"""The folders of several processes."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lab.files import DIAGNOSIS, METRICS
from lab.processes import own_folder, place, read_others
from lab.store import Row, Store

if TYPE_CHECKING:
    import pytest


def recorded(folder: Path, value: float, *, ended: bool = True) -> None:
    folder.mkdir(parents=True)
    store = Store(folder / METRICS)
    store.write(0, Row((("loss", ""),), np.array([value])))
    store.close()
    if ended:
        (folder / DIAGNOSIS).write_text("{}")


def test_a_launcher_says_which_process_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert place() == (0, 1)
    assert own_folder(Path("run")) == Path("run")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert place() == (3, 4)
    assert own_folder(Path("run")) == Path("run/rank-3")


def test_what_others_recorded_is_read_in_the_order_of_their_ranks(tmp_path: Path) -> None:
    for rank in (10, 2, 1):
        recorded(tmp_path / f"rank-{rank}", float(rank))
    found = read_others(tmp_path)
    assert [*found] == ["rank-1", "rank-2", "rank-10"]
    assert [history.last("loss") for history in found.values()] == [1, 2, 10]


def test_what_is_damaged_or_empty_is_left_out(tmp_path: Path) -> None:
    recorded(tmp_path / "rank-1", 1.0)
    recorded(tmp_path / "rank-2", 2.0)
    (tmp_path / "rank-1" / METRICS).write_bytes(b"nothing of ours" * 100)
    (tmp_path / "rank-3").mkdir()
    assert [*read_others(tmp_path)] == ["rank-2"]


def test_it_waits_for_those_that_have_begun_and_not_without_end(tmp_path: Path) -> None:
    recorded(tmp_path / "rank-1", 1.0, ended=False)
    begun = time.monotonic()
    read_others(tmp_path, patience=0.2)
    assert 0.2 <= time.monotonic() - begun < 5
    ending = threading.Timer(0.2, (tmp_path / "rank-1" / DIAGNOSIS).write_text, ("{}",))
    ending.start()
    begun = time.monotonic()
    read_others(tmp_path, patience=30.0)
    assert time.monotonic() - begun < 20
    ending.join()


def test_nobody_is_waited_for_where_there_is_nobody(tmp_path: Path) -> None:
    begun = time.monotonic()
    assert read_others(tmp_path, patience=30.0) == {}
    assert time.monotonic() - begun < 5
