"""A progress bar on the terminal, with the loss and the time left."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from lab import Plugin, plugin

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from lab import Row, Run, Step, Symptom


@plugin("progress", title="Progress bar with loss and time left")
class ProgressBar(Plugin):
    """Draws on standard error, and only where that is a terminal: standard output belongs to the result."""

    _progress: Progress | None = None

    def lab_start(self, run: Run) -> None:
        if not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        what = "healthy twin" if run.folder.name == "twin" else "training"
        self._task: TaskID = self._progress.add_task(what, total=run.steps, loss="-")
        self._progress.start()

    def lab_metrics(self, step: Step, metrics: Row) -> None:
        if self._progress is None:
            return
        where = metrics.columns.index(("loss", "")) if ("loss", "") in metrics.columns else None
        loss = f"{metrics.values[where]:.3f}" if where is not None else "-"
        self._progress.update(self._task, completed=step.index + 1, loss=loss)

    def lab_finding(self, step: Step, symptom: Symptom) -> None:
        if self._progress is not None:
            self._progress.console.print(f"[yellow]step {step.index}[/] {symptom.text}", highlight=False)

    def lab_end(self) -> None:
        self._stop()

    def lab_error(self) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
