"""What this machine can do: products a second in each format, bytes a second, and how long an operator takes at least.

Measured, not looked up: it depends on threads, on neighbours and on the build of PyTorch.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

SIDE = 768  # of the square matrices: large enough for a kernel's best, and a few milliseconds each
LARGE = 128 * 2**20  # bytes: beyond every cache of a core
TRIALS = 2  # the best counts: whatever else runs can only slow one


@dataclass(frozen=True)
class Machine:
    """The roof of a roofline.

    Attributes:
        flops: Of products a second, by the name of the format.
        bytes: Read and written a second, from and to memory beyond the caches.
        operator: Seconds of the smallest operator that is called from Python and notes its way back.
        threads: With how many threads that was measured.
        device: Where.
    """

    flops: dict[str, float]
    bytes: float
    operator: float
    threads: int
    device: str

    def to_dict(self) -> dict[str, Any]:
        """Give this as JSON types."""
        return asdict(self)

    def seconds(self, flops: float, moved: float, kind: str = "float32") -> float:
        """The least time for so many FLOPs and bytes (Williams et al., 2009)."""
        return max(flops / self.flops.get(kind, self.flops["float32"]), moved / self.bytes)


def measure(device: torch.device, formats: tuple[torch.dtype, ...] = (torch.float32,)) -> Machine:
    """Measure the machine in about a tenth of a second, drawing no random number."""
    wait: Callable[[], object] = torch.cuda.synchronize if device.type == "cuda" else int
    flops = {}
    for dtype in dict.fromkeys((torch.float32, *formats)):
        a = torch.ones(SIDE, SIDE, dtype=dtype, device=device)
        flops[str(dtype).removeprefix("torch.")] = 2 * SIDE**3 / _best(lambda a=a: torch.mm(a, a), wait)  # type: ignore[misc]
    source = torch.ones(LARGE // 8, device=device)  # half of the bytes are read, half are written
    target = torch.empty_like(source)
    moved = LARGE / _best(lambda: target.copy_(source), wait)
    one = torch.ones(1, device=device, requires_grad=True)

    def hundred() -> None:
        for _ in range(100):
            one * one

    return Machine(flops, moved, _best(hundred, wait) / 100, torch.get_num_threads(), str(device))


def cores() -> int:
    """How many the process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def in_threads(count: int) -> Iterator[None]:
    """Compute in so many threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def typical(found: Sequence[Machine]) -> Machine:
    """What the machine could do while several measurements were made: others may have used it as well."""
    flops = {kind: statistics.median(each.flops[kind] for each in found) for kind in found[0].flops}
    moved, operator = (statistics.median(getattr(each, name) for each in found) for name in ("bytes", "operator"))
    return Machine(flops, moved, operator, found[-1].threads, found[-1].device)


def _best(work: Callable[[], object], wait: Callable[[], object]) -> float:
    work()
    times = []
    for _ in range(TRIALS):
        wait()
        begun = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - begun)
    return min(times)
