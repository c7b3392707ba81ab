"""Data that say less than they seem to, and the causes behind them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Interval

from lab import BadInput, Cause, Fault, fault, torch

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from torch import Tensor

    from lab import Batch, Run, Step

SAME_BATCH = Cause(
    id="data.same_batch",
    title="Every step trains on the same batch",
    must=("data.repeats",),
    place="data",
    repair="Take the next batch in each step: one iterator for the whole epoch, made outside the loop. "
    "next(iter(loader)) makes a new one each time, and a generator that is seeded in each step draws the same again.",
    refute="Batches of two steps differ.",
    look="Where the batch of a step is drawn, and what is seeded or rewound there.",
    source="PyTorch documentation: torch.utils.data, DataLoader; Reproducibility, seed_worker",
)

ITERATOR_ANEW = Cause(
    id="data.iterator_anew",
    title="A new iterator for each step gives the first batch again",
    must=("loader.restarted",),
    place="data",
    repair="Loop over the loader, or make its iterator once for each epoch, outside the loop over steps: "
    "next(iter(loader)) begins anew each time.",
    refute="Batches of two steps differ.",
    look="Where the batch of a step is drawn: iter(loader) inside the loop.",
    source="ZhaoJ9014/face.evoLVe pull request 39; wandb/examples issue 444",
)

DUPLICATE_ROWS = Cause(
    id="data.duplicate_rows",
    title="The workers that draw rows draw the same ones",
    must=("data.duplicates",),
    place="data",
    repair="Give each worker its own seed and its own share: worker_init_fn with torch.initial_seed() for other "
    "libraries' random numbers, get_worker_info() in an IterableDataset, a DistributedSampler for processes.",
    refute="No two rows of a batch are equal.",
    look="What each worker seeds, and which part of the data it reads.",
    source="PyTorch documentation: torch.utils.data, multi-process data loading; pytorch/pytorch#5059",
)

TRAIN_IN_HELD_OUT = Cause(
    id="data.train_in_held_out",
    title="The held-out data were trained on",
    must=("data.held_out_seen",),
    place="data",
    repair="Split first, by document and before anything is shuffled, repeated or cut into windows; then give each "
    "loader its own part. Look for equal rows in both, by hash.",
    refute="No row that is evaluated on was a row of training.",
    look="Which loader or which split the evaluation is given.",
    source="Kapoor and Narayanan, 2023 (leakage, L1.1: no split)",
)

CONSTANT_INPUT = Cause(
    id="data.constant_input",
    title="Every token of the inputs is the same",
    must=("data.constant",),
    place="data",
    repair="Read text and tokens with the same tokenizer, and decode a batch before training: what is not in a "
    "vocabulary becomes one token for all, and a buffer that was never filled is all 0.",
    refute="A batch holds more than one token.",
    look="A batch, as text.",
    source="Karpathy, 2019 (a recipe for training neural networks: visualise just before the net)",
)


def own(run: Run, fault: Fault, *objectives: str) -> None:
    """Refuse training that the lab did not write, or that has none of these objectives; without any, all will do.

    Raises:
        BadInput: It is such a training.
    """
    if run.config is None or (objectives and run.config.train.objective not in objectives):
        what = f" with train.objective = {' or '.join(map(repr, objectives))}" if objectives else ""
        raise BadInput(f"{fault.info.id}: needs the lab's own training{what}")


def each_tensor(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """Change every tensor of a batch alike."""

    def changed(value: Any) -> Any:
        return change(value) if torch.is_tensor(value) else value

    return replace(batch, args=tuple(map(changed, batch.args)), targets=changed(batch.targets))


@fault(
    "data.same_batch",
    title="Training stays with the batch of one step",
    cause="data.same_batch",
    moves="data.unchanged",
    repair=SAME_BATCH.repair,
)
class SameBatch(Fault):
    """Gives each training step the batch of the first in which it is active."""

    def lab_start(self, run: Run) -> None:
        own(run, self)
        self.kept: Batch | None = None

    def lab_batch(self, run: Run, step: Step) -> Generator[None, Batch, Batch]:
        batch = yield
        if not self.active(run) or step.mode != "train":
            return batch
        if self.kept is None:
            self.kept = batch
        return replace(self.kept)


@fault(
    "data.duplicate_rows",
    title="Several workers draw the same rows",
    cause="data.duplicate_rows",
    moves="data.duplicates",
    repair=DUPLICATE_ROWS.repair,
)
class DuplicateRows(Fault):
    """Makes each training batch of `workers` equal parts: of the first rows, again and again."""

    workers: Annotated[int, Interval(ge=2, le=1024)] = 2

    def lab_start(self, run: Run) -> None:
        own(run, self, "next-token", "masked", "seq2seq", "sft")
        rows = len(run.data.batch(0, "train").inputs)
        if rows < self.workers:
            raise BadInput(f"data.duplicate_rows: workers = {self.workers}, and {rows} rows in a batch")

    def lab_batch(self, run: Run, step: Step) -> Generator[None, Batch, Batch]:
        batch = yield
        if not self.active(run) or step.mode != "train":
            return batch
        rows = len(batch.args[0])
        chosen = torch.arange(rows, device=batch.args[0].device) % (rows // self.workers)
        return each_tensor(batch, lambda value: value[chosen])


@fault(
    "data.train_in_held_out",
    title="Evaluation is given batches of training",
    cause="data.train_in_held_out",
    moves="data.held_out_seen",
    repair=TRAIN_IN_HELD_OUT.repair,
)
class TrainInHeldOut(Fault):
    """Evaluates on the batches of the first training steps."""

    def lab_start(self, run: Run) -> None:
        own(run, self)

    def lab_batch(self, run: Run, step: Step) -> Generator[None, Batch, Batch]:
        batch = yield
        if not self.active(run) or step.mode != "evaluate":
            return batch
        trained: Batch = run.data.batch(step.index, "train")
        return each_tensor(trained, lambda value: value.to(run.device))


@fault(
    "data.constant_input",
    title="Every token of the inputs becomes the same one",
    cause="data.constant_input",
    moves="data.constant",
    repair=CONSTANT_INPUT.repair,
)
class ConstantInput(Fault):
    """Puts `token` in the place of each token of the inputs, in training and evaluation; targets stay."""

    token: Annotated[int, Ge(0)] = 0

    def lab_start(self, run: Run) -> None:
        own(run, self, "next-token", "masked", "sft", "dpo")
        if self.token >= run.data.vocabulary:
            raise BadInput(f"data.constant_input: token = {self.token}, and {run.data.vocabulary} tokens are known")

    def lab_batch(self, run: Run) -> Generator[None, Batch, Batch]:
        batch = yield
        if not self.active(run):
            return batch
        tokens, *more = batch.args
        return replace(batch, args=(torch.full_like(tokens, self.token), *more))
