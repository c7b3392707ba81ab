"""Do matrices follow each other with no activation between them? Read off the sequences of the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab import Probe, Symptom, probe, rule, torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from lab import History, Run, Step


@probe("linear-rows", title="How many matrices follow each other without an activation?", cost="none", every=0)
class LinearRows(Probe):
    """Looks at each ``nn.Sequential``, which calls its parts one after the other.

    Records, where the step is examined, ``ffn.row``: how many ``nn.Linear`` that learn follow each other with nothing
    but dropout between them, none of which is narrower than both what goes in and what comes out, the most of each
    sequence; 0 under no name.
    """

    def lab_before_update(self, run: Run, step: Step) -> None:
        if not self.due(step):
            return
        step.record("ffn.row", 0.0)
        for name, module in run.model.named_modules():
            if type(module) is torch.nn.Sequential:
                step.record("ffn.row", max(map(_factors, _rows(module))), name or "model")


def _rows(sequence: nn.Sequential) -> Iterator[list[nn.Linear]]:
    """Yield the matrices that follow each other directly, or with dropout between them."""
    row: list[nn.Linear] = []
    for module in sequence:
        if type(module) is torch.nn.Linear and all(p.requires_grad for p in module.parameters()):
            row.append(module)
        elif not isinstance(module, (torch.nn.Identity, torch.nn.Dropout)):
            yield row
            row = []
    yield row


def _factors(row: list[nn.Linear]) -> int:
    """How many of them are no factors of low rank; 0 where one is, which is meant."""
    if not row:
        return 0
    ends = min(row[0].in_features, row[-1].out_features)
    return 0 if any(layer.out_features < ends for layer in row[:-1]) else len(row)


@rule(
    "ffn.linear_row",
    title="No more than two matrices follow each other without an activation",
    reads=("ffn.row",),
    basis="theory",
    phase="forward",
)
def ffn_linear_row(history: History) -> Iterator[Symptom]:
    """A product of matrices is a matrix: of three in a row, all of which are learned, two add nothing.

    Two in a row may be meant, as a new head behind an old one, and so may a factor of low rank.
    """
    for name in history.sites("ffn.row"):
        series = history.series("ffn.row", name)
        if name and (found := series.first(series.values > 2)):
            text = f"{name} multiplies by {found[1]:.0f} matrices one after the other, with no activation between them"
            yield Symptom(at=name, since=found[0], seen=found[1], expected="at most 2", text=text)
