"""Does `lab diff` stay silent where two runs compute the same, and only round otherwise?

    python benchmarks/diff_healthy.py               # 20 healthy configurations
    python benchmarks/diff_healthy.py --runs 100

The configurations are those of `lab matrix`, of all projects in turn. Each is run for 24 steps as it is; once more;
with the parts of attention written out in place of the fused kernel; and, where no random number depends on it, with
each batch in twice as many parts. The numbers of none of these pairs should differ, and neither should the work of what
was run once more: what is printed is a false alarm. Attention that is written out does take other work.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import lab
from lab.diff import compare_folders
from lab.explain import headline
from lab.manager import discover
from lab.matrix.cells import configured, healthy_cells
from lab.runtime.run import find_device, run_once

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.catalogue import Catalogue
    from lab.scenario import Scenario

STEPS = 24  # enough to tell whether times differ
AGAIN = "once more"


@lab.plugin("written_out", title="Attention, part by part")
class WrittenOut(lab.Plugin):
    """Replaces scores by themselves: what does so takes the fused kernel away."""

    def lab_start(self, run: lab.Run) -> None:
        """Replace all there are."""
        for site in run.sites.match("**"):
            if site.name.endswith(".scores"):
                run.sites.replace(site.name, lambda scores: scores, lambda: True)


def pairs(scenario: Scenario, catalogue: Catalogue, folder: Path) -> Iterator[tuple[str, Path, Path]]:
    """Run a scenario in several ways that come to the same; yield what was changed, and two folders."""

    def run(name: str, changed: Scenario, *tools: lab.Plugin) -> Path:
        run_once(name, changed, catalogue, folder / name, [], find_device("cpu"), [*tools])
        return folder / name

    plain = run("plain", scenario)
    yield AGAIN, plain, run("again", scenario)
    yield "attention written out", plain, run("written out", scenario, WrittenOut())
    parts = 2 * scenario.train.accumulate
    if scenario.data.batch % parts == 0 and not scenario.model.dropout:
        train = scenario.train.model_copy(update={"accumulate": parts})
        yield "more parts", plain, run("parts", scenario.model_copy(update={"train": train}))


def main() -> int:
    """Print each false alarm, and how many pairs there were; the status is 1 if there was any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20, help="how many configurations")
    options = parser.parse_args()
    torch.set_num_threads(1)
    catalogue = discover()
    probes = [id for id, probe in catalogue.probes.items() if probe.info.stages]
    count = wrong = 0
    for cell in healthy_cells(options.runs):
        scenario = configured(cell).model_copy(update={"steps": STEPS, "probes": probes})
        if scenario.train.ranks > 1:  # several processes take seconds to start
            continue
        with tempfile.TemporaryDirectory(prefix="lab-diff-") as folder:
            for changed, a, b in pairs(scenario, catalogue, Path(folder)):
                count += 1
                found = compare_folders(a, b).found
                if found.first is not None or (changed == AGAIN and found.work.amounts):
                    wrong += 1
                    print(f"{cell.key}, {changed}: {headline(found)}", flush=True)
    print(f"{count - wrong} of {count} pairs agree")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
