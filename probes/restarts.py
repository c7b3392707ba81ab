"""Whether a loader begins anew for each step, in a loop that the lab did not write."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab import NotChecked, Probe, Symptom, probe, rule
from lab import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab import History, Run, Step

LOOKS = 5  # batches that have to agree


@probe("restarts", title="Does a loader begin anew in every step?", cost="none")
class Restarts(Probe):
    """Counts the iterators that are made of loaders of several batches, in a loop that the lab did not write.

    Records in each step ``loader.begun``, how many were made since the update before.
    """

    def lab_start(self, run: Run) -> None:
        if run.config is not None:
            raise NotChecked("the lab's own training makes no iterator in a step")

    def lab_before_update(self, step: Step) -> None:
        step.record("loader.begun", float(step.loaders))


@rule(
    "loader.restarted",
    title="A loader does not begin anew for each step, to give the first batch again",
    reads=("loader.begun", "fingerprint.batch"),
    basis="experiment",
    phase="run",
)
def loader_restarted(history: History) -> Iterator[Symptom]:
    """A loader of several batches began anew in each step, and every batch that was looked at is the same.

    To the last bit. One batch that is trained on by intent is taken from its loader once; and a loader that begins anew
    and shuffles gives another batch each time.
    """
    begun = history.series("loader.begun")
    parts = [series for _, series in history.each("fingerprint.batch")]  # of what the model is called with
    # Before step 0, a loader may have begun unseen.
    if np.any(begun.values[1:] == 0) or any(len(set(part.values)) > 1 for part in parts):
        return
    count = max(len(part) for part in parts)
    if count < LOOKS:
        raise NotChecked(f"{count} batches were looked at; {LOOKS} are needed")
    text = f"in each of {len(begun) - 1} steps a loader of several batches began anew, and all batches are the same"
    yield Symptom(at="", since=int(begun.steps[0]), seen=1.0, expected="another batch", text=text)
