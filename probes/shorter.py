"""Is a row answered alike when its padding is shorter? Asked where a table of tokens says which token is padding."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lab import LabError, NotChecked, Probe, probe, torch

from .hooked import Hooked
from .mixing import NOTHING, ROUNDING, ROUTED

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from lab import Batch, Run, Step

    Made = dict[str, tuple[Tensor | None, Tensor]]  # what went into a module and what came out; the model has no name

LEAST = 2  # tokens of padding at the end of the row that is asked: one may be a token like any other


@probe(
    "shorter",
    title="Is a row answered alike when its padding is shorter?",
    cost="four forward passes on one row, where a table of tokens names its padding",
    examines=True,
    seldom=True,
)
class Shorter(Probe):
    """Calls the model in evaluation mode with the row that has most padding, and without a part of that.

    It leaves out the last column, the last quarter and the last half; the most that is all padding counts. What is
    padding a table of tokens says (``padding_idx``), and the batch: that token stands nowhere but at the ends of its
    rows, which are not equally long. Records ``shorter.change``, the largest change of an output at a token over the
    largest output, or -1 where that is not so; and when there was one, in the next experiment for each module
    ``shorter.module``, 0 where what goes into it has changed at a token already.
    """

    def lab_start(self, run: Run) -> None:
        modules = [*run.model.modules()]
        tables = [module.padding_idx for module in modules if isinstance(module, torch.nn.Embedding)]
        named = {token for token in tables if token is not None}
        if len(named) != 1:
            raise NotChecked("no table of tokens says which of them is padding")
        if any(isinstance(module, (torch.nn.RNNBase, torch.nn.Conv1d, torch.nn.Conv2d)) for module in modules):
            raise NotChecked("a convolution or a recurrence reads padding by design")
        if any(word in name.lower() for name, _ in run.model.named_modules() for word in ROUTED):
            raise NotChecked("a router shares tokens out: a row may depend on its padding by design")
        self._padding = named.pop()

    def lab_examine(self, run: Run, step: Step) -> None:
        batch = step.batch
        tokens = batch.inputs if batch is not None else None
        if batch is None or tokens is None or tokens.dim() != 2 or tokens.is_floating_point():
            raise NotChecked("the model is not called with tokens [B T]")
        count, length = tokens.shape
        if count < 2 or length <= LEAST or count == length:
            raise NotChecked(f"{count} rows of {length} positions: too few, or which axis is which cannot be told")
        padding = tokens == self._padding  # [B T]
        ends = padding.flip(1).cumprod(1).flip(1).bool()  # what stands behind all other tokens
        sizes = ends.sum(1)  # [B]
        most, row = sizes.amax(), sizes.argmax().reshape(1)
        known = (padding == ends).all() & (most >= LEAST) & (most < length) & (sizes.amin() < most)
        run.model.eval()
        whole = _called(run, _cut(batch, tokens, row, 0), length)
        changes: dict[str, Tensor] = {}
        for less in sorted({1, length // 4, length // 2}):
            made = _called(run, _cut(batch, tokens, row, less), length - less)
            there = ~ends[row][0, : length - less]  # [T-less]
            for name in whole.keys() & made.keys():
                change = _changed(whole[name], made[name], there)
                changes[name] = torch.where(most > less, change, changes.get(name, change))
        for name, change in changes.items():
            step.record("shorter.module" if name else "shorter.change", torch.where(known, change, NOTHING), name)


def _called(run: Run, batch: Batch, length: int) -> Made:
    """Call the model; note each module as well, where something was found."""
    everywhere = run.history.last("shorter.change") > ROUNDING
    with torch.no_grad(), _Calls(run.model, length, everywhere=everywhere) as calls:
        try:
            calls.made[""] = None, run.call(batch)
        except LabError:
            raise
        except Exception as error:  # noqa: BLE001 - a model of one length only may raise anything
            raise NotChecked(f"the model cannot be called with a shorter row ({type(error).__name__})") from None
    return calls.made


def _cut(batch: Batch, tokens: Tensor, row: Tensor, less: int) -> Batch:
    """One row of all that has as many as the tokens, and so many columns less of what has as many columns, too."""
    count, length = tokens.shape

    def cut(value: Any) -> Any:
        if not torch.is_tensor(value) or value.dim() == 0:
            return value
        if value.dim() >= 2 and value.shape[1] == length and len(value) in (1, count):
            value = value[:, : length - less]
        return value[row] if len(value) == count else value

    kwargs = {name: cut(value) for name, value in batch.kwargs.items()}
    return replace(batch, args=tuple(map(cut, batch.args)), kwargs=kwargs, targets=None)


def _changed(was: tuple[Tensor | None, Tensor], now: tuple[Tensor | None, Tensor], there: Tensor) -> Tensor:  # -> []
    """By how much what comes out changed; 0 where what goes in has changed already."""
    change = _change(was[1], now[1], there)
    if was[0] is None or now[0] is None:
        return change
    return change.masked_fill(_change(was[0], now[0], there) > ROUNDING, 0.0)


def _change(was: Tensor, now: Tensor, there: Tensor) -> Tensor:  # -> []
    """The largest change at a token over the largest value there, of [1 T ...]; of another shape, anywhere."""
    if was.dim() >= 2 and was.shape[1] > now.shape[1] == len(there):
        at = there.view(1, -1, *[1] * (was.dim() - 2))
        was, now = was[:, : len(there)] * at, now * at
    if was.shape != now.shape:
        return was.new_full((), torch.nan)
    return (now.float() - was.float()).abs().amax() / was.float().abs().amax().clamp_min(1e-30)


class _Calls(Hooked):
    """While in the block, notes what goes in and comes out of each module that maps [1 T ...] to [1 T ...]."""

    def __init__(self, model: nn.Module, length: int, *, everywhere: bool) -> None:
        super().__init__(model if everywhere else None)
        self.length = length
        self.made: Made = {}

    def _hook(self, name: str) -> Callable[..., None]:
        def note(_module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
            went = output[0] if isinstance(output, tuple) and output else output
            came = next((value for value in (*args, *kwargs.values()) if self._fits(value)), None)
            if came is not None and self._fits(went):
                self.made.setdefault(name, (came, went))  # type: ignore[arg-type]

        return note

    def _fits(self, value: object) -> bool:
        shape = (1, self.length)
        return torch.is_tensor(value) and value.dim() >= 3 and value.is_floating_point() and value.shape[:2] == shape
