"""Does a recurrence remember, without remembering too much or from elsewhere? Experiments on each one alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lab import NotChecked, Probe, Symptom, probe, rule, torch
from lab import numpy as np

from .impulse import calls, shares

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from lab import Batch, History, Run, Step

    from .impulse import Call

# As for evaluation.random: a device may add in another order.
ROUNDING = 1e-4
# float32 has 24 bits: beside what is 2^24 times as large, a term of a sum is lost.
BITS = 24.0
LOOKS = 3


def _recurrences(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules with a weight on the state that read one way: cells, which take one position, have no T."""
    found = {}
    for name, module in model.named_modules():
        own = [p for p, _ in module.named_parameters(recurse=False)]
        if name and any(p.startswith("weight_hh") for p in own) and not getattr(module, "bidirectional", False):
            found[name] = module
    return found


@probe(
    "recurrence",
    title="Does each recurrence remember, and only its own row?",
    cost="two forward passes and one backward on one row",
    examines=True,
    seldom=True,
)
class Recurrence(Probe):
    """Differentiates the last output of each recurrence by its inputs, and calls the model once more.

    Records ``recurrence.earlier``, the share of the gradient on earlier positions; ``recurrence.growth``, how many
    times the largest of the last quarter the largest of the first half is, as a power of 2; ``recurrence.carried``,
    how far the output moves when the model is called again with the same tokens and the same random numbers, over its
    largest value (0 where the input of the recurrence has moved already); ``recurrence.forget``, of an LSTM, the mean
    of the forget gate over the positions, of the unit in which it is largest. In each step: ``recurrence.continues``,
    the share of rows that begin with the last target of the same row in the batch before.
    """

    def lab_start(self, run: Run) -> None:
        self._modules = _recurrences(run.model)
        self._ends: Tensor | None = None

    def lab_step_end(self, run: Run, step: Step) -> None:  # noqa: ARG002
        ends, self._ends = self._ends, None
        batch = step.batch if self._modules else None
        tokens = batch.inputs if batch is not None else None
        if batch is None or tokens is None or tokens.dim() != 2 or tokens.is_floating_point():
            return
        if ends is not None and ends.shape == tokens.shape[:1]:
            step.record("recurrence.continues", (tokens[:, 0] == ends).double().mean())
        if batch.targets is not None and batch.targets.shape == tokens.shape:
            self._ends = batch.targets[:, -1]

    def lab_examine(self, run: Run, step: Step) -> None:
        if not self._modules:
            raise NotChecked("no recurrence in this model")
        if step.batch is None or step.batch.inputs is None:
            raise NotChecked("the batch is not known")
        rows = step.batch.rows(1)
        for module in self._modules.values():
            module.train()  # cuDNN's recurrences can be differentiated in training mode only
        with torch.enable_grad():
            first = self._called(run, rows)
            found = {name: call for name, call in first.items() if call.made.shape[call.axis] >= 4}
            if not found:
                raise NotChecked("no recurrence in this model is called with a row of positions")
            sizes = shares(found, {name: call.made.shape[call.axis] - 1 for name, call in found.items()})
        for name, size in sizes.items():
            step.record("recurrence.earlier", _share(size), name)
            step.record("recurrence.growth", _growth(size), name)
        with torch.no_grad():
            second = self._called(run, rows)
            for name, call in found.items():
                if name in second:
                    step.record("recurrence.carried", _moved(call, second[name]), name)
                gate = _forget(self._modules[name], call)
                if gate is not None:
                    step.record("recurrence.forget", gate, name)

    def _called(self, run: Run, rows: Batch) -> dict[str, Call]:
        torch.manual_seed(0)  # what is drawn is the same in both calls; the sandbox puts the state back
        return calls(run, rows, self._modules)


def _share(size: Tensor) -> Tensor:  # [T] -> []
    """The share of the earlier positions; 1 where nothing at all comes back, as from units that are dead."""
    total = size.sum()
    return torch.where(total > 0, size[:-1].sum() / total.clamp_min(1e-30), torch.ones_like(total))


