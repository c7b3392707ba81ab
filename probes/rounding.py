"""How far rounding alone moves the numbers of this very run: what `lab diff` takes for equal."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from lab import Probe, Stage, probe, torch

from .fingerprint import HIDDEN
from .signs import plain

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from lab import Batch, Run, Site, Step

ROWS, POSITIONS = 2, 128  # so many positions are enough
KINKED = ("threshold", "leaky_relu", "hardtanh", "_prelu", "max_pool")  # functions whose derivative jumps
LATER = 10  # times as far into the run as before, it is measured again
MIXER = 0x9E37  # times the bits of a number, as Fibonacci hashing has it: 2^16 over the golden ratio, odd
FLIPPED = 2.0  # of an update's element, the most that rounding can change: its sign


@probe(
    "rounding",
    title="How far rounding alone moves values, gradients and weights: what two runs are allowed to differ by",
    cost="four forward and three backward passes on two rows, or on one that is long, and a copy of the weights",
    examines=True,
    seldom=True,
    stages={
        "rounding.value": Stage("value", "rounding"),
        "rounding.loss": Stage("loss", "rounding"),
        "rounding.gradient": Stage("gradient", "rounding"),
        "rounding.norm": Stage("norm", "rounding"),
        "rounding.weight": Stage("weight", "rounding"),
        "rounding.weight_drift": Stage("weight", "drift"),
        "rounding.update": Stage("update", "rounding"),
        "rounding.value_drift": Stage("value", "drift"),
        "rounding.loss_drift": Stage("loss", "drift"),
        "rounding.gradient_drift": Stage("gradient", "drift"),
        "rounding.norm_drift": Stage("norm", "drift"),
    },
)
class Rounding(Probe):
    """Calls the model three times on the same rows, forward and backward, with the same random numbers.

    Once more, forward alone, to see that the same call gives the same answer; else all that is recorded is NaN.

    The second time, what each operator computes is changed by one unit of its format in the last place, up or down
    without a pattern: as if every operator rounded otherwise (Parker's Monte Carlo arithmetic). Records, relative to
    the first: ``rounding.value`` by site; ``rounding.gradient`` by site and parameter, and without a site that of what
    the loss sends back; ``rounding.norm`` of all gradients together; ``rounding.loss``, and with the site ``alone``
    that of equal outputs; and of each weight ``rounding.weight``, that unit.

    The third time, the weights are those that the newest update would have given with the gradients of the second: an
    element of an update changes by as much, relatively, as that of the gradient did, and at most to the opposite. That
    is what an optimiser that divides each element by its size makes of a gradient that is nothing but rounding. Records
    the same with ``_drift`` behind the name: how far rounding in one step moves the next. Where a function has a kink,
    as a ReLU has, gradients are said to move by 1/sqrt(N) at least, as if one of the N elements passed it. And records
    ``rounding.update``, how far a weight is moved if the element that changed most is updated to the opposite: its
    gradient is then nothing but rounding, which is seldom seen in a few rows.
    """

    def lab_start(self, run: Run) -> None:
        self._run = run
        self._sent: Tensor | None = None
        self._before: dict[str, Tensor] = {}
        self._next = 0
        self._inner = {name for name, m in run.model.named_modules() if next(m.children(), None) is not None}
        if run.sites.output:
            self.read(run, run.sites.output, self._see, grad=True)

    def _see(self, _site: Site, gradient: Tensor) -> None:
        step = self._run.step
        if self._wanted(step) and step.part == step.parts - 1 and gradient.dim():
            self._sent = gradient.detach()  # until the examination, a moment later

    def _wanted(self, step: Step) -> bool:
        return step.thorough and step.index >= self._next

    def lab_before_update(self, run: Run, step: Step) -> None:
        if self._wanted(step):
            self._before = {name: p.detach().clone() for name, p in run.parameters.items() if plain(p)}

    def lab_examine(self, run: Run, step: Step) -> None:
        sent, self._sent = self._sent, None
        before, self._before = self._before, {}
        if step.batch is None or sent is None or not before:
            return
        self._next = LATER * step.index + 1
        rows = step.batch.rows(ROWS, enough=POSITIONS)
        first = self._pass(run, rows, sent)
        if first is None:
            return
        again = self._pass(run, rows, None)
        kinks: list[int] = []
        with other_rounding(kinks):
            second = self._pass(run, rows, sent)
        if again is None or second is None:
            return
        # A model that remembers its calls, or draws from elsewhere, answers otherwise each time: that is no rounding.
        steady = _apart(first.out, again.out) <= _apart(first.out, second.out) / 2
        steady = torch.where(steady, 1.0, torch.nan)
        step.record_all("rounding.weight", tuple(before), _units(before.values(), first.out.device))
        _record(step, "", first, second, sent, steady)
        largest = {name: _largest(run.parameters[name], old) for name, old in before.items()}
        moved = self._drift(run, before, first, second)
        if moved:
            step.record_all("rounding.weight_drift", tuple(moved), torch.stack(list(moved.values())) * steady)
            step.record_all("rounding.update", tuple(largest), torch.stack(list(largest.values())) * steady)
            third = self._pass(run, rows, sent)
            assert third is not None
            # Weights that moved a little let here and there an element pass a kink, perhaps on rows not seen here.
            whole = min(kinks) * len(sent) / len(first.out) if kinks else 0
            _record(step, "_drift", first, third, sent, steady, least=whole**-0.5 if whole else 0.0)

    def _pass(self, run: Run, rows: Batch, sent: Tensor | None) -> Pass | None:
        """Go forward, and backward from what was sent to the output, once; forward alone if nothing is sent."""
        random = [run.device] if run.device.type == "cuda" else []
        with torch.random.fork_rng(devices=random), run.sites.capture("**") as values:
            out = run.call(rows)
            if sent is None:
                return Pass(out.detach(), {}, {}, set())
            if not out.requires_grad or out.dim() != sent.dim() or len(out) > len(sent):
                return None
            sent = sent[: len(out)].to(out.dtype)
            if out.shape != sent.shape:
                return None
            inner = {
                site.name: values[site.name]
                for site in run.sites.match("**.out")
                if site.module in self._inner and site.name in values and values[site.name].requires_grad
            }
            asked = {**inner, **{name: p for name, p in run.parameters.items() if p.requires_grad}}
            found = torch.autograd.grad(out, list(asked.values()), sent, allow_unused=True)
        gradients = {name: g for name, g in zip(asked, found, strict=True) if g is not None and plain(g)}
        kept = {n: v.detach() for n, v in values.items() if n.rpartition(".")[2] not in HIDDEN and plain(v)}
        # A table that is looked up as a whole gives out its very weights, and these are changed for the third pass.
        weights = {p.untyped_storage().data_ptr() for p in run.parameters.values()}
        kept = {n: v.clone() if v.untyped_storage().data_ptr() in weights else v for n, v in kept.items()}
        return Pass(out.detach(), kept, gradients, set(inner))

    @staticmethod
    def _drift(run: Run, before: dict[str, Tensor], first: Pass, second: Pass) -> dict[str, Tensor]:
        """Put the weights where the newest update would have put them; return by how much each changed, relatively."""
        moved = {}
        with torch.no_grad():
            for name, old in before.items():
                if name in first.gradients and name in second.gradients:
                    gradient, weight = first.gradients[name], run.parameters[name]
                    share = (second.gradients[name] - gradient).abs() / gradient.abs()
                    share = share.nan_to_num(0.0, posinf=FLIPPED).clamp_max(FLIPPED)
                    change = (weight - old) * share
                    moved[name] = _size(change) / _size(weight).clamp_min(1e-30)
                    weight.sub_(change)
        return moved


class Pass:
    """What one forward and backward pass made."""

    def __init__(self, out: Tensor, values: dict[str, Tensor], gradients: dict[str, Tensor], inner: set[str]) -> None:
        self.out, self.values, self.gradients, self.inner = out, values, gradients, inner


def _record(step: Step, kind: str, first: Pass, second: Pass, sent: Tensor, steady: Tensor, least: float = 0.0) -> None:
    """Record how far two passes are apart, gradients `least` at least; `steady` is 1, or NaN: it means nothing then."""
    for part in ("values", "gradients"):
        mine, others = getattr(first, part), getattr(second, part)
        names = tuple(n for n in mine if n in others and mine[n].shape == others[n].shape)
        if names:
            apart = torch.stack([_apart(mine[name], others[name]) for name in names])
            apart = apart.clamp_min(least) if part == "gradients" else apart
            step.record_all(f"rounding.{part[:-1]}{kind}", names, apart * steady)
    weights = [name for name in first.gradients if name not in first.inner]
    if weights:
        differences = [_size(second.gradients[name] - first.gradients[name]) for name in weights]
        sizes = [_size(first.gradients[name]) for name in weights]
        norms = [torch.linalg.vector_norm(torch.stack(found)) for found in (differences, sizes)]
        step.record(f"rounding.norm{kind}", (norms[0] / norms[1].clamp_min(1e-30)).clamp_min(least) * steady)
    if step.loss is not None and step.loss.numel() == 1:
        # To first order a loss changes by its gradient times the change of the output; the rows stand for all of them.
        share = len(sent) / len(first.out)
        change = share * _size(sent[: len(first.out)]) * _size(second.out - first.out)
        unit = torch.finfo(step.loss.dtype).eps
        step.record("rounding.loss", unit, "alone")
        step.record(f"rounding.gradient{kind}", _sent_apart(second.out - first.out, sent) * steady)
        relative = change / step.loss.detach().abs().double().clamp_min(1e-30)
        step.record(f"rounding.loss{kind}", (relative + unit) * steady)


def _sent_apart(change: Tensor, sent: Tensor) -> Tensor:
    """How far, relatively, a loss would have sent another gradient to an output that is another by `change`.

    The second derivative of a mean over N rows is at most 1/2N for a cross-entropy, and 2/NV for the squares of V
    numbers each. Where a loss is scaled, it grows with the gradient: 1/N is then no less than the gradient of a row.
    """
    classes = sent.shape[-1]  # V
    rows = sent[: len(change)]
    size = _size(rows) / (rows.numel() / classes) ** 0.5  # of the gradient of a row
    bend = max(0.5, 2 / classes) * size.clamp_min(classes / sent.numel())
    apart: Tensor = bend * _size(change) / _size(rows).clamp_min(1e-30)
    return apart


def _largest(weight: Tensor, before: Tensor) -> Tensor:
    """How far a weight is moved, relatively, if the element that changed most changes to the opposite."""
    return FLIPPED * (weight.detach() - before).abs().max().double() / _size(weight).clamp_min(1e-30)


def _apart(a: Tensor, b: Tensor) -> Tensor:
    return _size(a - b) / _size(a).clamp_min(1e-30)


def _size(x: Tensor) -> Tensor:
    size: Tensor = torch.linalg.vector_norm(x.detach(), dtype=torch.promote_types(x.dtype, torch.float32))
    return size.double()


def _units(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    return torch.tensor([torch.finfo(x.dtype).eps for x in tensors], dtype=torch.float64, device=device)


def other_rounding(kinks: list[int]) -> Any:
    """Return a block in which each operator's floating-point result is changed by a unit in its last place.

    To `kinks` the number of elements is added of each gradient that passed a function that has a kink.

    Left as they are: what is made of no such number, as constants and counts; views and what is written in place, which
    compute nothing new or are read elsewhere; and what is 0, or would become infinite.
    """

    class OtherRounding(torch.utils._python_dispatch.TorchDispatchMode):  # type: ignore[no-untyped-call]  # noqa: SLF001
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            name = func.overloadpacket.__name__
            if name.endswith("_backward") and name.startswith(KINKED) and torch.is_tensor(out):
                kinks.append(out.numel())
            shares_memory = any(r.alias_info is not None for r in func._schema.returns)  # noqa: SLF001
            return out if shares_memory or not _any_float((args, kwargs)) else _changed(out)

    return OtherRounding()  # type: ignore[no-untyped-call]


def _any_float(value: Any) -> bool:
    if torch.is_tensor(value):
        return bool(value.is_floating_point())
    if isinstance(value, dict):
        value = value.values()
    return any(map(_any_float, value)) if not isinstance(value, (str, bytes)) and hasattr(value, "__iter__") else False


def _whole(x: Tensor) -> torch.dtype:
    """The whole numbers of as many bits."""
    return {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]


def _changed(out: Any) -> Any:
    if isinstance(out, (tuple, list)):
        return type(out)(map(_changed, out))
    if not torch.is_tensor(out) or not plain(out):
        return out
    # Up or down is the first bit of a product that depends on all bits: without a pattern, and the same for what is the
    # same, as rounding is. Of a number between 2^k and 2^(k+1) a unit is eps 2^k: a share of 5/8 eps of it is between
    # 5/8 and 5/4 of that, and what is added is rounded to one. 0 stays 0; what is infinite, or as large as a mask's
    # largest number, is given too little to be another.
    minus, share = _bits(out.dtype)
    sign = out.view(_whole(out)) * MIXER
    sign &= minus
    sign |= share
    large = torch.finfo(out.dtype).max / 4
    return out.addcmul(out.clamp(-large, large), sign.view(out.dtype))


@functools.cache
def _bits(dtype: torch.dtype) -> tuple[int, int]:
    """The bit that makes a number negative, and those of the share by which one is changed, as whole numbers."""
    numbers = torch.tensor([-0.0, 0.625 * torch.finfo(dtype).eps], dtype=dtype)
    minus, share = numbers.view(_whole(numbers)).tolist()
    return minus, share
