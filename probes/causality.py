"""Does the past depend on the future? An experiment whose right answer is known: it does not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab import NotChecked, Probe, Symptom, probe, rule, torch
from lab import numpy as np

from .hooked import Hooked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

    from lab import Batch, History, Run, Step

# In exact arithmetic it is 0, and masked weights are exact zeros: only rounding is allowed for.
ROUNDING = 1e-6
ROWS, FEW = 4, 2  # the more the more positions are asked; and where other experiments are not made
ALL = 0.99  # of the targets


@probe(
    "causality",
    title="Does an output depend on later inputs?",
    cost="forward and backward on two rows, or four, on examined steps",
    examines=True,
)
class Causality(Probe):
    """Differentiates the output at one position, another in each row, by the inputs at every position.

    Only at positions that have a target: what a model makes of padding, or of a question, may come from anywhere.

    Records ``causality.next_token`` (the share of targets that are the token after: whether the model is meant to be
    causal at all), ``causality.along_rows`` and ``causality.time_first`` (that along the second axis and along the
    first: where it is the first, the next experiment takes that for time), ``causality.asked`` (at how many positions
    it asks), ``causality.future`` (the share of the gradient that lies on later positions, for the whole model; NaN
    where it is not meant to be causal). When that is not 0, the next experiment asks each module alone:
    ``causality.module_future``, and ``causality.module_past``, the share on earlier positions.
    """

    def lab_start(self, run: Run) -> None:
        self._run = run

    def lab_examine(self, run: Run, step: Step) -> None:
        batch = step.batch
        inputs = batch.inputs if batch is not None else None
        if batch is None or inputs is None or inputs.dim() != 2 or inputs.is_floating_point():
            raise NotChecked("the model is not called with tokens [B T]")
        if batch.targets is None or batch.targets.numel() != inputs.numel():
            raise NotChecked("the targets are not known, or are not one for each token")
        targets, history = batch.targets.view_as(inputs), run.history
        time_first = history.last("causality.time_first") > ALL >= history.last("causality.along_rows")
        count, length = inputs.T.shape if time_first else inputs.shape
        if length < 4:
            raise NotChecked(f"{length} positions are too few")
        along = _shifted(inputs, targets), _shifted(inputs.T, targets.T)
        step.record("causality.along_rows", along[0])
        step.record("causality.time_first", along[1])
        step.record("causality.next_token", along[int(time_first)])
        if not time_first:
            rows = ROWS if step.thorough else FEW
            batch = batch.rows(rows if length != rows else rows - 1)
            assert batch.inputs is not None
            count = len(batch.inputs)
        if count == length:
            raise NotChecked(f"{length} rows of {length} positions: which axis is which cannot be told")
        suspect = history.last("causality.future") > ROUNDING
        counts = (targets.T if time_first else targets)[:count] >= 0  # [R T]
        self._differentiate(run, step, batch, counts, along[int(time_first)], everywhere=suspect)

    def _differentiate(
        self, run: Run, step: Step, batch: Batch, counts: Tensor, asked: Tensor, *, everywhere: bool
    ) -> None:
        rows, length = counts.shape
        places, told = _places(counts, step.index)
        step.record("causality.asked", told.sum())
        asked = torch.where(told.any(), asked, torch.nan)
        with torch.enable_grad(), _Calls(run.model, rows, length, everywhere=everywhere) as calls:
            logits = run.call(batch)
            if not calls.begins:
                raise NotChecked("no module makes a vector [B T C] of each token")
            found = (_shares(logits, begin, places, told, length) for begin in calls.begins)
            shares = next((share for share in found if share is not None), None)
            if shares is None:
                raise NotChecked("the output does not depend on the embedding in a way that can be differentiated")
            step.record("causality.future", torch.where(asked > ALL, shares[0], torch.nan))
            for name, came, went in calls.made:
                local = _shares(went, came, places, told, length)
                if local is not None:
                    step.record("causality.module_future", local[0], name)
                    step.record("causality.module_past", local[1], name)


class _Calls(Hooked):
    """While in the block, notes what goes in and comes out of each module that maps [B T ...] or [B C T] to such.

    What does not require a gradient, as in a model of which most is frozen, is exchanged for a copy that does.
    """

    def __init__(self, model: nn.Module, rows: int, length: int, *, everywhere: bool) -> None:
        super().__init__(model)
        self.shape, self.everywhere = (rows, length), everywhere
        self.begins: list[Tensor] = []  # what to differentiate by: the first, and each such copy
        self.made: list[tuple[str, Tensor, Tensor]] = []

    def _hook(self, name: str) -> Callable[..., Tensor | None]:
        def note(
            _module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object
        ) -> Tensor | None:
            went = output[0] if isinstance(output, tuple) and output else output
            if not torch.is_tensor(went) or not self._fits(went):
                return None
            if not went.requires_grad and went is output:
                fresh: Tensor = went.detach().requires_grad_()
                self.begins.append(fresh)
                return fresh
            if not went.requires_grad:
                return None
            if not self.begins:
                self.begins.append(went)
            came = (v for v in (*args, *kwargs.values()) if torch.is_tensor(v) and self._fits(v) and v.requires_grad)
            if self.everywhere and (first := next(came, None)) is not None:
                self.made.append((name, first, went))
            return None

        return note

    def _fits(self, value: Tensor) -> bool:
        if value.dim() < 3 or not value.is_floating_point():
            return False
        rows, length = self.shape
        return tuple(value.shape[:2]) in (self.shape, self.shape[::-1]) or _positions_last(value, rows, length)


def _places(counts: Tensor, shift: int) -> tuple[Tensor, Tensor]:
    """Return a position in each row [R], neither its first nor its last, and whether it has a target [R].

    Another in each row, and with another shift: of those in the row that have a target, if there are any.
    """
    rows, length = counts.shape
    some = torch.arange(rows, device=counts.device) * length // rows + shift
    counts = counts.clone()
    counts[:, 0] = counts[:, -1] = False
    number = counts.sum(1)
    told = number > 0
    wanted = some % number.clamp_min(1)  # which of them, from 0
    place = (counts & (counts.cumsum(1) == wanted[:, None] + 1)).int().argmax(1)
    return torch.where(told, place, some % (length - 2) + 1), told


def _positions_last(value: Tensor, rows: int, length: int) -> bool:
    """Whether it is [R C T], as convolutions have it."""
    return value.dim() == 3 and len(value) == rows and value.shape[1] != length == value.shape[2]


def _rows_first(value: Tensor, rows: int, length: int) -> Tensor:
    """Return [R T ...] of that, of [T R ...] or of [R C T]."""
    if _positions_last(value, rows, length):
        return value.transpose(1, 2)
    return value if len(value) == rows else value.transpose(0, 1)


def _shares(
    went: Tensor, came: Tensor, places: Tensor, told: Tensor, length: int
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return the largest share of the gradient on later positions over the rows, and the largest on earlier ones.

    And the smallest on the position itself.

    ``went`` at ``places`` [R] is differentiated by ``came``, both [R T ...], [T R ...] or [R C T]. Rows that are not
    ``told`` [R] are left out.
    """
    rows = len(places)
    out = _rows_first(went, rows, length)
    picked = out[torch.arange(rows, device=out.device), places]  # [R ...]
    signs = torch.ones_like(picked)
    signs.view(-1)[::2] = -1.0  # a direction that no symmetry of the model cancels
    signs *= torch.linspace(0.5, 1.5, signs.shape[-1], device=signs.device, dtype=signs.dtype)
    (grad,) = torch.autograd.grad((picked * signs).sum(), came, retain_graph=True, allow_unused=True)
    if grad is None:
        return None
    grad = _rows_first(grad, rows, length)
    size = grad.float().flatten(2).norm(dim=-1)  # [R T]
    later = torch.arange(size.shape[1], device=size.device)[None] - places[:, None]  # [R T]
    total = size.sum(-1).clamp_min(1e-30)  # [R]
    future = (size * (later > 0)).sum(-1) / total
    past = (size * (later < 0)).sum(-1) / total
    itself = (size * (later == 0)).sum(-1) / total
    return future.where(told, 0.0).amax(), past.where(told, 0.0).amax(), itself.where(told, 1.0).amin()


