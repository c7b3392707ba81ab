"""Are the targets the tokens that follow? They are compared with the inputs at each offset, and row by row."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lab import LookAgain, NotChecked, Probe, Symptom, probe, rule, torch
from lab import numpy as np

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from numpy.typing import NDArray
    from torch import Tensor

    from lab import Batch, History, Run, Series, Step

OFFSETS = (0, 1, 2)
# In exact arithmetic it is 0, and masked weights are exact zeros: only rounding is allowed for, as for causality.
ROUNDING = 1e-6
# What a device does that adds in another order, as for evaluation.random: a change above it is one.
NOISE = 1e-4
# The loss is computed again in float32: five digits agree when it is the same.
SAME = 1e-4
SHORTEST = 4  # positions
STEPS = 3  # measured steps that have to agree
ASKED = 64  # targets in them: that so many are equal by chance does not happen
NOTHING = -1.0  # without padding there is nothing to compare
ROWS, LEAST = 8, 8  # rows that are looked for among the others, and how many targets each needs at least
BESIDE = {"labels", "targets", "attention_mask", "position_ids", "token_type_ids"}  # names of what is no sequence


@probe(
    "targets",
    title="Are the targets the tokens that follow the inputs?",
    every=0,
    cost="comparisons of the batch, on measured steps; two forward passes at step 0, later only on suspicion",
    examines=True,
)
class Targets(Probe):
    """Compares targets with inputs, where one sequence of tokens [B T] goes in and one target belongs to each.

    Records ``targets.counted``, the share of targets that are not ignored; ``targets.sole``, whether nothing but these
    is learned; ``targets.padding``, the share of positions in the padding whose target counts, or -1 where the call
    names no padding; ``targets.share``, the share of targets that are the input at the same place (``0``), at the next
    (``1``) and at the one after (``2``); ``targets.asked``, how many count; ``targets.another_row``, the share of rows
    whose targets are the next tokens of another row, where each of the first eight is found in one row alone and no two
    in the same, else 0; and ``targets.sees``: how much the outputs ``before`` a position, ``at`` it and ``after`` it
    change with the token there, relative to the largest output.
    """

    def lab_start(self) -> None:
        self._whole: Batch | None = None

    def lab_batch(self, step: Step) -> Generator[None, Batch, Batch]:
        batch = yield
        if step.mode == "train":
            self._whole = batch  # it may pass the model in parts
        return batch

    def lab_before_update(self, run: Run, step: Step) -> None:
        batch, self._whole = self._whole or step.batch, None
        inputs, targets = (batch.inputs, batch.targets) if batch is not None else (None, None)
        if batch is None or targets is None or not _whole(targets):
            return
        counts = targets >= 0
        step.record("targets.counted", counts.double().mean())
        step.record("targets.sole", 1.0 if run.config is not None else _sole(step, targets))
        if inputs is None or why_not(batch) or not self.due(step):
            return
        targets, counts = targets.view_as(inputs), counts.view_as(inputs)
        step.record("targets.asked", counts.sum().double())
        step.record("targets.padding", _in_padding(batch, inputs, counts))
        step.record_all("targets.share", [str(k) for k in OFFSETS], _shares(inputs, targets, counts))
        if len(inputs) > 1 and inputs.shape[1] > LEAST:
            step.record("targets.another_row", _another_row(inputs, targets, counts))

    def lab_examine(self, run: Run, step: Step) -> None:
        batch = step.batch
        if batch is None or batch.targets is None or not _whole(batch.targets):
            raise NotChecked("the targets are not known, or are no classes")
        history = run.history
        suspect = any(history.last("targets.share", str(k)) == 1 for k in OFFSETS if k != 1)
        if not why_not(batch) and (suspect or not history.sites("targets.sees")):
            step.record_all("targets.sees", ("before", "at", "after"), _sees(run, batch))


def why_not(batch: Batch) -> str:
    """Say why the targets cannot be compared with the inputs; empty where they can."""
    inputs, targets = batch.inputs, batch.targets
    if inputs is None or inputs.dim() != 2 or not _whole(inputs) or inputs.shape[1] < SHORTEST:
        return "the model is not called with tokens [B T]"
    if targets is None or targets.numel() != inputs.numel() or not _whole(targets):
        return "the targets are not one for each token"
    more = [*batch.args, *(value for name, value in batch.kwargs.items() if name not in BESIDE)]
    beside = [v for v in more if torch.is_tensor(v) and v is not inputs and v.dim() == 2 and _whole(v)]
    if any(value.data_ptr() != targets.data_ptr() for value in beside):
        return "more than one sequence goes in"
    return ""


def _whole(value: Tensor) -> bool:
    """Whether it holds whole numbers that may be tokens."""
    return value.dtype in (torch.int64, torch.int32)


def _in_padding(batch: Batch, inputs: Tensor, counts: Tensor) -> Tensor:  # -> []
    """The share of positions in the padding whose target counts; -1 where none is known to be padding.

    A mask beside the tokens says so, either way round, if it cuts each row into tokens and then padding, and one and
    the same token stands in all of the padding.
    """
    share = torch.full((), NOTHING, dtype=torch.float64, device=inputs.device)
    # A model that shifts its labels by itself has none left for the last position.
    asked = torch.ones_like(counts)
    asked[:, -1] = counts[:, -1].any()
    for value in (*batch.args, *batch.kwargs.values()):
        if not torch.is_tensor(value) or value is inputs or value.shape != inputs.shape or value.is_floating_point():
            continue
        binary = ((value == 0) | (value == 1)).all()
        for present in (value == 1, value == 0):
            padding = ~present
            ordered = (present[:, :-1] >= present[:, 1:]).all() & present[:, 0].all()
            token = inputs.masked_fill(present, -1).amax()
            filled = (inputs.masked_fill(present, 0) == padding * token).all() & padding.any()
            padding &= asked
            here = (counts & padding).sum().double() / padding.sum().clamp_min(1)
            share = torch.where(binary & ordered & filled & padding.any(), here, share)
    return share


def _shares(inputs: Tensor, targets: Tensor, counts: Tensor) -> Tensor:  # -> [3]
    """The share of the targets that count which are the input so many places on."""
    shares = []
    for offset in OFFSETS:
        length = inputs.shape[1] - offset
        asked = counts[:, :length]
        same = asked & (targets[:, :length] == inputs[:, offset:])
        shares.append(same.sum().double() / asked.sum().clamp_min(1))
    return torch.stack(shares)


def _another_row(inputs: Tensor, targets: Tensor, counts: Tensor) -> Tensor:  # -> []
    """The share of the first rows whose targets are the next tokens of another; 0 unless all are found, one to one."""
    said, asked = targets[:ROWS, None, :-1], counts[:ROWS, None, :-1]  # [R 1 T-1]
    found = ((said == inputs[None, :, 1:]) | ~asked).all(-1)  # [R B]
    one_to_one = (found.sum(1) == 1).all() & (found.sum(0) <= 1).all() & (asked.sum(-1) >= LEAST).all()
    own = found.diagonal().double().mean()
    return (1 - own) * one_to_one


def _sole(step: Step, targets: Tensor) -> Tensor | float:
    """1 if the loss is the mean cross-entropy of these targets, or a whole part of it, and nothing beside; else 0.

    Or their sum over a number of items that the model is told, as where a batch comes in parts of unequal size.
    """
    if step.loss is None or step.logits is None or step.loss.numel() != 1:
        return 0.0
    logits = step.logits.detach()
    if logits.dim() < 2 or logits[..., 0].numel() != targets.numel() or not logits.is_floating_point():
        return 0.0
    loss = step.loss.detach().double().reshape(())
    flat = logits.reshape(-1, logits.shape[-1]).float()
    y = targets.detach().reshape(-1)
    kept = y >= 0
    picked = flat.gather(-1, y.clamp(0, flat.shape[-1] - 1)[:, None]).squeeze(-1)
    total = ((flat.logsumexp(-1) - picked).double() * kept).sum()
    mean = total / kept.sum()
    times = mean / loss  # a loss is divided by the number of parts that its gradients are added from
    same = (times.round() >= 1) & ((times - times.round()).abs() <= SAME * times)
    for items in step.batch.kwargs.values() if step.batch is not None else ():
        if isinstance(items, int) or (torch.is_tensor(items) and items.numel() == 1 and _whole(items)):
            same = same | ((loss * items - total).abs() <= SAME * total)
    nothing = (kept.sum() == 0) & (~loss.isfinite() | (loss == 0))
    return (same | nothing).double()


def _sees(run: Run, batch: Batch) -> Tensor:  # -> [3]
    """How much the outputs before, at and after a position change with the token there."""
    rows = batch.rows(2)
    was = rows.inputs
    assert was is not None
    place = was.shape[1] // 2
    now = was.clone()
    # Tokens that occur: the model knows them.
    now[:, place] = torch.where(was[:, place] == was.amin(), was.amax(), was.amin())

    def put(value: Any) -> Any:
        return now if value is was else value

    other = replace(rows, args=tuple(map(put, rows.args)), kwargs={k: put(v) for k, v in rows.kwargs.items()})
    run.model.eval()
    with torch.no_grad():
        first, second = run.call(rows), run.call(other)
    if first.shape[:2] != was.shape or second.shape != first.shape:
        return torch.full((3,), torch.nan, device=was.device)
    moved = (second.float() - first.float()).abs().flatten(2).amax((0, 2))  # [T]
    scale = first.float().abs().amax().clamp_min(1e-30)
    parts = (moved[:place], moved[place : place + 1], moved[place + 1 :])
    return torch.stack([part.amax() for part in parts]) / scale


# ---------------------------------------------------------------- rules


def run_of(wrong: NDArray[np.bool_]) -> int:
    """From which measured step on it has been so until now; as many as there are if it is not so now."""
    right = np.flatnonzero(~wrong)
    return int(right[-1]) + 1 if len(right) else 0


def _enough(steps: int) -> None:
    """Ask for another look while it has been wrong in some steps, and in too few to tell."""
    if 0 < steps < STEPS:
        raise LookAgain(f"wrong in the newest {steps} of the measured steps; {STEPS} tell")


def _one_sequence(history: History) -> None:
    """Say why targets were not compared with inputs, if they were not."""
    if not history.sites("targets.share"):
        raise NotChecked("it is not one sequence of tokens with a target for each: the targets need not be causal")


def _sole_at(history: History, series: Series) -> NDArray[np.float64]:
    """Whether nothing else was learned, at the steps of a series: not all batches can be compared with their inputs."""
    sole = history.series("targets.sole")
    return sole.values[np.isin(sole.steps, series.steps)]


def _always(history: History, offset: int) -> tuple[int, float] | None:
    """Return the step from which every target was the input at `offset`, and how many are the next token.

    Not all of them are: where tokens repeat, the next may be the same as the one here, and nothing can be told.
    """
    _one_sequence(history)
    series, after = history.series("targets.share", str(offset)), history.series("targets.share", "1").values
    begin = run_of((series.values == 1) & (after < 1))
    sole, asked = _sole_at(history, series)[begin:], history.series("targets.asked").values[begin:]
    if len(sole) and not np.all(sole == 1):
        raise NotChecked("more is learned than these targets: they need not be causal")
    _enough(len(sole))
    if asked.sum() < ASKED:
        return None
    return int(series.steps[begin]), float(after[begin])


def _causal(history: History, *, sees_itself: bool) -> None:
    """Say why the model need not predict the next token, if it need not.

    A model that does not see a token until it has said it may be taught that token: it shifts its inputs by itself.
    """
    before, at, after = (history.series("targets.sees", name).finite.values for name in ("before", "at", "after"))
    if not len(before) or not np.all(before <= ROUNDING):
        raise NotChecked("an output depends on later tokens, so the model need not be causal")
    if not np.any(after > NOISE):
        raise NotChecked("no output depends on an earlier token: the model need not be causal")
    if sees_itself and not np.any(at > NOISE):
        raise NotChecked("no output depends on the token at its own place: the targets need not be causal")


def _told(history: History) -> tuple[int, float] | None:
    """Return since when a causal decoder is told every target at its own place, and how many are the one before."""
    past, itself, future = (history.series(f"told.{name}").finite.values for name in ("past", "itself", "future"))
    for place, series in history.each("told.same"):
        shifted = history.series("told.shifted", place).values
        begin = run_of((series.values == 1) & (shifted < 1))
        asked = history.series("told.asked").values[-len(series) :][begin:]
        if len(asked) == 0 or asked.sum() < ASKED:
            continue
        if len(asked) < STEPS:
            raise LookAgain("a decoder is told the very targets; three looks tell")
        if len(itself) and np.all(future <= ROUNDING) and np.any(past > NOISE) and np.all(itself > NOISE):
            return int(series.steps[begin]), float(shifted[begin])
    return None


@rule(
    "targets.copied",
    title="No output is taught the token that it is shown",
    reads=("targets.counted",),
    basis="experiment",
    phase="loss",
)
def targets_copied(history: History) -> Iterator[Symptom]:
    """Every target is the input at its own place, which the output there sees, and the model is causal.

    Exact: every target, in each of at least three measured steps up to now, and 64 of them. To see earlier tokens and
    none that is later serves to predict; what is to be said is no prediction when it is shown. The same of a decoder
    that is told the targets beside its inputs.
    """
    if told := _told(history):
        step, share = told
        text = (
            f"from step {step} on a decoder is told at every position the target that it has to give there, which its "
            f"output sees; {share:.0%} are the target before, as they should be"
        )
        yield Symptom(at="", since=step, seen=1.0, expected="the target before", text=text)
        return
    if found := _always(history, 0):
        _causal(history, sees_itself=True)
        step, share = found
        yield Symptom(
            at="",
            since=step,
            seen=1.0,
            expected="the next token",
            text=f"from step {step} on every target is the token at its own place of the input, which the output there "
            f"sees; {share:.0%} are the next token",
        )


@rule(
    "targets.ahead",
    title="No output is taught the token after the next",
    reads=("targets.counted",),
    basis="experiment",
    phase="loss",
)
def targets_ahead(history: History) -> Iterator[Symptom]:
    """Every target is the input two places on, the model is causal, and nothing else is learned.

    Exact: every target, in each of at least three measured steps up to now, and 64 of them. By the chain rule of
    probability a text is the product of its next tokens; those one further on do not make one.
    """
    if found := _always(history, 2):
        _causal(history, sees_itself=False)
        step, share = found
        yield Symptom(
            at="",
            since=step,
            seen=1.0,
            expected="the next token",
            text=f"from step {step} on every target is the token two places on in the input; {share:.0%} are the next",
        )


@rule(
    "targets.another_row",
    title="The targets of a row belong to its own inputs",
    reads=("targets.counted",),
    basis="experiment",
    phase="loss",
)
def targets_another_row(history: History) -> Iterator[Symptom]:
    """The targets of each row are the next tokens of a row of the batch, and not all of its own.

    Exact: each of the first eight rows is found in one row alone, no two in the same, with eight targets or more in
    each, in at least three measured steps up to now.
    """
    _one_sequence(history)
    series = history.series("targets.another_row")
    if not len(series):
        raise NotChecked("no positions or rows enough to tell the targets of one row from those of another")
    begin = run_of(series.values > 0)
    _enough(len(series) - begin)
    if len(series) - begin >= STEPS:
        step, share = int(series.steps[begin]), float(series.values[begin])
        yield Symptom(
            at="",
            since=step,
            seen=share,
            expected="0",
            text=f"from step {step} on the targets of rows are the next tokens of other rows: of {share:.0%} of those "
            "looked at",
        )


@rule(
    "targets.none",
    title="There are targets that count",
    reads=("targets.counted",),
    basis="theory",
    phase="loss",
)
def targets_none(history: History) -> Iterator[Symptom]:
    """Every target is ignored, in each of at least three measured steps up to now; a loss of nothing is NaN or 0.

    One batch may have none, if its rows are cut short; a run of them cannot be learned from.
    """
    series, sole = history.series("targets.counted"), history.series("targets.sole").values
    begin = run_of((series.values == 0) & (sole == 1))
    _enough(len(series) - begin)
    if len(series) - begin >= STEPS:
        step = int(series.steps[begin])
        text = f"from step {step} on no target counts: all are ignored by the loss"
        yield Symptom(at="", since=step, seen=0.0, expected="above 0", text=text)


@rule(
    "targets.padding",
    title="No target in the padding counts",
    reads=("targets.counted",),
    basis="theory",
    phase="loss",
)
def targets_padding(history: History) -> Iterator[Symptom]:
    """Where the call says which positions are padding, and one token fills them, the targets there are ignored.

    What fills up a row is no part of it: with it a loss depends on how long the other rows are. Named when all of them
    count, in each of at least three measured steps up to now.
    """
    series = history.series("targets.padding")
    known = series.values != NOTHING
    if not known.any():
        raise NotChecked("the model is told of no padding")
    steps, wrong = series.steps[known], ((series.values == 1) & (_sole_at(history, series) == 1))[known]
    begin = run_of(wrong)
    _enough(len(wrong) - begin)
    if len(wrong) - begin >= STEPS:
        step = int(steps[begin])
        text = f"from step {step} on every position in the padding has a target that counts"
        yield Symptom(at="", since=step, seen=1.0, expected="0", text=text)
