"""Is the loss the cross-entropy of the logits? It is computed again, in the right form and in wrong ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab import LookAgain, NotChecked, Probe, Symptom, probe, rule, torch
from lab import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from torch import Tensor

    from lab import History, Run, Site, Step

FLOORS = tuple(range(1, 9))  # a clamp at 10^-1 to 10^-8; float32 has no use for one further down
# float32 has 24 bits; the log-sum-exp over a row and the mean over tokens, in whatever order, lose a few of them.
ROUNDING = 1e-5


@probe(
    "objective",
    title="Is the loss the cross-entropy of the logits, or a wrong form of it?",
    every=0,
    cost="three passes over the logits, on measured steps",
)
class Objective(Probe):
    """Computes the loss of a classifier again from its logits and targets, right and wrong.

    Records ``objective.loss`` (what was propagated backward), ``objective.cross_entropy`` (the mean over all targets
    that count), ``objective.error`` (its standard error), ``objective.form``, what it would be by each wrong form
    (``softmax_twice``, ``mean_of_means``, ``clamped_1`` to ``clamped_8``: probabilities clamped at 10^-1 to 10^-8),
    ``objective.unevenness`` (how far ``objective.loss`` is from the cross-entropy, relatively), ``objective.cut`` (how
    far it is below it), ``objective.uniform`` (ln V), ``objective.descends`` (whether the optimiser minimises), and
    ``objective.distributions``: the share of rows of what counts as logits that are at least 0 and sum to 1.
    """

    def lab_start(self, run: Run) -> None:
        self._run = run
        self._parts: list[_Part] = []
        self._looked = -1  # at the newest step that was measured
        if run.sites.output:
            self.read(run, run.sites.output, self._see)

    def _see(self, _site: Site, logits: Tensor) -> None:
        """Of a batch that passes in parts only the last one's logits are left at the end: look at each as it passes."""
        step = self._run.step
        targets = step.batch.targets if step.batch is not None else None
        if step.parts > 1 and targets is not None and _fit(logits, targets):
            self._parts.append(_Part(logits, targets))

    def _surprised(self, run: Run) -> bool:
        """Whether the last look, and not the one before it, found another loss: the next one tells more."""
        if self._looked != run.step.index - 1:
            return False
        uneven = run.history.series("objective.unevenness").values[-2:] > ROUNDING
        return bool(len(uneven) and uneven[-1] and not uneven[:-1].any())

    def lab_before_update(self, run: Run, step: Step) -> None:
        parts, self._parts = self._parts, []
        if not (self.due(step) or self._surprised(run)) or step.loss is None or step.logits is None:
            return
        if step.loss.numel() != 1 or step.loss.dtype not in (torch.float32, torch.float64):
            return
        targets = step.batch.targets if step.batch is not None else None
        if step.parts == 1:
            parts = [_Part(step.logits, targets)] if targets is not None and _fit(step.logits, targets) else []
        if len(parts) != step.parts:
            return
        self._looked = step.index
        loss = step.loss.detach().double().reshape(())
        count = torch.stack([part.count for part in parts]).sum()
        right = torch.stack([part.losses.sum() for part in parts]).sum() / count
        step.record("objective.loss", loss)
        step.record("objective.cross_entropy", right)
        spread = torch.stack([((part.losses - right).square() * part.kept).sum() for part in parts]).sum()
        step.record("objective.error", spread.sqrt() / count)
        step.record("objective.unevenness", (loss - right).abs() / right.abs().clamp_min(1e-30))
        step.record("objective.cut", right - loss)
        step.record("objective.uniform", float(np.log(parts[0].classes)))
        step.record("objective.descends", float(not run.optimizer.param_groups[0].get("maximize", False)))
        step.record("objective.distributions", torch.stack([part.distributions for part in parts]).mean())
        forms = {
            "softmax_twice": torch.stack([part.twice for part in parts]).sum() / count,
            "mean_of_means": torch.stack([part.losses.sum() / part.count for part in parts]).mean(),
        }
        for digits in FLOORS:
            cut = torch.stack([part.losses.clamp_max(digits * float(np.log(10))).sum() for part in parts])
            forms[f"clamped_{digits}"] = cut.sum() / count
        step.record_all("objective.form", tuple(forms), torch.stack(list(forms.values())))


