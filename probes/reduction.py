"""What becomes of the processes' own gradients: their mean, a sum, or an average of a part."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from lab import NotChecked, Probe, Stage, Symptom, probe, rule, torch
from lab import numpy as np

from .ranks import why_not

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from numpy.typing import NDArray
    from torch import Tensor

    from lab import Batch, History, Run, Step

SAMPLE = 65_536  # numbers of all gradients that are compared, in every weight as many
# Sums of float32 keep 24 bits but for what cancels. A form that is another than this one is far beyond a hundred times.
ROUNDING = 1e-4
APART = 1e-2
FORMS = ("mean", "early")


@probe(
    "reduction",
    title="Is the gradient the mean of the processes' own?",
    every=10,
    cost="a copy of 65,536 numbers and a message of a megabyte, on measured steps",
    stages={
        "reduction.early": Stage(
            "gradient",
            "flag",
            about="loop",
            says="gradients are averaged after the first part of a batch alone",
        )
    },
)
class Reduction(Probe):
    """Keeps of each weight some numbers of what each backward pass gives, and compares the update's gradient with them.

    Records ``reduction.error``: of the gradient, relatively, from a multiple of ``mean`` (the mean over the processes
    of all parts of the batch) and of ``early`` (of the first part that mean, of the others this process's own);
    ``reduction.early``, whether it is the second of these and not the first. And
    ``reduction.ratio``: how many times that mean it is, before it is clipped; ``reduction.world``, how many processes
    there are; ``reduction.parts``, in how many parts the batch passed. For each weight ``reduction.left_out``: whether
    its gradient is a multiple of this process's own, and not of the mean; ``reduction.averaged``, for how many weights
    it is the other way round.
    """

    def lab_start(self, run: Run) -> None:
        self._run = run
        self._hooks: list[Any] = []
        self._first: dict[str, Tensor] = {}
        self._own: dict[str, Tensor] = {}
        self._chosen: dict[str, Tensor] = {}
        self._names: tuple[str, ...] = ()
        if why_not(run):
            return
        kinds = (torch.float32, torch.float64)
        self._chosen = {name: p for name, p in run.parameters.items() if p.dtype in kinds}
        self._names = tuple(self._chosen)
        # Messages have one size: where weights are cut into unequal shares, none is sent.
        size = torch.tensor([float(p.numel()) for p in self._chosen.values()], device=run.device).cumsum(0)[-1:]
        each = [torch.empty_like(size) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(each, size)
        if not all(torch.equal(other, size) for other in each):
            self._chosen = {}

    def lab_batch(self, step: Step) -> Generator[None, Batch, Batch]:
        batch = yield
        if step.mode == "train" and self.due(step) and not self._hooks:
            for name, p in self._chosen.items():
                self._hooks.append(p.register_hook(partial(self._see, name)))  # type: ignore[no-untyped-call]
        return batch

    def _see(self, name: str, grad: Tensor | None) -> None:
        """A backward pass has made this gradient, and no other process knows of it yet."""
        if grad is None:
            return
        some = self._some(grad)
        self._own[name] = self._own[name] + some if name in self._own else some
        if self._run.step.part == 0:
            self._first[name] = self._own[name]

    def _some(self, grad: Tensor) -> Tensor:  # -> [k]
        """Some numbers of a gradient, spread over it."""
        room = max(16, SAMPLE // len(self._chosen))
        return grad.detach().reshape(-1)[:: -(-grad.numel() // room)].double()

    def _rows(self, values: dict[str, Tensor]) -> Tensor:  # -> [n k]
        """Put the numbers of each weight in a row of its own; 0 where there are none."""
        room = max(16, SAMPLE // len(self._chosen))
        rows = torch.zeros(len(self._chosen), room, dtype=torch.float64, device=self._run.device)
        for row, name in zip(rows, self._names, strict=True):
            if name in values:
                row[: len(values[name])] = values[name]
        return rows

    def lab_before_update(self, run: Run, step: Step) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        first, self._first = self._first, {}
        own, self._own = self._own, {}
        if not (self.due(step) and self._chosen):
            return
        parts = torch.stack([self._rows(first), self._rows(own)])  # [2 n k]
        means = parts.clone()
        torch.distributed.all_reduce(means)
        means /= torch.distributed.get_world_size()
        grad = self._rows({name: self._some(p.grad) for name, p in self._chosen.items() if p.grad is not None})  # [n k]
        forms = torch.stack([means[1], means[0] + (parts[1] - parts[0])])  # [2 n k]
        times, error = _multiple(forms.flatten(1), grad.flatten())  # [2] each
        step.record_all("reduction.error", FORMS, error)
        step.record("reduction.early", ((error[1] < ROUNDING) & (error[0] > APART)).double())
        step.record("reduction.world", float(torch.distributed.get_world_size()))
        step.record("reduction.parts", float(step.parts))
        ratio, every = times[0], [p.grad for p in run.parameters.values() if p.grad is not None]
        if step.grad_norm is not None and every:
            left = torch.stack(torch._foreach_norm(every)).double().norm()
            ratio = ratio * step.grad_norm.detach().double() / left.clamp_min(1e-300)
        step.record("reduction.ratio", ratio)
        # Norms that are not the same clip by factors that are not: weight by weight, any multiple will do.
        (_, mean), (_, alone) = _multiple(means[1], grad), _multiple(parts[1], grad)  # [n] each
        step.record_all("reduction.left_out", self._names, ((alone < ROUNDING) & (mean > APART)).double())
        step.record("reduction.averaged", ((mean < ROUNDING) & (alone > APART)).sum())

    def lab_examine(self, run: Run) -> None:
        if reason := why_not(run):
            raise NotChecked(reason)


def _multiple(form: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:  # [... k] -> [...] each
    """The multiple of a form that is nearest to a gradient, and how far it is from that, relatively."""
    times = (form * grad).sum(-1) / form.square().sum(-1).clamp_min(1e-300)
    return times, (grad - times[..., None] * form).norm(dim=-1) / grad.norm(dim=-1).clamp_min(1e-300)


# ---------------------------------------------------------------- rules


def _one_model(history: History) -> None:
    if not history.last("ranks.alike") == 1:
        raise NotChecked("weights are cut between the processes, or did not begin alike")


def _lasts(steps: NDArray[np.int64], wrong: NDArray[np.bool_]) -> int | None:
    """Return the step from which it is so in every look, two at least."""
    right = np.flatnonzero(~wrong)
    begin = int(right[-1]) + 1 if len(right) else 0
    return int(steps[begin]) if len(steps) - begin >= 2 else None


def _times(history: History, expected: NDArray[np.float64]) -> int | None:
    """Return the step from which gradients are so many times their mean, each being that of a mean loss.

    Raises:
        NotChecked: What the loss is a mean over is not known, or the gradient is no multiple of that mean.
    """
    _one_model(history)
    ratio, error = history.series("reduction.ratio"), history.series("reduction.error", "mean").values
    loss, right = history.series("objective.loss"), history.series("objective.cross_entropy")
    known = np.abs(loss.values - right.values) <= 1e-5 * np.maximum(1, np.abs(right.values))
    plain = np.isin(ratio.steps, loss.steps[known])  # a loss that was multiplied beforehand may make up for it
    if not np.any(plain & (error < ROUNDING)):
        raise NotChecked("the gradient is no multiple of the mean over the processes, or the loss no mean over tokens")
    return _lasts(ratio.steps, plain & (error < ROUNDING) & (np.abs(ratio.values / expected - 1) < 1e-3))


@rule(
    "reduction.summed",
    title="Gradients are averaged over the processes, not added up",
    reads=("reduction.ratio", "objective.loss", "ranks.alike"),
    basis="experiment",
    phase="backward",
)
def reduction_summed(history: History) -> Iterator[Symptom]:
    """The gradient is N times the mean of those of N processes, each that of the mean loss over its tokens.

    What all rows lose on average has the mean for its gradient. A loss that is divided by N beforehand, or by the
    tokens of all processes, is no mean over this process's tokens, and is not asked.
    """
    world = history.series("reduction.world").values
    if (step := _times(history, world)) is not None:
        text = f"the gradient is {world[-1]:.0f} times the mean over the processes, from step {step}"
        yield Symptom(at="", since=step, seen=float(world[-1]), expected="1", text=text)


@rule(
    "reduction.divided",
    title="Gradients are divided by the number of processes once",
    reads=("reduction.ratio", "objective.loss", "ranks.alike"),
    basis="experiment",
    phase="backward",
)
def reduction_divided(history: History) -> Iterator[Symptom]:
    """The gradient is 1/N of the mean of those of N processes, each that of the mean loss over its tokens."""
    world = history.series("reduction.world").values
    if (step := _times(history, 1 / world)) is not None:
        text = f"the gradient is 1/{world[-1]:.0f} of the mean over the processes, from step {step}"
        yield Symptom(at="", since=step, seen=float(1 / world[-1]), expected="1", text=text)


@rule(
    "reduction.early",
    title="Gradients are averaged when all parts of a batch have passed",
    reads=("reduction.error", "ranks.alike"),
    basis="experiment",
    phase="backward",
)
def reduction_early(history: History) -> Iterator[Symptom]:
    """The gradient is the mean over the processes of the first part, with this process's own of the others.

    Equal to that within rounding, and a hundred times further from the mean of all parts.
    """
    _one_model(history)
    series, mean = history.series("reduction.error", "early"), history.series("reduction.error", "mean").values
    if not np.any(history.series("reduction.parts").values > 1):
        raise NotChecked("a batch passes in one part: there is one process or no accumulation")
    if (step := _lasts(series.steps, (series.values < ROUNDING) & (mean > APART))) is not None:
        text = f"only the first part's gradients are averaged over the processes, from step {step}"
        yield Symptom(at="", since=step, seen=float(mean[-1]), expected="0", text=text)


@rule(
    "reduction.left_out",
    title="No weight's gradient is left out of the average",
    reads=("reduction.left_out", "ranks.alike"),
    basis="experiment",
    phase="backward",
)
def reduction_left_out(history: History) -> Iterator[Symptom]:
    """A weight's gradient is this process's own, to within rounding, where those of other weights are averages.

    It is a hundred times further from the average, in two looks or more, and until now.
    """
    _one_model(history)
    averaged = history.series("reduction.averaged").values > 0
    for name, series in history.each("reduction.left_out"):
        if (step := _lasts(series.steps, (series.values > 0) & averaged)) is not None:
            text = f"the gradient of {name} is this process's own, from step {step}; others are averages"
            yield Symptom(at=name, since=step, seen=1.0, expected="the average", text=text)
