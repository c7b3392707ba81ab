"""Starts the processes of a scenario with ``train.ranks`` above 1, by torchrun, and hears how they ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from lab.errors import BadInput, FaultFailed, LabError
from lab.learn.component import used

if TYPE_CHECKING:
    from pathlib import Path

    from lab.catalogue import Catalogue
    from lab.scenario import Scenario

JOB, ERROR, LOG = "job.json", "error.json", "ranks.log"
KINDS: dict[str, type[LabError]] = {"BadInput": BadInput, "FaultFailed": FaultFailed}


def launch(
    scenario: Scenario, catalogue: Catalogue, folder: Path, *, device: str, tools: list[str], resume: bool
) -> None:
    """Run a scenario in several processes; the first of them keeps the run in `folder`.

    The processes are those that ``torchrun -m lab.runtime.rank JOB`` starts, on one machine. On several machines that
    share a disk the same command runs, with torchrun's own arguments for them.

    Raises:
        BadInput, FaultFailed: A process raised it.
        LabError: A process ended otherwise.
    """
    job = {
        "scenario": scenario.model_dump(mode="json", by_alias=True, exclude_none=True),
        "folder": str(folder.resolve()),
        "device": device,
        "plugins": list(catalogue.asked),
        "tools": tools,
        "use": used(),
        "resume": resume,
    }
    (folder / JOB).write_text(json.dumps(job), encoding="utf-8")
    (folder / ERROR).unlink(missing_ok=True)
    count = scenario.train.ranks
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command = [*torchrun, "-m", "lab.runtime.rank", str(folder / JOB)]
    threads = str(max(1, (os.cpu_count() or 1) // count))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    with (folder / LOG).open("w", encoding="utf-8") as log:
        status = subprocess.run(command, stderr=log, env=environment, check=False).returncode  # noqa: S603 - our own
    if status:
        raise _error(folder)


def _error(folder: Path) -> LabError:
    """Say what a process said before it ended, or where to look."""
    try:
        told: dict[str, Any] = json.loads((folder / ERROR).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return LabError(f"a process ended without a word; see {folder / LOG}")
    return KINDS.get(told["kind"], LabError)(told["text"])
