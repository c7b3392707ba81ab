"""Processes that work together for a moment: their results, their errors, and that nothing of them is left."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
import warnings
from typing import TYPE_CHECKING

import psutil
import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from lab.errors import BadInput
from lab.ranks import together
from lab.spec import Mismatch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    yield
    assert {process.pid for process in psutil.Process().children(recursive=True)} <= before
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_meet_and_results_come_in_order(world: int) -> None:
    def work(rank: int) -> tuple[int, Tensor]:
        x = torch.full((3,), float(rank + 1))
        dist.all_reduce(x)
        return dist.get_rank(), x

    results = together(world, work)
    assert [rank for rank, _ in results] == list(range(world))
    for _, x in results:
        assert torch.equal(x, torch.full((3,), world * (world + 1) / 2))


def test_a_fork_computes_after_its_parent_did_with_threads() -> None:
    """OpenMP's threads and autograd's do not survive a fork: a child that waits for them would hang."""
    threads = torch.get_num_threads()

    def work(_rank: int) -> Tensor:
        x = torch.ones(600, 600, requires_grad=True)
        (x @ x).sum().backward()  # type: ignore[no-untyped-call]
        assert x.grad is not None
        return x.grad[0, :2]

    try:
        torch.set_num_threads(2)
        work(0)
        for gradient in together(2, work, timeout=30):
            assert torch.equal(gradient, torch.full((2,), 1200.0))
    finally:
        torch.set_num_threads(threads)


def test_large_results_fit_through() -> None:
    results = together(2, lambda rank: torch.full((2_000_000,), float(rank)))
    assert [float(x.mean()) for x in results] == [0.0, 1.0]


def test_the_error_is_that_of_the_rank_that_failed_first() -> None:
    def work(rank: int) -> None:
        if rank == 1:
            raise Mismatch("the third entry is wrong", ("got 1", "expected 2"))
        dist.barrier()

    for _ in range(3):
        with pytest.raises(Mismatch, match="the third entry is wrong") as caught:
            together(2, work)
        assert caught.value.lines == ("got 1", "expected 2")
        assert caught.value.__notes__ == ["on rank 1"]


def test_a_stub_says_that_it_is_one() -> None:
    def work(_rank: int) -> None:
        raise NotImplementedError("Linear.forward is not written yet")

    with pytest.raises(NotImplementedError, match="not written yet"):
        together(2, work)


def test_an_error_that_cannot_be_pickled_is_told_in_a_line() -> None:
    class Mine(Exception):  # noqa: N818 - local: no other process can find it
        pass

    def work(_rank: int) -> None:
        raise Mine("strange")

    with pytest.raises(RuntimeError, match=r"rank \d raised .*strange"):
        together(2, work)


def test_a_rank_that_dies_is_named() -> None:
    def work(rank: int) -> None:
        if rank == 1:
            os._exit(3)
        time.sleep(5)

    with pytest.raises(RuntimeError, match="rank 1 ended without a word"):
        together(2, work)


def test_a_rank_that_hangs_is_killed() -> None:
    def work(rank: int) -> None:
        if rank == 1:
            time.sleep(60)

    begun = time.monotonic()
    with pytest.raises(TimeoutError, match="rank 1 did not end within 1 seconds"):
        together(2, work, timeout=1)
    assert time.monotonic() - begun < 10


def test_a_rank_that_loops_ends_when_its_parent_was_killed(tmp_path: Path) -> None:
    def loop(_rank: int) -> None:
        while True:
            pass

    parent = os.fork()
    if parent == 0:
        together(2, loop, timeout=2)
        os._exit(0)
    ranks: list[psutil.Process] = []
    while len(ranks) < 2:
        ranks = psutil.Process(parent).children()
        time.sleep(0.01)
    time.sleep(0.2)  # until they have set their clock
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    _, alive = psutil.wait_procs(ranks, timeout=10)
    for folder in tmp_path.iterdir():  # who is killed tidies nothing
        shutil.rmtree(folder)
    assert not alive


def test_groups_do_not_nest() -> None:
    def work(_rank: int) -> str:
        try:
            together(1, lambda rank: rank)
        except BadInput as error:
            return str(error)
        return "nested"

    assert "do not nest" in together(1, work)[0]


def test_nothing_is_printed_and_no_one_is_warned(capfd: pytest.CaptureFixture[str]) -> None:
    def work(rank: int) -> None:
        warnings.warn("a warning of a rank", stacklevel=1)
        if rank:
            raise ValueError("no")

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with pytest.raises(ValueError, match="no"):
            together(2, work)
    assert capfd.readouterr() == ("", "")
    assert not told
