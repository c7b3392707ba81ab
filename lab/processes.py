"""The other processes of the same training: the folder that each has, and what it has shown.

The first process keeps its run in the folder itself, each other one in a folder inside it. Nothing is sent between
them: what one has recorded another reads when it has ended, so that no process ever waits in a step for another.
"""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

from lab.errors import BadInput
from lab.files import DIAGNOSIS, METRICS
from lab.store import read_history

if TYPE_CHECKING:
    from pathlib import Path

    from lab.store import History

RANK = "rank-"  # begins the name of the folder of another process
PATIENCE = 10.0  # seconds in which the others are to end, once the first has
GLANCE = 0.02  # seconds between two looks at whether they have


def place() -> tuple[int, int]:
    """Return the rank of this process, and how many there are: (0, 1) where there is one.

    As they have told each other; before they have, as a launcher such as torchrun has told them.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)


def own_folder(folder: Path) -> Path:
    """Where this process keeps its run, of a training that is kept in `folder`."""
    rank, _ = place()
    return folder / f"{RANK}{rank}" if rank else folder


def read_others(folder: Path, *, patience: float = 0.0) -> dict[str, History]:
    """Read what the other processes have recorded, by the names of their folders, in the order of their ranks.

    Args:
        folder: Of the first process.
        patience: For how many seconds at most to wait for those that have begun to end.
    """
    others = sorted(folder.glob(f"{RANK}*"), key=lambda path: (len(path.name), path.name))
    until = time.monotonic() + patience
    while time.monotonic() < until and not all((other / DIAGNOSIS).exists() for other in others):
        time.sleep(GLANCE)
    found: dict[str, History] = {}
    for other in others:
        try:
            found[other.name] = read_history(other / METRICS)
        except BadInput:
            continue  # it has recorded nothing yet, or was killed as it wrote
    return found
