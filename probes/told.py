"""Does a decoder that is told what it should have said see more than that? Causality, by its second argument."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lab import NotChecked, Probe, Symptom, probe, rule, torch

from .causality import ALL, ROUNDING, ROWS, _Calls, _shares, _shifted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

    from lab import Batch, History, Run, Step

BESIDE = {"labels", "targets"}  # names of what the loss is told, and no decoder
NOBODY = "no decoder in this model is told the targets before: apart from its inputs, it need not be causal"


@probe(
    "told",
    title="Does an output depend on later tokens of those that a decoder is told?",
    cost="as causality, where a model is called with such tokens",
    examines=True,
    seldom=True,
)
class Told(Probe):
    """Looks for tokens beside the inputs that are the targets shifted right by one, and differentiates by them.

    Records, for each argument of tokens by its place, ``told.shifted``, the share of its tokens that are the target
    before, and ``told.same``, the share of the targets that are the token at their own place. Once it is known that
    all are one of these, at the next experiment, it records the share of the gradient at later positions
    (``told.future``), at the position itself (``told.itself``) and at earlier ones (``told.past``); and when the first
    is not 0, the same for each module that comes after: ``told.module_future``. And ``told.asked``: how many targets
    count.
    """

    def lab_examine(self, run: Run, step: Step) -> None:
        batch = step.batch
        targets = batch.targets if batch is not None else None
        found = {} if batch is None or targets is None else _tokens(batch, targets)
        if batch is None or targets is None or not found:
            raise NotChecked(NOBODY)
        rows, length = next(iter(found.values())).shape
        if length < 4:
            raise NotChecked(f"{length} positions are too few")
        targets = targets.view(rows, length)
        counts = targets >= 0
        step.record("told.asked", counts.sum())
        for place, tokens in found.items():
            step.record("told.shifted", _shifted(tokens, targets), place)
            step.record("told.same", ((tokens == targets) & counts).sum() / counts.sum().clamp_min(1), place)
        known = [place for place in found if _known(run.history, place)]
        count = min(rows, ROWS if length != ROWS else ROWS - 1)
        if known and count != length:
            told = found[known[0]]
            suspect = run.history.last("told.future") > ROUNDING
            self._differentiate(run, step, _cut(batch, told, count), told[:count], everywhere=suspect)

    def _differentiate(self, run: Run, step: Step, batch: Batch, told: Tensor, *, everywhere: bool) -> None:
        rows, length = told.shape
        # Another position in each row, and others in the next experiment.
        places = (torch.arange(rows, device=told.device) * length // rows + step.index) % (length - 2) + 1  # [R]
        with torch.enable_grad(), _After(run.model, told, everywhere=everywhere) as calls:
            logits = run.call(batch)
            all_told = torch.ones_like(places, dtype=torch.bool)
            found = (_shares(logits, begin, places, all_told, length) for begin in calls.begins)
            share = next((share for share in found if share is not None), None)
            if share is None:
                raise NotChecked("no module is seen to make a vector [B T C] of each token that a decoder is told")
            step.record("told.future", share[0])
            step.record("told.past", share[1])
            step.record("told.itself", share[2])
            for name, came, went in calls.made:
                heard = torch.autograd.grad(came.sum(), calls.begins, retain_graph=True, allow_unused=True)
                local = (
                    _shares(went, came, places, all_told, length) if any(part is not None for part in heard) else None
                )
                if local is not None:
                    step.record("told.module_future", local[0], name)


class _After(_Calls):
    """Notes what passes from the module on that is given the tokens: an encoder before it may see everything."""

    def __init__(self, model: nn.Module, told: Tensor, *, everywhere: bool) -> None:
        super().__init__(model, *told.shape, everywhere=everywhere)
        self.told = told

    def _hook(self, name: str) -> Callable[..., Tensor | None]:
        note = super()._hook(name)

        def later(
            module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object
        ) -> Tensor | None:
            given = any(_is(value, self.told) for value in (*args, *kwargs.values()))
            return note(module, args, kwargs, output) if self.begins or given else None

        return later


def _is(value: object, tokens: Tensor) -> bool:
    """Whether these are the tokens, or a view of all of them."""
    return torch.is_tensor(value) and value.shape == tokens.shape and value.data_ptr() == tokens.data_ptr()


def _tokens(batch: Batch, targets: Tensor) -> dict[str, Tensor]:
    """The arguments of integers [B T] beside the inputs, by their place in the call; the targets may be flat."""
    whole = (torch.int32, torch.int64)
    named = [*(("", value) for value in batch.args), *batch.kwargs.items()]
    found = {
        str(place): value
        for place, (name, value) in enumerate(named)
        if torch.is_tensor(value) and value.dtype in whole and value.dim() == 2 and name not in BESIDE
    }
    found = {place: value for place, value in found.items() if value is not batch.inputs}
    if targets.dim() == 2:
        return {place: value for place, value in found.items() if value.shape == targets.shape}
    fits = {place: value for place, value in found.items() if value.numel() == targets.numel()}
    shapes = {value.shape for value in fits.values()}
    return fits if targets.dim() == 1 and len(shapes) == 1 else {}


def _known(history: History, place: str) -> bool:
    """Whether an argument holds the targets, each at the next place or at its own."""
    return history.last("told.shifted", place) > ALL or history.last("told.same", place) == 1


def _cut(batch: Batch, told: Tensor, count: int) -> Batch:
    """The first rows of each argument that has as many as the tokens."""

    def cut(value: Any) -> Any:
        return value[:count] if torch.is_tensor(value) and value.dim() and len(value) == len(told) else value

    kwargs = {name: cut(value) for name, value in batch.kwargs.items()}
    return replace(batch, args=tuple(map(cut, batch.args)), kwargs=kwargs, targets=None)


# ---------------------------------------------------------------- rules


def _leak(history: History, metric: str, site: str) -> tuple[int, float] | None:
    """Return since when, and with what share, a decoder that is told the targets sees later ones."""
    if not any((series.values > ALL).any() for _, series in history.each("told.shifted")):
        raise NotChecked(NOBODY)
    if not len(history.series("told.future").finite):
        raise NotChecked("the outputs were not finite when it was tried, or it was not yet")
    series = history.series(metric, site).finite
    return series.first(series.values > ROUNDING)


@rule(
    "told.future",
    title="No output depends on a later token of those that a decoder is told",
    reads=("told.shifted",),
    basis="experiment",
    phase="forward",
)
def told_future(history: History) -> Iterator[Symptom]:
    """A decoder is told the targets before; one that sees the next of these tokens is shown the answer."""
    if found := _leak(history, "told.future", ""):
        step, share = found
        text = f"{share:.0%} of what a decoder's output hears of the targets, it hears of later ones, at step {step}"
        yield Symptom(at="", since=step, seen=share, expected="0", text=text)


@rule(
    "told.leak",
    title="No module's output depends on later tokens of those that a decoder is told",
    reads=("told.shifted",),
    basis="experiment",
    phase="forward",
)
def told_leak(history: History) -> Iterator[Symptom]:
    """Each module alone, where the decoder as a whole leaks; the innermost that leak are named."""
    sites = history.sites("told.module_future")
    leaks = {site: found for site in sites or [""] if (found := _leak(history, "told.module_future", site))}
    for site, (step, share) in leaks.items():
        if not any(other.startswith(f"{site}.") for other in leaks):
            text = f"{site} alone lets {share:.0%} of what moves its output come from later positions"
            yield Symptom(at=site, since=step, seen=share, expected="0", text=text)
