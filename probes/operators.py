"""The operators of a forward pass, counted: what is computed twice, one by one, in too many bits, or for the host."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from lab import LabError, NotChecked, Probe, Stage, Symptom, probe, rule, torch

from .dispatch import Trace

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from lab import Batch, History, Run, Step

ROWS = 2
SHORTEST = 8  # positions: half of them must be enough to be told from all
# A layer may have a few attentions side by side on purpose: differential attention has two.
HEADS = 4


@probe(
    "operators",
    title="Which operators does a forward pass take?",
    cost="two forward passes of two rows, one of half the length",
    examines=True,
    seldom=True,
    stages={
        "operators.count": Stage("work", "exact", says="operators of a forward pass"),
        "operators.bytes": Stage("work", "exact", says="bytes that operators write"),
        "operators.promoted": Stage("work", "exact", says="operators made float64 by one operand"),
        "operators.host_reads": Stage("work", "exact", says="numbers read on the host"),
        "operators.again": Stage("work", "exact", says="products of tensors whose product was there"),
        "operators.slices": Stage("work", "exact", says="products on slices of the same tensors"),
        "operators.by_position": Stage("work", "exact", says="more products for each further position"),
        "operators.joined": Stage("work", "exact", says="times that each joined number is written"),
    },
)
class Operators(Probe):
    """Counts the operators of a forward pass on two rows, and on the first half of them.

    For every module, and for the whole model under no name, ``operators.count``, how many there are that compute
    anything, and ``operators.bytes``, how much they write. And for the whole model, and for every module where it is
    not 0:

    ``operators.promoted``, operators in which a tensor computed from the batch became float64 by meeting one of
    float64; ``operators.host_reads``, numbers computed from the batch that were read on the host; ``operators.again``,
    matrix products of the same two tensors as before; ``operators.slices``, products on slices of the same tensors, of
    equal shapes and over all positions; ``operators.by_position``, matrix products that each further position adds,
    though none of them waits for another; ``operators.joined`` and ``operators.joined_half``, what a chain of
    concatenations wrote over the size of its result, with all positions and with half.
    """

    def lab_examine(self, run: Run, step: Step) -> None:
        if step.batch is None:
            raise NotChecked("no batch was seen")
        rows = _rows(step.batch)
        whole = _traced(run, rows)
        if not any(p.dtype == torch.float64 for p in run.model.parameters()):
            _record(step, "operators.promoted", whole.promoted)
        for name, (count, written) in whole.work.items():
            step.record("operators.count", count, name)
            step.record("operators.bytes", written, name)
        _record(step, "operators.host_reads", whole.reads)
        _record(step, "operators.again", whole.again)
        _record(step, "operators.slices", whole.slices)
        half = _half(rows)
        if half is not None:
            try:
                part = _traced(run, half)
            except NotChecked:
                return  # a model of one fixed length; the rules that compare two say so
            _record(step, "operators.by_position", _by_position(whole, part))
            _record(step, "operators.joined", whole.joined)
            _record(step, "operators.joined_half", {name: part.joined.get(name, 1.0) for name in whole.joined})


def _calls(batch: Batch) -> list[Tensor]:
    return [value for value in (*batch.args, *batch.kwargs.values()) if torch.is_tensor(value)]


def _is_row(value: object, batch: int) -> bool:
    """Whether this holds a token, or a yes or no, for each position: [B T]."""
    return torch.is_tensor(value) and value.dim() == 2 and not value.is_floating_point() and len(value) == batch


def _cut(batch: Batch, rows: int, share: int = 1) -> Batch:
    """The first rows, and of these the first ``1 / share`` of the positions."""

    def cut(value: object) -> object:
        return value[:rows, : value.shape[1] // share] if torch.is_tensor(value) else value

    args = tuple(cut(value) for value in batch.args)
    return dataclasses.replace(batch, args=args, kwargs={k: cut(v) for k, v in batch.kwargs.items()}, targets=None)


def _rows(batch: Batch) -> Batch:
    values = _calls(batch)
    if not values or values[0].dim() == 0:
        raise NotChecked("the model is not called with a batch of tensors")
    if all(_is_row(value, len(values[0])) for value in values):
        return _cut(batch, ROWS)
    rows = batch.rows(ROWS)
    if len(_calls(rows)[0]) > ROWS:
        raise NotChecked("the call cannot be cut to a few rows")
    return rows


def _half(rows: Batch) -> Batch | None:
    values = _calls(rows)
    if not all(_is_row(value, len(values[0])) for value in values):
        return None
    return _cut(rows, ROWS, 2) if min(value.shape[1] for value in values) >= SHORTEST else None


def _traced(run: Run, batch: Batch) -> Trace:
    values = _calls(batch)
    trace = Trace(values[0].shape[1] if values[0].dim() > 1 else 0)
    try:
        with torch.no_grad():
            trace.run(run.model, values, lambda: run.answer(batch))
    except (LabError, NotChecked):
        raise
    except Exception as error:  # noqa: BLE001 - a compiled model, or one of a fixed length, may raise anything
        raise NotChecked(f"the model cannot be called and followed on {ROWS} rows ({type(error).__name__})") from None
    return trace


def _record(step: Step, metric: str, found: Mapping[str, float]) -> None:
    step.record(metric, max(found.values(), default=0))
    for name, value in found.items():
        if name and value:
            step.record(metric, value, name)


def _by_position(whole: Trace, part: Trace) -> dict[str, float]:
    """For the innermost modules whose products grow with the length, and whose longest chain does not: how fast."""
    found = {}
    more, less = _largest(whole), _largest(part)
    for name in more.keys() & less.keys():
        slope = (more[name][0] - less[name][0]) / max(1, whole.length - part.length)
        if slope >= 1 and more[name][1] <= less[name][1]:
            found[name] = slope
    return {name: slope for name, slope in found.items() if not any(_inside(other, name) for other in found)}


def _largest(trace: Trace) -> dict[str, tuple[int, int]]:
    """Products and longest chain in a call of each module, the largest over its calls."""
    largest: dict[str, tuple[int, int]] = {}
    for call in trace.calls:
        products, depth = largest.get(call.name, (0, 0))
        largest[call.name] = max(products, call.products), max(depth, call.depth)
    return largest


def _inside(inner: str, outer: str) -> bool:
    return inner != outer and (not outer or inner.startswith(f"{outer}."))


def _found(history: History, metric: str, least: float) -> Iterator[tuple[str, int, float]]:
    """Where a count reaches `least`: the modules, or the model as a whole where no module inside it does."""
    named = [
        (site, *found)
        for site, series in history.each(metric)
        if site and (found := series.first(series.values >= least))
    ]
    whole = history.series(metric)
    if not named and (found := whole.first(whole.values >= least)):
        named = [("", *found)]
    yield from named


def _where(name: str) -> str:
    return name or "the model"


@rule(
    "operators.promoted",
    title="No tensor becomes float64 by meeting one of float64",
    reads=("operators.promoted",),
    basis="experiment",
    phase="forward",
)
def operators_promoted(history: History) -> Iterator[Symptom]:
    """No parameter is float64, and nothing converted an activation: it became so by type promotion, unasked for."""
    for name, step, seen in _found(history, "operators.promoted", 1):
        text = f"in {_where(name)} {seen:.0f} operators turn an activation into float64, as the other operand is"
        yield Symptom(at=name, since=step, seen=seen, expected="0", text=text)


@rule(
    "operators.host_reads",
    title="No activation is read on the host in the forward pass",
    reads=("operators.host_reads",),
    basis="experiment",
    phase="forward",
)
def operators_host_reads(history: History) -> Iterator[Symptom]:
    """A floating-point number computed from the batch, taken by .item() or float(): the device is waited for."""
    for name, step, seen in _found(history, "operators.host_reads", 1):
        text = f"{_where(name)} reads {seen:.0f} numbers of its activations on the host in each forward pass"
        yield Symptom(at=name, since=step, seen=seen, expected="0", text=text)


@rule(
    "operators.again",
    title="No matrix product is computed twice",
    reads=("operators.again",),
    basis="experiment",
    phase="forward",
)
def operators_again(history: History) -> Iterator[Symptom]:
    """The same operator on the same memory, unchanged in between, gives the same again."""
    for name, step, seen in _found(history, "operators.again", 1):
        text = f"{_where(name)} computes {seen:.0f} matrix products of tensors whose product was computed before"
        yield Symptom(at=name, since=step, seen=seen, expected="0", text=text)


@rule(
    "operators.slices",
    title="Heads are computed together",
    reads=("operators.slices",),
    basis="experiment",
    phase="forward",
)
def operators_slices(history: History) -> Iterator[Symptom]:
    """Products of equal shapes on slices of the same two tensors, over all positions, are one batched product.

    From four on: fewer may be attentions of different kinds side by side, as in differential attention.
    """
    for name, step, seen in _found(history, "operators.slices", HEADS):
        text = f"{_where(name)} computes {seen:.0f} products one by one, on slices of the same two tensors"
        yield Symptom(at=name, since=step, seen=seen, expected="1", text=text)


@rule(
    "operators.by_position",
    title="No module loops over positions that do not wait for each other",
    reads=("operators.again",),
    basis="experiment",
    phase="forward",
)
def operators_by_position(history: History) -> Iterator[Symptom]:
    """One matrix product or more for each further position, while the longest chain of operators stays as it was.

    Where each position needs the one before, as in a recurrent layer, the chain grows too.
    """
    if not history.sites("operators.by_position"):
        raise NotChecked("the model is not called with tokens [B T] of which a half could be passed")
    for name, step, seen in _found(history, "operators.by_position", 1):
        text = f"{_where(name)} computes {seen:.3g} more matrix products for each further position"
        yield Symptom(at=name, since=step, seen=seen, expected="0", text=text)


@rule(
    "operators.joined",
    title="No tensor is concatenated piece by piece",
    reads=("operators.again",),
    basis="experiment",
    phase="forward",
)
def operators_joined(history: History) -> Iterator[Symptom]:
    """One concatenation writes each number once, whatever the length. What a chain writes for each grows with it.

    A chain in which a part is used before it is extended does not count: there the parts are wanted.
    """
    if not history.sites("operators.joined_half"):
        raise NotChecked("the model is not called with tokens [B T] of which a half could be passed")
    for name, step, seen in _found(history, "operators.joined", 2):
        half = history.last("operators.joined_half", name)
        if seen > 1.5 * half:  # twice as many pieces: twice as much for each number
            text = f"{_where(name)} joins pieces one after another: each number is written {seen:.3g} times, "
            text += f"and {half:.3g} times with half the positions"
            yield Symptom(at=name, since=step, seen=seen, expected="1", text=text)
