"""Which rows each process reads: the same ones, or shares that overlap, where they should be apart."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lab import NotChecked, Probe, Symptom, probe, rule, torch
from lab import numpy as np

from .data import _coefficients, run_of
from .ranks import why_not

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from torch import Tensor

    from lab import Batch, History, Run, Step

EDGE = 16  # rows that are compared at either end of a batch: shares that overlap do so at their ends
CHANCE = 6.0  # less than one in 10^6, as for the data of one process
CUT = "weights are cut between the processes, which may share their rows on purpose, or did not begin alike"


@probe(
    "shards", title="Do the processes read rows of their own?", every=5, cost="a hash of 32 rows and a small message"
)
class Shards(Probe):
    """Compares a hash of the first and the last rows of each batch between the processes.

    Records ``shards.shared``, the share of this process's rows that another one has too; ``shards.same``, whether every
    process has the same rows in the same order, all different from each other and from those at the last look;
    ``shards.rows``, how many rows of a process were compared. And of the two places, in two processes, that have held
    equal and new rows for the longest: ``shards.looks``, in how many looks up to now, and ``shards.odds``, the decimal
    logarithm of the chance that any two places do, if all rows were dealt out at random.
    """

    def lab_start(self) -> None:
        self._inputs: Tensor | None = None
        self._before: Tensor | None = None
        self._odds: Tensor | None = None
        self._looks: Tensor | None = None

    def lab_batch(self, step: Step) -> Generator[None, Batch, Batch]:
        batch = yield
        if step.mode == "train" and self.due(step):
            self._inputs = batch.inputs
        return batch

    def lab_before_update(self, run: Run, step: Step) -> None:
        inputs, self._inputs = self._inputs, None
        if not self.due(step) or why_not(run):
            return
        # Whatever this process was given, it takes part in the message.
        mine = _edges(inputs).to(run.device)  # [1 + 2 EDGE]
        each = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(each, mine)
        self._compare(step, torch.stack(each), torch.distributed.get_rank())

    def _compare(self, step: Step, each: Tensor, rank: int) -> None:  # [W 1 + 2 EDGE]
        counts, rows = each[:, 0], each[:, 1:]
        there = (torch.arange(rows.shape[1], device=each.device) < counts[:, None]).flatten()  # [N]
        owner = torch.arange(len(rows), device=each.device).repeat_interleave(rows.shape[1])  # [N]
        flat = rows.flatten()
        fresh = there if self._before is None else there & (flat != self._before)
        self._before = flat
        equal = (flat[:, None] == flat) & there[:, None] & there  # [N N]
        across = equal & (owner[:, None] != owner)
        pairs = equal.triu(1).sum()
        places = (there.sum() * (there.sum() - 1) / 2).double().clamp_min(1)
        within = pairs > across.triu(1).sum()
        same = (rows == rows[0]).all() & (counts == counts[0]).all() & (counts[0] > 0) & (fresh == there).all()
        mine = across[owner == rank].any(1).sum() / counts[rank].clamp_min(1)
        step.record("shards.shared", mine.double())
        step.record("shards.same", (same & ~within).double())
        step.record("shards.rows", counts.amin().double())
        hit = across & fresh[:, None] & fresh
        first = places.log10()
        if self._odds is None or self._looks is None:
            self._odds, self._looks = first.expand(hit.shape), torch.zeros_like(hit, dtype=torch.float64)
        # Of all pairs of places so many hold equal rows: dealt out at random, that is the chance of each.
        self._odds = torch.where(hit, self._odds + (pairs / places).log10(), first)
        self._looks = torch.where(hit, self._looks + 1, 0.0)
        best = self._odds.argmin()
        step.record("shards.odds", self._odds.flatten().gather(0, best[None]).squeeze(0))
        step.record("shards.looks", self._looks.flatten().gather(0, best[None]).squeeze(0))

    def lab_examine(self, run: Run) -> None:
        if reason := why_not(run):
            raise NotChecked(reason)


def _edges(inputs: Tensor | None) -> Tensor:  # -> [1 + 2 EDGE]
    """How many rows are compared, and a hash of each: of the first and the last of a batch of tokens."""
    if inputs is None or inputs.dim() != 2 or inputs.dtype not in (torch.int64, torch.int32):
        return torch.zeros(1 + 2 * EDGE, dtype=torch.int64)
    if len(inputs) > 2 * EDGE:
        inputs = torch.cat([inputs[:EDGE], inputs[-EDGE:]])
    known = _coefficients(inputs.shape[1], inputs.device)
    out = torch.zeros(1 + 2 * EDGE, dtype=torch.int64, device=inputs.device)
    out[0] = len(inputs)
    out[1 : 1 + len(inputs)] = (inputs.long() * known).sum(-1)
    return out


def _one_model(history: History) -> None:
    """Ask only of processes that hold the same weights.

    Raises:
        NotChecked: They do not, or no rows of tokens were seen.
    """
    if not history.last("ranks.alike") == 1:
        raise NotChecked(CUT)
    if not np.any(history.series("shards.rows").values > 0):
        raise NotChecked("no rows of tokens go into the model")


def _matchings(rows: float) -> float:
    """The decimal logarithm of (2 B - 1)!!: in how many ways 2 B rows, two of each, make pairs of places."""
    return float((math.lgamma(2 * rows + 1) - math.lgamma(rows + 1)) / math.log(10) - rows * math.log10(2))


@rule(
    "shards.same",
    title="The processes do not read the same rows",
    reads=("shards.same", "ranks.alike"),
    basis="theory",
)
def shards_same(history: History) -> Iterator[Symptom]:
    """Every process has the same rows in the same order, in each look from some step on.

    Each row occurs once in each process, and is new in each look. If 2 B such rows were dealt out at random to two
    processes, equal ones come to equal places with a chance of 1 / (2 B - 1)!!; of all looks, below one in 10^6.
    """
    _one_model(history)
    series, rows = history.series("shards.same"), history.series("shards.rows").values
    begin = run_of(series.values == 1)
    if begin == len(series):
        return
    if sum(map(_matchings, rows[begin:])) < CHANCE:
        raise NotChecked("the processes had the same rows, which with so few looks may be chance")
    step, looks = int(series.steps[begin]), len(series) - begin
    text = f"in each of {looks} looks from step {step} on every process has the same {rows[-1]:.0f} rows"
    yield Symptom(at="", since=step, seen=1.0, expected="0", text=text)


@rule(
    "shards.overlap",
    title="No row is in the share of two processes",
    reads=("shards.odds", "shards.same", "ranks.alike"),
    basis="theory",
)
def shards_overlap(history: History) -> Iterator[Symptom]:
    """The row in a place of one process is that in a place of another, in each look up to now, and always a new one.

    Of n places with m pairs of equal rows, two given places hold such a pair with a chance of m / (n (n - 1) / 2), if
    rows are dealt out at random; over all looks, and for any two places, below one in 10^6. Where rows are few, and
    equal by nature, m is large.
    """
    _one_model(history)
    if np.any(history.series("shards.same").values == 1):
        raise NotChecked("the processes had all their rows in common")
    series, looks = history.series("shards.odds"), history.series("shards.looks").values
    if len(series) and looks[-1] and series.values[-1] < -CHANCE:
        count, share = min(int(looks[-1]), len(series)), history.last("shards.shared")
        step = int(series.steps[-count])
        text = f"in each of {count} looks from step {step} on two processes have a row in common, {share:.0%} of theirs"
        yield Symptom(at="", since=step, seen=share, expected="0", text=text)
