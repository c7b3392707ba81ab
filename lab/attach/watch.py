"""``lab.watch``: the lab around a training loop of your own.

The same session, probes, rules and causes as in the lab's own runtime. Only the events come from elsewhere: from the
model's forward pass, from ``backward``, and from the optimiser's step.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lab.attach.compiled import around, compiled_parts, original, uncompiled
from lab.attach.evaluations import Evaluations
from lab.attach.findings import Findings
from lab.attach.intercept import Calls, LossCalls, after_closure, closure_of
from lab.attach.modules import Hook, ModuleSites
from lab.attach.passes import Passes
from lab.attach.targets import Losses
from lab.context import Batch, Clip, Run, Step, autocast_now, first_tensor
from lab.errors import NotChecked
from lab.files import METRICS, new_folder, write_run_file
from lab.manager import Manager, discover
from lab.processes import PATIENCE, own_folder, place, read_others
from lab.session import SOON, Session

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import TracebackType

    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from lab.attach.findings import OnFinding
    from lab.catalogue import Catalogue, Plugin
    from lab.diagnosis.model import Diagnosis
    from lab.store import History


def watch(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    out: str | Path | None = None,
    plugins: Iterable[Plugin] = (),
    catalogue: Catalogue | None = None,
    examine_every: int = 10,
    scheduler: LRScheduler | None = None,
    probes: Iterable[str] | None = None,
    on_finding: OnFinding = None,
    sites: Iterable[str] | None = None,
) -> Watch:
    """Watch a training loop, for as long as the block lasts.

    ::

        with lab.watch(model, optimizer) as watching:
            for inputs, targets in batches:
                loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        print(watching.diagnosis.verdict, [cause.title for cause in watching.diagnosis.causes])

    A step is whatever lies between two calls of ``optimizer.step()``. Nothing about the training changes.

    Args:
        model: Any module.
        optimizer: What trains it.
        out: The run folder; by default a new one in ``runs``. Of several processes the first has this one, and each
            other one a folder in it; the first compares them.
        plugins: More to take part, such as a fault or a probe of your own.
        catalogue: Where probes, rules and causes are found; by default everything that is installed.
        examine_every: The cadence of experiments, in steps; later in the run more seldom (see `lab.session.Session`).
        scheduler: Of the learning rate, if it is to be stepped once for each update. Leave out one that counts epochs.
        probes: The ids of those to use; by default all but those that cost too much in each step to be used unasked.
        on_finding: What to do at once with each new symptom: a function that is given it; ``"warn"``; ``"log"``, to the
            logger ``lab``; or ``"raise"``, which ends the loop with `FaultFound` from ``optimizer.step()``, when the
            step is recorded.
        sites: Where values and gradients are read: patterns of modules, such as ``"blocks.*.attn"`` or ``"head.**"``;
            by default everywhere. In large models it bounds what a step costs and what is kept. Experiments are not
            bound to it, nor is what is read of parameters.

    Raises:
        BadInput: `out` holds a run already, there is no such probe, `on_finding` is another word, or one of `sites`
            matches nothing.
    """
    folder = own_folder(Path(out)) if out is not None else _new_folder()
    findings = Findings(on_finding)
    more = (*plugins, findings)
    about = (folder, more, catalogue or discover(), examine_every, scheduler, probes)
    watching = Watch(model, optimizer, *about, sites=sites)
    watching.findings = findings
    return watching


def _new_folder() -> Path:
    """A folder for this process; several of one training agree on a name, each by the runs that it has begun."""
    _, several = place()
    for number in itertools.count(1):
        name = f"watch-of-{os.getppid()}-{number}" if several > 1 else f"watch-{number}"
        folder = own_folder(Path("runs") / name)
        if not (folder / METRICS).exists() and (several > 1 or not folder.exists()):
            return folder
    raise AssertionError  # there is always one number more


class Watch:
    """A training loop that is being watched; see `watch`.

    Attributes:
        run: As hooks see it.
        diagnosis: When the block has ended.
        findings: Who tells what is found, as it is found; None for nobody.
    """

    diagnosis: Diagnosis
    findings: Findings | None = None

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        folder: Path,
        plugins: tuple[Plugin, ...],
        catalogue: Catalogue,
        examine_every: int,
        scheduler: LRScheduler | None = None,
        probes: Iterable[str] | None = None,
        calls: Calls | None = None,
        sites: Iterable[str] | None = None,
    ) -> None:
        unasked = [id for id, probe in catalogue.probes.items() if not probe.info.on_request]
        chosen = [catalogue.probe(id) for id in (unasked if probes is None else probes)]
        compiled = compiled_parts(model)
        self._modules = ModuleSites(original(model), compiled, sites)
        new_folder(folder)
        write_run_file(folder, "watch", {}, torch.initial_seed() % 2**31)
        manager = Manager()
        parameter = next(model.parameters(), None)
        device = parameter.device if parameter is not None else torch.device("cpu")
        self.run = Run(folder, manager, device=device)
        self._place = place()
        self._called_as = model
        self._compiled = bool(compiled)
        self.run.compiled = compiled
        self.run.attach(original(model), optimizer, self._modules.sites)
        self.run.scheduler = scheduler
        self._session = Session(self.run, catalogue, examine_every=examine_every, others=self._others)
        for plugin in plugins:
            manager.add(plugin)
        for probe in chosen:
            manager.add_made(probe)
        self._calls = calls
        taken = Losses(self.run)
        self._functions = LossCalls(taken.cross_entropy, taken.distance, taken.scores)
        self._undo = contextlib.ExitStack()
        self._passes = Passes(self.run)
        self._open_calls: list[int] = []  # how many answers there were when each call began that has not ended
        self._answers = 0
        self._evaluations = Evaluations()
        self._last = self.run.step
        self._examined: Batch | None = None

    def __enter__(self) -> Self:
        model, undo = self._called_as, self._undo
        self._session.start()
        undo.enter_context(around(model, Hook(model, self._called), Hook(model, self._answered)))
        # Of every optimiser: a loop may make another one on its way.
        undo.callback(register_optimizer_step_pre_hook(self._stepping).remove)
        undo.callback(register_optimizer_step_post_hook(self._stepped).remove)
        calls = undo.enter_context(Calls()) if self._calls is None else self._calls
        calls.listener = self
        undo.callback(setattr, calls, "listener", None)
        undo.callback(lambda: self._functions.turn(on=False))
        self._begin(0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()
        try:
            if error is not None:
                self.run.plugins.event("lab_error", self.run, error=error)
            # The step that was begun after the last update holds no update: it is not one of the run's.
            if self.run.history.last_step >= 0 and self.run.step.index > self.run.history.last_step:
                self._last.take(self.run.step)
                self.run.step = self._last
            if self._examined is not None:
                self.run.step.batch = self._examined  # the newest whose targets are known
            with self._looking():
                self.diagnosis = self._session.finish(ended=error is None)
        finally:
            self._session.close()
        if self.findings is not None:
            self.findings.tell(over=True)

    def _others(self, ended: bool) -> dict[str, History]:
        """Of several processes the first reads what the others have seen, when they have ended as well."""
        rank, several = self._place
        if rank or several == 1:
            return {}
        return read_others(self.run.folder, patience=PATIENCE if ended else 0.0)

    @contextlib.contextmanager
    def _looking(self) -> Iterator[None]:
        """Make what is compiled stand aside, and put the hooks into it, while experiments may run."""
        if not self._compiled:
            yield
            return
        self._functions.turn(on=False)
        self._modules.pause()
        self._modules.resume(everywhere=True)
        try:
            with uncompiled():
                yield
        finally:
            self._modules.pause()
            self._modules.resume()

    def pause(self) -> None:
        """Take everything off the model until it is called for training again.

        For a loop that evaluates a part of it: the model itself is let alone when it is called for evaluation.
        """
        self._modules.pause()
        self._functions.turn(on=False)

    # ---------------------------------------------------------------- what the loop does

    def _begin(self, index: int) -> None:
        step = Step(index)
        self._passes.begin()
        self._open_calls.clear()  # of calls that raised
        self._session.begin_step(step)
        self._functions.turn(on=False)  # until the model is called

    @property
    def _training(self) -> bool:
        return self.run.sites.mode == "train"

    def _called(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.run.sites.mode == "examine":
            return
        self._open_calls.append(self._answers)
        if model.training and torch.is_grad_enabled():
            self.run.sites.mode = "train"
            self._modules.resume()
            self._functions.turn(on=self.run.step.examined and not self._compiled)
            self.run.step.batch = Batch(args, kwargs)
            self.run.autocast = autocast_now(self.run.device.type)
            self._passes.called()
            if vain := self._evaluations.end():
                self.run.step.graphs = vain
        else:
            # A model that is intercepted, or has hooks, may take another path, and round otherwise.
            self.run.sites.mode = "evaluate"
            self.pause()

    def _answered(self, _model: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        if self.run.sites.mode == "examine":
            return
        if self._open_calls and self._open_calls.pop() != self._answers:
            return  # a call of the same module within this one was the model's: around it stands a step of training
        self._answers += 1
        if self.run.sites.mode == "evaluate":
            self._evaluations.answered(output)
        if self._training:
            with contextlib.suppress(NotChecked):
                answer = first_tensor(output)
                if answer.dim():  # a single number is a loss
                    self.run.step.logits = answer
            # A mode of functions makes what is compiled compile again, so it begins only now.
            self._functions.turn(on=self.run.step.examined)

    def backward(self, loss: Tensor) -> None:
        """Take the loss, if it is that of a training step."""
        if not self._training:
            return
        if loss.numel() == 1:
            self.run.step.loss = loss
        if self._counts_passes:
            self._passes.backward(self.run.step)

    def iterates(self) -> None:
        """Note that a loader begins anew in this step."""
        self.run.step.loaders += 1

    def differentiated(self) -> None:
        """Note that the answers of an evaluation may have been wanted for their gradients."""
        if self.run.sites.mode != "examine":
            self._evaluations.differentiated()

    def propagated(self) -> None:
        """Look at the gradients that a pass left."""
        if self._training and self._counts_passes:
            self._passes.propagated(self.run.step)

    @property
    def _counts_passes(self) -> bool:
        return self.run.step.index < SOON or self.run.step.examined

    def clipped(self, params: tuple[Tensor, ...], limit: float, norm: Tensor) -> None:
        """Take note of a clipping of gradients."""
        self.run.step.clips.append(Clip(params, limit, norm, late=self.run.step.loss is None))

    def scaler_stepped(self, optimizer: Optimizer) -> None:
        """Begin the step anew, if the scaler made no update: what it met was an overflow, and is none of the run's."""
        step = self.run.step
        if optimizer is self.run.optimizer and step.loss is not None:
            self.run.step = Step(step.index, examined=step.examined, thorough=step.thorough)

    def _stepping(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if optimizer is not self.run.optimizer:
            if not self._takes_over(optimizer):
                return None
            self.run.optimizer = optimizer
        return self._before_update(optimizer, args, kwargs)

    def _stepped(self, optimizer: Optimizer, *_: Any) -> None:
        if optimizer is self.run.optimizer:
            self._updated()
        else:
            self._passes.other_update()

    def _takes_over(self, optimizer: Optimizer) -> bool:
        """Whether an optimiser is now what the watched one was: it holds the same, or more, and that one rests."""
        if self.run.step.loss is None or self.run.step.index == self._last.index:
            return False
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return self.run.held <= held

    def _before_update(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Read the gradients; where a closure makes them, when it has been called first. `args` begin with `self`."""
        step = self.run.step
        step.lr = float(optimizer.param_groups[0]["lr"])
        if closure_of(args, kwargs) is None:
            self._passes.update(step)
            self._session.before_update(step)
            return None
        return after_closure(args, kwargs, lambda: self.gradients_made(step))

    def gradients_made(self, step: Step) -> None:
        """Read the gradients that a closure has made."""
        step.lr = float(self.run.optimizer.param_groups[0]["lr"])
        with torch.no_grad():
            self._passes.update(step)
            self._session.before_update(step)

    def _updated(self) -> None:
        step = self.run.step
        self._functions.turn(on=False)  # experiments would pass through it, operator by operator
        with self._looking():
            self._session.end_step(step)
        self._last = step
        if step.examined:
            self._examined = step.batch
        self._begin(step.index + 1)
        if self.findings is not None:
            self.findings.tell()
