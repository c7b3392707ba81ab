"""The run folder: the names of its files, how one is begun, and what JSON in it may hold."""

from __future__ import annotations

import math
import platform
import time
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lab.errors import BadInput

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

RUN, METRICS, FINDINGS, DIAGNOSIS = "run.toml", "metrics.db", "findings.jsonl", "diagnosis.json"
CHECKPOINT = "checkpoint.pt"
PROGRESS = "lab-progress.json"  # of a learner, beside the components


def new_folder(folder: Path) -> None:
    """Make the folder of a run.

    Raises:
        BadInput: It holds a run already, or cannot be made.
    """
    if (folder / METRICS).exists():
        raise BadInput(f"{folder}: holds a run already; choose another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / METRICS).touch()
        (folder / METRICS).unlink()
    except OSError as error:
        raise BadInput(f"{folder}: cannot hold a run: {error.strerror}") from None


def write_run_file(
    folder: Path,
    name: str,
    scenario: dict[str, Any],
    seed: int,
    *,
    plugins: Sequence[str] = (),
    use: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write what the run is, on what it ran, the plugins asked for by name and the learner's own components."""
    import numpy as np
    import pluggy
    import tomli_w
    import torch

    import lab

    about = {
        "run": {
            "scenario": name,
            "seed": seed,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            **({"plugins": [*plugins]} if plugins else {}),
            **({"use": dict(use)} if use else {}),
        },
        "versions": {
            "breaklab": lab.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "pluggy": pluggy.__version__,
            "python": platform.python_version(),
        },
        "machine": {"system": platform.platform(), "processor": platform.machine(), "threads": torch.get_num_threads()},
        "scenario": scenario,
    }
    (folder / RUN).write_text(tomli_w.dumps(about), encoding="utf-8")


def plain(thing: Any) -> Any:
    """Make JSON of a thing that holds numbers: what is not finite becomes null, which every reader of JSON takes."""
    if isinstance(thing, dict):
        return {key: plain(value) for key, value in thing.items()}
    if isinstance(thing, (list, tuple)):
        return [plain(value) for value in thing]
    return None if isinstance(thing, float) and not math.isfinite(thing) else thing
