"""Clocks and counters: how long a step is at each place, what it computes there, and what it keeps in memory."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lab.profiling.costs import Cost, cost_of, tensors
from lab.profiling.places import LOOP, WATCHING, Place

if TYPE_CHECKING:
    from collections.abc import Callable

    from lab.profiling.memory import Ledger


class Clock:
    """How long a step was at each place.

    Args:
        device: On any but the CPU, work is waited for before a time is taken: else it would be that of asking for it.

    Attributes:
        spent: Seconds at each place.
    """

    def __init__(self, device: torch.device) -> None:
        self.spent: dict[Place, float] = defaultdict(float)
        self._wait: Callable[[], object] = torch.cuda.synchronize if device.type == "cuda" else int
        self._now, self._since = LOOP, time.perf_counter()

    def __call__(self, place: Place) -> None:
        """Note that a place is entered."""
        self._wait()
        now = time.perf_counter()
        self.spent[self._now] += now - self._since
        self._now, self._since = place, now

    def restart(self) -> None:
        """Forget what was counted."""
        self.spent.clear()
        self._since = time.perf_counter()

    def stop(self) -> None:
        """Count the time until now."""
        self(self._now)

    @property
    def total(self) -> float:
        """Seconds in all, without what measuring took."""
        return sum(spent for place, spent in self.spent.items() if place != WATCHING)


class Counter(TorchDispatchMode):
    """While in the block, counts what is computed at each place, operator by operator.

    Attributes:
        costs: By place and name of the operator.
        seconds: The same, how long they ran.
        formats: FLOPs by place and by the name of the format that is multiplied.
        ledger: What is in memory.
    """

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.costs: dict[tuple[Place, str], Cost] = defaultdict(Cost)
        self.seconds: dict[tuple[Place, str], float] = defaultdict(float)
        self.formats: dict[Place, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        self.ledger = ledger
        self._place = LOOP

    def __call__(self, place: Place) -> None:
        """Note that a place is entered."""
        self._place = place

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute, and count it."""
        kwargs = kwargs or {}
        begun = time.perf_counter()
        out = func(*args, **kwargs)
        ended, place = time.perf_counter(), self._place
        if place != WATCHING:
            self.seconds[place, func.overloadpacket.__name__] += ended - begun
            cost = cost_of(func, args, kwargs, out)
            self.costs[place, func.overloadpacket.__name__].add(cost)
            if cost.flops:
                self.formats[place][_format(args)] += cost.flops
            self.ledger.made(place, tensors(out), tensors((args, kwargs)))
        return out


def _format(args: Any) -> str:
    """The name of the format of what is multiplied."""
    return next((str(t.dtype).removeprefix("torch.") for t in tensors(args) if t.is_floating_point()), "float32")
