"""Does each norm normalise? Experiments whose right answers are known, whatever its gain and shift."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING

from lab import NotChecked, Probe, Symptom, probe, rule, torch
from lab import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

    from lab import History, Run, Step

NAMED = re.compile(r"(layer|rms)_?norm", re.IGNORECASE)
WIDER = re.compile(r"glob|cumul|batch|instance|group", re.IGNORECASE)  # norms over more than one token by name
ROWS = 2
SCALE = 1024.0  # a power of two: multiplying by it rounds nothing
# Rounding is allowed for; a token that takes part in the mean of another moves it by much more.
ROUNDING = 1e-3
# The largest default of any framework is 1e-3 (Keras); one of PyTorch is 1e-5. Ten times that is no default.
LARGEST_EPS = 1e-2
MISFIT = 1e-2  # bfloat16 rounds by 2^-8
ATTENTION = re.compile(r"attn|attention|mha", re.IGNORECASE)


@probe(
    "normalisation",
    title="Does each norm normalise, and each token by itself?",
    cost="a forward pass on two rows, and four calls of each norm",
    examines=True,
    seldom=True,
)
class Normalisation(Probe):
    """Calls each layer norm and RMS norm again, on what it was just given, changed in ways that have a known answer.

    Records ``norm.follows_scale``: how much larger the output is when the input is 1024 times as large (right: 1; the
    median over the tokens, the shift taken off), ``norm.eps``: the eps that would explain it, and
    ``norm.other_tokens``: how far an output moves when other tokens are changed, relative to its size (right: 0).
    Of those with no parameters but ``weight`` and ``bias``: ``norm.offset``, how far the output of 0 is from the bias,
    relative to the size of an output (right: 0); and ``norm.factor``, the multiple of the formula that the output is
    (right: 1; NaN where it is none), with ``norm.rms``, its size, and ``norm.width``. Of a norm by hand, whose gain has
    another name, ``norm.other_tokens`` only: it may have its eps beside the deviation, and not in the root.
    """

    def lab_examine(self, run: Run, step: Step) -> None:
        if step.batch is None or step.batch.inputs is None:
            raise NotChecked("the batch is not known")
        norms = {name: module for name, module in run.model.named_modules() if NAMED.search(type(module).__name__)}
        if not norms:
            raise NotChecked("no layer norm and no RMS norm in this model")
        given: dict[str, Tensor] = {}
        handles = [module.register_forward_hook(_keep(given, name)) for name, module in norms.items()]
        try:
            with torch.no_grad():
                run.call(step.batch.rows(ROWS))
        finally:
            for handle in handles:
                handle.remove()
        with torch.no_grad():
            for name, x in given.items():
                with contextlib.suppress(RuntimeError):  # channels come first: it is no norm over the last dimension
                    _experiment(step, name, norms[name], x)


def _keep(given: dict[str, Tensor], name: str) -> Callable[..., None]:
    """Keep the first input [R ... T C] of a norm over its last dimension, and of that alone."""

    def hook(module: nn.Module, args: tuple[object, ...], output: object) -> None:
        if name in given or len(args) != 1 or not torch.is_tensor(args[0]) or not torch.is_tensor(output):
            return
        x = args[0]
        if x.is_nested:  # rows of different lengths, as in PyTorch's own encoder when it evaluates
            return
        declared = _declared(module)
        # A norm over several dimensions, or over channels that come first, mixes what it should.
        if declared != tuple(x.shape[-1:]) or x.dim() < 3 or x.shape[-2] < 3:
            return
        if x.is_floating_point() and x.shape == output.shape:
            # With as many positions as features, a norm over the wrong ones of them would pass for a right one.
            given[name] = x.detach()[..., :-1, :] if x.shape[-2] == x.shape[-1] else x.detach()

    return hook


def _declared(module: nn.Module) -> tuple[int, ...]:
    """The shape over which a norm says that it normalises; empty if it does not."""
    weight = getattr(module, "weight", None)
    said = tuple(getattr(module, "normalized_shape", ())) or (tuple(weight.shape) if weight is not None else ())
    if said or not _by_hand(module):
        return said
    shapes = {tuple(p.shape) for p in module.parameters(recurse=False)}
    return shapes.pop() if len(shapes) == 1 else ()


def _by_hand(module: nn.Module) -> bool:
    plain = not hasattr(module, "weight") and not hasattr(module, "normalized_shape")
    return plain and not WIDER.search(type(module).__name__)


def _experiment(step: Step, name: str, norm: nn.Module, x: Tensor) -> None:
    shift = torch.nan_to_num(norm(torch.zeros_like(x)).float())  # 0 / 0, where eps is 0
    plain = norm(x).float() - shift  # [... T C]
    larger = norm(x * SCALE).float() - shift
    squares = plain.square().mean(-1)  # [... T]
    growth = larger.square().mean(-1) / squares  # of the mean square; NaN where the input is 0
    eps = x.float().var(-1, correction=0) * (growth - 1) / (1 - growth / SCALE**2).clamp_min(1e-6)
    if not _by_hand(norm):
        step.record("norm.follows_scale", torch.nanmedian(growth).sqrt(), name)
        step.record("norm.eps", torch.nanmedian(eps), name)
    # All tokens but the first half of the first row become others.
    half = x.shape[-2] // 2
    changed = 3 * x.flip(-1) + 1
    changed[0, ..., :half, :] = x[0, ..., :half, :]
    moved = norm(changed).float()[0, ..., :half, :] - (plain + shift)[0, ..., :half, :]
    size = plain[0, ..., :half, :].square().mean().sqrt()
    step.record("norm.other_tokens", moved.square().mean().sqrt() / size, name)
    if not _by_hand(norm) and {key for key, _ in norm.named_parameters()} <= {"weight", "bias"}:
        bias = getattr(norm, "bias", None)
        offset = (norm(torch.zeros_like(x)) - (0 if bias is None else bias)).abs().amax()
        step.record("norm.offset", offset / size, name)
        step.record("norm.factor", _factor(norm, x * SCALE, larger), name)
        step.record("norm.rms", larger.square().mean().sqrt(), name)
        step.record("norm.width", x.shape[-1], name)


def _factor(norm: nn.Module, x: Tensor, out: Tensor) -> Tensor:
    """Which multiple of the formula `out` is: of layer norm's or RMS norm's, with a gain of w or of 1 + w, []."""
    wide = x.double()
    centred = wide - wide.mean(-1, keepdim=True)
    weight = getattr(norm, "weight", None)
    found = []
    for plain in (wide, centred):
        unit = plain / plain.square().mean(-1, keepdim=True).sqrt()
        for gain in (0.0, 1.0) if weight is not None else (1.0,):
            right = unit * (gain + (0.0 if weight is None else weight.double()))
            factor = (out * right).sum() / right.square().sum()
            misfit = torch.linalg.vector_norm(out - factor * right) / torch.linalg.vector_norm(out)
            found.append(torch.where(misfit < MISFIT, factor, torch.nan))
    factors = torch.stack(found)
    # Where several fit, as at the start, where all gains are alike: the one nearest to 1.
    distance = torch.nan_to_num(factors.abs().log().abs(), nan=torch.inf)
    return factors.gather(0, distance.argmin().reshape(1)).squeeze(0)  # an index would have to be known on the host


def _first(history: History, metric: str, name: str) -> tuple[int, float] | None:
    """Return the first look and its value, of those that are finite."""
    series = history.series(metric, name).finite
    return series.first(np.ones(len(series), dtype=bool))


def _judged(history: History, metric: str) -> Iterator[str]:
    names = [name for name in history.sites(metric) if _first(history, metric, name)]
    if not names:
        raise NotChecked("what the norms gave out was not finite, or 0")
    yield from names


@rule(
    "norm.identity",
    title="Every norm gives out the same size, however large its input",
    reads=("norm.follows_scale",),
    basis="experiment",
    phase="forward",
)
def norm_identity(history: History) -> Iterator[Symptom]:
    """``norm(1024 x) = norm(x)`` but for eps. An output that is 1024 times as large too was not normalised.

    An eps could do the same to an input far below it; so it is asked only where that eps would be above 1e-2, ten
    times the largest default of any framework.
    """
    for name in _judged(history, "norm.follows_scale"):
        scale, eps = (history.series(metric, name) for metric in ("norm.follows_scale", "norm.eps"))
        if found := scale.first((scale.values > 0.9 * SCALE) & (eps.values > LARGEST_EPS)):
            step, seen = found
            text = f"an input of {name} that is {SCALE:.0f} times as large gives an output {seen:.0f} times as large"
            yield Symptom(at=name, since=step, seen=seen, expected="1", text=text)


@rule(
    "norm.eps",
    title="No norm's eps is larger than the variance that it guards",
    reads=("norm.follows_scale", "norm.eps"),
    basis="theory",
    phase="forward",
)
def norm_eps(history: History) -> Iterator[Symptom]:
    """The output has mean square ``var / (var + eps)``: below 1/2 when eps outweighs the variance.

    That alone can be an input that starts at almost 0; so the eps itself has to be above 1e-2 too, ten times the
    largest default of any framework.
    """
    for name in _judged(history, "norm.eps"):
        scale, eps = (history.series(metric, name) for metric in ("norm.follows_scale", "norm.eps"))
        wrong = (eps.values > LARGEST_EPS) & (scale.values**2 > 2) & (scale.values <= 0.9 * SCALE)
        if found := eps.first(wrong):
            step, seen = found
            share = 1 - float(scale.values[wrong][0]) ** -2
            text = f"{name} acts as with eps = {seen:.2g}: {share:.0%} of what it divides by is eps"
            yield Symptom(at=name, since=step, seen=seen, expected=f"at most {LARGEST_EPS:g}", text=text)


@rule(
    "norm.other_tokens",
    title="Every norm treats each token by itself",
    reads=("norm.other_tokens",),
    basis="experiment",
    phase="forward",
)
def norm_other_tokens(history: History) -> Iterator[Symptom]:
    """A norm over the width of a token gives for it what it gave, whatever the other tokens are; rounding apart."""
    for name in _judged(history, "norm.other_tokens"):
        series = history.series("norm.other_tokens", name).finite
        if found := series.first(series.values > ROUNDING):
            step, seen = found
            text = f"what {name} makes of a token moves by {seen:.0%} when only other tokens change"
            yield Symptom(at=name, since=step, seen=seen, expected="0", text=text)


@rule(
    "norm.offset",
    title="A norm adds its own bias and nothing else",
    reads=("norm.offset",),
    basis="experiment",
    phase="forward",
)
def norm_offset(history: History) -> Iterator[Symptom]:
    """Of an input of 0 a norm makes its bias, or 0 if it has none: ``0 / sqrt(0 + eps) * w + b``, without rounding."""
    for name in _judged(history, "norm.offset"):
        series = history.series("norm.offset", name).finite
        if found := series.first(series.values > ROUNDING):
            step, seen = found
            text = f"{name} makes of 0 something else than its bias: {seen:.2g} of the size of its output beside it"
            yield Symptom(at=name, since=step, seen=seen, expected="0", text=text)


@rule(
    "norm.sum",
    title="No norm divides by a sum of squares where their mean is meant",
    reads=("norm.factor", "norm.rms", "norm.width"),
    basis="experiment",
    phase="forward",
)
def norm_sum(history: History) -> Iterator[Symptom]:
    """The output is that of the formula over sqrt(C), to 1%, and its size is below 1/2.

    The size, as a gain may make up for it, of sqrt(C) in some libraries. Not inside attention, where queries and keys
    may be of length 1, their product a cosine.
    """
    for name in _judged(history, "norm.factor"):
        if ATTENTION.search(name.rpartition(".")[0].rpartition(".")[2]):
            continue
        factor, size, width = (history.series(f"norm.{metric}", name).values for metric in ("factor", "rms", "width"))
        ratio = factor * np.sqrt(width)
        wrong = (np.abs(ratio - 1) < MISFIT) & (size < 1 / 2) & (width >= 8)
        if found := history.series("norm.factor", name).first(wrong):
            step, seen = found
            text = f"{name} gives out {seen:.3g} = 1 / sqrt({width[-1]:.0f}) times what it should"
            yield Symptom(at=name, since=step, seen=seen, expected="1", text=text)
