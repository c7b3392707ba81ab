"""The loss: its course, and where it starts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lab import NotChecked, Probe, Stage, Symptom, probe, rule, torch
from lab import numpy as np

from .response import need_response

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from torch import Tensor, nn

    from lab import History, Run, Step


@probe(
    "loss",
    title="The loss, in training and on held-out data",
    cost="none",
    stages={"loss": Stage("loss", "newest"), "loss.held_out": Stage("evaluation")},
)
class Loss(Probe):
    """Records ``loss`` each step, and ``loss.held_out`` (nats a token) when the run evaluates.

    Where the source knows them, also ``loss.over_floor``, the latter over the entropy rate, and ``loss.bits_per_byte``,
    which does not depend on the tokenizer.
    """

    def lab_step_end(self, step: Step) -> None:
        if step.loss is not None:
            step.record("loss", step.loss.detach().mean())

    def lab_evaluate(self, run: Run) -> Generator[None, Tensor, Tensor]:
        loss = yield
        run.step.record("loss.held_out", loss)
        floor = getattr(run.data, "floor", None)  # the entropy rate, where the source has one that is known
        if floor:
            run.step.record("loss.over_floor", loss / floor)
        size = getattr(run.data, "bytes_per_token", None)
        if size:
            run.step.record("loss.bits_per_byte", loss / (size * math.log(2)))
        return loss


@rule("loss.nonfinite", title="The loss is finite", reads=("loss",), basis="theory", phase="loss")
def loss_nonfinite(history: History) -> Iterator[Symptom]:
    """Nothing can be learned from a loss that is NaN or infinite."""
    series = history.series("loss")
    if found := series.first(~np.isfinite(series.values)):
        step, seen = found
        text = f"the loss is not finite from step {step}"
        yield Symptom(at="", since=step, seen=seen, expected="finite", text=text)


@probe(
    "start",
    title="Does the loss start where theory says?",
    cost="one pass over the logits, at step 0 only",
    examines=True,
)
class Start(Probe):
    """At step 0, for a classifier over V classes, records what is needed to compare the loss with ln V + d s^2 / 2.

    ``start.loss``, ``start.error`` (its standard error), ``start.classes`` (V), ``start.head_std`` and
    ``start.head_inputs`` (s and d of the layer that makes the logits), and for each matrix ``start.scale``: its
    standard deviation over that of He's initialiser, ``sqrt(2 / fan_in)``, and ``start.inputs``, that fan_in.
    """

    def lab_start(self, run: Run) -> None:
        self._run = run
        matrices = {name: p for name, p in run.parameters.items() if p.dim() >= 2 and p.numel() > 1}
        self._scales = [(name, p.detach().std() / (2 / fan_in(run.model, name)) ** 0.5) for name, p in matrices.items()]

    def lab_before_update(self, run: Run, step: Step) -> None:
        if step.index == 0:
            self._at_start(run, step)

    def _at_start(self, run: Run, step: Step) -> None:
        step.record_all("start.scale", tuple(n for n, _ in self._scales), torch.stack([s for _, s in self._scales]))
        for name, _ in self._scales:
            step.record("start.inputs", float(fan_in(run.model, name)), name)
        targets = step.batch.targets if step.batch is not None else None
        if step.logits is None or targets is None or targets.is_floating_point():
            return
        classes = step.logits.shape[-1]
        logits = step.logits.detach().reshape(-1, classes).float()  # [N V]
        flat = targets.reshape(-1)  # [N]
        if len(flat) != len(logits):
            return
        losses = torch.nn.functional.cross_entropy(logits, flat, reduction="none")  # [N]; 0 where ignored
        kept = (flat >= 0).float()
        count = kept.sum()
        mean = losses.sum() / count
        spread = ((losses - mean).square() * kept).sum() / count
        step.record("start.classes", float(classes))
        step.record("start.loss", mean)
        step.record("start.error", (spread / count).sqrt())
        head = [p for p in run.parameters.values() if p.dim() == 2 and p.shape[0] == classes]
        if head:
            step.record("start.head_std", head[-1].detach().std())
            step.record("start.head_inputs", float(head[-1].shape[1]))


def fan_in(model: nn.Module, name: str) -> int:
    """How many inputs each output of a weight sums: 1 for a table that is looked up."""
    path, _, _ = name.rpartition(".")
    module = model.get_submodule(path)
    declared = getattr(module, "fan_in", None)
    if declared is not None:
        return int(declared)
    if isinstance(module, (torch.nn.Embedding, torch.nn.EmbeddingBag)):
        return 1
    return int(model.get_parameter(name)[0].numel())


# He's variance, 2 / fan_in, is the largest of the standard initialisers. With inputs of mean square 1 it gives
# logits of variance 2, and a mean loss of ln V + 2/2 over targets that the logits do not know.
LARGEST_EXCESS = 1.0


@rule(
    "start.loss_high",
    title="The loss starts near ln V + d s^2/2",
    reads=("start.loss",),
    basis="theory",
    phase="loss",
)
def start_loss_high(history: History) -> Iterator[Symptom]:
    """Before anything is learned, logits of variance ``d s^2`` cost ``ln V + d s^2 / 2`` nats, at most 1 above ln V.

    Three standard errors of the measured mean are allowed for. A higher loss is judged only where the logits become
    smaller with the weights: between normalised vectors, times a scale, they do not, and that scale is a choice.
    """
    loss, error, classes = (history.last(f"start.{name}") for name in ("loss", "error", "classes"))
    if not math.isfinite(loss):
        raise NotChecked("the loss at step 0 is not finite")
    bound = math.log(classes) + LARGEST_EXCESS
    if loss > bound + 3 * error:
        need_response(history)
        std, inputs = history.last("start.head_std"), history.last("start.head_inputs")
        said = f"; the head's d s^2/2 is {inputs * std**2 / 2:.3g}" if math.isfinite(std) else ""
        yield Symptom(
            at="",
            since=0,
            seen=loss,
            expected=f"at most {bound:.3g}",
            text=f"the loss starts at {loss:.2f}, where ln V = {math.log(classes):.2f} and no standard initialiser "
            f"goes above {bound:.2f}{said}",
        )


@rule(
    "start.scale_high",
    title="No weight starts larger than a standard initialiser makes it, where the loss starts high",
    reads=("start.scale", "start.loss"),
    basis="theory",
    phase="forward",
)
def start_scale_high(history: History) -> Iterator[Symptom]:
    """A standard deviation above twice He's ``sqrt(2 / fan_in)``; asked only where the loss starts too high."""
    if not any(start_loss_high.judge(history)):
        return
    for name, series in history.each("start.scale"):
        scale = float(series.values[0])
        if scale > 2:
            yield Symptom(
                at=name,
                since=0,
                seen=scale,
                expected="at most 1",
                text=f"{name} starts with {scale:.1f} times the standard deviation of He's initialiser",
            )


