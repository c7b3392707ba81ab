"""Around a loop with Hugging Face Accelerate: ``with watch(accelerator, model, optimizer):``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from lab import BadInput, Watcher

try:
    from accelerate import Accelerator
except ModuleNotFoundError as missing:
    if missing.name != "accelerate":
        raise
    raise ImportError("lab.plugins.accelerate needs accelerate: pip install 'breaklab[accelerate]'") from missing

if TYPE_CHECKING:
    from types import TracebackType


class watch(Watcher):  # noqa: N801 - called as lab.watch is
    """Watches a training loop for as long as the block lasts, in the main process.

    ::

        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        with watch(accelerator, model, optimizer) as watching:
            for inputs, targets in loader:
                with accelerator.accumulate(model):
                    loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()

    A step is an update that is made: one that Accelerate puts off, while gradients accumulate, is none. What was found
    is printed on standard error at the end, and in ``watching.diagnosis``; that is None in other processes.

    Args:
        accelerator: That prepared them.
        model: As ``prepare`` gave it back.
        optimizer: Likewise.
        scheduler: Likewise; leave out one that counts epochs.
        options: Those of `Watcher`, which are those of `lab.watch`; without ``on_finding="stop"``: the loop is yours.

    Raises:
        BadInput: It is no Accelerator, or an option is wrong.
    """

    def __init__(
        self, accelerator: Accelerator, model: Any, optimizer: Any, scheduler: Any = None, **options: Any
    ) -> None:
        if not isinstance(accelerator, Accelerator):
            raise BadInput(f"a {type(accelerator).__name__} is no Accelerator: watch(accelerator, model, optimizer)")
        if options.get("on_finding") == "stop":
            raise BadInput("on_finding = 'stop': there is no trainer to ask; give a function that tells your loop")
        super().__init__(**options)
        self._accelerator = accelerator
        self._model = accelerator.unwrap_model(model)
        # With several processes a prepared scheduler is stepped once for each of them.
        known = getattr(scheduler, "split_batches", True) or accelerator.num_processes == 1
        self._trained = self._plain_optimizer(optimizer), getattr(scheduler, "scheduler", scheduler) if known else None

    def __enter__(self) -> Self:
        if self._accelerator.is_main_process:
            self._begin(self._model, [self._trained])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_open:
            self._end(error)
            self._show()
