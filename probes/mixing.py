"""What rows of a batch, and tokens and padding, see of each other: experiments whose right answer is nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from lab import LookAgain, NotChecked, Probe, Symptom, probe, rule, torch

from .hooked import Hooked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

    from lab import Batch, History, Run, Step

# As for evaluation.random: a device may add in another order. In practice two calls of one shape agree to the bit.
ROUNDING = 1e-4
ROWS, FEW = 3, 2  # and where nothing says what is padding
NOTHING = -1.0  # without padding there is nothing to compare
NOT_TOLD = "no attention in this model was told of padding, or the outputs were not finite"
# What shares tokens out among parts of limited room lets rows depend on each other by design.
ROUTED = ("router", "expert", "moe")


@probe(
    "mixing",
    title="Does a row depend on another, or a token on padding?",
    cost="two forward passes on two rows, or three where something may say what is padding",
    examines=True,
    seldom=True,
)
class Mixing(Probe):
    """Calls the model twice in evaluation mode: with a few rows, and with other tokens where nothing should depend on.

    The first row stays as it is; in the second, the tokens in its padding are exchanged; the last is another row. Where
    nothing may say what is padding, there are two.
    Records ``mixing.rows``, the largest change of an output of the first row over the largest output, and
    ``mixing.padding``, the same at the tokens of the second row, or -1 where the call names no padding.
    ``mixing.batch_first`` tells whether the first axis is known to be the batch: the model says so, or the targets are
    the tokens that follow along the second axis, and only there, or one for each row. When a change is not 0, the
    next experiment looks at each module: ``mixing.module_rows``, ``mixing.module_padding``, 0 where what goes into it
    has changed already.
    """

    def lab_start(self, run: Run) -> None:
        if any(word in name.lower() for name, _ in run.model.named_modules() for word in ROUTED):
            raise NotChecked("a router shares tokens out: rows may depend on each other by design")
        modules = [*run.model.modules()]
        if any(getattr(module, "track_running_stats", True) is False for module in modules):
            raise NotChecked("a norm takes its statistics from the batch in evaluation too: rows depend on each other")
        # A convolution or a recurrence reads padding by design, and what it reads there is always the same.
        reads_all = (torch.nn.RNNBase, torch.nn.Conv1d, torch.nn.Conv2d)
        self._by_attention = not any(isinstance(module, reads_all) for module in modules)
        self._says = any(site.axes[:2] == ["B", "T"] for site in run.sites.match("**"))

    def lab_examine(self, run: Run, step: Step) -> None:
        batch = step.batch
        tokens = batch.inputs if batch is not None else None
        if batch is None or tokens is None or tokens.dim() != 2 or tokens.is_floating_point():
            raise NotChecked("the model is not called with tokens [B T]")
        count, length = tokens.shape
        rows = ROWS if self._by_attention and _marks(batch, tokens) else FEW
        if count < 2 or length < 2 or length == rows:
            raise NotChecked(f"{count} rows of {length} positions: too few, or which axis is which cannot be told")
        if not all(_plain(value, tokens) for value in (*batch.args, *batch.kwargs.values())):
            raise NotChecked("the model is called with something of which the rows cannot be told")
        present = _present(batch, tokens) if self._by_attention else torch.ones_like(tokens, dtype=torch.bool)
        chosen = _chosen(present)[:rows]
        padded = present[chosen][1]  # [T]
        was = _picked(batch, chosen)
        now = _exchanged(was, tokens, padded)
        suspect = any(run.history.last(f"mixing.{kind}") > ROUNDING for kind in ("rows", "padding"))
        changes = self._compare(run, was, now, _Look(rows, length, padded), everywhere=suspect)
        step.record("mixing.batch_first", 1.0 if self._says else _rows_first(batch, tokens))
        for name, change in changes.items():
            step.record("mixing.module_rows" if name else "mixing.rows", change[0], name)
            step.record("mixing.module_padding" if name else "mixing.padding", change[1], name)

    def _compare(self, run: Run, was: Batch, now: Batch, look: _Look, *, everywhere: bool) -> dict[str, Tensor]:
        """Call the model with both; return the changes [2] by module, that of the whole under no name."""
        run.model.eval()
        made = []
        for batch in (was, now):
            with torch.no_grad(), _Calls(run.model if everywhere else None, look) as calls:
                calls.made[""] = (None, run.call(batch))
            made.append(calls.made)
        if not look.fits_whole(made[0][""][1]):
            raise NotChecked("the output is not one vector for each token [B T V], or for each row [B V]")
        return {name: look.made_here(call, made[1][name]) for name, call in made[0].items() if name in made[1]}


class _Look(NamedTuple):
    """Which outputs [R T ...] are compared: all of the first row, and of the second where `present` [T]."""

    rows: int
    length: int
    present: Tensor

    def fits(self, value: object) -> bool:
        return (
            torch.is_tensor(value)
            and value.dim() >= 3
            and value.is_floating_point()
            and tuple(value.shape[:2]) in ((self.rows, self.length), (self.length, self.rows))
        )

    def fits_whole(self, value: Tensor) -> bool:
        return self.fits(value) or (value.dim() == 2 and len(value) == self.rows)

    def changes(self, was: Tensor, now: Tensor) -> Tensor:  # -> [2]
        """Of the first row, and of the tokens of the second: the largest change over the largest value."""
        if was.dim() == 2:
            was, now = was[:, None], now[:, None]
        if was.shape[0] != self.rows:
            was, now = was.transpose(0, 1), now.transpose(0, 1)
        moved = (now.float() - was.float()).abs().flatten(2).amax(-1)  # [R T]
        scale = was[:2].float().abs().amax().clamp_min(1e-30)
        padding = (moved[1] * self.present).amax() / scale
        return torch.stack([moved[0].amax() / scale, padding.masked_fill(self.present.all(), NOTHING)])

    def made_here(self, was: tuple[Tensor | None, Tensor], now: tuple[Tensor | None, Tensor]) -> Tensor:  # -> [2]
        """The changes of what comes out of a module; 0 where what goes in has changed as well."""
        change = self.changes(was[1], now[1])
        if was[0] is None or now[0] is None:
            return change
        return change.masked_fill(self.changes(was[0], now[0]) > ROUNDING, 0.0)


class _Calls(Hooked):
    """While in the block, notes what goes in and comes out of each module that maps [R T ...] to [R T ...]."""

    def __init__(self, model: nn.Module | None, look: _Look) -> None:
        super().__init__(model)
        self.look = look
        self.made: dict[str, tuple[Tensor | None, Tensor]] = {}

    def _hook(self, name: str) -> Callable[..., None]:
        def note(_module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
            went = output[0] if isinstance(output, tuple) and output else output
            came = next((value for value in (*args, *kwargs.values()) if self.look.fits(value)), None)
            if came is not None and self.look.fits(went):
                self.made.setdefault(name, (came, went))  # type: ignore[arg-type]

        return note


def _plain(value: Any, tokens: Tensor) -> bool:
    """Whether it is known what a few rows of an argument are: it has the shape of the tokens, or serves all rows."""
    if not torch.is_tensor(value):
        return value is None or isinstance(value, (bool, int, float, str))
    count, length = tokens.shape
    if value is tokens or value.dim() == 0:
        return True
    return count != length and (value.shape == tokens.shape or {*value.shape} <= {1, length})


def _rows_first(batch: Batch, tokens: Tensor) -> Tensor | float:
    """1 if the targets are the tokens that follow along the second axis and not along the first, else 0; [].

    Or if there is one for each row, of another number than positions.
    """
    targets = batch.targets
    if targets is not None and targets.shape == tokens.shape[:1] != tokens.shape[1:]:
        return 1.0
    if targets is None or targets.shape != tokens.shape:
        return 0.0
    counts = (targets >= 0).float()

    def share(axis: int) -> Tensor:
        length = tokens.shape[axis] - 1
        asked = counts.narrow(axis, 0, length)
        same = targets.narrow(axis, 0, length) == tokens.narrow(axis, 1, length)
        return (same * asked).sum() / asked.sum().clamp_min(1)

    return ((share(1) > 0.99) & (share(0) < 0.99)).float()


def _marks(batch: Batch, tokens: Tensor) -> list[Tensor]:
    """What may say which positions are padding: what else there is of yes and no for each token [B T]."""
    targets = batch.targets
    if targets is None or targets.shape != tokens.shape:
        return []
    return [
        value
        for value in (*batch.args, *batch.kwargs.values())
        if torch.is_tensor(value) and value is not tokens and value is not targets and value.shape == tokens.shape
        if value.dtype is torch.bool or not value.is_floating_point()
    ]


def _present(batch: Batch, tokens: Tensor) -> Tensor:
    """Which positions are tokens [B T], where the call and the targets say so without doubt; all of them otherwise.

    A mask beside the tokens says so, either way round, if it cuts each row into tokens and then padding, and no target
    in the padding counts. Padding on the left moves positions, and is not taken for it.
    """
    everywhere = torch.ones_like(tokens, dtype=torch.bool)
    targets = batch.targets
    if targets is None:
        return everywhere
    for value in _marks(batch, tokens):
        binary = ((value == 0) | (value == 1)).all()
        for present in (value == 1, value == 0):
            ordered = (present[:, :-1] >= present[:, 1:]).all() & present[:, 0].all()
            ignored = ((targets < 0) | present).all()
            everywhere = everywhere & (present | ~(binary & ordered & ignored))
    return everywhere


def _chosen(present: Tensor) -> Tensor:
    """Three rows: the one with most padding stands second; their indices [3]."""
    order = present.sum(-1).argsort()  # [B]
    places = torch.tensor([1, 0, len(order) - 1], device=order.device)
    return order[places]


def _picked(batch: Batch, chosen: Tensor) -> Batch:
    """These rows of every tensor that has as many as the tokens."""
    count = len(batch.inputs) if batch.inputs is not None else 0

    def pick(value: Any) -> Any:
        return value[chosen] if torch.is_tensor(value) and value.dim() and len(value) == count else value

    kwargs = {name: pick(value) for name, value in batch.kwargs.items()}
    return replace(batch, args=tuple(map(pick, batch.args)), kwargs=kwargs, targets=None)


def _exchanged(batch: Batch, tokens: Tensor, present: Tensor) -> Batch:
    """The second row with other tokens in its padding, and another last row."""
    was = batch.inputs
    assert was is not None
    now = was.clone()
    # Tokens that occur, but for each position another: the model knows them.
    row = torch.where(tokens[:1] == was[1:2], tokens.amax(), tokens[:1])[0]  # [T]
    now[1] = torch.where(present, was[1], torch.where(row == was[1], tokens.amin(), row))
    now[-1] = torch.where(was[-1] == tokens.amax(), tokens.amin(), tokens.amax())
    args = tuple(now if value is was else value for value in batch.args)
    kwargs = {name: now if value is was else value for name, value in batch.kwargs.items()}
    return replace(batch, args=args, kwargs=kwargs, targets=None)


def _ready(history: History) -> None:
    """Say why it cannot be judged, if it cannot."""
    if not (history.series("mixing.batch_first").values > 0).all():
        raise NotChecked("which axis is the batch is not known: the targets are not the next tokens along the second")
    if (history.series("determinism.difference").values > ROUNDING).any():
        raise NotChecked("evaluation is random, so two calls may differ")


@rule(
    "mixing.rows",
    title="No row of a batch depends on another",
    reads=("mixing.rows",),
    basis="experiment",
    phase="forward",
)
def mixing_rows(history: History) -> Iterator[Symptom]:
    """In evaluation mode a row's output is a function of that row; rounding is allowed for."""
    _ready(history)
    series = history.series("mixing.rows").finite
    if not len(series):
        raise NotChecked("the outputs were not finite when it was tried")
    if found := series.first(series.values > ROUNDING):
        step, seen = found
        text = f"the output of a row changes by {seen:.2g} of the largest when another row is exchanged, at step {step}"
        yield Symptom(at="", since=step, seen=seen, expected="0", text=text)


