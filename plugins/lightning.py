"""A callback for the Trainer of Lightning: ``Trainer(callbacks=[LabCallback()])``.

It serves ``lightning.pytorch`` and ``pytorch_lightning``.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from lab import BadInput, Watcher

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler


def _base() -> Any:
    """The class that callbacks come from, in the one of the two packages that is in use, else that is installed."""
    for name in sorted(("lightning.pytorch", "pytorch_lightning"), key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(name).Callback
        except ModuleNotFoundError as missing:
            if missing.name not in {"lightning", name}:
                raise
    raise ImportError("lab.plugins.lightning needs lightning: pip install 'breaklab[lightning]'")


class LabCallback(Watcher, _base()):  # type: ignore[misc] # which class it is, is known when it runs
    """Watches ``trainer.fit``, and prints at its end, on standard error and in one process, what is wrong with it.

    ::

        callback = LabCallback()
        Trainer(callbacks=[callback]).fit(model, loader)
        print(callback.diagnosis.verdict)

    What ``training_step`` calls is watched: the LightningModule itself, or else the outermost module in it that is
    called. Losses, weights and checkpoints are those of a training without it. Its options are those of `lab.Watcher`,
    which are those of `lab.watch`. ``on_finding="stop"`` sets ``trainer.should_stop``, as early stopping does.
    """

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if getattr(pl_module, "_compiler_ctx", None) is not None:
            raise BadInput("training_step is compiled, as what watches would be; compile the model inside it instead")
        if trainer.is_global_zero:
            trained = [_with_scheduler(trainer, self._plain_optimizer(optimizer)) for optimizer in trainer.optimizers]
            # Where the model is wrapped, its forward stands in for training_step until that is called.
            self._begin(
                pl_module, trained, skip=lambda module: module is pl_module and _bound(module.forward) is not module
            )

    def on_validation_start(self, *_: Any) -> None:
        if self.watching is not None:
            self.watching.pause()  # validation_step may call a part of what is watched

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if self._on_finding == "stop" and trainer.strategy.reduce_boolean_decision(self._found_something, all=False):
            trainer.should_stop = True

    def on_train_end(self, *_: Any) -> None:
        self._end()

    def on_fit_end(self, trainer: Any, *_: Any) -> None:
        if trainer.is_global_zero:
            self._show()  # the progress bar has ended, too

    def on_exception(self, _trainer: Any, _pl_module: Any, exception: BaseException) -> None:
        if self._is_open:
            self._end(exception)
            self._show()


def _bound(forward: Any) -> Any:
    return getattr(forward, "__self__", None)


def _with_scheduler(trainer: Any, optimizer: Any) -> tuple[Optimizer, LRScheduler | None]:
    """An optimiser, with the scheduler that is stepped once for each of its updates, where there is one."""
    for config in trainer.lr_scheduler_configs:
        per_update = config.interval == "step" and config.frequency == 1 and not config.reduce_on_plateau
        if per_update and config.scheduler.optimizer is optimizer:
            return optimizer, config.scheduler
    return optimizer, None
