"""Does it matter where in a batch a row stands?"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lab import Cause, LookAgain, NotChecked, Probe, Symptom, probe, rule, torch

from .hooked import Hooked
from .mixing import ROUNDING, ROUTED, _rows_first

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

    from lab import Batch, History, Run, Step

ROWS, FEW = 3, 2  # the first and the last are kept, and the one between is exchanged; until two equal ones differ
UNKNOWN = "which axis is the batch is not known, or there are too few rows"
COARSE = 0.05  # between what bfloat16 rounds, 2^-8 a number, and the smallest mistake that is one of kind

ALONG_BATCH = Cause(
    id="positions.along_batch",
    title="Positions are counted along the batch",
    must=("places.row",),
    may=("places.module", "positions.same"),
    locate=("places.module",),
    place="model",
    repair="Index the table by the axis of time: x + positions[:, : x.size(1)] for x [B T C]. "
    "A table [T 1 C], indexed by x.size(0), is written for x [T B C], and gives each row one vector, and the rows "
    "of a batch different ones.",
    refute="Rows that hold the same have the same output, wherever in the batch they stand.",
    look="The shape of the table, and the size that cuts it: which axis of the input it is of.",
    source="PyTorch tutorials: Language Modeling with nn.Transformer, PositionalEncoding (time comes first there)",
)


@probe(
    "places",
    title="Does it matter where in a batch a row stands?",
    cost="a forward pass on two rows",
    examines=True,
    seldom=True,
)
class Places(Probe):
    """Calls the model in evaluation mode with one row twice.

    Records ``places.twice``, how far the outputs of the equal rows are apart, over the largest output, and
    ``places.rounding``, what that may be by rounding. When it is more, the next experiment calls the model with one row
    three times, and again with another one between, and records ``places.apart``, the smallest difference of two of the
    equal rows: 0 where not all are different; ``places.others``, how far the first or the last moves when the row
    between is another; and ``places.module_apart`` for each module, 0 where what it is given differs already.
    """

    def lab_start(self, run: Run) -> None:
        if any(word in name.lower() for name, _ in run.model.named_modules() for word in ROUTED):
            raise NotChecked("a router shares tokens out: rows may depend on each other by design")
        self._says = any(site.axes[:2] == ["B", "T"] for site in run.sites.match("**"))

    def lab_examine(self, run: Run, step: Step) -> None:
        batch = step.batch
        if batch is None or batch.inputs is None or not batch.inputs.dim():
            raise NotChecked("the batch is not known")
        known = 1.0 if self._says else _rows_known(batch)
        if len(batch.inputs) < ROWS or not _rows_alike(batch) or known is None:
            raise NotChecked(UNKNOWN)
        history = run.history
        suspect = history.last("places.twice") > history.last("places.rounding")
        rows = ROWS if suspect else FEW
        run.model.eval()
        with torch.no_grad(), _Calls(run.model if suspect else None, rows) as calls:
            same = _output(run, _picked(batch, [0] * rows))
        if not same.dim() or len(same) != rows:
            raise NotChecked("the output is not one for each row")
        coarse = run.autocast is not None or torch.finfo(same.dtype).bits < 32
        coarse |= any(torch.finfo(p.dtype).bits < 32 for p in run.model.parameters() if p.is_floating_point())
        step.record("places.batch_first", known)
        step.record("places.rounding", COARSE if coarse else ROUNDING)
        step.record("places.apart" if suspect else "places.twice", _apart(same))
        if suspect:
            with torch.no_grad():
                between = _output(run, _picked(batch, [0, 1, 0]))
            moved = (same - between)[[0, -1]].float().abs().amax()
            step.record("places.others", moved / same.float().abs().amax().clamp_min(1e-30))
            for name, value in calls.apart.items():
                step.record("places.module_apart", value, name)


def _output(run: Run, batch: Batch) -> Tensor:
    try:
        return run.call(batch)
    except TypeError as error:
        raise NotChecked(str(error)) from None


def _rows_alike(batch: Batch) -> bool:
    """Whether it is known what a few rows of all that the model is given are."""
    inputs = batch.inputs
    count = len(inputs) if inputs is not None else 0
    for value in (*batch.args, *batch.kwargs.values()):
        if torch.is_tensor(value):
            if value.layout != torch.strided:
                return False
            if value is not inputs and value.dim() and count in value.shape[len(value) == count :]:
                return False
        elif not (value is None or isinstance(value, (bool, int, float, str))):
            return False
    return True


def _rows_known(batch: Batch) -> float | Tensor | None:
    """1 where the first axis of the inputs is the batch, as the targets tell; else 0 or None."""
    inputs, targets = batch.inputs, batch.targets
    if inputs is None or targets is None:
        return None
    if inputs.dim() == 2 and not inputs.is_floating_point():  # tokens [B T]
        return _rows_first(batch, inputs)
    return 1.0 if inputs.dim() > 2 and targets.shape == inputs.shape[:1] else None  # one class for each row


def _picked(batch: Batch, chosen: list[int]) -> Batch:
    """These rows of every tensor that has as many as the inputs."""
    assert batch.inputs is not None
    count = len(batch.inputs)

    def pick(value: Any) -> Any:
        return value[chosen] if torch.is_tensor(value) and value.dim() and len(value) == count else value

    kwargs = {name: pick(value) for name, value in batch.kwargs.items()}
    return replace(batch, args=tuple(map(pick, batch.args)), kwargs=kwargs, targets=None)


def _apart(value: Tensor) -> Tensor:  # [K ...] -> []
    """The smallest largest difference of two rows, over the largest value."""
    flat = value.float().flatten(1)  # [K N]
    apart = torch.stack([(flat[:i] - flat[i]).abs().amax(-1).amin() for i in range(1, len(flat))]).amin()
    return apart / flat.abs().amax().clamp_min(1e-30)


class _Calls(Hooked):
    """While in the block, notes how far rows are apart that come out of a module which is given equal ones."""

    def __init__(self, model: nn.Module | None, rows: int) -> None:
        super().__init__(model)
        self.rows = rows
        self.apart: dict[str, Tensor] = {}

    def _hook(self, name: str) -> Callable[..., None]:
        def note(_module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
            went = output[0] if isinstance(output, tuple) and output else output
            came = [(value == value[:1]).all() for value in (*args, *kwargs.values()) if self._fits(value)]  # type: ignore[index]
            if came and self._fits(went):
                apart = _apart(went) * torch.stack(came).all()  # type: ignore[arg-type]
                self.apart[name] = torch.maximum(self.apart.get(name, apart), apart)

        return note

    def _fits(self, value: object) -> bool:
        return torch.is_tensor(value) and value.dim() > 1 and len(value) == self.rows and value.layout == torch.strided


def _out_of_place(history: History, metric: str) -> Iterator[tuple[str, int, float]]:
    """Yield where equal rows are all apart, in an experiment in which none depends on the others."""
    twice = history.series("places.twice").finite
    if not len(twice):
        raise NotChecked("the outputs were not finite when it was tried")
    if not (history.series("places.batch_first").values > 0).any():
        raise NotChecked(UNKNOWN)
    if (history.series("determinism.difference").values > ROUNDING).any():
        raise NotChecked("evaluation is random, so two calls may differ")
    limit = history.last("places.rounding")
    since = twice.first(twice.values > limit)
    if since is None:
        return
    apart, others = (history.series(f"places.{name}") for name in ("apart", "others"))
    if not len(apart):
        raise LookAgain("equal rows are answered differently; the next look tells whether by their place")
    if not len(apart.finite):
        raise NotChecked("equal rows were answered differently, and then the outputs were not finite")
    told = set(apart.steps[apart.values > limit]) & set(others.steps[others.values <= limit])
    for site, series in history.each(metric):
        for step, seen in zip(series.steps, series.values, strict=True):
            if step in told and seen > limit:
                yield site, since[0], float(seen)
                break


@rule(
    "places.row",
    title="A row's output is the same wherever in the batch it stands",
    reads=("places.twice",),
    basis="experiment",
    phase="forward",
)
def places_row(history: History) -> Iterator[Symptom]:
    """Equal rows that are all answered differently, and alike whatever the others hold, are told by their place."""
    for _, step, seen in _out_of_place(history, "places.apart"):
        text = f"the same row is answered differently at each place in the batch, by {seen:.2g} of the largest output"
        yield Symptom(at="", since=step, seen=seen, expected="0", text=f"{text} at least, at step {step}")


@rule(
    "places.module",
    title="No module tells equal rows apart by their place in the batch",
    reads=("places.twice",),
    basis="experiment",
    phase="forward",
)
def places_module(history: History) -> Iterator[Symptom]:
    """Which module, where the model as a whole does; of nested ones, the innermost."""
    found = {site: (step, seen) for site, step, seen in _out_of_place(history, "places.module_apart")}
    for site, (step, seen) in found.items():
        if not any(other.startswith(f"{site}.") for other in found):
            text = f"{site} is where it comes in: what it is given is the same for all rows, what it gives is not"
            yield Symptom(at=site, since=step, seen=seen, expected="0", text=text)
