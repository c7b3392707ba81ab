"""Are there as many classes as tokens, and does every class count in the loss?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab import NotChecked, Probe, Stage, Symptom, probe, rule, torch
from lab import numpy as np

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from torch import Tensor

    from lab import History, Run, Step

STEPS = 3  # measured steps that have to agree
# The same numbers, added in float32 in another order: five digits agree. What is not the same differs in the fourth.
ROUNDING, APART = 1e-5, 1e-4
# Tables are made a multiple of 128 for each of up to 16 processes that share them, and of no more.
ROUND_UP = 2048
OTHERS = "it is not the lab's own training: which tokens there are is not known"


@probe(
    "vocabulary",
    title="Does the model have the classes that there are, and does each count in the loss?",
    every=0,
    cost="two passes over the logits, on measured steps",
    stages={
        "vocabulary.beyond": Stage(
            "weight", "flag", about="head", says="the model has more classes than the data have tokens, rounded up"
        )
    },
)
class Vocabulary(Probe):
    """Counts the classes, and computes the loss of the lab's own training again, without each class in turn.

    Records ``vocabulary.classes`` and ``vocabulary.tokens``, how many classes there are and how many the data have;
    ``vocabulary.beyond``, how many classes there are beyond these tokens, rounded up;
    ``vocabulary.loss``, ``vocabulary.whole``, the mean over all targets that count, and of the means without the
    targets of one class the nearest to the loss, ``vocabulary.without``, and that class, ``vocabulary.left_out``;
    ``vocabulary.unevenness``, how far the loss is from the mean over all; and ``vocabulary.present``, how many targets
    are of the class that was left out when one last was, or 1 before that.
    """

    def lab_start(self) -> None:
        self._suspect: Tensor | None = None  # the class that was left out; -1 before

    def lab_loss(self, run: Run, step: Step) -> Generator[None, Tensor, Tensor]:
        loss = yield
        known = getattr(run.data, "vocabulary", None)
        if step.mode != "train" or step.part or not self.due(step) or not isinstance(known, int):
            return loss
        logits, targets = step.logits, step.batch.targets if step.batch is not None else None
        if logits is None or targets is None or logits.shape[:-1] != targets.shape or loss.numel() != 1:
            return loss
        step.record("vocabulary.classes", float(logits.shape[-1]))
        step.record("vocabulary.tokens", float(known))
        step.record("vocabulary.beyond", float(max(0, logits.shape[-1] - -(-known // ROUND_UP) * ROUND_UP)))
        self._without(step, logits.detach().flatten(0, -2), targets.flatten(), loss.detach().double())
        return loss

    def _without(self, step: Step, logits: Tensor, targets: Tensor, loss: Tensor) -> None:
        """Leave each class out in turn: the sum of all losses less those of the class, by how many are left."""
        kept = targets >= 0
        own = targets.clamp_min(0)  # [N]
        z = logits.float()
        losses = (z.logsumexp(-1) - z.gather(-1, own[:, None])[:, 0]).double() * kept  # [N]
        zeros = losses.new_zeros(z.shape[-1])
        total, count = zeros.index_add(0, own, losses), zeros.index_add(0, own, kept.double())  # [V]
        left = count.sum() - count
        without = (total.sum() - total) / left.clamp_min(1)  # [V]
        gap = torch.where((count > 0) & (left > 0), (without - loss).abs(), torch.inf)
        nearest = gap.argmin()
        whole = total.sum() / count.sum().clamp_min(1)
        suspect = nearest.new_full((), -1) if self._suspect is None else self._suspect
        step.record("vocabulary.present", torch.where(suspect < 0, 1.0, count.take(suspect.clamp_min(0))))
        size = loss.abs().clamp_min(1)
        found = (gap.amin() <= ROUNDING * size) & ((loss - whole).abs() > APART * size)
        self._suspect = torch.where(found, nearest, suspect)
        step.record("vocabulary.loss", loss)
        step.record("vocabulary.whole", whole)
        step.record("vocabulary.without", without.take(nearest))
        step.record("vocabulary.left_out", nearest.double())
        step.record("vocabulary.unevenness", (loss - whole).abs())


# ---------------------------------------------------------------- rules


@rule(
    "vocabulary.class_left_out",
    title="Every class counts in the loss",
    reads=(),
    basis="experiment",
    phase="loss",
)
def vocabulary_class_left_out(history: History) -> Iterator[Symptom]:
    """The loss is the mean over all targets but those of one class, and not over all, in three measured steps or more.

    Exact, and up to now: one class among many may fit by chance, but not the same one three times. Only in the lab's
    own training: elsewhere a token of padding or of an image may be left out by the loss, rightly.
    """
    series = history.series("vocabulary.loss")
    if not len(series):
        raise NotChecked(OTHERS)
    loss = series.values
    whole, without, left = (history.series(f"vocabulary.{n}").values for n in ("whole", "without", "left_out"))
    with np.errstate(invalid="ignore"):  # of a loss that is not finite nothing fits
        off = np.abs(loss - whole) / np.maximum(1, np.abs(loss))
    fits = np.abs(loss - without) <= ROUNDING * np.maximum(1, np.abs(loss))
    if not np.any(fits | (off <= APART)):
        raise NotChecked("the loss is no form of the cross-entropy that is known here")
    # Where the class does not occur, or the two means are close to each other, nothing can be said.
    told = np.flatnonzero(((off <= ROUNDING) & (history.series("vocabulary.present").values > 0)) | (off > APART))
    if not len(told):
        return
    steps, loss, whole, left = series.steps[told], loss[told], whole[told], left[told]
    begin = series.until_now(fits[told] & (off[told] > APART) & (left == left[-1]), STEPS)
    if begin is not None:
        step, token = int(steps[begin]), int(left[-1])
        text = f"the loss at step {step} is {loss[begin]:.5f}, the mean over all targets but those of class {token}; "
        text += f"over all it is {whole[begin]:.5f}"
        yield Symptom(at="", since=step, seen=float(loss[begin]), expected=f"{whole[begin]:.5g}", text=text)


@rule(
    "vocabulary.too_many",
    title="The model has no more classes than there are tokens, rounded up",
    reads=(),
    basis="theory",
    phase="forward",
)
def vocabulary_too_many(history: History) -> Iterator[Symptom]:
    """There are more classes than tokens, rounded up to a multiple of 2048.

    Tables are rounded up to a multiple of 64 or 128, or of 128 for each of the processes that share them; 2048 is that
    for 16. A row that no token has is never learned, and only costs.
    """
    classes, tokens = history.series("vocabulary.classes"), history.series("vocabulary.tokens").values
    if not len(classes):
        raise NotChecked(OTHERS)
    if found := classes.first(classes.values > np.ceil(tokens / ROUND_UP) * ROUND_UP):
        step, seen = found
        text = f"the model tells {seen:.0f} classes apart, and there are {tokens[0]:.0f} tokens"
        yield Symptom(at="", since=step, seen=seen, expected=f"{tokens[0]:.0f}", text=text)
