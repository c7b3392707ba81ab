"""Are positions told apart?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab import NotChecked, Probe, Symptom, probe, rule, torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from lab import History, Run, Site

LENGTH = 512  # of a table's positions, those whose angles are compared
# To bfloat16, a sine is rounded by 2^-9 at most, and three of them are compared: what is stored so differs by less.
STORED = 2.0**-6


@probe("positions", title="Has each position a vector of its own?", every=10, cost="a sort of one number a position")
class Positions(Probe):
    """Looks at each table of positions [T C] as the model uses it.

    Records ``positions.repeated``, the share of the positions whose vector another one has too;
    ``positions.early`` and ``positions.late``, whether the first two, and the last two, have the same. Of a table that
    is not learned, ``positions.circle``, how far the squares of each sine and its cosine are from adding up to 1, and
    ``positions.unevenness``: a pair as a complex number z(t), over that at the first position, is w(t), and this is the
    largest ``|w(t+1) - w(t) w(1)|``.
    """

    def lab_start(self, run: Run) -> None:
        self._run = run
        found = [site.name for site in run.sites.match("**.out") if site.axes == ["T", "C"]]
        if not found:
            raise NotChecked("no attention in this model is preceded by a table of positions that is a site")
        for name in found:
            self.read(run, name, self._see)

    def _see(self, site: Site, table: Tensor) -> None:  # [T C]
        if table.dim() != 2 or len(table) < 3:
            return
        fixed = not table.requires_grad and table.dtype in (torch.float32, torch.float64)
        table = table.detach().double()
        # Equal vectors have equal products; that different ones do too has no measurable chance.
        weights = torch.linspace(1.0, 2.0, table.shape[1], device=table.device, dtype=table.dtype).sin()
        same = (table * weights).sum(-1).sort().values.diff() == 0  # [T-1]
        edge = torch.zeros_like(same[:1])
        repeated = torch.cat([same, edge]) | torch.cat([edge, same])  # [T]
        step = self._run.step
        step.record("positions.repeated", repeated.double().mean(), site.name)
        step.record("positions.early", (table[0] == table[1]).all().double(), site.name)
        step.record("positions.late", (table[-1] == table[-2]).all().double(), site.name)
        if fixed and table.shape[1] >= 2:
            circle, unevenness = _circles(table)
            step.record("positions.circle", circle, site.name)
            step.record("positions.unevenness", unevenness, site.name)


def _circles(table: Tensor) -> tuple[Tensor, Tensor]:  # [T C] -> [], []
    """How far pairs of channels are from a circle, and from going round it evenly; pairs in the better of two ways."""
    table = table[:LENGTH, : table.shape[1] // 2 * 2]
    ways = [torch.complex(*table.chunk(2, dim=-1)), torch.complex(table[:, 0::2], table[:, 1::2])]  # [T C/2] each
    circle = torch.stack([(z.abs().square() - 1).abs().amax() for z in ways])  # [2]
    turned = [z * z[:1].conj() for z in ways]
    uneven = torch.stack([(w[1:] - w[:-1] * w[1:2]).abs().amax() for w in turned])  # [2]
    return circle.amin(), uneven[circle.argmin()]


def _until_now(history: History, metric: str) -> Iterator[tuple[str, int, float]]:
    """Yield the tables of which a metric is above 0 in each look up to now, since when, and the share that is repeated.

    A table may start from zeros, and be told apart by the first updates: two looks after those are asked for.
    """
    for site, series in history.each(metric):
        begin = series.until_now(series.values > 0, 3)
        if begin is not None and (series.steps[begin:] >= 2).sum() >= 2:
            yield site, int(series.steps[begin]), history.last("positions.repeated", site)


def _since(history: History, metric: str, site: str, step: int) -> bool:
    """Whether a metric is above 0 in each look from a step on."""
    series = history.series(metric, site)
    return bool((series.values[series.steps >= step] > 0).all())


@rule(
    "positions.same",
    title="Positions have different vectors",
    reads=("positions.repeated",),
    basis="theory",
    phase="forward",
)
def positions_same(history: History) -> Iterator[Symptom]:
    """If all have the same, what is added says nothing: attention cannot tell one order of tokens from another."""
    for site, step, share in _until_now(history, "positions.repeated"):
        if share == 1 and _since(history, "positions.early", site, step):
            text = f"{site} gives every position the same vector"
            yield Symptom(at=site, since=step, seen=share, expected="0", text=text)


@rule(
    "positions.late",
    title="The last positions have vectors of their own",
    reads=("positions.late",),
    basis="theory",
    phase="forward",
)
def positions_late(history: History) -> Iterator[Symptom]:
    """The last two have one vector and the first two have not: the table, or an index into it, ends too early."""
    for site, step, share in _until_now(history, "positions.late"):
        if not _since(history, "positions.early", site, step):
            text = f"{site} gives its last positions the same vector; {share:.0%} of all share theirs with another"
            yield Symptom(at=site, since=step, seen=share, expected="0", text=text)


@rule(
    "positions.early",
    title="The first positions have vectors of their own",
    reads=("positions.early",),
    basis="theory",
    phase="forward",
)
def positions_early(history: History) -> Iterator[Symptom]:
    """The first two have one vector and the last two have not: indices are shifted, and clamped at 0."""
    for site, step, share in _until_now(history, "positions.early"):
        if not _since(history, "positions.late", site, step):
            text = f"{site} gives its first two positions the same vector"
            yield Symptom(at=site, since=step, seen=share, expected="0", text=text)


@rule(
    "positions.uneven",
    title="From each position to the next, a table of sines goes on by the same angles",
    reads=("positions.repeated",),
    basis="theory",
    phase="forward",
)
def positions_uneven(history: History) -> Iterator[Symptom]:
    """Angles are multiples of a rate; what bfloat16 makes of sines is allowed for, and what it makes of angles is not.

    A table is one of sines if the squares of each pair add up to 1. A learned one is not asked.
    """
    judged = False
    for site, series in history.each("positions.circle"):
        sines = series.values < STORED
        judged |= bool(sines.any())
        unevenness = history.series("positions.unevenness", site)
        if found := unevenness.first((unevenness.values > STORED) & sines):
            text = f"the angles of {site} are off the multiples of a rate by up to {found[1]:.2g}"
            yield Symptom(at=site, since=found[0], seen=found[1], expected="0", text=text)
    if not judged:
        raise NotChecked("no attention in this model is preceded by a fixed table of sines")
