"""Memory: of the process, and of the tensors that training keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab import Probe, probe, torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lab import Run, Step


@probe("memory", title="Bytes held by the process and by weights, gradients and optimiser", every=10, cost="none")
class Memory(Probe):
    """Adds up what is held.

    Records ``memory.process`` (resident bytes), ``memory.weights``, ``memory.gradients``, ``memory.optimizer``,
    and on CUDA ``memory.device`` (bytes allocated) and ``memory.device_peak``.
    """

    def lab_start(self) -> None:
        import psutil

        self._process = psutil.Process()

    def lab_step_end(self, run: Run, step: Step) -> None:
        if not self.due(step):
            return
        params = list(run.parameters.values())
        state = (value for kept in run.optimizer.state.values() for value in kept.values())
        step.record("memory.process", self._process.memory_info().rss)
        step.record("memory.weights", _bytes(params))
        step.record("memory.gradients", _bytes([p.grad for p in params if p.grad is not None]))
        step.record("memory.optimizer", _bytes([value for value in state if torch.is_tensor(value)]))
        if run.device.type == "cuda":
            step.record("memory.device", torch.cuda.memory_allocated(run.device))
            step.record("memory.device_peak", torch.cuda.max_memory_allocated(run.device))


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
