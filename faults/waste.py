"""Steps that take longer than they need: threads in each other's way, work done twice, and waiting for data."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from annotated_types import Interval

from lab import BadInput, Cause, Fault, NotChecked, Saving, fault, torch

if TYPE_CHECKING:
    from collections.abc import Generator

    from torch import Tensor

    from lab import Batch, History, Profile, Run, Step


def _threads_cost(profile: Profile, _history: History, _at: str) -> Saving:
    """What a pass gains in as many threads as there are cores, model and loss may on both ways."""
    if profile.fair >= 1:
        raise NotChecked("a pass took no longer in these threads than in fewer")
    work = profile.model.seconds + profile.part("loss").seconds
    why = f"a pass takes {1 / profile.fair:.2f} times as long in {profile.machine.threads} threads as with one a core"
    return Saving((1 - profile.fair) * work, why)


def _second_pass_cost(profile: Profile, history: History, _at: str) -> Saving:
    vain = float(history.last("calls.in_vain"))
    if not profile.passes:
        raise NotChecked("no call of the model was timed")
    forward = sum(row.seconds for row in profile.rows if row.direction == "forward") / profile.passes
    return Saving(
        vain * forward, f"a pass of the model takes {forward * 1e3:.3g} ms, and {vain:.0f} of a step is in vain"
    )


def _padding_cost(profile: Profile, history: History, _at: str) -> Saving:
    share = float(history.last("padding.columns"))
    parts = profile.model, profile.part("loss")
    # As many operators are called for fewer positions; only what they compute is less.
    work = sum(max(0.0, part.seconds - part.dispatch) for part in parts)
    return Saving(share * work, f"{share:.0%} of the positions are padding, in {work * 1e3:.3g} ms of model and loss")


def _waiting_cost(profile: Profile, _history: History, _at: str) -> Saving:
    waiting = profile.part("data").seconds
    return Saving(waiting, f"the model waits {waiting * 1e3:.3g} ms for its batch")


TOO_MANY_THREADS = Cause(
    id="performance.too_many_threads",
    title="An operator is computed by more threads than there are cores",
    must=("threads.too_many",),
    place="loop",
    repair="Give each process its share of the cores: OMP_NUM_THREADS or torch.set_num_threads, at most "
    "len(os.sched_getaffinity(0)); one thread in each worker of a DataLoader, which is its default.",
    refute="torch.get_num_threads() is not above the number of cores that the process may run on.",
    look="OMP_NUM_THREADS, MKL_NUM_THREADS, torch.set_num_threads; and what the job may use of its machine.",
    source="PyTorch documentation: CPU threading; performance tuning guide, OMP_NUM_THREADS",
    saves=_threads_cost,
)

FORWARD_TWICE = Cause(
    id="performance.forward_twice",
    title="The same batch passes the model twice in a step, the second time for nothing",
    must=("calls.in_vain",),
    place="loop",
    repair="Keep the logits of the pass that is trained on, and compute metrics from logits.detach(). Where another "
    "pass is meant, as in evaluation mode, put it under torch.no_grad().",
    refute="Each answer of the model in a step is new, or a backward pass goes through it.",
    look="Where accuracy or another metric is computed in the training loop: model(x) is called a second time there.",
    source="PyTorch documentation: performance tuning guide; autograd mechanics (no_grad)",
    saves=_second_pass_cost,
)

PADDING_WASTE = Cause(
    id="performance.padding_waste",
    title="Most of each batch is padding that no row needs",
    must=("padding.unneeded",),
    place="data",
    repair="Pad each batch to its own longest row: padding='longest', DataCollatorWithPadding, pad_sequence; and put "
    "rows of similar length together (group_by_length). Keep padding='max_length' for a model that is compiled.",
    refute="In each batch there is a row without padding.",
    look="padding= where rows are tokenised, and the collate_fn of the loader.",
    source="Hugging Face documentation: padding and truncation; data collators",
    saves=_padding_cost,
)

LOADER_BOUND = Cause(
    id="performance.loader_bound",
    title="Training waits for its batches longer than it takes to train on them",
    must=("loader.waiting",),
    place="data",
    repair="Prepare batches while the model trains: DataLoader(num_workers=..., persistent_workers=True, "
    "prefetch_factor=...), and once for all what is the same in each epoch (tokenising, decoding, resizing).",
    refute="A step takes about as long with a batch that is there already.",
    look="What is done in __getitem__ and collate_fn, and num_workers, which is 0 by default.",
    source="PyTorch documentation: performance tuning guide, enable asynchronous data loading",
    saves=_waiting_cost,
)


@fault(
    "performance.too_many_threads",
    title="PyTorch is given more threads than there are cores",
    cause="performance.too_many_threads",
    moves="threads.intra_op",
    repair=TOO_MANY_THREADS.repair,
)
class TooManyThreads(Fault):
    """Asks for `times` as many threads as there are cores; the number is put back when the run ends."""

    at: str = "loop"
    times: Annotated[int, Interval(ge=2, le=16)] = 2

    def lab_start(self, run: Run) -> None:
        if run.device.type != "cpu" or not hasattr(os, "sched_getaffinity"):
            raise BadInput("performance.too_many_threads: needs a model on the CPU of a system that tells its cores")
        self._asked = False

    def lab_zero_grad(self, run: Run) -> None:
        """Nothing is cleared here."""
        if self.active(run) and not self._asked:
            self._asked = True
            run.cleanup.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(self.times * len(os.sched_getaffinity(0)))


@fault(
    "performance.forward_twice",
    title="Each batch passes the model a second time",
    cause="performance.forward_twice",
    moves="calls.in_vain",
    repair=FORWARD_TWICE.repair,
)
class ForwardTwice(Fault):
    """Calls the model again in each training step, with gradients, and makes nothing of the answer."""

    at: str = "loop"

    def lab_start(self, run: Run) -> None:
        if any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in run.model.modules()):
            raise BadInput("performance.forward_twice: with dropout the second answer is another, and may be wanted")

    def lab_forward(self, run: Run, step: Step) -> Generator[None, Tensor, Tensor]:
        logits = yield
        if step.mode == "train" and self.active(run) and step.batch is not None:
            run.call(step.batch)
        return logits


@fault(
    "performance.padding_waste",
    title="Short rows are padded to the full length",
    cause="performance.padding_waste",
    moves="padding.columns",
    repair=PADDING_WASTE.repair,
)
class PaddingWaste(Fault):
    """Cuts the rows of training to the first `kept` of their length; the rest of each is padding."""

    at: str = "data"
    kept: Annotated[float, Interval(ge=0.2, le=0.45)] = 0.4

    def lab_start(self, run: Run) -> None:
        if run.config is None or run.config.train.objective != "masked":
            raise BadInput("performance.padding_waste: needs the lab's own training with train.objective = 'masked'")

    def lab_batch(self, run: Run, step: Step) -> Generator[None, Batch, Batch]:
        batch = yield
        if not self.active(run) or step.mode != "train" or batch.targets is None:
            return batch
        inputs, present = batch.args  # [B T] each
        out = torch.arange(inputs.shape[1], device=inputs.device) >= max(2, int(self.kept * inputs.shape[1]))  # [T]
        args = (inputs.masked_fill(out, 0), present & ~out)
        return replace(batch, args=args, targets=batch.targets.masked_fill(out, -100))


@fault(
    "performance.loader_bound",
    title="Each batch takes longer than training on it",
    cause="performance.loader_bound",
    moves="loader.middle",
    repair=LOADER_BOUND.repair,
)
class LoaderBound(Fault):
    """Waits for each batch `times` as long as the rest of the step before it took."""

    at: str = "data"
    times: Annotated[float, Interval(ge=2, le=10)] = 3.0

    def lab_start(self) -> None:
        self._waited = self._rest = 0.0

    def lab_step(self) -> Generator[None, bool, bool]:
        begun, self._waited = time.perf_counter(), 0.0
        done = yield
        self._rest = time.perf_counter() - begun - self._waited
        return done

    def lab_batch(self, run: Run, step: Step) -> Generator[None, Batch, Batch]:
        begun = time.perf_counter()
        batch = yield
        if step.mode == "train":
            if self.active(run):
                time.sleep(self.times * self._rest)
            self._waited += time.perf_counter() - begun
        return batch
