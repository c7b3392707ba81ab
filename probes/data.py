"""What comes out of the data: batches that never change, rows twice, held-out rows that were trained on, one token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab import LookAgain, NotChecked, Probe, Stage, Symptom, probe, rule, torch
from lab import numpy as np

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from numpy.typing import NDArray
    from torch import Tensor

    from lab import Batch, History, Run, Series, Step

KEPT = 65_536  # rows of training whose hashes are kept, 8 bytes each
STEPS = 3  # measured steps that have to agree
TOKENS = 64  # tokens in them
# Steps in a row. Of two splits drawn alike, all of these in the one and none held out: below 1 in 1000.
BATCHES = 21
CHANCE = 1e-6
NOTHING = -1.0  # nothing to judge
BESIDE = {"labels", "targets", "attention_mask", "position_ids", "token_type_ids"}  # names of what tells no more


@probe(
    "data",
    title="Do batches change, and are held-out rows new?",
    every=0,
    cost="one product and a sort of the rows in each step, and a search among the rows seen on measured steps",
    stages={"data.fingerprint": Stage("batch", "exact"), "data.held_out_fingerprint": Stage("batch", "exact")},
)
class Data(Probe):
    """Takes a hash of each row of tokens, with mixed coefficients: rows that differ agree about once in 2^64.

    Records, in the lab's own training, where batches are drawn anew in each step: ``data.unchanged``, whether a batch
    is that of the step before, ``data.duplicates``, the share of its rows that equal another before them,
    ``data.rows`` and ``data.seen_before``, how many there are and the share trained on in an earlier step; and when the
    run evaluates ``data.held_out_rows``, ``data.held_out_duplicates``, ``data.held_out_repeats`` (batches that equal
    one before) and ``data.held_out_seen``, the share trained on; and ``data.fingerprint`` and
    ``data.held_out_fingerprint``, numbers that two batches, or evaluations, share only if they are equal. Everywhere,
    where nothing but tokens goes in: ``data.tokens``, how many, and ``data.constant``, whether they are all the same
    while the targets are not; -1 where more goes in, or the targets are not known.
    """

    def lab_start(self) -> None:
        self._coefficients: Tensor | None = None
        self._fresh: list[Tensor] = []  # rows of the steps since the last search
        self._kept: list[Tensor] = []  # rows before them
        self._count = 0
        self._held_out: list[Tensor] | None = None
        self._whole: Batch | None = None
        self._before: Tensor | None = None

    def lab_batch(self, step: Step) -> Generator[None, Batch, Batch]:
        batch = yield
        if step.mode == "train":
            self._whole = batch
        inputs = batch.inputs
        if inputs is None or inputs.dim() != 2 or not _whole(inputs):
            return batch
        rows = self._hashes(inputs)  # [B]
        if step.mode == "train":
            self._in_training(step, rows)
        elif self._held_out is not None:
            self._held_out.append(rows)
        return batch

    def lab_evaluate(self, run: Run) -> Generator[None, Tensor, Tensor]:
        self._held_out = []
        loss = yield
        batches, self._held_out = self._held_out, None
        if batches and self._count:
            step, rows = run.step, torch.cat(batches)
            each = torch.stack([self._batch(part) for part in batches])
            step.record("data.held_out_rows", float(len(rows)))
            step.record("data.held_out_duplicates", torch.stack([_duplicates(part) for part in batches]).amax())
            step.record("data.held_out_repeats", _duplicates(each) * len(each))
            step.record("data.held_out_seen", torch.isin(rows, self._seen()).double().mean())
            step.record("data.held_out_fingerprint", _short(self._batch(rows)), "held-out")
        return loss

    def lab_before_update(self, step: Step) -> None:
        batch, self._whole = self._whole or step.batch, None
        if batch is None or not self.due(step):
            return
        if not _alone(batch):
            step.record("data.constant", NOTHING)
            return
        inputs, targets = batch.inputs, batch.targets
        assert inputs is not None
        assert targets is not None
        counts = targets >= 0
        lowest = torch.where(counts, targets, torch.iinfo(targets.dtype).max).amin()
        varied = torch.where(counts, targets, -1).amax() > lowest
        step.record("data.tokens", float(inputs.numel()))
        step.record("data.constant", ((inputs.amin() == inputs.amax()) & varied).double())

    def _in_training(self, step: Step, rows: Tensor) -> None:
        now = self._batch(rows)
        if self._before is not None:
            step.record("data.unchanged", (now == self._before).double())
        self._before = now
        step.record("data.fingerprint", _short(now))
        step.record("data.duplicates", _duplicates(rows))
        if self.due(step) and self._count:
            step.record("data.rows", float(len(rows)))
            step.record("data.seen_before", torch.isin(rows, self._seen()).double().mean())
        if self._count + len(rows) <= KEPT:
            self._fresh.append(rows)
            self._count += len(rows)

    def _seen(self) -> Tensor:  # -> [n]
        """The hashes of all rows kept."""
        if self._fresh:
            self._kept, self._fresh = [torch.cat([*self._kept, *self._fresh])], []
        return self._kept[0]

    def _hashes(self, values: Tensor) -> Tensor:  # [... T] -> [...]
        """Add up the values, each times a coefficient of 64 bits."""
        known, length = self._coefficients, values.shape[-1]
        if known is None or len(known) < length:
            self._coefficients = known = _coefficients(2 * length, values.device)
        return (values.long() * known[:length]).sum(-1)

    def _batch(self, rows: Tensor) -> Tensor:  # [B] -> []
        """A hash of a batch."""
        return self._hashes((rows >> 12) ^ rows)


def _coefficients(count: int, device: torch.device) -> Tensor:  # -> [count]
    """Odd numbers of 64 bits without a pattern, made where they are used: counted up, and mixed by splitmix64."""
    mixed = torch.arange(1, count + 1, device=device) * -0x61C8864680B583EB
    mixed = (mixed ^ (mixed >> 30)) * -0x40A7B892E31B1A47
    mixed = (mixed ^ (mixed >> 27)) * -0x6B2FB644ECCEEE15
    return (mixed ^ (mixed >> 31)) | 1


def _whole(value: Tensor) -> bool:
    """Whether it holds whole numbers that may be tokens."""
    return value.dtype in (torch.int64, torch.int32)


def _duplicates(values: Tensor) -> Tensor:  # [n] -> []
    """The share of the values that equal another before them."""
    ordered = values.sort().values
    return (ordered[1:] == ordered[:-1]).sum().double() / len(values)


def _alone(batch: Batch) -> bool:
    """Whether nothing goes into the model but tokens [B T], and what tells no more than they."""
    inputs, targets = batch.inputs, batch.targets
    if inputs is None or targets is None or inputs.dim() != 2 or not _whole(inputs) or not _whole(targets):
        return False
    more = [*batch.args, *(value for name, value in batch.kwargs.items() if name not in BESIDE)]
    others = [value for value in more if value is not inputs and not isinstance(value, (bool, int, float, str))]
    return inputs.shape[1] > 1 and all(
        value is None
        or (torch.is_tensor(value) and (value.dtype is torch.bool or value.data_ptr() == targets.data_ptr()))
        for value in others
    )


def _short(hashed: Tensor) -> Tensor:
    """As many bits of a hash as float64 keeps."""
    return (hashed & (2**52 - 1)).double()


# ---------------------------------------------------------------- rules


def run_of(wrong: NDArray[np.bool_]) -> int:
    """From which value on it has been so until now; as many as there are if it is not so now."""
    right = np.flatnonzero(~wrong)
    return int(right[-1]) + 1 if len(right) else 0


def _long_enough(series: Series, begin: int) -> bool:
    """Whether so many steps in a row say something.

    Raises:
        NotChecked: It is so now, but not for long.
    """
    count = len(series) - begin
    if 1 < count < BATCHES:
        raise NotChecked(f"{count} steps in a row; {BATCHES} are needed")
    return count >= BATCHES


@rule(
    "data.repeats",
    title="Training does not stay with one batch",
    reads=("data.unchanged",),
    basis="theory",
    phase="run",
)
def data_repeats(history: History) -> Iterator[Symptom]:
    """The batch has been that of the step before in each of the last 21 steps or more; of held-out batches none is.

    Both are drawn in the same way. If a batch were as likely to come again in both, then of 24 pairs of neighbours that
    three are unlike, and just those held out, is below 1 in 2000 (a permutation test). On training that the lab did not
    write, one batch may be meant: it is a common test, and full-batch descent is another.
    """
    series = history.series("data.unchanged")
    begin = run_of(series.values == 1)
    if _long_enough(series, begin):
        repeats = history.series("data.held_out_repeats").values
        if not len(repeats):
            raise NotChecked("nothing was held out yet: whether batches differ by nature is not known")
        if np.any(repeats > 0):
            raise NotChecked("held-out batches repeat themselves too: the data are few")
        step, count = int(series.steps[begin]), len(series) - begin
        text = f"each of {count} steps from step {step} on had the batch of the step before; held-out batches differ"
        yield Symptom(at="", since=step, seen=float(count), expected="1", text=text)


@rule(
    "data.duplicates",
    title="Rows of a batch are drawn apart from each other",
    reads=("data.duplicates",),
    basis="theory",
    phase="run",
)
def data_duplicates(history: History) -> Iterator[Symptom]:
    """Each of the last 21 batches or more has equal rows, and no held-out batch has any.

    Both are drawn in the same way. If batches with equal rows were as likely in both, then of 25 of them that four
    have none, and just those held out, is below 1 in 12,000 (a permutation test).
    """
    series = history.series("data.duplicates")
    begin = run_of(series.values > 0)
    if _long_enough(series, begin):
        others = history.series("data.held_out_duplicates").values
        if not len(others):
            raise NotChecked("nothing was held out yet: whether rows repeat by nature is not known")
        if np.any(others > 0):
            raise NotChecked("held-out rows repeat themselves too: the data are few")
        step, share = int(series.steps[begin]), float(np.mean(series.values[begin:]))
        text = f"in each batch from step {step} on {share:.0%} of the rows equal another; of held-out rows none does"
        yield Symptom(at="", since=step, seen=share, expected="0", text=text)


@rule(
    "data.held_out_seen",
    title="Held-out rows were not trained on",
    reads=("data.held_out_seen",),
    basis="theory",
    phase="run",
)
def data_held_out_seen(history: History) -> Iterator[Symptom]:
    """Every held-out row of an evaluation was a row of training, and rows do not come again by chance.

    What is held out is met in training no more often than training meets its own rows again. With that share f (its
    mean with one row more, or the largest that was measured), n rows are all met with a chance of f^n, below 1e-6.
    """
    series, rows = history.series("data.held_out_seen"), history.series("data.held_out_rows").values
    found = series.first(series.values == 1)
    if found is None:
        return
    asked, again = history.series("data.rows").values, history.series("data.seen_before").values
    share = max((float(again @ asked) + 1) / (float(asked.sum()) + 1), *again)
    if share ** rows[0] > CHANCE:
        raise NotChecked("rows come again by themselves, or too few were seen: the data are few")
    step, _ = found
    text = f"all {rows[0]:.0f} held-out rows at step {step} had been trained on; of rows of training below {share:.2%}"
    yield Symptom(at="", since=step, seen=1.0, expected="0", text=text)


@rule(
    "data.constant",
    title="The inputs are not one and the same token",
    reads=("data.constant",),
    basis="theory",
    phase="forward",
)
def data_constant(history: History) -> Iterator[Symptom]:
    """All tokens of the inputs are the same, in each of at least three measured steps up to now, and targets are not.

    Nothing else goes into the model. An input that never changes tells nothing of the targets (its information about
    them is 0), so nothing can be learned but how often each occurs at each place.
    """
    series, tokens = history.series("data.constant"), history.series("data.tokens")
    if not len(tokens):
        raise NotChecked("more goes into the model than tokens, or the targets are not known")
    begin = run_of(series.values == 1)
    asked = tokens.values[np.isin(tokens.steps, series.steps[begin:])].sum()
    if 0 < len(series) - begin < STEPS:
        raise LookAgain(f"so in the newest {len(series) - begin} of the measured steps; {STEPS} tell")
    if len(series) - begin >= STEPS and asked >= TOKENS:
        step = int(series.steps[begin])
        text = f"from step {step} on every token of the inputs is the same, while the targets differ"
        yield Symptom(at="", since=step, seen=1.0, expected="0", text=text)
