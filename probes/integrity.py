"""Does anything but the optimiser change weights, or the optimiser's own memory? Their bits are summed as integers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lab import NotChecked, Probe, Symptom, probe, rule, torch
from lab import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from lab import History, Run, Step

SMALL = 4096  # a tensor of at most so many elements is kept as it is; of a larger one, the sum of each row
RARE = 2  # what memory loses is lost once; what a loop does on purpose, it does again and again
BEFORE = 5  # the loss has to exceed that of so many steps before a change, for the change to have done harm
LOOKS = 3
ELSEWHERE = 0.5  # the cosine of two drawings of 32 numbers is above that once in 300 times


@dataclass
class _Kept:
    """The bits of many tensors just after an update, and where to read them again."""

    names: tuple[str, ...]
    bits: list[Tensor]  # views
    summed: list[bool]
    entries: Tensor  # [N], int32


@probe(
    "integrity",
    title="Do weights and the optimiser's memory stay as an update left them, until the next?",
    cost="sums of the bits of all weights and of the optimiser's memory, twice a step",
    on_request=True,
)
class Integrity(Probe):
    """Sums bits as integers just after an update and just before the next: exact, in whatever order they are added.

    An entry is an element of a small tensor, or the sum of a row of a large one, modulo 2^32. Records for weights and
    for the optimiser's memory: ``integrity.changed`` and ``integrity.state_changed``, how many entries are not what
    they were; where it is one alone, ``integrity.bit`` and ``integrity.state_bit``, k if it changed by 2^k and -1 if
    not; ``integrity.owner`` and ``integrity.state_owner``, the number of the tensor that holds the first of them, and
    once, by tensor, ``integrity.place`` and ``integrity.state_place``, its number. Of the table that gives the
    logits, a row a class: ``integrity.rows``, how many rows there are, ``integrity.rows_changed``,
    ``integrity.rows_learned``, how many of those were targets before, and ``integrity.rows_turned``, how many of these
    point elsewhere (a cosine below a half) and are not 0.
    """

    def lab_start(self) -> None:
        self._kept: list[_Kept | None] = [None, None]
        self._bounds: dict[tuple[str, ...], Tensor] = {}
        self._head = ""
        self._learned: Tensor | None = None

    def lab_before_update(self, run: Run, step: Step) -> None:
        for which, (kept, of) in enumerate(zip(self._kept, ("integrity.", "integrity.state_"), strict=True)):
            if kept is not None:
                changed = self._compare(kept, step, of)
                if which == 0 and self._head and kept.names[-1] == self._head:
                    rows = changed[-len(kept.bits[-1]) :]
                    step.record("integrity.rows", float(len(rows)), self._head)
                    step.record("integrity.rows_changed", rows.sum(), self._head)
                    if self._learned is not None:
                        learned = rows & self._learned
                        step.record("integrity.rows_learned", learned.sum(), self._head)
                        turned = _turned(self._table, run.parameters[self._head].detach())
                        step.record("integrity.rows_turned", (learned & turned).sum(), self._head)
        self._head = self._head or _head(run, step)
        self._note_targets(run, step)

    def lab_step_end(self, run: Run) -> None:
        weights: dict[str, Tensor] = {name: p for name, p in run.parameters.items() if name != self._head}
        if self._head:
            weights[self._head] = run.parameters[self._head]  # last, so that its rows are easily found
            self._table = run.parameters[self._head].detach().clone()
        held = run.optimizer.state
        states = {
            f"{name} {key}": value
            for name, p in run.parameters.items()
            if p in held
            for key, value in held[p].items()
            if torch.is_tensor(value) and value.shape == p.shape
        }
        self._kept = [_keep(weights, self._head), _keep(states)]

    def _compare(self, kept: _Kept, step: Step, of: str) -> Tensor:
        """Record what is not as it was; return where."""
        difference = _entries(kept.bits, kept.summed) - kept.entries  # modulo 2^32
        changed = difference != 0
        count, first = changed.sum(), changed.int().argmax()
        step.record(f"{of}changed", count)
        # The bits of a number that was 0 and was set to 2, or to minus infinity, differ by a power of two as well.
        alone = (count == 1) & (kept.entries.take(first) != 0)
        by = difference.take(first).long().abs()
        power = by.clamp_min(1).double().log2().round().long()
        exact = alone & (by == torch.ones_like(by).bitwise_left_shift(power))
        step.record(f"{of}bit", torch.where(exact, power, -1))
        if kept.names not in self._bounds:
            sizes = [len(b) if s else b.numel() for b, s in zip(kept.bits, kept.summed, strict=True)]
            self._bounds[kept.names] = torch.tensor(np.cumsum(sizes), device=difference.device)
            numbers = torch.arange(len(kept.names), dtype=torch.float64, device=difference.device)
            step.record_all(f"{of}place", kept.names, numbers)
        owner = torch.searchsorted(self._bounds[kept.names], first.reshape(1), right=True)
        step.record(f"{of}owner", owner.reshape(()))
        return changed

    def _note_targets(self, run: Run, step: Step) -> None:
        """Remember which classes were to be learned."""
        targets = step.batch.targets if step.batch is not None else None
        if not self._head or targets is None or targets.is_floating_point():
            return
        classes = len(run.parameters[self._head])
        flat = targets.detach().reshape(-1)
        # One place more, for what is no class.
        seen = torch.zeros(classes + 1, dtype=torch.bool, device=flat.device)
        seen[torch.where((flat >= 0) & (flat < classes), flat, classes)] = True
        self._learned = seen[:-1] if self._learned is None else self._learned | seen[:-1]


def _head(run: Run, step: Step) -> str:
    """Return the name of the table that gives the logits, a row a class; empty if none is trained."""
    if step.logits is None or step.logits.dim() < 2:
        return ""
    found = [n for n, p in run.parameters.items() if p.dim() == 2 and len(p) == step.logits.shape[-1] and _plain(p)]
    ours = [n for n in found if n == run.sites.output.removesuffix("out") + "weight"]
    linear = [n for n in found if isinstance(run.model.get_submodule(n.rpartition(".")[0]), torch.nn.Linear)]
    # One that is left is tied to the table of the tokens.
    return (ours or linear or (found if len(found) == 1 else []) or [""])[-1]


def _turned(before: Tensor, now: Tensor) -> Tensor:  # [V C] x 2 -> [V]
    """Which rows point elsewhere: what is scaled, averaged or cut off in part does not."""
    return (torch.cosine_similarity(before.float(), now.float(), dim=-1) < ELSEWHERE) & (now != 0).any(-1)


def _plain(x: Tensor) -> bool:
    """Whether its bits can be read where they are. One element alone is left out: a temperature may well be doubled."""
    usual = type(x) in (torch.nn.Parameter, torch.Tensor) and x.is_floating_point() and x.layout == torch.strided
    return usual and x.numel() > 1 and x.element_size() in (2, 4)


def _keep(tensors: dict[str, Tensor], by_rows: str = "") -> _Kept | None:
    held = {name: x for name, x in tensors.items() if _plain(x)}
    if not held or len({x.device for x in held.values()}) > 1:
        return None
    bits = [x.detach().view(torch.int32 if x.element_size() == 4 else torch.int16) for x in held.values()]
    summed = [
        name == by_rows or (b.numel() > SMALL and b.dim() > 1 and len(b) > 1)
        for name, b in zip(held, bits, strict=True)
    ]
    return _Kept(tuple(held), bits, summed, _entries(bits, summed))


def _entries(bits: list[Tensor], summed: list[bool]) -> Tensor:
    return torch.cat(
        [
            b.sum(tuple(range(1, b.dim())), dtype=torch.int32) if s else b.reshape(-1).to(torch.int32)
            for b, s in zip(bits, summed, strict=True)
        ]
    )


# ---------------------------------------------------------------- rules


def _changes(history: History, of: str) -> tuple[int, int] | None:
    """Return the step at which one entry alone was changed, by one bit, and which bit; None if no step is like that.

    Raises:
        NotChecked: It was seen too seldom, or the loop changes what it was asked about again and again.
    """
    series = history.series(f"{of}changed")
    steps = series.steps[series.values > 0]
    if len(series) < LOOKS:
        raise NotChecked("fewer than three updates were seen")
    bits = history.series(f"{of}bit").values
    flipped = np.flatnonzero(bits >= 0)
    if len(steps) > RARE:
        raise NotChecked(f"something other than the optimiser changes it, in {len(steps)} of {len(series)} steps")
    return (int(series.steps[flipped[0]]), int(bits[flipped[0]])) if len(flipped) else None


def _owner(history: History, of: str, step: int) -> str:
    series = history.series(f"{of}owner")
    number = series.values[series.steps == step][0]
    return next((name for name, places in history.each(f"{of}place") if places.values[-1] == number), "")


@rule(
    "integrity.weight_bit",
    title="No bit of a weight flips between two updates",
    reads=("integrity.changed", "integrity.bit"),
    basis="experiment",
    phase="forward",
)
def integrity_weight_bit(history: History) -> Iterator[Symptom]:
    """Read as an integer, a number in which one bit flips changes by exactly 2^k, and with it the sum of its row.

    All else has to be bit for bit what the update left. What a loop changes on purpose (clipping, normalising, an
    average put in its place, a mask) changes many entries, or one by anything: 32 in 2^32 such changes look like this.
    And it does so again and again: this is asked only where at most two steps of the run changed anything.
    """
    if found := _changes(history, "integrity."):
        step, bit = found
        name = _owner(history, "integrity.", step)
        text = (
            f"between the updates of steps {step - 1} and {step} bit {bit} of one element of {name} flipped; "
            f"all else stayed"
        )
        yield Symptom(at=name, since=step, seen=float(bit), expected="no change", text=text)


@rule(
    "integrity.state_bit",
    title="No bit of the optimiser's memory flips between two updates",
    reads=("integrity.state_changed", "integrity.state_bit"),
    basis="experiment",
    phase="update",
)
def integrity_state_bit(history: History) -> Iterator[Symptom]:
    """The same of what the optimiser keeps for each weight: nothing but an update has any business there."""
    if found := _changes(history, "integrity.state_"):
        step, bit = found
        name, _, key = _owner(history, "integrity.state_", step).partition(" ")
        text = (
            f"between the updates of steps {step - 1} and {step} bit {bit} of one element of the optimiser's {key} "
            f"of {name} flipped; all else stayed"
        )
        yield Symptom(at=name, since=step, seen=float(bit), expected="no change", text=text)


@rule(
    "integrity.rows_reset",
    title="No learned rows of the table that gives the logits are set anew",
    reads=("loss",),
    basis="experiment",
    phase="forward",
)
def integrity_rows_reset(history: History) -> Iterator[Symptom]:
    """Rows of classes that were targets before, two at least and not all, changed outside the optimiser, for the worse.

    They all point elsewhere, or the loss rises above each of the five before. Rows are made anew on purpose for classes
    that are new, or for all classes at once. Once or twice in the run: what a loop does to rows again and again, it
    means.
    """
    if not history.sites("integrity.rows_learned"):
        raise NotChecked("no table of classes, with targets known, is trained")
    unsure = ""
    for name, changed in history.each("integrity.rows_changed"):
        if len(changed) < LOOKS:
            raise NotChecked("fewer than three updates were seen")
        when = changed.steps[changed.values > 0]
        if len(when) > RARE:
            raise NotChecked(f"something other than the optimiser changes rows, in {len(when)} of {len(changed)} steps")
        for step in when:
            kinds = ("integrity.rows_changed", "integrity.rows_learned", "integrity.rows", "integrity.rows_turned")
            count, learned, rows, turned = (_at(history, metric, name, step) for metric in kinds)
            if not learned >= 2 or count >= rows:
                continue
            now = _at(history, "loss", "", step)
            past = np.array([_at(history, "loss", "", step - back) for back in range(1, BEFORE + 1)])
            if turned == learned or (np.all(np.isfinite(past)) and not now <= np.max(past)):
                harm = "point elsewhere now" if turned == learned else f"the loss rose above the {BEFORE} before"
                text = (
                    f"{learned:.0f} rows of {name} whose classes had been learned were changed between the updates "
                    f"of steps {step - 1} and {step}, and {harm}; the loss is {now:.3g}"
                )
                yield Symptom(at=name, since=int(step), seen=learned, expected="0", text=text)
            else:
                unsure = f"{learned:.0f} learned rows of {name} changed before step {step}; the loss does not show harm"
    if unsure:
        raise NotChecked(unsure)


def _at(history: History, metric: str, site: str, step: int) -> float:
    series = history.series(metric, site)
    found = series.values[series.steps == step]
    return float(found[0]) if len(found) else float("nan")
