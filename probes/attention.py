"""Attention from the inside: where each position looks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab import NotChecked, Probe, Symptom, probe, rule, torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from lab import History, Run, Site


@probe(
    "attention",
    title="Entropy, row sums and mass on the future of each attention pattern",
    every=10,
    cost="one layer's scores for one row of the batch, computed aside",
)
class Attention(Probe):
    """Looks at each attention pattern, for one row of the batch.

    Records ``attention.entropy`` (nats, the mean over rows), ``attention.row_error`` (the
    largest distance of a row's sum from 1; a row that may see nothing sums to 0), ``attention.future`` (the largest
    share of a row that lies on later positions), and an image of the first head.
    """

    IMAGE_EVERY = 50

    def lab_start(self, run: Run) -> None:
        self._run = run
        if not self.read(run, "**.pattern", self._see):
            raise NotChecked("no attention in this model names its pattern as a site")

    def _see(self, site: Site, pattern: Tensor) -> None:
        pattern = pattern.detach()[:1]  # [1 H T S]; training's own path computes one row for us
        step = self._run.step
        rows = pattern.sum(-1)  # [1 H T]
        step.record("attention.entropy", torch.special.entr(pattern).sum(-1).mean(), site.name)
        step.record("attention.row_error", ((rows - 1).abs() * (rows != 0)).amax(), site.name)
        step.record(
            "attention.future", pattern.triu(pattern.shape[-1] - pattern.shape[-2] + 1).sum(-1).amax(), site.name
        )
        if step.index % self.IMAGE_EVERY == 0:
            step.show("image", "attention", pattern[0, 0], site.name)


@rule(
    "attention.future",
    title="No attention pattern lies on later positions",
    reads=("attention.future", "causality.next_token"),
    basis="theory",
    phase="forward",
)
def attention_future(history: History) -> Iterator[Symptom]:
    """Where the next token is to be predicted, a pattern that reaches later positions reads the answer."""
    share = history.series("causality.next_token").finite.values
    if not len(share) or not share.max() > 0.99:
        raise NotChecked("the targets are not the next tokens, so the model need not be causal")
    for site, series in history.each("attention.future"):
        if found := series.first(series.values > 1e-6):
            step, seen = found
            text = f"{site} puts up to {seen:.0%} of a row on later positions, from step {step}"
            yield Symptom(at=site, since=step, seen=seen, expected="0", text=text)


@rule(
    "attention.rows",
    title="The rows of each attention pattern sum to 1",
    reads=("attention.row_error",),
    basis="theory",
    phase="forward",
)
def attention_rows(history: History) -> Iterator[Symptom]:
    """A softmax sums to 1 along the axis that it was taken over; float error grows with the length of the row."""
    for site, series in history.each("attention.row_error"):
        # bfloat16 keeps 8 bits: 2^-8 a term, and errors cancel.
        if found := series.first(series.values > 1e-2):
            step, error = found
            text = f"a row of {site} sums to 1 only within {error:.2g}, from step {step}"
            yield Symptom(at=site, since=step, seen=error, expected="0", text=text)
