"""Rotary positions, by experiment: a layer is given one vector at every position, and only the turning is left."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, NamedTuple

from lab import NotChecked, Probe, Symptom, probe, rule, torch
from lab import numpy as np

from .turning import SAME, Same, Turning, largest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from torch import Tensor

    from lab import History, Run, Step

HEADS, LENGTH = 4, 512  # looked at: what is wrong with a rotation is so in all heads, and early
NONE = "no attention in this model turns its queries and keys, in pairs of channels known here, as sites"


@probe(
    "rotary",
    title="Are queries and keys turned alike, evenly, and alone?",
    cost="a forward pass on one row",
    examines=True,
    seldom=True,
)
class Rotary(Probe):
    """Gives each attention layer the same vector at every position: what then changes from one to another is turning.

    A pair of channels is a complex number, and w(t) its value at position t over that at the first. Pairs are known by
    ``|w| = 1``. Records, for the sites of queries and keys, ``rotary.halves`` and ``rotary.neighbours``: how far
    ``|w|`` is from 1 at most where channel i is paired with i + D/2, or 2i with 2i + 1; ``rotary.turned``, the largest
    ``|w - 1|``; ``rotary.unevenness``, the largest ``|w(t+1) - w(t) w(1)|``, and ``rotary.rounding``, what rounding
    allows it. Of a layer, ``rotary.unlike`` (1 where the pairs of queries and keys are not the same),
    ``rotary.apart`` (the largest distance of their w), ``rotary.value_change`` (of the values, relatively),
    ``rotary.value_apart`` (the distance of the values' w from the queries'). When values change, the next experiment
    asks whether they are averaged as they are: ``rotary.value_unused``, how far any module's input is from that.
    """

    def lab_start(self, run: Run) -> None:
        layers = []
        for site in run.sites.match("**.q"):
            others = [found for name in ("k", "v") for found in run.sites.match(f"{site.module}.{name}")]
            if len(others) == 2 and all(found.axes == ["B", "H", "T", "D"] for found in (site, *others)):
                layers.append(site.module)
        self._layers = layers

    def lab_examine(self, run: Run, step: Step) -> None:
        if not self._layers:
            raise NotChecked(NONE)
        if step.batch is None or step.batch.inputs is None:
            raise NotChecked("the batch is not known")
        suspects = [name for name in self._layers if run.history.last("rotary.value_change", name) > SAME]
        rows = step.batch.rows(1)
        inside: contextlib.AbstractContextManager[dict[str, Tensor]]
        inside = run.sites.capture("**.pattern") if suspects else contextlib.nullcontext({})
        with (
            torch.no_grad(),
            Same(run.model, self._layers, suspects) as same,
            run.sites.capture("**.q") as q,
            run.sites.capture("**.k") as k,
            run.sites.capture("**.v") as v,
            inside as pattern,
        ):
            run.call(rows)
        for group in self._alike(q, k, v):
            self._record(step, group)
        for name in suspects:
            if f"{name}.pattern" in pattern and f"{name}.v" in v:
                mixed = _mixed(pattern[f"{name}.pattern"][0], v[f"{name}.v"][0])  # [T C]
                step.record("rotary.value_unused", same.distance(name, mixed), name)

    def _alike(self, q: dict[str, Tensor], k: dict[str, Tensor], v: dict[str, Tensor]) -> Iterator[_Group]:
        """Yield the layers in groups of one shape, which are measured at once."""
        groups: dict[object, list[str]] = {}
        for name in self._layers:
            if not (f"{name}.q" in q and f"{name}.k" in k and f"{name}.v" in v):
                continue
            one, other = q[f"{name}.q"], k[f"{name}.k"]
            if one.shape[-1] % 2 == 0 and one.shape[-2] == other.shape[-2] > 2:
                groups.setdefault((one.shape[1:], other.shape[1:], one.dtype, one.device), []).append(name)
        for names in groups.values():
            yield _Group(names, *(_stacked(found, names, which) for found, which in ((q, "q"), (k, "k"), (v, "v"))))

    def _record(self, step: Step, group: _Group) -> None:
        names, q, k, v = group
        eps = torch.finfo(q.dtype).eps
        length = q.shape[-2]
        sets = {"q": Turning(q), "k": Turning(k)}
        for which, turning in sets.items():
            at = [f"{name}.{which}" for name in names]
            step.record_all("rotary.halves", at, turning.halves)
            step.record_all("rotary.neighbours", at, turning.neighbours)
            step.record_all("rotary.turned", at, largest(turning.w - 1))
            step.record_all("rotary.unevenness", at, largest(turning.w[:, 1:] - turning.w[:, :-1] * turning.w[:, 1:2]))
            # An angle t is rounded to t 2^-24; bfloat16's would be to t 2^-8, float16's to t 2^-11.
            for name in at:
                step.record("rotary.rounding", 64 * eps + length * 2.0**-20, name)
        one, other = sets["q"], sets["k"]
        step.record_all("rotary.apart", names, largest(one.w - other.w))
        crossed = (one.is_halves & other.is_neighbours) | (one.is_neighbours & other.is_halves)
        step.record_all("rotary.unlike", names, crossed.double())
        x = v.double()  # [L K T D]
        change = (x - x[:, :, :1]).abs().amax((1, 2, 3)) / x.abs().amax((1, 2, 3)).clamp_min(1e-30)
        step.record_all("rotary.value_change", names, change)
        step.record_all("rotary.value_apart", names, largest(Turning(v, like=one).w - one.w))


class _Group(NamedTuple):
    """Layers of one shape: queries [L H T D], keys and values [L K T D]."""

    names: list[str]
    q: Tensor
    k: Tensor
    v: Tensor


def _stacked(found: dict[str, Tensor], names: list[str], which: str) -> Tensor:  # L of [B H T D] -> [L H T D]
    return torch.stack([found[f"{name}.{which}"][0, :HEADS, :LENGTH] for name in names])


def _mixed(pattern: Tensor, v: Tensor) -> Tensor:  # [H T S], [K S D] -> [T H*D]
    v = v.repeat_interleave(pattern.shape[0] // v.shape[0], dim=0)
    return (pattern @ v).transpose(0, 1).flatten(1)


# ---------------------------------------------------------------- rules


def _unpaired(history: History, site: str) -> NDArray[np.float64]:
    """Return how far pairs are from keeping their norm, in the better of the two ways to pair."""
    ways = [history.series(f"rotary.{name}", site).values for name in ("halves", "neighbours")]
    return np.minimum(*ways)


def _layers(history: History) -> Iterator[str]:
    """Yield the layers whose queries are turned.

    Raises:
        NotChecked: There is none.
    """
    layers = []
    for site, series in history.each("rotary.turned"):
        layer, _, which = site.rpartition(".")
        if which == "q" and np.any((series.values > SAME) & (_unpaired(history, site) < SAME)):
            layers.append(layer)
    if not layers:
        raise NotChecked(NONE)
    yield from layers


def _known(history: History, layer: str, *, even: bool) -> NDArray[np.bool_]:
    """Return the looks at which queries and keys are turned in pairs, in the same way, and each of them evenly."""
    known = history.series("rotary.unlike", layer).values == 0
    for site in (f"{layer}.q", f"{layer}.k"):
        known = known & (_unpaired(history, site) < SAME)
        if even:
            bound = np.minimum(history.series("rotary.rounding", site).values, SAME)
            known = known & (history.series("rotary.unevenness", site).values < bound)
    return np.asarray(known)


@rule(
    "rotary.pairing",
    title="Queries and keys are turned in the same pairs of channels",
    reads=("rotary.turned", "rotary.unlike"),
    basis="experiment",
    phase="forward",
)
def rotary_pairing(history: History) -> Iterator[Symptom]:
    """A turned pair keeps its norm, whatever the angle: only one way to pair keeps all. Which one is free; not two."""
    for layer in _layers(history):
        series = history.series("rotary.unlike", layer)
        if found := series.first(series.values == 1):
            q = history.series("rotary.halves", f"{layer}.q").values[series.steps == found[0]][0]
            kinds = ("halves", "neighbours") if q < SAME else ("neighbours", "halves")
            text = f"{layer} turns its queries in pairs of {kinds[0]}, and its keys in pairs of {kinds[1]}"
            yield Symptom(at=f"{layer}.q", since=found[0], seen=1.0, expected="0", text=text)


@rule(
    "rotary.rates",
    title="Queries and keys are turned by the same angles",
    reads=("rotary.turned", "rotary.apart"),
    basis="experiment",
    phase="forward",
)
def rotary_rates(history: History) -> Iterator[Symptom]:
    """Else scores depend on more than distances: ``<R_m q, R_n k> = <q, R_(n-m) k>`` needs one R for both."""
    for layer in _layers(history):
        series = history.series("rotary.apart", layer)
        bound = np.minimum(history.series("rotary.rounding", f"{layer}.q").values, SAME)
        if found := series.first((series.values > bound) & _known(history, layer, even=True)):
            text = f"{layer} turns a query and a key of one position by angles that differ by up to {found[1]:.2g}"
            yield Symptom(at=f"{layer}.q", since=found[0], seen=found[1], expected="0", text=text)


@rule(
    "rotary.uneven",
    title="From each position to the next, queries and keys are turned by the same angle",
    reads=("rotary.turned", "rotary.unevenness"),
    basis="experiment",
    phase="forward",
)
def rotary_uneven(history: History) -> Iterator[Symptom]:
    """Angles are multiples of a rate to within float32: asked where queries are of float32 or better themselves."""
    judged = False
    for layer in _layers(history):
        for site in (f"{layer}.q", f"{layer}.k"):
            series, bound = (history.series(f"rotary.{name}", site) for name in ("unevenness", "rounding"))
            fine = bound.values < SAME
            judged |= bool(np.any(fine))
            if found := series.first((series.values > bound.values) & fine & _known(history, layer, even=False)):
                text = f"the angles of {site} are off the multiples of a rate by up to {found[1]:.2g}"
                yield Symptom(at=site, since=found[0], seen=found[1], expected="0", text=text)
    if not judged:
        raise NotChecked("queries are rounded to less than float32 themselves, or the rows are too long to tell")


@rule(
    "rotary.values",
    title="Values are not turned by their positions",
    reads=("rotary.turned", "rotary.value_change"),
    basis="experiment",
    phase="forward",
)
def rotary_values(history: History) -> Iterator[Symptom]:
    """The same vector has the same value everywhere. Asked of values that are averaged as they are: some turn back."""
    for layer in _layers(history):
        series = history.series("rotary.value_change", layer)
        turned = (series.values > 2 * SAME) & (history.series("rotary.value_apart", layer).values < SAME)
        unused = history.series("rotary.value_unused", layer).values
        if (found := series.first(turned)) and len(unused) and unused.min() < SAME:
            text = f"{layer} turns its values by the angles of its queries, and averages them so"
            yield Symptom(at=f"{layer}.v", since=found[0], seen=found[1], expected="0", text=text)
