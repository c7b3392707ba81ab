"""The schedule of the lab's own training, as the object that any training has: torch's scheduler."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from torch.optim.lr_scheduler import LambdaLR

from lab.projects.backprop.component import learning_rate

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from lab.scenario import Scenario


def make_scheduler(scenario: Scenario, optimizer: Optimizer) -> LambdaLR:
    """Warmup, then a cosine; set to the first step."""
    t, total = scenario.train, scenario.steps
    for group in optimizer.param_groups:
        group["initial_lr"] = 1.0  # what the schedule answers is multiplied by it, and it answers the rate itself
    return LambdaLR(optimizer, lambda step: learning_rate(step, peak=t.lr, warmup=t.warmup, total=total))


def advance(scheduler: LRScheduler) -> None:
    """Go on to the next step. If the optimiser has not stepped yet, torch warns; here the lab will tell."""
    with warnings.catch_warnings():
        if scheduler.last_epoch == 0:
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        scheduler.step()
