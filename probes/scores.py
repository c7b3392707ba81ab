"""Is each attention pattern the softmax of the scores, with what is hidden left out? Computed again from q and k."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab import NotChecked, Probe, Symptom, probe, rule, torch
from lab import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from lab import History, Run, Site

PARTS = ("q", "k", "scores", "pattern")
# Scores that differ by less say nothing: bfloat16, with 8 bits, may round the weights that they give to the same.
DIFFERENT = 0.25


@probe(
    "scores",
    title="Is each pattern the softmax of the scores, with what is hidden left out?",
    every=0,
    cost="one layer's scores for one row of the batch, computed a second time",
    seldom=True,
)
class Scores(Probe):
    """Compares scores and pattern, for one row of the batch, with ``E = q k^T / sqrt(D)`` and with each other.

    The logarithm of a weight is what the softmax was given, but for a constant of its row, and that is known from the
    weight of a position on itself. Of layers with a causal mask it records ``scores.open`` (the share of the later
    keys that have a weight) and ``scores.ahead`` (the largest sum of a row's); what was added to E there, as
    ``scores.added`` (the middle) and ``scores.added_spread`` (the largest minus the smallest); what stood there in the
    place of E, ``scores.set`` and ``scores.set_spread``; and ``scores.rounding``, which both spreads may have from
    rounding alone. Of layers without one, ``scores.silent``: the share of positions that look at nothing, and are
    looked at.

    Of all: ``scores.empty_rows`` (the share of rows of NaN, of finite scores), ``scores.heeded`` (the range of the
    logarithms of a head's weights over the range of its scores; the smallest of the heads whose scores differ, or -1
    where none do), ``scores.half`` (the share of E that is no number of float16, where all scores are E rounded to
    such; else 0), and ``scores.tied`` (how many heads have the scores of another one, bit for bit).
    """

    def lab_start(self, run: Run) -> None:
        self._run = run
        self._kept: dict[str, dict[str, Tensor]] = {}
        layers = set.intersection(*({site.module for site in run.sites.match(f"**.{name}")} for name in PARTS))
        if not layers:
            raise NotChecked("no attention in this model names its queries, keys, scores and pattern as sites")
        self._causal = {site.module for site in run.sites.match("**.mask")}
        for layer in sorted(layers):
            for name in PARTS:
                self.read(run, f"{layer}.{name}", self._see)

    def _see(self, site: Site, value: Tensor) -> None:
        kept = self._kept.setdefault(site.module, {})
        kept[site.name.rpartition(".")[2]] = value.detach()[0]  # [H T D] or [H T S]
        if site.name.endswith(".pattern"):
            del self._kept[site.module]
            if len(kept) == len(PARTS) and kept["scores"].shape[-1] > 1:
                self._judge(site.module, **kept)

    def _judge(self, layer: str, q: Tensor, k: Tensor, scores: Tensor, pattern: Tensor) -> None:
        record, at = self._run.step.record, f"{layer}.pattern"
        # Under autocast one of them is not, or E is not what was rounded: then scores may be coarse.
        exact = q.dtype == k.dtype == scores.dtype == torch.float32
        eps = torch.finfo(pattern.dtype).eps
        q, scores, pattern = q.float(), scores.float(), pattern.float()
        k = k.float().repeat_interleave(len(q) // len(k), dim=0)
        right = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5  # [H T S], E
        logs = pattern.log()  # [H T S]
        record("scores.empty_rows", (pattern.isnan().all(-1) & scores.isfinite().all(-1)).float().mean(), at)
        record("scores.heeded", _heeded(scores, logs), at)
        if exact:
            record("scores.half", _half(scores, right), f"{layer}.scores")
        record("scores.tied", _tied(scores), f"{layer}.scores")
        t, s = scores.shape[-2:]
        if t != s or t < 4:
            return
        if layer not in self._causal:
            silent = (pattern == 0).flatten(2).all(-1).all(0) & (pattern > 0).flatten(0, 1).any(0)  # [T]
            record("scores.silent", silent.float().mean(), at)
            return
        size = q.norm(dim=-1).amax() * k.norm(dim=-1).amax() * q.shape[-1] ** -0.5
        for name, number in _ahead(right, logs, size, eps).items():
            record(f"scores.{name}", number, at)


def _ahead(right: Tensor, logs: Tensor, size: Tensor, eps: float) -> dict[str, Tensor]:  # [H T S] x 2
    """What the softmax was given at later positions, by the weights that it gave them."""
    at_self = (logs - right).diagonal(dim1=-2, dim2=-1)[..., None]  # [H T 1], minus the logarithm of a row's sum
    given = logs - at_self  # [H T S]
    later = torch.ones_like(right[0], dtype=torch.bool).triu(1)  # [T S]
    seen = later & (logs > -70.0)  # [H T S]; below, float32 begins to lose digits
    share = seen.sum() / (later.sum() * len(right))
    ahead = (logs.exp() * later).sum(-1).amax()
    found = {"open": share, "ahead": ahead, "rounding": 32 * eps * (1 + size + (logs * seen).nan_to_num().abs().amax())}
    for name, value in (("added", given - right), ("set", given)):
        high = torch.where(seen, value, -torch.inf).amax()
        low = torch.where(seen, value, torch.inf).amin()
        found[name] = torch.where(share > 0, (high + low) / 2, 0.0)
        found[f"{name}_spread"] = torch.where(share > 0, high - low, 0.0)
    return found


def _range(value: Tensor, where: Tensor) -> Tensor:  # [H T S] x 2 -> [H]
    """The largest range of a row, over what counts in it."""
    high = torch.where(where, value, -torch.inf).amax(-1)
    low = torch.where(where, value, torch.inf).amin(-1)
    return (high - low).clamp_min(0).amax(-1)


def _heeded(scores: Tensor, logs: Tensor) -> Tensor:  # [H T S] x 2 -> []
    """The range of the logarithms over that of the scores: 1 for a softmax, 0 for a mean; -1 where it is not known."""
    seen = logs > -torch.inf
    differ = _range(scores, seen)  # [H]
    share = torch.where(differ > DIFFERENT, _range(logs, seen) / differ.clamp_min(DIFFERENT), torch.inf).amin()
    return torch.where(share < torch.inf, share, -1.0)


def _half(scores: Tensor, right: Tensor) -> Tensor:  # [H T S] x 2 -> []
    """The share of E that is no float16, where all scores are, and are E to the accuracy of float16; else 0."""
    near = (scores - right).abs() <= 2.0**-10 * right.abs() + 2.0**-24
    near |= scores.isinf() & (right.abs() > 65000)  # float16 ends at 65504
    rounded = (near & (scores.half().float() == scores)).all()
    return (right.half().float() != right).float().mean() * rounded


def _tied(scores: Tensor) -> Tensor:  # [H T S] -> []
    """How many heads repeat another. Equal ones have equal products with anything; then all numbers are compared."""
    flat = scores.flatten(1)  # [H N]
    weights = torch.linspace(1.0, 40.0, flat.shape[1], device=flat.device).sin()
    order = (flat * weights).sum(-1).argsort()
    flat, differ = flat[order], (scores.amax(-1) > scores.amin(-1)).any(-1)[order]
    return ((flat[1:] == flat[:-1]).all(-1) & differ[1:]).float().sum()


# ---------------------------------------------------------------- rules


def _constants(history: History) -> Iterator[tuple[str, int, str, float, bool]]:
    """Yield the causal layers of which all later keys have one constant score, or have one constant added to theirs.

    With each: since when, ``set`` or ``added``, the constant, and whether it is 0. In two looks at least it has to be
    the same to within rounding, and the other of the two far from it; more than half of the later keys have a weight,
    and what a row gives to all of them is above what ``attention.future`` allows for.
    """
    if not history.sites("scores.open"):
        raise NotChecked("no attention in this model has a causal mask as a site")
    for site, share in history.each("scores.open"):
        near = history.series("scores.rounding", site).values
        matters = (share.values > 0.5) & (history.series("scores.ahead", site).values > 1e-6)
        for kind, other in (("set", "added"), ("added", "set")):
            same = history.series(f"scores.{kind}_spread", site).values <= near
            apart = history.series(f"scores.{other}_spread", site).values > 10 * near
            where = np.flatnonzero(matters & same & apart)
            if len({*share.steps[where]}) < 2:
                continue
            values = history.series(f"scores.{kind}", site).values[where]
            if np.all(np.abs(values) <= near[where]):
                yield site, int(share.steps[where[0]]), kind, 0.0, True
            elif np.all(np.abs(values) > 10 * near[where]):
                yield site, int(share.steps[where[0]]), kind, float(values[0]), False


@rule(
    "scores.finite",
    title="What a causal mask hides has a score of minus infinity, not a finite one",
    reads=("scores.heeded",),
    basis="theory",
    phase="forward",
)
def scores_finite(history: History) -> Iterator[Symptom]:
    """By the softmax's inverse: all later keys were given one finite number, other than 0, or had it added."""
    for site, step, kind, value, zero in _constants(history):
        if not zero:
            how = "are given" if kind == "set" else "have added to theirs"
            text = f"{site}: all later keys {how} the finite score {value:.4g}, which a larger score outweighs"
            yield Symptom(at=site, since=step, seen=value, expected="-inf", text=text)


@rule(
    "scores.multiplied",
    title="What a causal mask hides has a score of minus infinity, not 0",
    reads=("scores.heeded",),
    basis="theory",
    phase="forward",
)
def scores_multiplied(history: History) -> Iterator[Symptom]:
    """By the softmax's inverse: all later keys were given the score 0, whatever ``q k^T`` is there."""
    for site, step, kind, value, zero in _constants(history):
        if zero and kind == "set":
            text = f"{site}: all later keys have the score 0 whatever their q k^T is, and the weight that goes with it"
            yield Symptom(at=site, since=step, seen=value, expected="-inf", text=text)


@rule(
    "scores.empty_row",
    title="No row of finite scores becomes a pattern of NaN",
    reads=("scores.empty_rows",),
    basis="theory",
    phase="forward",
)
def scores_empty_row(history: History) -> Iterator[Symptom]:
    """A softmax of finite scores is finite, unless all of them are hidden: then it is 0 / 0."""
    for site, series in history.each("scores.empty_rows"):
        if found := series.first(series.values > 0):
            step, share = found
            text = f"{share:.1%} of the rows of {site} are NaN, of scores that are finite: every key is hidden there"
            yield Symptom(at=site, since=step, seen=share, expected="0", text=text)


@rule(
    "scores.ignored",
    title="Keys with different scores have different weights",
    reads=("scores.heeded",),
    basis="theory",
    phase="forward",
)
def scores_ignored(history: History) -> Iterator[Symptom]:
    """The logarithms of a softmax's weights differ by as much as the scores; a bias of distance cancels no scores."""
    looks = [series for _, series in history.each("scores.heeded")]
    if not any((series.values >= 0).any() for series in looks):
        raise NotChecked("no attention in this model has scores that differ enough to tell")
    for site, series in history.each("scores.heeded"):
        wrong = (series.values >= 0) & (series.values < 1e-3)
        if len({*series.steps[wrong]}) >= 2 and (found := series.first(wrong)):
            step, share = found
            text = f"a head of {site} gives all keys that it sees the same weight, and their scores differ"
            yield Symptom(at=site, since=step, seen=share, expected="1", text=text)


@rule(
    "scores.half",
    title="Scores of float32 queries and keys are float32",
    reads=("scores.tied",),
    basis="theory",
    phase="forward",
)
def scores_half(history: History) -> Iterator[Symptom]:
    """Of numbers with 24 bits one in 8192 has no more than float16's 11: all of them are not so by chance."""
    if not history.sites("scores.half"):
        raise NotChecked("no attention in this model has float32 queries and keys")
    for site, series in history.each("scores.half"):
        wrong = series.values > 0.5
        if len({*series.steps[wrong]}) >= 2 and (found := series.first(wrong)):
            step, share = found
            text = f"{site} are rounded: each is a number of float16, and {share:.0%} of q k^T / sqrt(D) are none"
            yield Symptom(at=site, since=step, seen=share, expected="0", text=text)


@rule(
    "scores.tied",
    title="No head repeats another",
    reads=("scores.tied",),
    basis="theory",
    phase="forward",
)
def scores_tied(history: History) -> Iterator[Symptom]:
    """Two heads with other weights have other scores. Copies that begin alike part in time: three looks are asked for.

    A warmup may begin at 0, so that the third look is to be of step 2 or later.
    """
    for site, series in history.each("scores.tied"):
        begin = series.until_now(series.values > 0, 3)
        if begin is not None and series.steps[-1] >= 2:
            step, count = int(series.steps[begin]), float(series.values[begin])
            text = f"{count:.0f} heads of {site} have the scores of another one, to the last bit, from step {step} on"
            yield Symptom(at=site, since=step, seen=count, expected="0", text=text)


@rule(
    "scores.padding",
    title="Padding is hidden among the keys, not among the queries",
    reads=("scores.heeded",),
    basis="experiment",
    phase="forward",
)
def scores_padding(history: History) -> Iterator[Symptom]:
    """Where tokens depend on padding: positions that look at nothing, although others look at them."""
    if not history.sites("scores.silent"):
        raise NotChecked("no attention in this model is without a causal mask")
    padding = history.series("mixing.padding").finite.values
    if not (padding >= 0).any():
        raise NotChecked("no attention in this model was told of padding, or the outputs were not finite")
    if not (padding > 1e-4).any():
        return
    for site, series in history.each("scores.silent"):
        wrong = series.values > 0
        if len({*series.steps[wrong]}) >= 2 and (found := series.first(wrong)):
            step, share = found
            text = f"{share:.0%} of the positions of {site} look at nothing, and are looked at: padding, the wrong way"
            yield Symptom(at=site, since=step, seen=share, expected="0", text=text)
