"""Learning rates that are not what was planned, and the causes behind them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lab import BadInput, Cause, Fault, fault

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from lab import Run, Step

PER_PART = Cause(
    id="schedule.per_part",
    title="The schedule is stepped more than once for each update",
    must=("schedule.stepped_often",),
    place="schedule",
    repair="Call scheduler.step() right after optimizer.step(), under the same condition; or plan as many steps as "
    "there are calls. len(dataloader) counts micro-batches: divide it by the parts of a batch.",
    refute="Between two updates scheduler.last_epoch grows by 1.",
    look="Where scheduler.step() stands, and the if around optimizer.step() where gradients accumulate.",
    source="PyTorch documentation: torch.optim, how to adjust learning rate; huggingface/accelerate documentation: "
    "gradient accumulation",
)

NEVER_STEPPED = Cause(
    id="schedule.never_stepped",
    title="The schedule is made and never stepped",
    must=("schedule.never_stepped",),
    may=("optimizer.rate_zero", "movement.none"),
    place="schedule",
    repair="Call scheduler.step() after each optimizer.step(). With a warmup the rate otherwise stays at the first, "
    "which may be 0.",
    refute="scheduler.last_epoch is larger after an update than before the one before it.",
    look="The training loop for a call of scheduler.step(), and whether an if leaves it out.",
    source="PyTorch documentation: torch.optim, how to adjust learning rate",
)

NOT_APPLIED = Cause(
    id="schedule.not_applied",
    title="The optimiser does not go by its schedule",
    must=("schedule.not_applied",),
    place="schedule",
    repair="Make the scheduler for the optimiser that trains, after it, and make both again where one is: "
    "scheduler.optimizer is optimizer. Let nothing else write group['lr'], such as a line left from before there was "
    "a schedule, or optimizer.load_state_dict() after the scheduler was stepped.",
    refute="scheduler.get_last_lr() equals [group['lr'] for group in optimizer.param_groups] at each update.",
    look="Every line that writes 'lr', and whether an optimiser is made twice.",
    source="PyTorch documentation: LRScheduler, get_last_lr",
)

RATE_ZERO = Cause(
    id="schedule.rate_zero",
    title="The learning rate is 0",
    must=("optimizer.rate_zero*",),
    may=("schedule.not_applied", "movement.none"),
    cannot=("schedule.never_stepped",),
    place="schedule",
    repair="Print group['lr'] at each of the first updates. A warmup multiplies by (step + 1) / warmup, in true "
    "division: step // warmup is 0 until it ends. One that is stepped once an epoch counts epochs, and must not begin "
    "with 0. With a peak read from a file, check that it was read.",
    refute="group['lr'] is above 0 at the second update, and a weight moves.",
    look="The function that LambdaLR is given, at 0, 1 and 2; and base_lrs of the scheduler.",
    source="PyTorch documentation: LambdaLR",
)


def scheduler_of(run: Run, fault: Fault) -> Any:
    """Return the schedule of a training of the lab's own.

    Raises:
        BadInput: It has none.
    """
    if run.config is None or run.scheduler is None:
        raise BadInput(f"{fault.info.id}: needs the lab's own training, with a schedule")
    return run.scheduler


def answers(run: Run, fault: Fault, change: Callable[[float], float]) -> None:
    """Let the schedule answer other rates, from its first step on, until the run ends."""
    scheduler = scheduler_of(run, fault)
    old = scheduler.lr_lambdas

    def changed(rate: Callable[[int], float]) -> Callable[[int], float]:
        return lambda step: change(rate(step))

    run.cleanup.callback(setattr, scheduler, "lr_lambdas", old)
    scheduler.lr_lambdas = [changed(rate) for rate in old]
    for group in run.optimizer.param_groups:  # the first step was made with the schedule
        group["lr"] = change(group["lr"])


@fault(
    "schedule.per_part",
    title="The schedule is stepped after each part of a batch",
    cause="schedule.per_part",
    moves="schedule.count",
    repair=PER_PART.repair,
)
class PerPart(Fault):
    """Steps the schedule for each part of the batch before, where batches pass in parts."""

    at: str = "schedule"

    def lab_start(self, run: Run) -> None:
        scheduler_of(run, self)
        if run.config.train.accumulate == 1:
            raise BadInput("schedule.per_part: batches pass in one part; set train.accumulate")

    def lab_schedule(self, run: Run, step: Step) -> Generator[None, float, float]:
        if self.active(run) and step.index:
            for _ in range(step.parts - 1):
                run.scheduler.step()  # type: ignore[union-attr]
        return (yield)


@fault(
    "schedule.never_stepped",
    title="Nobody steps the schedule",
    cause="schedule.never_stepped",
    moves="schedule.count",
    repair=NEVER_STEPPED.repair,
)
class NeverStepped(Fault):
    """Answers with the rate as it is, and leaves the schedule where it stands."""

    at: str = "schedule"

    def lab_start(self, run: Run) -> None:
        scheduler_of(run, self)
        self.from_the_start()

    def lab_schedule(self, run: Run) -> float:
        return float(run.optimizer.param_groups[0]["lr"])


@fault(
    "schedule.not_applied",
    title="A line after the schedule writes another rate",
    cause="schedule.not_applied",
    moves="schedule.set",
    repair=NOT_APPLIED.repair,
)
class NotApplied(Fault):
    """Sets the rate of every group to the peak after the schedule has set it."""

    at: str = "schedule"

    def lab_start(self, run: Run) -> None:
        scheduler_of(run, self)
        self.from_the_start()

    def lab_schedule(self, run: Run) -> Generator[None, float, float]:
        yield
        peak = float(run.config.train.lr)
        for group in run.optimizer.param_groups:
            group["lr"] = peak
        return peak


@fault(
    "schedule.rate_zero",
    title="The schedule answers 0",
    cause="schedule.rate_zero",
    moves="optimizer.rate",
    repair=RATE_ZERO.repair,
)
class RateZero(Fault):
    """Makes the schedule answer 0 at every step."""

    at: str = "schedule"

    def lab_start(self, run: Run) -> None:
        self.from_the_start()
        answers(run, self, lambda _rate: 0.0)
