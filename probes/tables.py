"""Tables that are made anew in each call, of nothing that changes: how much of a training step are they?"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from lab import LabError, NotChecked, Probe, Symptom, probe, rule, torch

from .dispatch import Memory, follow, tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

    from lab import History, Run, Step

ROWS = 2
PASSES = 3  # a backward pass computes two gradients for each product of the forward pass
MOST = 0.5
FUSED = 2  # numbers that fused attention computes for each pair of positions: a score, and what softmax makes of it


@probe(
    "tables",
    title="How much of a step goes into tables of nothing that changes?",
    cost="a forward pass of two rows",
    examines=True,
    seldom=True,
)
class Tables(Probe):
    """Calls the model on two rows, and counts the numbers that it computes.

    Records ``tables.share``: of all numbers that a training step computes, how many are computed from constants alone,
    that is from what an operator made of no tensor (``torch.arange``), without chance. For the whole model, and for
    each module that computes any. Where they are most, the model is called once more, and that counts: what a call
    keeps for the next is not computed again. A buffer, a parameter and whatever else the model is given may change,
    so nothing that depends on one counts.

    The rest is counted as for the whole batch, and three times, as a backward pass computes twice what a forward pass
    does.
    """

    def lab_examine(self, run: Run, step: Step) -> None:
        inputs = step.batch.inputs if step.batch is not None else None
        if step.batch is None or inputs is None or not inputs.dim():
            raise NotChecked("the model is not called with a batch of tensors")
        few = step.batch.rows(ROWS)
        rows = few.inputs
        assert rows is not None
        for _ in range(2):
            work = Work()
            try:
                with torch.no_grad():
                    work.follow(run.model, lambda: run.answer(few))
            except (LabError, NotChecked):
                raise
            except Exception as error:  # noqa: BLE001 - a model that cannot be followed may raise anything
                reason = f"the model cannot be called and followed on {ROWS} rows ({type(error).__name__})"
                raise NotChecked(reason) from None
            rest = PASSES * work.rest * len(inputs) / max(1, len(rows))
            made = work.tables.total()
            if made <= MOST * (made + rest):
                break
        for name, count in {**work.tables, "": made}.items():
            step.record("tables.share", count / max(1.0, made + rest), name)


class Work:
    """Counts the numbers that are computed in a call of a model, and tells those of constants from the rest.

    Attributes:
        tables: For each module, how many numbers it computes from constants alone.
        rest: How many others are computed, in the whole model.
    """

    def __init__(self) -> None:
        self.tables: Counter[str] = Counter()
        self.rest = 0
        self._memory = Memory()
        self._constant: set[int] = set()
        self._open: list[str] = []

    def follow(self, model: nn.Module, call: Callable[[], Any]) -> None:
        """Call the model, and count."""
        try:
            follow(model, call, self._operator, lambda name, _: self._open.append(name), self._ends)
        finally:
            self._memory.clear()

    def _ends(self) -> None:
        self._open.pop()

    def _operator(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        made, given = tensors(out), tensors((args, kwargs))
        written, read = ({self._memory.key(value) for value in values} for values in (made, given))
        constant = read <= self._constant and torch.Tag.nondeterministic_seeded not in func.tags
        # What is written to in place depends on what was there, and what is made of constants is one.
        self._constant = self._constant | written if constant else self._constant - written
        if written <= read and not func._schema.is_mutable:  # noqa: SLF001 - torch offers no other way to ask
            return  # a view: nothing was computed
        count = sum(value.numel() for value in made)
        if not constant:
            self.rest += count + _inside(func.overloadpacket.__name__, given)
        elif read and self._open:
            self.tables[self._open[-1]] += count


def _inside(name: str, given: list[Tensor]) -> int:
    """How many numbers fused attention of q [B H T D] and k [B H S D] computes and does not give out."""
    if not name.startswith("_scaled_dot_product") or len(given) < 2 or given[0].dim() != 4:
        return 0
    return FUSED * given[0].shape[:-1].numel() * given[1].shape[-2]


@rule(
    "tables.rebuilt",
    title="A step computes more than tables of nothing that changes",
    reads=("tables.share",),
    basis="theory",
    phase="forward",
)
def tables_rebuilt(history: History) -> Iterator[Symptom]:
    """Most of the numbers that a training step computes are the same in each call, and could be computed once.

    Positions, masks and angles are made in each call by many models, and are small beside the rest. A mask of m
    operators [T T] is outweighed by scores [B H T T] in L layers, each of which passes two operators and their
    gradients, where m < 6 B H L.
    """
    whole = history.series("tables.share")
    if found := whole.first(whole.values > MOST):
        step, share = found
        shares = {name: history.last("tables.share", name) for name in history.sites("tables.share") if name}
        for name in (name for name, value in shares.items() if value >= max(shares.values()) / 2):
            text = f"{shares[name]:.0%} of the numbers that a step computes are tables that {name} makes anew, in each "
            text += "call, of nothing that changes"
            yield Symptom(at=name, since=step, seen=share, expected=f"at most {MOST}", text=text)