def _fit(logits: Tensor, targets: Tensor) -> bool:
    """Whether there is a class for each row of logits."""
    whole = not targets.is_floating_point() and logits.is_floating_point() and logits.dim() >= 2
    return whole and logits.shape[-1] > 1 and logits[..., 0].numel() == targets.numel()


class _Part:
    """What the logits of one part of a batch give, on the device, in float64 where it is added up."""

    def __init__(self, logits: Tensor, targets: Tensor) -> None:
        self.classes = logits.shape[-1]
        with torch.no_grad():
            z = logits.detach().reshape(-1, self.classes).float()  # [N V]
            y = targets.detach().reshape(-1)  # [N]
            self.kept = kept = y >= 0
            y = y.clamp(0, self.classes - 1)
            self.count = kept.sum().double()
            log_sum = z.logsumexp(-1)  # [N]
            self.losses = (log_sum - z.gather(-1, y[:, None]).squeeze(-1)).double() * kept  # [N]; 0 where ignored
            p = (z - log_sum[:, None]).exp()  # [N V]
            again = p.logsumexp(-1) - p.gather(-1, y[:, None]).squeeze(-1)  # [N]
            self.twice = (again.double() * kept).sum()
            sums = (z.sum(-1) - 1).abs() < 1e-3
            self.distributions = ((z.amin(-1) >= 0) & sums).double().mean()


# ---------------------------------------------------------------- rules


def _same(a: NDArray[np.float64], b: NDArray[np.float64], within: float = ROUNDING) -> NDArray[np.bool_]:
    """Whether two losses are equal but for rounding."""
    finite = np.isfinite(a) & np.isfinite(b)  # infinity is within any share of itself
    with np.errstate(invalid="ignore"):
        answer: NDArray[np.bool_] = np.abs(a - b) <= within * np.maximum(1, np.maximum(np.abs(a), np.abs(b)))
    return answer & finite


def _wrong_from(history: History, form: NDArray[np.float64]) -> tuple[int, float, float] | None:
    """Return the step from which the loss is a wrong form, and not the right one: with it, and what is right.

    It has to be so in two measured steps at least, and in all that can tell the two apart from the first of them on:
    that two numbers which have nothing to do with each other agree in five digits happens once, not always.

    Raises:
        NotChecked: It is neither, or one step was seen.
    """
    series, right = history.series("objective.loss"), history.series("objective.cross_entropy").values
    loss = series.values
    if not len(loss) or not np.any(np.isfinite(loss)):
        raise NotChecked("the loss was not finite on a measured step")
    # Ten times the rounding apart: nothing that is close to both tells which it is.
    apart = ~_same(form, right, 10 * ROUNDING)
    wrong = _same(loss, form) & apart
    where = np.flatnonzero(wrong)
    if len(where):
        first = int(where[0])
        told = apart[first:] & np.isfinite(loss[first:])
        if np.all(wrong[first:][told]):
            if len(where) < 2:
                raise LookAgain("one step was seen in which the loss may be another form; the next tells")
            return int(series.steps[first]), float(loss[first]), float(right[first])
    if not np.any(_same(loss, right)):
        raise NotChecked("the loss is no form of the cross-entropy of the logits that is known here")
    return None


def _form(history: History, name: str) -> NDArray[np.float64]:
    return history.series("objective.form", name).values


@rule(
    "objective.softmax_twice",
    title="Cross-entropy is taken of logits, not of probabilities",
    reads=("objective.loss", "objective.form"),
    basis="experiment",
    phase="loss",
)
def objective_softmax_twice(history: History) -> Iterator[Symptom]:
    """The loss is the cross-entropy of the softmax of the softmax; or the right one, of logits that are probabilities.

    A row that is nowhere below 0 and sums to 1 is a distribution. Logits have no reason to be one, in every row of
    every measured step. Right is the closed form; only rounding is allowed for.
    """
    series, right = history.series("objective.loss"), history.series("objective.cross_entropy").values
    share = history.series("objective.distributions").values
    if len(share) > 1 and np.all(share == 1) and np.all(_same(series.values, right)):
        seen, since, text = float(series.values[0]), int(series.steps[0]), "what it is given sums to 1 in every row"
        yield Symptom(
            at="",
            since=since,
            seen=seen,
            expected="logits",
            text=f"cross-entropy is given probabilities: {text}",
        )
        return
    if found := _wrong_from(history, _form(history, "softmax_twice")):
        step, seen, best = found
        yield Symptom(
            at="",
            since=step,
            seen=seen,
            expected=f"{best:.5g}",
            text=f"the loss at step {step} is {seen:.5f}, the cross-entropy of the softmax of the softmax; that of the "
            f"logits is {best:.5f}",
        )


