"""Pairs of answers: is the loss DPO's, of the log-probabilities that are logged? It is computed again from these."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lab import NotChecked, Probe, Stage, Symptom, probe, rule, torch
from lab import numpy as np

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from torch import Tensor

    from lab import Batch, History, Run, Step

ROWS = 4
STEPS = 3  # measured steps that have to agree
# float32 has 24 bits; the same function of the same numbers agrees to five digits, and another one does not to four.
ROUNDING, APART = 1e-5, 1e-4
# Of a sum over a few tokens, computed from other rows beside them.
SCORE = 1e-4
NONE = "no reference in this run"


def scorer_of(run: Run) -> Any:
    """Return the part of the run that has a reference and logs the scores of both answers; None if there is none."""
    plugins = (plugin for _, plugin in run.plugins.list_name_plugin())
    return next((p for p in plugins if hasattr(p, "reference") and getattr(p, "scores", None) is not None), None)


@probe(
    "pairs",
    title="Is the loss of pairs DPO's, of the log-probabilities that are logged?",
    cost="the loss of the pairs again, in each step; a forward pass of the reference on four rows, on examined steps",
    examines=True,
    stages={
        "pairs.reference_chosen": Stage("beside", "newest"),
        "pairs.reference_rejected": Stage("beside", "newest"),
    },
)
class Pairs(Probe):
    """Computes the loss of a batch again from what was logged: ``-log sigmoid`` of the margin (Rafailov et al., 2023).

    Records ``pairs.loss``, what was propagated backward; ``pairs.form``, what it would be by DPO (``dpo``) and with the
    two answers exchanged (``swapped``); ``pairs.error``, how far it is from the first; ``pairs.reference_chosen`` and
    ``pairs.reference_rejected``, what the reference is logged to give, on average over the pairs; and on examined steps
    ``pairs.gap``, how far the scores of the ``policy`` and of the ``reference`` are from sums (``sum``) and from means
    (``mean``) over the targets that count, relatively.
    """

    def lab_start(self) -> None:
        self._kept: tuple[Batch, Tensor, Tensor] | None = (
            None  # rows, and what policy and reference were logged to give
        )
        self._policy: Tensor | None = None  # [2 rows]: log-probabilities of their targets, as a sum and as a mean

    def lab_loss(self, run: Run, step: Step) -> Generator[None, Tensor, Tensor]:
        loss = yield
        scorer = scorer_of(run) if step.mode == "train" and step.part == 0 else None
        if scorer is None or step.logits is None or step.batch is None or step.batch.targets is None:
            return loss
        scores, beta = tuple(score.double() for score in scorer.scores), float(scorer.beta)
        margin = beta * ((scores[0] - scores[2]) - (scores[1] - scores[3]))  # [pairs]
        forms = [torch.nn.functional.softplus(value).mean() for value in (-margin, margin)]
        step.record("pairs.loss", loss.double())
        step.record_all("pairs.form", ("dpo", "swapped"), torch.stack(forms))
        step.record("pairs.reference_chosen", scores[2].mean(), "reference")
        step.record("pairs.reference_rejected", scores[3].mean(), "reference")
        step.record("pairs.error", (loss.double() - forms[0]).abs())
        if step.examined:
            rows = step.batch.rows(ROWS)
            policy, reference = (torch.stack(scores[i : i + 2], dim=1).flatten()[:ROWS] for i in (0, 2))
            self._kept = rows, policy, reference
            assert rows.targets is not None
            self._policy = _sum_and_mean(step.logits.detach()[: len(rows.targets)], rows.targets)
        return loss

    def lab_examine(self, run: Run, step: Step) -> None:
        kept, policy = self._kept, self._policy
        self._kept = self._policy = None
        scorer = scorer_of(run)
        if scorer is None:
            raise NotChecked(NONE)
        if kept is None or policy is None or kept[0].targets is None or len(kept[0].targets) != len(kept[1]):
            return
        rows, *logged = kept
        with torch.no_grad():
            reference = _sum_and_mean(scorer.reference(*rows.args, **rows.kwargs), kept[0].targets)
        for name, own, said in (("policy", policy, logged[0]), ("reference", reference, logged[1])):
            gaps = (own - said).abs().amax(1) / own.abs().amax().clamp_min(1e-30)
            step.record_all("pairs.gap", (f"{name}.sum", f"{name}.mean"), gaps)


def _sum_and_mean(logits: Tensor, targets: Tensor) -> Tensor:  # [B T V], [B T] -> [2 B]
    """The log-probability of each row's targets that count: together, and of one on average."""
    counts = targets >= 0
    likely = logits.float().log_softmax(-1).gather(-1, targets.clamp_min(0)[..., None])[..., 0]
    total = (likely.double() * counts).sum(1)
    return torch.stack([total, total / counts.sum(1).clamp_min(1)])


# ---------------------------------------------------------------- rules


@rule(
    "pairs.swapped",
    title="The preferred answer is the one that gets likelier",
    reads=(),
    basis="experiment",
    phase="loss",
)
def pairs_swapped(history: History) -> Iterator[Symptom]:
    """The loss is ``-log sigmoid`` of minus the margin that is logged, and not of the margin.

    Exact, from some step on up to now and in three steps at least in which the two are apart: where the margin is 0,
    as it is at the start, they are equal and nothing is said.
    """
    series = history.series("pairs.loss")
    if not len(series):
        raise NotChecked(NONE)
    loss = series.values
    right, swapped = (history.series("pairs.form", name).values for name in ("dpo", "swapped"))
    apart = np.abs(right - swapped) > APART * np.maximum(1, np.abs(right))
    fits = np.abs(loss - swapped) <= ROUNDING * np.maximum(1, np.abs(loss))
    begin = series.until_now(fits[apart], STEPS)
    if begin is not None:
        step = int(series.steps[apart][begin])
        seen, best = float(loss[apart][begin]), float(right[apart][begin])
        text = (
            f"the loss at step {step} is {seen:.6f}, that of pairs whose answers are exchanged; by the margin that is "
            f"logged it is {best:.6f}"
        )
        yield Symptom(at="", since=step, seen=seen, expected=f"{best:.6g}", text=text)


@rule(
    "pairs.scored_apart",
    title="Policy and reference score an answer in the same way",
    reads=(),
    basis="experiment",
    phase="loss",
)
def pairs_scored_apart(history: History) -> Iterator[Symptom]:
    """One of the two is logged as the sum over an answer's tokens, the other as the mean, in three examined steps.

    A log-ratio is of two probabilities of the same thing. Means on both sides are not accused: length-normalised DPO
    takes them on purpose (Lambert et al., 2024, section 5).
    """
    first = history.series("pairs.gap", "policy.sum")
    if not len(first):
        raise NotChecked(NONE)
    gaps = {
        (who, how): history.series("pairs.gap", f"{who}.{how}").values
        for who in ("policy", "reference")
        for how in ("sum", "mean")
    }
    summed, averaged = (
        {who: (gaps[who, how] <= SCORE) & (gaps[who, other] > APART * 100) for who in ("policy", "reference")}
        for how, other in (("sum", "mean"), ("mean", "sum"))
    )
    for one, other in (("policy", "reference"), ("reference", "policy")):
        wrong = summed[one] & averaged[other]
        begin = first.until_now(wrong, STEPS)
        if begin is not None:
            step = int(first.steps[begin])
            text = (
                f"from step {step} on the {one} is logged with the sum of an answer's log-probabilities, the {other} "
            )
            text += "with their mean"
            yield Symptom(at="", since=step, seen=float(gaps[other, "sum"][begin]), expected="0", text=text)