def _reached(history: History) -> dict[str, tuple[int, float]] | None:
    """The innermost modules whose output at tokens changes with how much padding is behind them, and theirs alone.

    None where it was not asked. What changes after them all, as a mean over all positions does, is no attention.
    """
    series = history.series("shorter.change").finite
    if not (series.values != NOTHING).any() or (history.series("determinism.difference").values > ROUNDING).any():
        return None
    if (series.values > ROUNDING).any() and not history.sites("shorter.module"):
        raise LookAgain("an output changes with the padding behind it; where it comes in shows at the next look")
    return _changed(history, "shorter.module")


@rule(
    "mixing.padding",
    title="No output at a token depends on padding",
    reads=(),
    basis="experiment",
    phase="forward",
)
def mixing_padding(history: History) -> Iterator[Symptom]:
    """Where the call says which positions are padding, what stands there changes nothing elsewhere.

    And where the table of tokens says which token is padding, it changes nothing how much of it stands behind a row.
    """
    reached = _reached(history)
    if reached:
        step, seen = min(reached.values())
        text = f"an output at a token changes by {seen:.2g} of the largest with how much padding is behind the row, "
        yield Symptom(at="", since=step, seen=seen, expected="0", text=f"{text}at step {step}")
        return
    if not history.sites("mixing.padding"):
        if reached is None:
            raise NotChecked(history.reasons.get("mixing", NOT_TOLD))
        return
    _ready(history)
    series = history.series("mixing.padding").finite
    if not (series.values != NOTHING).any():
        if reached is None:
            raise NotChecked(NOT_TOLD)
        return
    if found := series.first(series.values > ROUNDING):
        step, seen = found
        text = f"an output at a token changes by {seen:.2g} of the largest with what stands in padding, at step {step}"
        yield Symptom(at="", since=step, seen=seen, expected="0", text=text)


