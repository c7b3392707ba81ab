"""A few processes that work together for a moment: what a spec of distributed code is checked in."""

from __future__ import annotations

import datetime as dt
import io
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import warnings
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import distributed as dist

from lab.errors import BadInput, one_line

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.process import BaseProcess

T = TypeVar("T")
GRACE = 0.2  # seconds in which the ranks that another's failure left alone are heard


def together(world: int, work: Callable[[int], T], *, timeout: float = 60.0) -> list[T]:
    """Run ``work(rank)`` in processes that are joined in a ``torch.distributed`` group (gloo); return what each gives.

    The processes are forks of this one, so that `work` may be a closure over a component that is in no file's module.
    Each computes with one thread: a fork has no other threads than the one that forked.

    Args:
        world: How many processes.
        work: Called in each with its rank. What it returns must be what `torch.save` takes.
        timeout: Seconds for all of it.

    Raises:
        BadInput: This process is in a group already.
        TimeoutError: Some did not end in time; all are killed.
        RuntimeError: One ended without a word, or raised what cannot be pickled; the text names its rank.
        Exception: Whatever the first to fail raised, with a note of its rank.
    """
    if dist.is_available() and dist.is_initialized():
        raise BadInput("this process is in a torch.distributed group; groups do not nest")
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="lab-ranks-") as folder:
        ranks: list[tuple[BaseProcess, Connection]] = []
        try:
            for rank in range(world):
                here, there = context.Pipe(duplex=False)
                process = context.Process(target=_one, args=(rank, world, work, Path(folder), there, timeout))
                with warnings.catch_warnings():
                    # Python warns of a fork beside other threads. torch's are idle here, and not used by the fork.
                    warnings.simplefilter("ignore", DeprecationWarning)
                    process.start()
                there.close()
                ranks.append((process, here))
            return _gather(ranks, time.monotonic() + timeout, timeout)
        finally:
            for started, here in ranks:
                started.kill()
                started.join()
                started.close()
                here.close()


def _gather(ranks: list[tuple[BaseProcess, Connection]], deadline: float, timeout: float) -> list[Any]:
    """Take the results as they come; the first failure ends it."""
    waiting = {here: rank for rank, (_, here) in enumerate(ranks)}
    results: list[Any] = [None] * len(ranks)
    while waiting:
        ready = cast("list[Connection]", wait(list(waiting), max(0.0, deadline - time.monotonic())))
        if not ready:
            late = ", ".join(str(rank) for rank in sorted(waiting.values()))
            raise TimeoutError(f"rank {late} did not end within {timeout:g} seconds")
        failed = []
        for here in ready:
            rank = waiting.pop(here)
            result = _hear(here, rank)
            if isinstance(result, Exception):
                failed.append(result)
            else:
                results[rank] = torch.load(result, weights_only=False)
        if failed:
            raise _first_cause(failed, waiting)
    return results


def _hear(here: Connection, rank: int) -> io.BytesIO | Exception:
    """What a rank sent: its result, or why there is none."""
    try:
        worked, content = here.recv()
    except EOFError:
        return RuntimeError(f"rank {rank} ended without a word")
    if worked:
        return io.BytesIO(content)
    pickled, line = content
    error = None if pickled is None else pickle.loads(pickled)  # noqa: S301 - our own fork wrote it
    if not isinstance(error, Exception):
        return RuntimeError(f"rank {rank} raised {line}")
    error.add_note(f"on rank {rank}")
    return error


def _first_cause(failed: list[Exception], waiting: dict[Connection, int]) -> Exception:
    """Of the ranks that failed, find the one that did not fail because another was gone: a moment may show it."""
    for here in cast("list[Connection]", wait(list(waiting), GRACE)):
        result = _hear(here, waiting[here])
        if isinstance(result, Exception):
            failed.append(result)
    gone = ("connection", "gloo", "peer")
    return min(failed, key=lambda error: any(word in str(error).lower() for word in gone))


def _one(rank: int, world: int, work: Callable[[int], Any], folder: Path, there: Connection, timeout: float) -> None:
    """What a process does: join, work, say what came of it, and end without the cleaning-up of its parent."""
    torch.set_num_threads(1)
    # Where the parent itself is killed, nobody is left to kill this one.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, timeout + 1)
    # A failing rank must not print: what it raised is told by the parent.
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 2)
    try:
        store = dist.FileStore(str(folder / "store"), world)  # type: ignore[attr-defined]
        limit = dt.timedelta(seconds=timeout)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
        result = work(rank)
        buffer = io.BytesIO()
        torch.save(result, buffer)
        there.send((True, buffer.getvalue()))
        dist.barrier()  # nobody leaves while another still needs it
        dist.destroy_process_group()
    except BaseException as error:  # noqa: BLE001 - whatever it is, the parent raises it
        try:
            pickled = pickle.dumps(error)
            pickle.loads(pickled)  # noqa: S301 - some cannot be made again from their arguments
        except Exception:  # noqa: BLE001
            pickled = None
        there.send((False, (pickled, one_line(error))))
        time.sleep(timeout)  # until it is killed: were it gone, the ranks that speak to it would fail too
    there.close()
    os._exit(0)
