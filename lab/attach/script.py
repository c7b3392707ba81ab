"""``lab exec``: somebody's training script, unchanged, watched from its first training step on."""

from __future__ import annotations

import builtins
import contextlib
import functools
import runpy
import sys
import types
import weakref
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch.optim.lr_scheduler import LRScheduler

from lab.attach.intercept import Calls
from lab.attach.search import Search, check_whole, trained_by
from lab.attach.watch import Watch
from lab.errors import BadInput, one_line
from lab.files import METRICS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn
    from torch.optim import Optimizer

    from lab.catalogue import Catalogue, Plugin
    from lab.diagnosis.model import Diagnosis

IDLE = 3  # steps of an optimiser that found no gradient at all, before it is taken for that of another network


class Finder:
    """While in the block, looks for a module that is trained, and watches the first.

    That is the outermost module that is called in training mode, with gradients on, and holds some of what an optimiser
    holds. Or, where an optimiser steps and steps and finds no gradient, one of the same shapes that has gradients:
    it holds the weights of a network that was replaced. Nothing is slower but the calls before it is found, by one
    function call each, and what `Calls` intercepts.

    Args:
        folder: Of the run.
        catalogue: Probes, rules and causes.
        examine_every: See `lab.session.Session`.
        sites: See `lab.watch`.
        tools: More that take part in the run, as links to other tools.

    Attributes:
        made: How many optimisers were made.
    """

    def __init__(
        self,
        folder: Path,
        catalogue: Catalogue,
        examine_every: int,
        sites: Sequence[str] | None = None,
        tools: Sequence[Plugin] = (),
    ) -> None:
        self.folder, self.catalogue, self.examine_every = folder, catalogue, examine_every
        self.sites, self.tools = sites, tuple(tools)
        self.made = 0
        # Weak: an optimiser that the script lets go of has to go.
        self._optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._schedulers: weakref.WeakKeyDictionary[Optimizer, weakref.ref[LRScheduler]] = weakref.WeakKeyDictionary()
        self._idle: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        self._calls = Calls()  # from the start: the script may import by its own name what is intercepted
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Self:
        made = torch.optim.Optimizer.__init__
        scheduled = LRScheduler.__init__

        @functools.wraps(made)
        def init(optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
            made(optimizer, *args, **kwargs)
            self.made += 1
            self._optimizers.add(optimizer)

        @functools.wraps(scheduled)
        def schedule(scheduler: LRScheduler, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
            scheduled(scheduler, optimizer, *args, **kwargs)
            self._schedulers[optimizer] = weakref.ref(scheduler)  # the newest is what others are chained in
            if self.watching is not None and self.watching.run.optimizer is optimizer:
                self.watching.run.scheduler = scheduler

        self._undo.callback(setattr, torch.optim.Optimizer, "__init__", made)
        self._undo.callback(setattr, LRScheduler, "__init__", scheduled)
        self._search = self._undo.enter_context(Search(self._take, self._rests))
        self._undo.enter_context(self._calls)
        torch.optim.Optimizer.__init__ = init  # type: ignore[method-assign, assignment]
        LRScheduler.__init__ = schedule  # type: ignore[method-assign, assignment]
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    @property
    def watching(self) -> Watch | None:
        """What was found; None until then."""
        return self._search.watching

    @property
    def why_not(self) -> str:
        """Why a module that was found is not watched; empty if none was found that cannot be."""
        return self._search.why_not

    def _rests(self, optimizer: Optimizer) -> None:
        if all(p.grad is None for group in optimizer.param_groups for p in group["params"]):
            self._idle[optimizer] = self._idle.get(optimizer, 0) + 1

    def _take(self, module: nn.Module) -> Watch | BadInput | None:
        """Watch a module, if it is one that is trained."""
        found = trained_by(module, self._optimizers) or self._beside(module)
        if found is None:
            return None
        about = (self.folder, self.tools, self.catalogue, self.examine_every)
        try:
            check_whole(module)
            watching = Watch(module, found, *about, calls=self._calls, sites=self.sites)
        except BadInput as error:  # the script goes on, whatever the lab was asked
            return error
        known = self._schedulers.get(found)
        watching.run.scheduler = known() if known is not None else None
        watching.run.scheduled = "unknown"
        return watching.__enter__()

    def _beside(self, module: nn.Module) -> Optimizer | None:
        """The optimiser that holds the weights of another network of the same shapes, which get no gradients."""
        wanted = Counter(p.shape for p in module.parameters() if p.requires_grad)
        if not wanted or all(p.grad is None for p in module.parameters()):
            return None
        for optimizer, steps in self._idle.items():
            held = Counter(p.shape for group in optimizer.param_groups for p in group["params"])
            if steps >= IDLE and held == wanted:
                return optimizer
        return None

    def finish(self, error: BaseException | None) -> Diagnosis | None:
        """End watching; return what was found of the training, None if there was none."""
        if self.watching is None:
            return None
        kind = type(error) if error is not None else None
        self.watching.__exit__(kind, error, error.__traceback__ if error is not None else None)
        return self.watching.diagnosis


# ---------------------------------------------------------------- running a script as Python does


def check_script(target: str, folder: Path, *, module: bool) -> None:
    """Check that there is something to run, and a place to keep it.

    Raises:
        BadInput: There is no such file, or the folder holds a run already.
    """
    if not module and not Path(target).is_file():
        raise BadInput(f"{target}: no such script; -m takes the name of a module")
    if (folder / METRICS).exists():
        raise BadInput(f"{folder}: holds a run already; choose another --out")


def run_script(target: str, arguments: Sequence[str], *, module: bool) -> BaseException | None:
    """Run a script, or with `module` a module, as ``python`` does; return what it ended with, None if it just ended.

    A `SystemExit` is returned like any other.

    Raises:
        BadInput: There is no such module.
    """
    with _as_main(target, arguments, module=module):
        try:
            if module:
                runpy.run_module(target, run_name="__main__", alter_sys=True)
            else:
                _execute(target)
        except BaseException as error:  # noqa: BLE001 - whatever it is, the script's end is ours to report, then its own
            if module and isinstance(error, ImportError) and _outside(error) is None:
                raise BadInput(f"-m {target}: {one_line(error)}") from None
            return error
    return None


def _execute(path: str) -> None:
    main = types.ModuleType("__main__")
    main.__file__ = path
    main.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = main  # classes of the script can be pickled, and processes that it starts find it
    code = compile(Path(path).read_bytes(), path, "exec")
    exec(code, main.__dict__)  # noqa: S102 - that is what was asked for


@contextlib.contextmanager
def _as_main(target: str, arguments: Sequence[str], *, module: bool) -> Iterator[None]:
    """What a script sees of itself: its arguments, and where it imports from."""
    argv, path, main = sys.argv, sys.path[:], sys.modules["__main__"]
    sys.argv = [target, *arguments]
    sys.path[0] = str(Path.cwd()) if module else str(Path(target).resolve().parent)
    try:
        yield
    finally:
        sys.argv, sys.path[:] = argv, path
        sys.modules["__main__"] = main


def status_of(error: BaseException | None) -> int:
    """The exit status of a script, by what it ended with."""
    if error is None:
        return 0
    if isinstance(error, SystemExit):
        if error.code is None:
            return 0
        if isinstance(error.code, int):
            return error.code
        sys.stderr.write(f"{error.code}\n")  # as Python does
        return 1
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 1


def ended_well(error: BaseException | None) -> bool:
    """Whether a script that ended so meant to end."""
    return error is None or (isinstance(error, SystemExit) and error.code in (None, 0))


def show_error(error: BaseException) -> None:
    """Show the traceback of a script that failed as Python would have: without the lines of the lab around it."""
    trace = _outside(error)
    sys.excepthook(type(error), error.with_traceback(trace), trace)


def _outside(error: BaseException) -> types.TracebackType | None:
    """The part of a traceback that is neither the lab's nor Python's own way of starting a module; None if none is."""
    trace = error.__traceback__
    while trace is not None and _ours(trace.tb_frame.f_code.co_filename):
        trace = trace.tb_next
    return trace


def _ours(file: str) -> bool:
    return file in (__file__, runpy.__file__) or file.startswith("<frozen runpy")