def _growth(size: Tensor) -> Tensor:  # [T] -> []
    """How many times the largest of the last quarter the largest of the earlier half is, as a power of 2."""
    early, late = size[: (len(size) + 1) // 2].amax(), size[-(len(size) // 4) :].amax()
    growth = early.clamp(1e-30, 1e30).log2() - late.clamp(1e-30, 1e30).log2()
    return torch.where(late > 0, growth, torch.zeros_like(growth))


def _moved(was: Call, now: Call) -> Tensor:
    """How far the output is from what it was, over its largest value; 0 where the input is another."""
    if was.made.shape != now.made.shape:
        return was.made.new_zeros(())
    came = (now.given - was.given).abs().amax() <= ROUNDING * was.given.abs().amax()
    moved = (now.made - was.made).abs().amax() / was.made.abs().amax().clamp_min(1e-30)
    return torch.where(came, moved, torch.zeros_like(moved))


def _forget(module: nn.Module, call: Call) -> Tensor | None:
    """Of an LSTM of one layer, the mean over positions of the forget gate, in the unit where it is largest."""
    own = dict(module.named_parameters(recurse=False))
    state: Any = own.get("weight_hh", own.get("weight_hh_l0"))
    inward: Any = own.get("weight_ih", own.get("weight_ih_l0"))
    stacked = getattr(module, "num_layers", 1) != 1 or getattr(module, "proj_size", 0)
    if stacked or state is None or inward is None or len(state) != 4 * state.shape[1]:
        return None
    width = state.shape[1]
    f = slice(width, 2 * width)  # i, f, g, o, as in torch.nn
    x, h = call.row(call.given).detach(), call.row(call.made).detach()  # [T C], [T F]
    before = torch.cat([torch.zeros_like(h[:1]), h[:-1]])
    gate = x @ inward[f].t().to(x) + before @ state[f].t().to(x)  # [T F]
    for name, bias in own.items():
        if name in ("bias_ih", "bias_hh", "bias_ih_l0", "bias_hh_l0"):
            gate = gate + bias[f].to(x)
    return torch.sigmoid(gate.float()).mean(0).amax()


# ---------------------------------------------------------------- rules


@rule(
    "recurrence.reset",
    title="Each recurrence takes something from earlier positions",
    reads=("recurrence.earlier",),
    basis="experiment",
    phase="forward",
)
def recurrence_reset(history: History) -> Iterator[Symptom]:
    """Exactly 0 in three looks or more, up to now: a matrix on the state may start from 0, and moves then."""
    for name, series in history.each("recurrence.earlier"):
        begin = series.until_now(series.values == 0, LOOKS)
        if begin is not None:
            text = f"{name} takes nothing from earlier positions: its state has forgotten them"
            yield Symptom(at=name, since=int(series.steps[begin]), seen=0.0, expected="above 0", text=text)


@rule(
    "recurrence.grows",
    title="The gradient of no recurrence grows beyond all bits on its way back",
    reads=("recurrence.growth",),
    basis="experiment",
    phase="backward",
)
def recurrence_grows(history: History) -> Iterator[Symptom]:
    """2^24 times as large early as late: in float32 the last quarter of the positions adds nothing to the sum of all.

    Asked in two looks in a row. An orthogonal matrix, and one of 1/sqrt(F), let no gradient grow.
    """
    for name, series in history.each("recurrence.growth"):
        grown = series.values > BITS
        if len(grown) >= 2 and (grown[1:] & grown[:-1]).any() and (found := series.first(grown)):
            step, bits = found
            text = (
                f"through {name} the gradient grows 2^{bits:.0f} times from the last quarter of a row to the first half"
            )
            yield Symptom(at=name, since=step, seen=bits, expected="at most 24", text=text)


@rule(
    "recurrence.carried",
    title="The state of each recurrence begins anew with each call",
    reads=("recurrence.carried",),
    basis="experiment",
    phase="forward",
)
def recurrence_carried(history: History) -> Iterator[Symptom]:
    """The same input and random numbers give the same output, unless a state is kept from the call before.

    That is meant where each row goes on where the same row of the batch before ended: then its first token is what
    that row had as its last target. Where it is so for nine rows in ten, no state is called wrong.
    """
    moved = [(name, found) for name, series in history.each("recurrence.carried") if (found := _carried(history, name))]
    continues = history.series("recurrence.continues").finite.values
    if moved and not len(continues):
        raise NotChecked("a state is kept from call to call, and whether rows continue is not known")
    if moved and np.mean(continues) >= 0.9:
        return
    for name, (step, change) in moved:
        text = f"called again with the same tokens, {name} gives out something else: {change:.0%} of its largest value"
        yield Symptom(at=name, since=step, seen=change, expected="0", text=text)


def _carried(history: History, name: str) -> tuple[int, float] | None:
    series = history.series("recurrence.carried", name).finite
    return series.first(series.values > ROUNDING)


@rule(
    "recurrence.forgets",
    title="Some unit of each LSTM keeps its cell",
    reads=("recurrence.earlier",),
    basis="theory",
    phase="forward",
)
def recurrence_forgets(history: History) -> Iterator[Symptom]:
    """Below 2^-12 in every unit, in three looks up to now: after two positions less is left than float32 tells."""
    if not history.sites("recurrence.forget"):
        raise NotChecked("no recurrence in this model has a forget gate that is known here")
    for name, series in history.each("recurrence.forget"):
        begin = series.until_now(series.values < 2.0**-12, LOOKS)
        if begin is not None:
            step, seen = int(series.steps[begin]), float(series.values[begin:].max())
            text = f"no unit of {name} keeps more than {seen:.1g} of its cell from one position to the next"
            yield Symptom(at=name, since=step, seen=seen, expected="above 2^-12 somewhere", text=text)
