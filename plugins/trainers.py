"""What the callbacks for trainers of other libraries share: watch what a trainer calls, then say what was found."""

from __future__ import annotations

import atexit
import contextlib
import sys
from typing import TYPE_CHECKING, Any

import lab
from lab import BadInput, LabError, torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from torch import nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from lab import Diagnosis, Plugin, Symptom
    from lab.attach.watch import Watch

    Trained = tuple[Optimizer, LRScheduler | None]

SHARE = 0.1  # of an optimiser's weights have to be in a module for it to be what the optimiser trains, as in `lab exec`
# What a copy of a callback leaves behind; Lightning hangs the last two on it, and the module that it trains with them.
OF_A_TRAINING = {"watching", "_diagnosis", "_open", "_is_open", "_found_something", "log", "log_dict"}
WORDS = ("raise", "stop", "warn", "log")


class Watcher:
    """Watches a training from the first call of the model on, and prints on standard error what was found.

    Args:
        out: The run folder; by default a new one in ``runs``. If the same trainer trains again, that goes to a
            folder of the same name with a number after it.
        examine_every: The cadence of experiments, in steps; later in the run more seldom.
        probes: The ids of those to use; by default all but those that cost too much to be used unasked.
        on_finding: What to do at once with each new symptom: as in `lab.watch` a function, ``"warn"``, ``"log"`` or
            ``"raise"``; or ``"stop"``, which asks the trainer to end after this step, as it would end by itself.
        plugins: More to take part, such as a probe of your own.
        quiet: Print nothing.

    Attributes:
        watching: What `lab.watch` gave for the newest training; None before its first call of the model.

    Raises:
        BadInput: `on_finding` is another word.
    """

    def __init__(
        self,
        *,
        out: str | Path | None = None,
        examine_every: int = 10,
        probes: Iterable[str] | None = None,
        on_finding: Callable[[Symptom], None] | str | None = None,
        plugins: Iterable[Plugin] = (),
        quiet: bool = False,
    ) -> None:
        if isinstance(on_finding, str) and on_finding not in WORDS:
            raise BadInput(f"on_finding = {on_finding!r}; a function, or one of the words {', '.join(WORDS)}")
        self._out = out
        self._on_finding = on_finding
        self._options = {
            "examine_every": examine_every,
            "probes": probes if probes is None else tuple(probes),
            "plugins": tuple(plugins),
        }
        self._quiet = quiet
        self._trainings = 0
        self._forget()

    def _forget(self) -> None:
        self.watching: Watch | None = None
        self._diagnosis: Diagnosis | None = None
        self._open = contextlib.ExitStack()  # what is to be undone; holds nothing when no training is watched
        self._is_open = self._found_something = False

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle has the options, and watches nothing."""
        return {name: value for name, value in vars(self).items() if name not in OF_A_TRAINING}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    @property
    def diagnosis(self) -> Diagnosis | None:
        """What was found in the newest training, when it has ended; None if nothing was watched, as on other ranks."""
        return self._diagnosis

    # ---------------------------------------------------------------- for those who know a trainer

    def _begin(
        self,
        model: nn.Module,
        trained: Sequence[Trained],
        *,
        skip: Callable[[nn.Module], bool] = lambda _module: False,
    ) -> None:
        """Look for what is called of a model, and watch it from its first call on.

        That is the outermost module in it that is called in training mode, with gradients on, and holds some of what
        one of the optimisers trains: what a trainer wraps around the model, or calls instead of it, need not be known.

        Args:
            model: In which to look.
            trained: Each optimiser, with the scheduler that is stepped once for each of its updates.
            skip: Whether a call of a module is none of the model's own.

        Raises:
            BadInput: Each process holds a part of the weights only.
        """
        self._end(_broken_off())  # one that broke off, and whose trainer did not say so
        _refuse_shards(model)
        self._forget()
        self._trainings += 1
        inside = {id(module) for module in model.modules()}
        plain = torch.nn.Module.__call__

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            # What is compiled keeps this function for good; the compiler knows when it compiles, and leaves this out.
            if not torch.compiler.is_compiling() and module.training and torch.is_grad_enabled():
                # `torch.compile` puts a module around the one that it compiles.
                mine = id(module) in inside or id(getattr(module, "_orig_mod", None)) in inside
                found = _trains(module, trained) if mine and not self.watching and not skip(module) else None
                if found is not None:
                    search.close()  # everybody's call is PyTorch's own again
                    self._watch(module, *found)
            return plain(module, *args, **kwargs)

        search = self._open.enter_context(contextlib.ExitStack())
        search.callback(setattr, torch.nn.Module, "__call__", plain)
        torch.nn.Module.__call__ = call  # type: ignore[method-assign]
        for optimizer, _ in trained:
            search.callback(optimizer.register_step_pre_hook(self._first_closure).remove)
        atexit.register(self._at_exit)
        self._is_open = True

    def _watch(self, module: nn.Module, optimizer: Optimizer, scheduler: LRScheduler | None) -> None:
        out = self._out
        if out is not None and self._trainings > 1:
            out = f"{out}-{self._trainings}"
        ask = self._ask_to_stop if self._on_finding == "stop" else self._on_finding
        options: dict[str, Any] = {**self._options, "out": out, "scheduler": scheduler, "on_finding": ask}
        watching = lab.watch(module, optimizer, **options)
        watching.__enter__()
        self.watching = watching

    def _first_closure(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Read the first gradients where a closure makes them: the model is then found within the optimiser's step.

        What `lab.watch` hangs before a step comes too late for that one. `args` begin with the optimiser.
        """
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            return None
        waiting = True

        def closed(*more: Any, **named: Any) -> Any:
            nonlocal waiting
            answer = closure(*more, **named)
            if waiting and self.watching is not None and self.watching.run.optimizer is optimizer:
                self.watching.gradients_made(self.watching.run.step)
            waiting = False
            return answer

        return ((args[0], closed, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": closed})

    def _ask_to_stop(self, _symptom: Symptom) -> None:
        self._found_something = True

    def _end(self, error: BaseException | None = None) -> None:
        """End watching, if it has not ended; with what the training ended with, if it did not reach its end."""
        if not self._is_open:
            return
        self._is_open = False
        atexit.unregister(self._at_exit)
        self._open.close()
        if self.watching is not None:
            trace = error.__traceback__ if error is not None else None
            self.watching.__exit__(type(error) if error is not None else None, error, trace)
            self._diagnosis = self.watching.diagnosis

    def _show(self) -> None:
        """Say what was found."""
        if self._quiet:
            return
        if self.watching is None or self._diagnosis is None:
            said = ["nothing to diagnose: no module that the optimiser trains was called in training mode"]
        else:
            said = _lines(self.watching, self._diagnosis)
        sys.stderr.write("".join(f"lab: {line}\n" for line in said))
        sys.stderr.flush()

    def _at_exit(self) -> None:
        """Say what was seen of a training that broke off, when Python ends."""
        self._end(_broken_off())
        self._show()


def plain_optimizer(optimizer: Any) -> Optimizer:
    """The optimiser of PyTorch in those that a library puts around it: its step is the one that is not skipped."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    found: Optimizer = optimizer
    return found


def _broken_off() -> BaseException:
    return sys.exc_info()[1] or LabError("the training did not reach its end")


def _trains(module: nn.Module, trained: Sequence[Trained]) -> Trained | None:
    """The optimiser that holds most of a module, if it is the module that it trains."""
    mine = {id(p) for p in module.parameters() if p.requires_grad}
    shares = []
    for pair in trained if mine else ():
        held = [p for group in pair[0].param_groups for p in group["params"] if p.requires_grad]
        inside = sum(p.numel() for p in held if id(p) in mine)
        if inside and inside >= SHARE * sum(p.numel() for p in held):
            shares.append((inside, pair))
    return max(shares, key=lambda share: share[0])[1] if shares else None


def _refuse_shards(model: nn.Module) -> None:
    """Refuse a model of which each process holds a part: an experiment in one process would wait for the others."""
    kinds = {type(p).__name__ for p in model.parameters()} | {type(m).__name__ for m in model.modules()}
    if kinds & {"DTensor", "FlatParameter", "FullyShardedDataParallel"} or any(
        hasattr(p, "ds_id") for p in model.parameters()
    ):
        raise BadInput("each process holds a part of the weights only (FSDP, ZeRO): this cannot be watched yet")


def _lines(watching: Watch, diagnosis: Diagnosis) -> list[str]:
    """The diagnosis as lines for a log."""
    run = watching.run
    count = run.history.last_step + 1
    what = f"{type(run.model).__name__}, {count} step{'s' if count != 1 else ''}"
    said = [f"{diagnosis.verdict}: {what}, {len(diagnosis.checked)} checks, {len(diagnosis.not_checked)} not made"]
    for place, cause in enumerate(diagnosis.causes, 1):
        where = ", ".join((cause.at or "the run as a whole", *cause.also_at[:4]))
        said.append(f"{place}. {cause.title} ({cause.id}), at {where}, since step {cause.since_step}")
        said += [f"   - {text}" for text in cause.evidence]
        said.append(f"   repair: {cause.repair}")
    said += [f"no known cause explains: {symptom.text}" for symptom in diagnosis.unexplained]
    return [*said, f"more: lab diagnose {run.folder}"]
