"""What a hook and a tap cost, with nobody there and with somebody, against what PyTorch itself takes.

    python benchmarks/hooks.py

All are called in turn in one process, a few thousand times a turn. Printed are ratios to adding 1 to a tensor of eight
numbers, the cheapest thing that a model does; and the nanoseconds of that.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import history
import torch
from torch import Tensor, nn

from lab.catalogue import Plugin
from lab.context import Run, Step
from lab.manager import Manager
from lab.sites import Component, sites_of

if TYPE_CHECKING:
    from collections.abc import Callable

CALLS = 2000
ADDING = "adding 1 to eight numbers"


class Part(Component):
    """A component of one site."""

    SITES = {"out": "B"}  # noqa: RUF012 - as each component says it

    def forward(self, x: Tensor) -> Tensor:  # [B] -> [B]
        """Offer it."""
        return self.tap("out", x)


class Listener(Plugin):
    """Listens to the end of a step, and does nothing."""

    def lab_step_end(self, step: Step) -> None:
        """Nothing."""


def event(listeners: int) -> Callable[[], Any]:
    """Return an event with so many listeners, as the lab fires it."""
    manager = Manager()
    for _ in range(listeners):
        manager.add(Listener())
    run, step, hook = Run(Path(), manager), Step(0), manager.hook.lab_step_end
    return lambda: hook(run=run, step=step)


def module(*, read: bool = False, hooked: bool = False) -> Callable[[], Any]:
    """Return a call of a tap: idle, with a reader; or of an identity with one of PyTorch's own forward hooks."""
    x = torch.zeros(8)
    if hooked:
        plain = nn.Identity()
        plain.register_forward_hook(lambda *_: None)
        return lambda: plain(x)
    part = Part()
    if read:
        sites_of(part).read("**", lambda *_: None)
    return lambda: part.tap("out", x)


def main() -> None:
    """Print the ratios."""
    options = history.parser(__doc__)
    options.add_argument("--rounds", type=int, default=50)
    rounds: int = options.parse_args().rounds
    x, identity = torch.zeros(8), nn.Identity()
    calls: dict[str, Callable[[], Any]] = {
        ADDING: lambda: x + 1,
        "a hook with one plugin": event(1),
        "a hook with five plugins": event(5),
        "an idle tap": module(),
        "a tap with a reader": module(read=True),
        "nn.Identity": lambda: identity(x),
        "nn.Identity with a forward hook": module(hooked=True),
    }

    def often(call: Callable[[], Any]) -> Callable[[], None]:
        def repeat() -> None:
            for _ in range(CALLS):
                call()

        return repeat

    times = history.in_turn({name: often(call) for name, call in calls.items()}, rounds)
    figures = {f"{ADDING}, ns": history.figure([1e9 * seconds / CALLS for seconds in times[ADDING]])}
    figures |= {name: history.figure(history.against(times, name, ADDING)) for name in calls if name != ADDING}
    history.tell("hooks", {"rounds": rounds}, figures)


if __name__ == "__main__":
    main()