def _shifted(inputs: Tensor, targets: Tensor) -> Tensor:
    """The share of the targets that are the next token of the input, of those that count."""
    same = (targets[:, :-1] == inputs[:, 1:]).float()
    counts = (targets[:, :-1] >= 0).float()
    return (same * counts).sum() / counts.sum().clamp_min(1)


def _is_causal(history: History) -> bool:
    share = history.series("causality.next_token").finite.values
    if not len(share) or not np.max(share) > ALL:
        raise NotChecked("the targets are not the next tokens, so the model need not be causal")
    return True


def _leak(history: History, metric: str, site: str) -> tuple[int, float] | None:
    """Return the step at which a share on later positions was first above rounding, and that share."""
    series = history.series(metric, site).finite
    return series.first(series.values > ROUNDING)


@rule(
    "causality.future",
    title="No output depends on a later input",
    reads=("causality.future", "causality.next_token"),
    basis="experiment",
    phase="forward",
)
def causality_future(history: History) -> Iterator[Symptom]:
    """Where the targets are the next tokens, ``d out_i / d x_j = 0`` for j > i, or the model is shown the answer."""
    causal = _is_causal(history)
    if not np.any(history.series("causality.asked").values):
        raise NotChecked("no position but the first and the last of a row has a target")
    if not len(history.series("causality.future").finite):
        raise NotChecked("the outputs were not finite when it was tried")
    if causal and (found := _leak(history, "causality.future", "")):
        step, share = found
        yield Symptom(
            at="",
            since=step,
            seen=share,
            expected="0",
            text=f"{share:.0%} of what moves an output is in later tokens, at step {step}; "
            "the targets are the next tokens",
        )


@rule(
    "causality.leak",
    title="No module's output depends on a later input",
    reads=("causality.future", "causality.next_token"),
    basis="experiment",
    phase="forward",
)
def causality_leak(history: History) -> Iterator[Symptom]:
    """Each module alone, where the model as a whole leaks; the innermost that leak are named."""
    _is_causal(history)
    leaks = {
        s: f for s in history.sites("causality.module_future") if (f := _leak(history, "causality.module_future", s))
    }
    for site, (step, share) in leaks.items():
        if not any(other.startswith(f"{site}.") for other in leaks):
            text = f"{site} alone lets {share:.0%} of what moves its output come from later positions"
            yield Symptom(at=site, since=step, seen=share, expected="0", text=text)


@rule(
    "causality.blind",
    title="No module that sees later inputs is blind to earlier ones",
    reads=("causality.future", "causality.next_token"),
    basis="experiment",
    phase="forward",
)
def causality_blind(history: History) -> Iterator[Symptom]:
    """A module that mixes positions, and takes nothing from earlier ones: its mask is the wrong way round."""
    for leak in causality_leak.judge(history):
        past = history.series("causality.module_past", leak.at).finite
        at_leak = past.values[past.steps == leak.since]
        if len(at_leak) and at_leak[0] == 0:
            text = f"{leak.at} takes nothing from earlier positions, and all it mixes in from later ones"
            yield Symptom(at=leak.at, since=leak.since, seen=0.0, expected="above 0", text=text)