def _innermost(history: History, kind: str) -> Iterator[Symptom]:
    """Name the modules whose output changes while what goes in does not; of nested ones, the innermost."""
    _ready(history)
    yield from _named(_changed(history, f"mixing.module_{kind}"))


def _changed(history: History, metric: str) -> dict[str, tuple[int, float]]:
    """The innermost modules that changed, since when, and by how much."""
    each = ((site, series.finite) for site, series in history.each(metric))
    changed = {site: found for site, series in each if (found := series.first(series.values > ROUNDING))}
    return {site: found for site, found in changed.items() if not any(o.startswith(f"{site}.") for o in changed)}


def _named(changed: dict[str, tuple[int, float]]) -> Iterator[Symptom]:
    for site, (step, seen) in changed.items():
        text = f"{site} is where it comes in: its output changes by {seen:.2g} of the largest, its input does not"
        yield Symptom(at=site, since=step, seen=seen, expected="0", text=text)


@rule(
    "mixing.rows_module",
    title="No module mixes rows of the batch",
    reads=("mixing.rows",),
    basis="experiment",
    phase="forward",
)
def mixing_rows_module(history: History) -> Iterator[Symptom]:
    """Which module, where the model as a whole mixes rows."""
    yield from _innermost(history, "rows")


@rule(
    "mixing.padding_module",
    title="No module mixes padding into tokens",
    reads=(),
    basis="experiment",
    phase="forward",
)
def mixing_padding_module(history: History) -> Iterator[Symptom]:
    """Which module, where the model as a whole lets padding reach tokens."""
    reached = _reached(history)
    if reached:
        yield from _named(reached)
        return
    if not (history.series("mixing.padding").finite.values != NOTHING).any():
        if reached is None:
            raise NotChecked(NOT_TOLD)
        return
    yield from _innermost(history, "padding")
