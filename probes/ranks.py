"""Do several processes that begin with the same weights keep the same weights?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab import NotChecked, Probe, Symptom, probe, rule, torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from lab import History, Run, Step


@probe("ranks", title="Do the processes hold the same weights?", every=10, cost="one sum a weight and a small message")
class Ranks(Probe):
    """Compares a sum of each weight between the processes, before an update: the first three, then every tenth.

    Records ``ranks.alike``, the share of weights that all processes began with alike, and ``ranks.drifted``, how many
    of these are not alike any more. Where weights are cut, the share is below 1, and nothing is judged: a bias of 0
    begins alike whether it is cut or not.
    """

    def lab_start(self) -> None:
        self._began: Tensor | None = None

    def lab_before_update(self, run: Run, step: Step) -> None:
        if self._why_not(run) or not self.due(step):
            return
        # A sum in one order: of the same bits it is the same.
        sums = torch.stack([p.detach().double().sum() for p in run.parameters.values()]).nan_to_num()
        each = [torch.empty_like(sums) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(each, sums)
        alike = (torch.stack(each) == sums).all(dim=0)  # [n]
        if self._began is None:
            self._began = alike
        step.record("ranks.alike", self._began.double().mean())
        step.record("ranks.drifted", (self._began & ~alike).sum())

    def lab_examine(self, run: Run) -> None:
        if reason := self._why_not(run):
            raise NotChecked(reason)

    def _why_not(self, run: Run) -> str:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return "there is one process"
        if torch.distributed.get_world_size() == 1:
            return "there is one process"
        # A message that some processes do not take part in is waited for without end.
        return "" if run.config is not None else "whether every process is watched is not known"


@rule(
    "ranks.drift",
    title="All processes keep the same weights",
    reads=("ranks.drifted",),
    basis="experiment",
    phase="update",
)
def ranks_drift(history: History) -> Iterator[Symptom]:
    """What was alike, and is given the same updates, stays alike to the last bit; if not, it drifts."""
    drifted, began = history.series("ranks.drifted"), history.last("ranks.alike")
    if len(drifted) < 2 or not began == 1:
        raise NotChecked("fewer than two looks, or the processes did not begin with the same weights")
    if found := drifted.first(drifted.values > 0):
        step, count = found
        if all(drifted.values[drifted.steps >= step] > 0):
            text = f"{count:.0f} weights that all processes began with alike differ at step {step}"
            yield Symptom(at="", since=step, seen=count, expected="0", text=text)
