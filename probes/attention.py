"""Attention from the inside: where each position looks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab import NotChecked, Probe, Symptom, probe, rule, torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from lab import History, Run, Site


@probe(
    "attention",
    title="Entropy, row sums and mass on the future of each attention pattern",
    every=0,
    cost="one layer's scores for one row of the batch, computed aside",
)
class Attention(Probe):
    """Looks at each attention pattern, for one row of the batch.

    Records ``attention.entropy`` (nats, the mean over rows), ``attention.row_error`` (the
    largest distance of a row's sum from 1; a row that may see nothing sums to 0), ``attention.future`` (the largest
    share of a row that lies on later positions), ``attention.reaching`` (the share of the positions that look at later
    ones), and an image of the first head.
    """

    IMAGE_EVERY = 50

    def lab_start(self, run: Run) -> None:
        self._run = run
        if not self.read(run, "**.pattern", self._see):
            raise NotChecked("no attention in this model names its pattern as a site")

    def _see(self, site: Site, pattern: Tensor) -> None:
        pattern = pattern.detach()[:1]  # [1 H T S]; training's own path computes one row for us
        step = self._run.step
        rows = pattern.sum(-1)  # [1 H T]
        step.record("attention.entropy", torch.special.entr(pattern).sum(-1).mean(), site.name)
        step.record("attention.row_error", ((rows - 1).abs() * (rows != 0)).amax(), site.name)
        step.record(
            "attention.future", pattern.triu(pattern.shape[-1] - pattern.shape[-2] + 1).sum(-1).amax(), site.name
        )
        later = pattern.triu(pattern.shape[-1] - pattern.shape[-2] + 1).sum(-1).amax(1) > 1e-6  # [1 T]
        step.record("attention.reaching", later[:, :-1].float().mean(), site.name)
        if step.index % self.IMAGE_EVERY == 0:
            step.show("image", "attention", pattern[0, 0], site.name)


@rule(
    "attention.future",
    title="No attention pattern lies on later positions",
    reads=("attention.future", "causality.next_token"),
    basis="theory",
    phase="forward",
)
def attention_future(history: History) -> Iterator[Symptom]:
    """Where the next token is to be predicted, a pattern that reaches later positions reads the answer."""
    share = history.series("causality.next_token").finite.values
    if not len(share) or not share.max() > 0.99:
        raise NotChecked("the targets are not the next tokens, so the model need not be causal")
    for site, series in history.each("attention.future"):
        if found := series.first(series.values > 1e-6):
            step, seen = found
            text = f"{site} puts up to {seen:.0%} of a row on later positions, from step {step}"
            yield Symptom(at=site, since=step, seen=seen, expected="0", text=text)


@rule(
    "attention.rows",
    title="The rows of each attention pattern sum to 1",
    reads=("attention.row_error",),
    basis="theory",
    phase="forward",
)
def attention_rows(history: History) -> Iterator[Symptom]:
    """A softmax sums to 1 along the axis that it was taken over; float error grows with the length of the row."""
    for site, series in history.each("attention.row_error"):
        # bfloat16 keeps 8 bits: 2^-8 a term, and errors cancel.
        if found := series.first(series.values > 1e-2):
            step, error = found
            text = f"a row of {site} sums to 1 only within {error:.2g}, from step {step}"
            yield Symptom(at=site, since=step, seen=error, expected="0", text=text)


@rule(
    "attention.partial",
    title="No few positions look ahead where the others do not",
    reads=("attention.reaching", "causality.next_token"),
    basis="theory",
    phase="forward",
)
def attention_partial(history: History) -> Iterator[Symptom]:
    """Where the next token is to be predicted no position looks ahead; a mask that is shifted lets all of them."""
    share = history.series("causality.next_token").finite.values
    if not len(share) or not share.max() > 0.99:
        raise NotChecked("the targets are not the next tokens, so the model need not be causal")
    for site, series in history.each("attention.reaching"):
        if (found := series.first(series.values > 0)) and found[1] < 0.5:
            step, seen = found
            text = f"{seen:.0%} of the positions of {site} look at later ones, the others do not, from step {step}"
            yield Symptom(at=site, since=step, seen=seen, expected="0", text=text)


@probe(
    "heads",
    title="Are the scores q k^T / sqrt(D), and which keys are hidden?",
    every=0,
    cost="one layer's scores for one row of the batch, computed a second time",
    seldom=True,
)
class Heads(Probe):
    """Computes from queries, keys and values what the scores and the pattern should be, for one row of the batch.

    With ``E = q k^T / sqrt(D)``, records of the scores: ``attention.scale`` (their projection on E; 1),
    ``attention.scale_error`` (the relative distance from that projection), ``attention.score_error`` and
    ``attention.swapped_error`` (from E, and from its transpose). Of the pattern: ``attention.column_error`` (the
    largest distance of a column's sum from 1), ``attention.cut_error`` (the relative distance from the softmax of all
    scores, with 0 where the pattern has it), ``attention.hidden_past`` and, where there is no causal mask,
    ``attention.hidden_future``: the share of the earlier, or later, keys that no head gives a weight although their
    scores would. And ``attention.head_output``: the smallest RMS of a head's output over the largest.
    """

    def lab_start(self, run: Run) -> None:
        self._run = run
        self._kept: dict[str, dict[str, Tensor]] = {}
        self._half = False
        names = {
            name: {s.module for s in run.sites.match(f"**.{name}")} for name in ("q", "k", "v", "scores", "pattern")
        }
        self._causal = {s.module for s in run.sites.match("**.mask")}
        layers = set.intersection(*names.values())
        if not layers:
            raise NotChecked("no attention in this model names its queries, keys, values, scores and pattern as sites")
        for layer in sorted(layers):
            for name in names:
                self.read(run, f"{layer}.{name}", self._see)

    def _see(self, site: Site, value: Tensor) -> None:
        kept = self._kept.setdefault(site.module, {})
        kept[site.name.rpartition(".")[2]] = value.detach()[0].float()  # [H T D] or [H T S]
        if not site.name.endswith(".pattern"):
            return
        del self._kept[site.module]
        self._half = value.dtype == torch.float16  # it takes small weights for 0
        if kept.keys() >= {"q", "k", "v", "scores"}:
            heads = kept["q"].shape[0]
            k, v = (kept[name].repeat_interleave(heads // kept[name].shape[0], dim=0) for name in ("k", "v"))
            self._judge_scores(site.module, kept["scores"], kept["q"] @ k.transpose(-2, -1) * k.shape[-1] ** -0.5)
            self._judge_pattern(site.module, kept["scores"], kept["pattern"])
            size = (kept["pattern"] @ v).square().mean((1, 2)).sqrt()  # [H]
            least = torch.where(size.amax() > 0, size.amin() / size.amax(), torch.ones_like(size[0]))
            self._run.step.record("attention.head_output", least, site.module)

    def _judge_scores(self, layer: str, scores: Tensor, right: Tensor) -> None:  # [H T S]
        step, at = self._run.step, f"{layer}.scores"
        size = right.norm().clamp_min(1e-30)
        scale = (scores * right).sum() / right.square().sum().clamp_min(1e-30)
        step.record("attention.scale", scale, at)
        step.record(
            "attention.scale_error", (scores - scale * right).norm() / (scale * right).norm().clamp_min(1e-30), at
        )
        step.record("attention.score_error", (scores - right).norm() / size, at)
        if scores.shape[-1] == scores.shape[-2]:
            step.record("attention.swapped_error", (scores - right.transpose(-2, -1)).norm() / size, at)

    def _judge_pattern(self, layer: str, scores: Tensor, pattern: Tensor) -> None:  # [H T S]
        step, at = self._run.step, f"{layer}.pattern"
        columns = pattern.sum(-2)  # [H S]
        step.record("attention.column_error", ((columns - 1).abs() * (columns != 0)).amax(), at)
        cut = torch.softmax(scores, dim=-1) * (pattern != 0)
        step.record("attention.cut_error", (pattern - cut).norm() / pattern.norm().clamp_min(1e-30), at)
        t, s = pattern.shape[-2:]
        if t != s or t < 2 or self._half:
            return
        # exp(-8) times a bias or a sum of some thousand terms is far from what float32 takes for 0.
        weighty = scores > scores.amax(-1, keepdim=True) - 8.0
        hidden = ((pattern == 0) & weighty).all(0).float()  # [T S]
        if layer in self._causal:
            pairs = t * (t + 1) / 2
            step.record("attention.hidden_past", hidden.tril().sum() / pairs, at)
        else:
            tokens = (pattern != 0).any(0).any(0).float()  # [S]; padding is hidden from everyone
            later = tokens.expand(t, s).triu(1)  # [T S]
            step.record("attention.hidden_future", (hidden * later).sum() / later.sum().clamp_min(1), at)


# Between what bfloat16 rounds, 2^-8 a number, and the smallest mistake that is one of kind.
SAME = 0.05


@rule(
    "attention.scale",
    title="Attention scores are scaled by 1/sqrt(D)",
    reads=("attention.scale", "attention.scale_error"),
    basis="theory",
    phase="forward",
)
def attention_scale(history: History) -> Iterator[Symptom]:
    """Scores that are a multiple of ``q k^T / sqrt(D)``, and another than 1: bfloat16 keeps 8 bits, 5% is far above."""
    for site, series in history.each("attention.scale"):
        error = history.series("attention.scale_error", site).values
        if found := series.first((abs(series.values - 1) > SAME) & (error < SAME) & (series.values != 0)):
            step, scale = found
            text = f"{site} are {scale:.3g} times q k^T / sqrt(D), from step {step}"
            yield Symptom(at=site, since=step, seen=scale, expected="1", text=text)


@rule(
    "attention.swapped",
    title="The rows of attention scores are queries",
    reads=("attention.score_error",),
    basis="theory",
    phase="forward",
)
def attention_swapped(history: History) -> Iterator[Symptom]:
    """Scores that are the transpose of ``q k^T / sqrt(D)`` to within rounding, and are not that itself."""
    for site, series in history.each("attention.swapped_error"):
        error = history.series("attention.score_error", site).values
        if found := series.first((series.values < SAME) & (error > 2 * SAME)):
            step, _ = found
            seen = float(error[series.steps == step][0])
            text = f"{site} are those of k with q, the transpose of q k^T / sqrt(D), from step {step}"
            yield Symptom(at=site, since=step, seen=seen, expected="0", text=text)


def _wrong_rows(history: History, metric: str, bound: float) -> Iterator[tuple[str, int, float]]:
    """Yield the patterns with a row whose sum is wrong on steps on which another metric is below a bound."""
    for site, series in history.each(metric):
        rows = history.series("attention.row_error", site)
        wrong = rows.steps[rows.values > 1e-2]  # as for attention.rows
        if found := series.first((series.values < bound) & [step in wrong for step in series.steps]):
            yield site, *found


@rule(
    "attention.columns",
    title="No attention pattern sums to 1 over the queries in place of the keys",
    reads=("attention.row_error", "attention.column_error"),
    basis="theory",
    phase="forward",
)
def attention_columns(history: History) -> Iterator[Symptom]:
    """Where rows do not sum to 1 and columns do, to the accuracy of bfloat16, the softmax went over the queries."""
    for site, step, seen in _wrong_rows(history, "attention.column_error", 1e-2):
        text = f"the columns of {site} sum to 1, and its rows do not, from step {step}"
        yield Symptom(at=site, since=step, seen=seen, expected="rows that sum to 1", text=text)


@rule(
    "attention.cut",
    title="Hidden keys take no share of an attention pattern",
    reads=("attention.row_error", "attention.cut_error"),
    basis="theory",
    phase="forward",
)
def attention_cut(history: History) -> Iterator[Symptom]:
    """Where rows do not sum to 1, and the pattern is the softmax of all scores but for what was set to 0 afterwards."""
    for site, step, seen in _wrong_rows(history, "attention.cut_error", SAME):
        text = f"{site} is the softmax of all scores, hidden ones too, with some set to 0 afterwards, from step {step}"
        yield Symptom(at=site, since=step, seen=seen, expected="a softmax of what is seen", text=text)


def _hidden(history: History, metric: str, which: str) -> Iterator[Symptom]:
    for site, series in history.each(metric):
        if found := series.first(series.values > 0):
            step, share = found
            text = f"{site} gives no weight to {share:.0%} of the {which} positions, whatever their scores"
            yield Symptom(at=site, since=step, seen=share, expected="0", text=text)


@rule(
    "attention.hidden_past",
    title="A causal mask hides later positions only",
    reads=("attention.row_error",),
    basis="theory",
    phase="forward",
)
def attention_hidden_past(history: History) -> Iterator[Symptom]:
    """A softmax of finite scores is above 0: an exact 0 where the score is near the row's largest is a mask's work."""
    if not history.sites("attention.hidden_past"):
        raise NotChecked("no attention in this model has a causal mask as a site")
    yield from _hidden(history, "attention.hidden_past", "earlier")


@rule(
    "attention.hidden_future",
    title="Attention that is not causal sees later positions",
    reads=("attention.row_error", "causality.next_token"),
    basis="theory",
    phase="forward",
)
def attention_hidden_future(history: History) -> Iterator[Symptom]:
    """The same for layers without a causal mask, where the targets are not the next tokens."""
    if not history.sites("attention.hidden_future"):
        raise NotChecked("no attention in this model is without a causal mask")
    share = history.series("causality.next_token").finite.values
    if not len(share) or share.max() > 0.99:
        raise NotChecked("the targets are the next tokens: no attention in this model need look ahead")
    yield from _hidden(history, "attention.hidden_future", "later")


@rule(
    "attention.head_silent",
    title="Every head gives out something",
    reads=("attention.head_output",),
    basis="theory",
    phase="forward",
)
def attention_head_silent(history: History) -> Iterator[Symptom]:
    """An average of values is exactly 0 only if all are: asked after updates, as values may start from weights of 0."""
    for site, series in history.each("attention.head_output"):
        begin = series.until_now(series.values == 0, 3)
        if begin is not None and series.steps[-1] >= 2:
            text = f"a head of {site} gives out exactly 0 in {len(series) - begin} looks up to now, others do not"
            yield Symptom(at=site, since=int(series.steps[begin]), seen=0.0, expected="above 0", text=text)


@rule(
    "attention.beside",
    title="No later position comes in beside an attention pattern that leaves it out",
    reads=("attention.future", "causality.future", "causality.next_token"),
    basis="experiment",
    phase="forward",
)
def attention_beside(history: History) -> Iterator[Symptom]:
    """A layer takes from later positions only what its pattern lets in; the bounds are those of the two experiments."""
    share = history.series("causality.next_token").finite.values
    if not len(share) or not share.max() > 0.99:
        raise NotChecked("the targets are not the next tokens, so the model need not be causal")
    for site, series in history.each("attention.future"):
        layer = site.rpartition(".")[0]
        leak = history.series("causality.module_future", layer).finite
        found = leak.first(leak.values > 1e-6)
        if found and series.steps[-1] >= found[0] and not (series.values > 1e-6).any():
            step, seen = found
            text = f"{layer} takes {seen:.0%} from later positions, of which its pattern lets none in"
            yield Symptom(at=layer, since=step, seen=seen, expected="0", text=text)
