"""One process of several: ``torchrun -m lab.runtime.rank JOB``. See `lab.runtime.launch`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed as dist

from lab.errors import LabError, one_line
from lab.files import new_folder
from lab.learn.component import use
from lab.manager import discover
from lab.projects import PROJECTS
from lab.scenario import Scenario, make_faults

if TYPE_CHECKING:
    from lab.catalogue import Catalogue


def main(path: Path) -> int:
    """Take part in the run that a job describes; 1 when it failed, and why in the file that the launcher reads."""
    job = json.loads(path.read_text(encoding="utf-8"))
    for project in PROJECTS:
        if project.id in job["use"]:
            use(project, job["use"][project.id])
    dist.init_process_group("nccl" if job["device"].startswith("cuda") else "gloo")
    try:
        take_part(job, discover(job["plugins"], Path.cwd()))
    except Exception as error:
        tell(path.with_name("error.json"), error)
        if isinstance(error, LabError):
            return 1
        raise
    finally:
        dist.destroy_process_group()
    return 0


def take_part(job: dict[str, Any], catalogue: Catalogue) -> None:
    """Train as one of several. The first keeps the run itself; the others keep theirs in a folder inside it."""
    from lab.runtime.team import TEAMS  # after the learner's components stand in place of the lab's
    from lab.runtime.train import train

    scenario = Scenario.model_validate(job["scenario"])
    rank = dist.get_rank()
    folder = Path(job["folder"]) / f"rank-{rank}" if rank else Path(job["folder"])
    if rank and not job["resume"]:
        new_folder(folder)
    tools = [catalogue.plugins[name] for name in job["tools"]] if rank == 0 else []
    faults = make_faults(scenario, catalogue, scenario.title)
    team = TEAMS[scenario.train.parallel](scenario)
    device = torch.device(job["device"])
    train(scenario, catalogue, folder, faults, tools, device=device, resume=job["resume"], team=team)


def tell(path: Path, error: Exception) -> None:
    """Write why this process failed. The first to fail is the one that counts: the others fail because of it."""
    told = {"kind": type(error).__name__, "text": str(error) if isinstance(error, LabError) else one_line(error)}
    try:
        with path.open("x", encoding="utf-8") as file:
            json.dump(told, file)
    except FileExistsError:
        pass


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