# The smallest of the standard initialisers divides 0.02 by the root of twice the layers (GPT-2). With a hundred layers
# of 16 inputs that is 0.004 of He's, and more with more inputs.
SMALLEST = 0.003
FEWEST_INPUTS, FEWEST_MATRICES = 16, 4


@rule(
    "start.scale_low",
    title="Not all matrices start smaller than any standard initialiser makes them",
    reads=("start.scale", "start.inputs", "start.loss"),
    basis="theory",
    phase="forward",
)
def start_scale_low(history: History) -> Iterator[Symptom]:
    """Every matrix of 16 inputs and more, but for one, is above 0 and below 0.003 of He's standard deviation.

    Some may be small or 0 on purpose: the last of a branch, the head, a table before a norm, an adapter on a trained
    model. So this asks for all of them, four at least, in a model that knows nothing: its loss starts at ln V.
    """
    scales = {
        name: float(series.values[0])
        for name, series in history.each("start.scale")
        if history.last("start.inputs", name) >= FEWEST_INPUTS
    }
    loss, error, classes = (history.last(f"start.{metric}") for metric in ("loss", "error", "classes"))
    if not math.isfinite(loss):
        raise NotChecked("the loss at step 0 is not finite")
    low = {name: scale for name, scale in scales.items() if 0 < scale < SMALLEST}
    if len(low) < max(FEWEST_MATRICES, len(scales) - 1) or loss < math.log(classes) - 3 * error:
        return
    for name, scale in low.items():
        yield Symptom(
            at=name,
            since=0,
            seen=scale,
            expected=f"at least {SMALLEST}",
            text=f"{name} starts with {scale:.2g} times the standard deviation of He's initialiser, as {len(low)} of "
            f"{len(scales)} matrices",
        )
