"""A callback for the Trainer of Hugging Face: ``Trainer(..., callbacks=[LabCallback()])``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lab import Watcher, torch

try:
    from transformers import TrainerCallback
except ModuleNotFoundError as missing:
    if missing.name != "transformers":
        raise
    raise ImportError("lab.plugins.transformers needs transformers: pip install 'breaklab[transformers]'") from missing

if TYPE_CHECKING:
    from lab import Diagnosis


class LabCallback(Watcher, TrainerCallback):  # type: ignore[misc] # to a type checker the library is Any
    """Watches the training, and prints at its end, on standard error and in one process, what is wrong with it.

    ::

        callback = LabCallback()
        Trainer(model=model, args=args, train_dataset=texts, callbacks=[callback]).train()
        print(callback.diagnosis.verdict)

    Losses, weights and checkpoints are those of a training without it. Its options are those of `lab.Watcher`, which
    are those of `lab.watch`. ``on_finding="stop"`` sets ``control.should_training_stop``, as early stopping does.
    """

    @property
    def diagnosis(self) -> Diagnosis | None:
        """What was found; None until the training has ended.

        The Trainer does not tell its callbacks of an error. If the training broke off, what was seen until then is
        diagnosed when this is read, or else when Python ends.
        """
        if self._is_open:
            self._end(self._broken_off())
            self._show()
        return self._diagnosis

    def on_train_begin(
        self, _args: Any, state: Any, _control: Any, *, model: Any, optimizer: Any, lr_scheduler: Any = None, **_: Any
    ) -> None:
        if state.is_world_process_zero:
            self._begin(model, [(self._plain_optimizer(optimizer), lr_scheduler)])

    def on_step_end(self, args: Any, _state: Any, control: Any, **_: Any) -> Any:
        if self._on_finding == "stop" and _anywhere(self._found_something, args.device):
            control.should_training_stop = True
        return control

    def on_train_end(self, *_: Any, **__: Any) -> None:
        if self._is_open:
            self._end()
            self._show()


def _anywhere(yes: bool, device: Any) -> bool:
    """Whether it is so in any process: they have to end together."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return yes
    flag = torch.tensor(float(yes), device=device)
    distributed.all_reduce(flag, distributed.ReduceOp.MAX)
    return bool(flag)