@rule(
    "objective.sign",
    title="Training lowers the cross-entropy",
    reads=("objective.loss", "objective.form"),
    basis="experiment",
    phase="loss",
)
def objective_sign(history: History) -> Iterator[Symptom]:
    """The loss is minus the cross-entropy, and the optimiser minimises it (or the other way round).

    To climb on purpose means to unlearn. So it counts only where nothing was learned yet, that is where the
    cross-entropy was not below ln V, that of even odds, by three standard errors; or where the sign changes in the run.
    """
    right = history.series("objective.cross_entropy").values
    steps = history.series("objective.loss").steps
    descends = history.series("objective.descends").values > 0
    loss = np.where(descends, 1.0, -1.0) * history.series("objective.loss").values
    if not np.any(_same(np.abs(loss), right)):
        raise NotChecked("the loss is no form of the cross-entropy of the logits that is known here")
    climbs = _same(loss, -right) & ~_same(loss, right)
    where = np.flatnonzero(climbs)
    if not len(where):
        return
    first = int(where[0])
    if not np.all(climbs[first:] | ~np.isfinite(loss[first:])):
        raise NotChecked("the sign of the loss changes to and fro: two objectives take turns")
    error = history.series("objective.error").values
    learned = right[first] + 3 * error[first] < history.last("objective.uniform") and not first
    if learned:
        raise NotChecked("training climbs from a model that had learned something: it may be meant to unlearn")
    if len(where) < 2:
        raise LookAgain("one step was seen that climbs; the next tells whether it is the rule")
    yield Symptom(
        at="",
        since=int(steps[first]),
        seen=float(loss[first]),
        expected=f"{right[first]:.5g}",
        text=f"from step {steps[first]} on what is minimised is minus the cross-entropy: {loss[first]:.5f}, and at the "
        f"end {loss[-1]:.5g}",
    )


@rule(
    "objective.mean_of_means",
    title="Each target weighs the same, in whatever part of a batch it is",
    reads=("objective.loss", "objective.form"),
    basis="experiment",
    phase="loss",
)
def objective_mean_of_means(history: History) -> Iterator[Symptom]:
    """The loss of a batch in parts is the mean of the parts' means, which is not the mean over the targets."""
    if found := _wrong_from(history, _form(history, "mean_of_means")):
        step, seen, best = found
        yield Symptom(
            at="",
            since=step,
            seen=seen,
            expected=f"{best:.5g}",
            text=f"the loss at step {step} is {seen:.5f}, the mean of the means of the parts; over all targets it "
            f"is {best:.5f}",
        )


@rule(
    "objective.clamped",
    title="The loss of an unlikely target has no upper bound",
    reads=("objective.loss", "objective.form"),
    basis="experiment",
    phase="loss",
)
def objective_clamped(history: History) -> Iterator[Symptom]:
    """The loss is that of probabilities which are at least 10^-1, ..., or 10^-8, and not that of the probabilities."""
    reasons: list[NotChecked] = []
    for digits in FLOORS:
        try:
            found = _wrong_from(history, _form(history, f"clamped_{digits}"))
        except NotChecked as reason:
            reasons.append(reason)
            continue
        if found:
            step, seen, best = found
            yield Symptom(
                at="",
                since=step,
                seen=seen,
                expected=f"{best:.5g}",
                text=f"the loss at step {step} is {seen:.5f}: that of probabilities which are at least "
                f"{10.0**-digits:.0e}; without the bound it is {best:.5f}",
            )
            return
    if len(reasons) == len(FLOORS):
        raise reasons[0]
