"""What a run that cannot be made again has recorded of its cost: one timing, and so no proof."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lab.comparison import Trained
from lab.errors import BadInput
from lab.files import METRICS
from lab.store import read_history, read_seconds

if TYPE_CHECKING:
    from pathlib import Path


def read_trained(folder: Path) -> Trained:
    """Return what a run folder tells of the time of a step and of the loss.

    A step's time is that from its record to the next one's, so it holds what measuring took and what the loop does
    between steps; where steps were left out, it is spread over them evenly.

    Raises:
        BadInput: It is no run folder, or holds fewer than two steps.
    """
    recorded, history = read_seconds(folder / METRICS), read_history(folder / METRICS)
    if len(recorded) < 2:
        raise BadInput(f"{folder}: {len(recorded)} steps were recorded; two are needed to tell how long one takes")
    gaps = np.diff(recorded.steps)
    times = np.repeat(np.diff(recorded.values) / gaps, gaps)  # [steps - 1]
    loss = history.series("loss")
    losses = np.full(len(times), np.nan)
    if len(loss):
        places = np.searchsorted(loss.steps, recorded.steps[0] + np.arange(len(times)))
        losses = loss.values[np.minimum(places, len(loss) - 1)]
    return Trained(steps=[*map(float, times)], losses=[*map(float, losses)])
