"""PyTorch's own profiler: some steps as a trace, which TensorBoard's profiler tab and Perfetto open."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from lab import Plugin, plugin, torch

if TYPE_CHECKING:
    from pathlib import Path

    from lab import Run, Step

FOLDER = "trace"
ENTRIES = 100_000  # of memory taken and given back, on CUDA
LEVEL = "KINETO_LOG_LEVEL"


@plugin("torch-profiler", title="Chrome traces of some steps, for TensorBoard's profiler tab and Perfetto")
class TorchProfiler(Plugin):
    """Writes ``trace/*.pt.trace.json``: operators with shapes, memory, stacks and modules; on CUDA a snapshot.

    Attributes:
        wait: Steps before it begins.
        warmup: Steps that it records and throws away: its first are slower than the others.
        active: Steps that it keeps.
        said: What is missing in the trace, in one line; empty where nothing is.
        operators: When it has ended, by operator: calls, and seconds of its own, in one step.
    """

    wait: int = 20
    warmup: int = 1
    active: int = 3

    def __init__(self, wait: int = wait, warmup: int = warmup, active: int = active) -> None:
        self.wait, self.warmup, self.active = wait, warmup, active
        self.operators: dict[str, tuple[float, float]] = {}
        self.said = ""
        self._profiler: Any = None
        self._last = -1
        self._quiet = False
        self._snapshot: Path | None = None

    def lab_start(self, run: Run) -> None:
        """Be ready."""
        self._begin(run, self.wait, stacks=True)

    def lab_step_end(self, run: Run, step: Step) -> None:
        """Go on to the next step; when the last is recorded, stop."""
        if self._profiler is None:
            return
        self._profiler.step()
        if self._spoilt:
            self._begin(run, 0, stacks=False)
            self.said = "the trace has no stacks: a module was imported in these steps, which spoils them"
            self._last = step.index + self.warmup + self.active
        elif step.index >= self._last:
            self._stop()

    def lab_end(self) -> None:
        """Write what there is."""
        self._stop()

    def lab_error(self) -> None:
        """Write what there is."""
        self._stop()

    def _begin(self, run: Run, wait: int, *, stacks: bool) -> None:
        self._stop()
        profiler = torch.profiler
        activities = [profiler.ProfilerActivity.CPU]
        if run.device.type == "cuda":
            activities.append(profiler.ProfilerActivity.CUDA)
        write = profiler.tensorboard_trace_handler(str(run.folder / FOLDER), worker_name="lab")
        self._spoilt = False

        def ready(found: Any) -> None:
            try:
                self._take(found)
            except UnicodeDecodeError:
                # The names of functions that are gone by now; https://github.com/pytorch/kineto/issues/988
                self._spoilt = stacks
                return
            write(found)

        self._quiet = LEVEL not in os.environ
        os.environ.setdefault(LEVEL, "6")  # no notes of its own on the terminal; read when it first begins
        self._profiler = profiler.profile(
            activities=activities,
            schedule=profiler.schedule(wait=wait, warmup=self.warmup, active=self.active, repeat=1),
            on_trace_ready=ready,
            record_shapes=True,
            profile_memory=True,
            with_stack=stacks,
            with_modules=stacks,
        )
        self._last = wait + self.warmup + self.active - 1
        self._snapshot = run.folder / FOLDER / "memory.pickle" if run.device.type == "cuda" else None
        if self._snapshot is not None:
            torch.cuda.memory._record_memory_history(max_entries=ENTRIES)  # noqa: SLF001 - torch's own way
        self._profiler.start()

    def _take(self, found: Any) -> None:
        """Take the time of each operator."""
        self.operators = {
            event.key: (event.count / self.active, event.self_cpu_time_total / 1e6 / self.active)
            for event in found.key_averages()
            if not event.key.startswith("ProfilerStep")
        }

    def _stop(self) -> None:
        profiler, self._profiler = self._profiler, None
        if profiler is not None:
            profiler.stop()
            if self._snapshot is not None:
                self._snapshot.parent.mkdir(exist_ok=True)
                torch.cuda.memory._dump_snapshot(str(self._snapshot))  # type: ignore[no-untyped-call]  # noqa: SLF001
                torch.cuda.memory._record_memory_history(enabled=None)  # noqa: SLF001
            if self._quiet:
                os.environ.pop(LEVEL, None)
