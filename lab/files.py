"""The run folder: the names of its files, and how one is begun."""

from __future__ import annotations

import platform
import time
from typing import TYPE_CHECKING, Any

from lab.errors import BadInput

if TYPE_CHECKING:
    from pathlib import Path

RUN, METRICS, FINDINGS, DIAGNOSIS = "run.toml", "metrics.db", "findings.jsonl", "diagnosis.json"


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


def write_run_file(folder: Path, name: str, scenario: dict[str, Any], seed: int) -> None:
    """Write what the run is, and on what it ran."""
    import numpy as np
    import pluggy
    import tomli_w
    import torch

    import lab

    about = {
        "run": {"scenario": name, "seed": seed, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")},
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
