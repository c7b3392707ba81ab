"""Gradients in one bucket against a message for each parameter: a small message costs its latency, not its bytes."""

from __future__ import annotations

import multiprocessing
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from lab.projects.decoder.component import Decoder
from lab.projects.distributed.component import DataParallel, ranks

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

WORLD, STEPS = 2, 5


def one_by_one(model: torch.nn.Module) -> None:
    """Average each gradient by a message of its own."""
    for p in model.parameters():
        assert p.grad is not None
        dist.all_reduce(p.grad)
        p.grad /= ranks()[1]


def all_begun(model: torch.nn.Module) -> None:
    """The same, with all messages begun before the first is waited for."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    for work in [dist.all_reduce(grad, async_op=True) for grad in grads]:
        assert work is not None
        work.wait()
    for grad in grads:
        grad.div_(ranks()[1])


def serve(rank: int, rendezvous: str, orders: Connection) -> None:
    """Be a rank: run `STEPS` averages of the variant that is named, and say when they are done."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    torch.manual_seed(0)
    model = Decoder(256, context=64, layers=4, width=64, heads=4)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    parallel = DataParallel(model)
    parallel.detach()  # no backward here: finish() sends every bucket
    run: dict[str, Callable[[], None]] = {
        "one by one": lambda: one_by_one(model),
        "one each, all begun at once": lambda: all_begun(model),
        "in buckets": parallel.finish,
    }
    while True:
        name = orders.recv()
        for _ in range(STEPS):
            run[name]()
        orders.send(name)


def variants() -> dict[str, Callable[[], object]]:
    """Average the gradients of a decoder of 4 layers over 2 ranks; the first is the one to beat.

    The ranks start here, once, and end with this process: what is timed is their averaging, and one message to and from
    each for `STEPS` of it.
    """
    rendezvous = str(Path(tempfile.mkdtemp()) / "group")
    fork, ends = multiprocessing.get_context("fork"), []
    for rank in range(WORLD):
        mine, theirs = fork.Pipe()
        fork.Process(target=serve, args=(rank, rendezvous, theirs), daemon=True).start()
        ends.append(mine)

    def run(name: str) -> Callable[[], object]:
        def averages() -> None:
            for end in ends:
                end.send(name)
            for end in ends:
                end.recv()

        return averages

    return {name: run(name) for name in ("one by one", "one each, all begun at once", "in buckets")}
