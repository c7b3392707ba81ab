"""Which targets of a row count: the same in training and in evaluation, and the end of a text among them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab import NotChecked, Probe, Stage, Symptom, probe, rule, torch
from lab import numpy as np

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from numpy.typing import NDArray
    from torch import Tensor

    from lab import Batch, History, Run, Step

# Steps in a row. Of batches drawn alike, all of these in training and none of four held out: below 1 in 12,000.
BATCHES, HELD_OUT = 21, 4
SOMETIMES = 4  # of so many steps one, once there were enough
STEPS = 3  # measured steps that have to agree
ENDS = 32  # ends of text in them: each is a target or is none, and no chance is in it
NAMES = ("first", "after", "none")
NONE = "no training whose evaluation is known, with one target for each token"


@probe(
    "answers",
    title="Do the same targets count in training and in evaluation, and does the end of a text?",
    cost="ten comparisons of the targets in each of the first steps, then in each fourth",
    stages={
        "answers.empty": Stage("batch", "flag", about="targets", says="rows of the batch have no target that counts")
    },
)
class Answers(Probe):
    """Looks at which targets of a row count: from which place on, up to which place, and whether any does.

    Records, in the lab's own training, in the first 42 steps and then in each fourth, ``answers.train``, the share of
    the rows of a batch that count from their ``first`` place on, the share that goes on ``after`` the last target that
    counts (with tokens that are not what fills up the row), and the share of which ``none`` counts, which is
    ``answers.empty`` as well; and when the run evaluates ``answers.held_out``, the largest of these shares over
    ``answers.held_out_batches``. Where next tokens are learned and one is known to end a text: ``answers.ends``, how
    many follow a target that counts, and ``answers.ends_counted``, how many count themselves.
    """

    def lab_start(self, run: Run) -> None:
        self._held_out: list[Tensor] | None = None
        self._whole: Batch | None = None
        own = getattr(run.data, "end", None)
        named = getattr(getattr(run.model, "config", None), "eos_token_id", None)
        self._fills = own is None  # then an end may be what fills up a row, and says nothing
        self._end = own if own is not None else named

    def lab_batch(self, step: Step) -> Generator[None, Batch, Batch]:
        batch = yield
        if step.mode == "train":
            self._whole = batch
        inputs, targets = batch.inputs, batch.targets
        if inputs is None or targets is None or not _a_target_each(inputs, targets):
            return batch
        if step.mode == "train":
            if step.index < 2 * BATCHES or step.index % SOMETIMES == 0:
                shares = _shape(inputs, targets)
                step.record_all("answers.train", NAMES, shares)
                step.record("answers.empty", shares[-1])
        elif self._held_out is not None:
            self._held_out.append(_shape(inputs, targets))
        return batch

    def lab_evaluate(self, run: Run) -> Generator[None, Tensor, Tensor]:
        self._held_out = []
        loss = yield
        batches, self._held_out = self._held_out, None
        if batches:
            run.step.record("answers.held_out_batches", float(len(batches)))
            run.step.record_all("answers.held_out", NAMES, torch.stack(batches).amax(0))
        return loss

    def lab_before_update(self, step: Step) -> None:
        batch, self._whole = self._whole or step.batch, None
        if batch is None or not isinstance(self._end, int) or not (step.index < STEPS or step.examined):
            return
        inputs, targets = batch.inputs, batch.targets
        if inputs is None or targets is None or not _a_target_each(inputs, targets):
            return
        counts = targets >= 0
        ends = (inputs[:, 2:] == self._end) & counts[:, :-2]  # [B T-2], after a target that counts
        if self._fills:
            ends = ends & torch.nn.functional.pad(inputs[:, 3:] != self._end, (0, 1))
        # Where hidden tokens are to be found, an end is never hidden: only of next tokens is it one.
        follows = (~counts[:, :-1] | (targets[:, :-1] == inputs[:, 1:])).all()
        step.record("answers.ends", (ends.sum() * follows).double())
        step.record("answers.ends_counted", (targets == self._end).sum().double())


def _a_target_each(inputs: Tensor, targets: Tensor) -> bool:
    """Whether one target belongs to each token of rows of three or more."""
    whole = all(value.dtype in (torch.int64, torch.int32) for value in (inputs, targets))
    return whole and inputs.dim() == 2 and inputs.shape == targets.shape and inputs.shape[1] > STEPS


def _shape(inputs: Tensor, targets: Tensor) -> Tensor:  # -> [3]
    """The shares of rows that count from the first place on, that go on after the last, and of which none counts."""
    counts = targets >= 0
    places = torch.arange(inputs.shape[1], device=inputs.device)
    last = (counts * places).amax(1, keepdim=True)  # [B 1]
    filler = inputs[:, -1:]  # of a row that is filled up
    goes_on = ((places[:-1] > last) & (inputs[:, 1:] != filler)).any(1)
    some = counts.any(1)
    return torch.stack([counts[:, 0], goes_on & some, ~some]).double().mean(1)


# ---------------------------------------------------------------- rules


def run_of(wrong: NDArray[np.bool_]) -> int:
    """From which value on it has been so until now; as many as there are if it is not so now."""
    right = np.flatnonzero(~wrong)
    return int(right[-1]) + 1 if len(right) else 0


def _unlike(history: History, wrong: NDArray[np.bool_], held_out: tuple[str, ...]) -> int | None:
    """Return the step from which training batches are all so; None where they are not.

    Raises:
        NotChecked: They are so, and steps or held-out batches are too few to say.
    """
    series = history.series("answers.train", NAMES[0])
    begin = run_of(wrong)
    count = len(series) - begin
    if count < 2 or any(np.any(history.series("answers.held_out", name).values > 0) for name in held_out):
        return None
    if count < BATCHES:
        raise NotChecked(f"{count} steps in a row; {BATCHES} are needed")
    batches = history.series("answers.held_out_batches").values
    if not len(batches) or batches[-1] < HELD_OUT:
        raise NotChecked("nothing was held out yet: which targets count in evaluation is not known")
    return int(series.steps[begin])


def _shares(history: History) -> list[NDArray[np.float64]]:
    """The three shares in training, by step.

    Raises:
        NotChecked: They were not recorded.
    """
    if not history.sites("answers.train"):
        raise NotChecked(NONE)
    return [history.series("answers.train", name).values for name in NAMES]


@rule(
    "answers.prompt",
    title="What counts in training counts in evaluation: no prompt in one of them alone",
    reads=(),
    basis="theory",
    phase="loss",
)
def answers_prompt(history: History) -> Iterator[Symptom]:
    """Every row of the last 21 batches or more counts from its first token on, and no row held out does.

    Both are drawn in the same way. If batches were as likely to be so in both, then of 25 of them that four are not,
    and just those held out, is below 1 in 12,000 (a permutation test). To learn prompts too may be meant; then what is
    held out is asked the same, or the two losses are of different things.
    """
    first, after, _ = _shares(history)
    step = _unlike(history, (first == 1) & (after < 1), ("first",))
    if step is not None:
        text = f"from step {step} on every row of training counts from its first token on; of held-out rows none does"
        yield Symptom(at="", since=step, seen=1.0, expected="0", text=text)


@rule(
    "answers.inverted",
    title="What counts in training counts in evaluation: the last part of a row",
    reads=(),
    basis="theory",
    phase="loss",
)
def answers_inverted(history: History) -> Iterator[Symptom]:
    """Every row of the last 21 batches counts from its first token on and goes on after the last; held out none does.

    The same permutation test: below 1 in 12,000.
    """
    first, after, _ = _shares(history)
    step = _unlike(history, (first == 1) & (after == 1), ("first", "after"))
    if step is not None:
        text = (
            f"from step {step} on every row of training counts from its first token on, and stops before its last; "
            "held-out rows begin to count later, and count to their end"
        )
        yield Symptom(at="", since=step, seen=1.0, expected="0", text=text)


@rule(
    "answers.cut",
    title="In each row of training some target counts, as in held-out rows",
    reads=(),
    basis="theory",
    phase="loss",
)
def answers_cut(history: History) -> Iterator[Symptom]:
    """In each of the last 21 batches or more some rows have no target that counts, and no held-out row is so.

    The same permutation test: below 1 in 12,000. Where no row ever has any, it is another matter, and another check's.
    """
    *_, none = _shares(history)
    step = _unlike(history, none > 0, ("none",))
    share = float(np.mean(none[-BATCHES:]))
    if step is not None and share < 1:
        text = f"from step {step} on {share:.0%} of the rows of training have no target that counts; held out all have"
        yield Symptom(at="", since=step, seen=share, expected="0", text=text)


@rule(
    "answers.end",
    title="The end of a text is a target",
    reads=(),
    basis="theory",
    phase="loss",
)
def answers_end(history: History) -> Iterator[Symptom]:
    """The token that ends a text follows targets that count, and never counts itself.

    Exact: none of at least 32 ends, in each of three measured steps or more up to now. The probability of stopping is
    then that of the start, whatever is learned. Which token it is, the source or the model's configuration says; by the
    latter, an end at the end of a row is not asked about: it may be what fills it up.
    """
    ends, counted = history.series("answers.ends"), history.series("answers.ends_counted").values
    if not len(ends) or not np.any(ends.values > 0):
        raise NotChecked("no end of a text is known in these rows")
    begin = ends.until_now((ends.values > 0) & (counted == 0), STEPS)
    if begin is not None and (seen := float(ends.values[begin:].sum())) >= ENDS:
        step = int(ends.steps[begin])
        text = f"from step {step} on none of {seen:.0f} ends of a text counts, and the targets before them do"
        yield Symptom(at="", since=step, seen=0.0, expected=f"{seen:.0f}", text=text)
