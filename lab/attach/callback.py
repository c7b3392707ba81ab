"""What callbacks for the trainers of other libraries share: watch what a trainer calls, then say what was found."""

from __future__ import annotations

import atexit
import sys
from typing import TYPE_CHECKING, Any

import torch

from lab.attach.search import Search, check_whole, trained_by
from lab.attach.watch import watch
from lab.errors import BadInput, LabError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from torch import nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from lab.attach.watch import Watch
    from lab.catalogue import Plugin
    from lab.diagnosis.model import Diagnosis, Symptom

# What a copy of a callback leaves behind; Lightning hangs the last two on it, and the module that it trains with them.
OF_A_TRAINING = {"_search", "_diagnosis", "_is_open", "_found_something", "log", "log_dict"}
WORDS = ("raise", "stop", "warn", "log")


class Watcher:
    """Watches a training from the first call of the model on, and prints on standard error what was found.

    The base of a callback for the trainer of another library, which calls `_begin` when a training begins, `_end` when
    it ends, however it does, and then `_show`; see ``plugins/lightning.py``.

    Args:
        out: The run folder; by default a new one in ``runs``. If the same trainer trains again, that goes to a
            folder of the same name with a number after it.
        examine_every: The cadence of experiments, in steps; later in the run more seldom.
        probes: The ids of those to use; by default all but those that cost too much to be used unasked.
        on_finding: What to do at once with each new symptom: as in `lab.watch` a function, ``"warn"``, ``"log"`` or
            ``"raise"``; or ``"stop"``, which asks the trainer to end after this step, as it would end by itself.
        plugins: More to take part, such as a probe of your own.
        quiet: Print nothing.

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
        self._search: Search | None = None  # of the newest training
        self._diagnosis: Diagnosis | None = None
        self._is_open = self._found_something = False

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle has the options, and watches nothing."""
        return {name: value for name, value in vars(self).items() if name not in OF_A_TRAINING}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    @property
    def watching(self) -> Watch | None:
        """What watches the newest training; None before its first call of the model."""
        return self._search.watching if self._search is not None else None

    @property
    def diagnosis(self) -> Diagnosis | None:
        """What was found in the newest training, when it has ended; None if nothing was watched, as on other ranks."""
        return self._diagnosis

    # ---------------------------------------------------------------- for those who know a trainer

    def _begin(
        self,
        model: nn.Module,
        trained: Sequence[tuple[Optimizer, LRScheduler | None]],
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
        self._end(self._broken_off())  # one that broke off, and whose trainer did not say so
        check_whole(model)
        self._forget()
        self._trainings += 1
        inside = {id(module) for module in model.modules()}
        schedulers = dict(trained)

        def take(module: nn.Module) -> Watch | None:
            # `torch.compile` puts a module around the one that it compiles.
            mine = id(module) in inside or id(getattr(module, "_orig_mod", None)) in inside
            found = trained_by(module, schedulers) if mine and not skip(module) else None
            return self._watch(module, found, schedulers[found]) if found is not None else None

        self._search = Search(take)
        atexit.register(self._at_exit)
        self._is_open = True

    def _watch(self, module: nn.Module, optimizer: Optimizer, scheduler: LRScheduler | None) -> Watch:
        out = self._out
        if out is not None and self._trainings > 1:
            out = f"{out}-{self._trainings}"
        ask = self._ask_to_stop if self._on_finding == "stop" else self._on_finding
        options: dict[str, Any] = {**self._options, "out": out, "scheduler": scheduler, "on_finding": ask}
        return watch(module, optimizer, **options).__enter__()

    @staticmethod
    def _plain_optimizer(optimizer: Any) -> Optimizer:
        """The optimiser of PyTorch in those that a library puts around it: its step is the one that is not skipped."""
        while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
            optimizer = inner
        found: Optimizer = optimizer
        return found

    @staticmethod
    def _broken_off() -> BaseException:
        """What a training ended with that did not say so."""
        return sys.exc_info()[1] or LabError("the training did not reach its end")

    def _ask_to_stop(self, _symptom: Symptom) -> None:
        self._found_something = True

    def _end(self, error: BaseException | None = None) -> None:
        """End watching, if it has not ended; with what the training ended with, if it did not reach its end."""
        if self._search is None or not self._is_open:
            return
        self._is_open = False
        atexit.unregister(self._at_exit)
        self._search.close()
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
        self._end(self._broken_off())
        self._show()


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
