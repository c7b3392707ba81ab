"""TensorBoard: a run's scalars, histograms and attention maps, its findings, diagnosis and settings."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from lab import Plugin, plugin
from lab import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from lab import Artifact, Diagnosis, Finding, Row, Run, Step, Symptom

# TensorBoard takes the columns of its table of runs from one run alone: so each run declares all of them,
# with a value that gives the type, also those that it cannot fill in.
NUMBERS = dict.fromkeys(("seed", "steps", "lr", "layers", "width", "heads"), 0)
SETTINGS = {"scenario": "", "faults": ""} | NUMBERS

# Five colours of viridis, from dark to bright. Equal steps look equal, also in grey.
VIRIDIS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
RED = (230, 0, 0)
SMALL, LARGE = 256, 512  # pixels a side


@plugin("tensorboard", title="TensorBoard files: scalars, histograms, attention maps, diagnosis")
class TensorBoard(Plugin):
    """Writes event files into ``tensorboard`` in the run folder.

    Scalars are named ``metric/site``, and are written for each of the first ten steps, each fifth, each
    examined one, each with a finding, and the last. Every image and every histogram, of what is finite, is
    written. Findings and the diagnosis are texts; settings and results, a row of the hyper-parameters.
    """

    FIRST, EVERY = 10, 5  # steps
    FLUSH_EVERY = 1  # second: what a killed run may lose, where TensorFlow is there to write the file
    QUEUE = 1000  # events: a full queue would make the training wait for the disk

    _writer: Any = None

    def __init__(self) -> None:
        self._scalars: dict[tuple[tuple[str, str], ...], _Scalars] = {}
        self._held: list[tuple[int, Row]] = []

    def lab_start(self, run: Run) -> None:
        """Open the file, and write what is to be run."""
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(run.folder / "tensorboard"), self.QUEUE, self.FLUSH_EVERY)
        self._write_text("scenario", _scenario(run), 0)

    def lab_metrics(self, step: Step, metrics: Row) -> None:
        """Write the numbers of a step in one event, or hold them until the step turns out to matter."""
        if self._held and self._held[0][0] != step.index:
            self._held.clear()
        if self._due(step, metrics):
            self._write_row(step.index, metrics)
        else:
            self._held.append((step.index, metrics))

    def lab_artifact(self, step: Step, artifact: Artifact) -> None:
        """Write a histogram or an image."""
        values = artifact.values
        if artifact.kind == "histogram":
            from tensorboard.plugins.histogram.summary_v2 import histogram_pb

            self._write(histogram_pb(artifact.title, values[np.isfinite(values)]), step.index)
        elif values.size:
            from torch.utils.tensorboard.summary import image

            drawn = image(artifact.title, pixels(values), dataformats="HWC")  # type: ignore[no-untyped-call]
            self._write(drawn, step.index)

    def lab_finding(self, step: Step, symptom: Symptom) -> None:
        """Write a symptom, and the numbers of its step."""
        self._release()
        # TensorBoard keeps one text for each tag and step, and a step can bring several findings.
        tag = "/".join(part for part in ("findings", symptom.id, symptom.at) if part)
        seen = f"Seen: {symptom.seen:.4g}. Expected: {symptom.expected}. Since step {symptom.since}."
        self._write_text(tag, f"{symptom.text}\n\n{seen}", step.index)

    def lab_end(self, run: Run, diagnosis: Diagnosis) -> None:
        """Write the diagnosis and the results, and close the file."""
        last = max(run.history.last_step, 0)
        self._release()
        self._write_text("diagnosis", _diagnosis(diagnosis), last)
        self._write_table(run, diagnosis, last)
        self._close()

    def lab_error(self, run: Run, error: BaseException) -> None:
        """Write what raised, and close the file."""
        self._release()
        self._write_text("error", f"`{type(error).__name__}`: {error}", run.step.index)
        self._close()

    # ---------------------------------------------------------------- what to write

    def _due(self, step: Step, metrics: Row) -> bool:
        if step.examined or step.index < self.FIRST or step.index % self.EVERY == 0:
            return True
        # What is measured at a cadence of its own, as the loss on held-out data is, might never meet ours.
        known = self._scalars.get(metrics.columns)
        return known is None or step.index - known.written >= 2 * self.EVERY

    def _release(self) -> None:
        """Write what is held: a finding, an error and the end need the numbers that led there."""
        for index, row in self._held:
            self._write_row(index, row)
        self._held.clear()

    def _write_row(self, index: int, row: Row) -> None:
        scalars = self._scalars.get(row.columns)
        if scalars is None:
            scalars = self._scalars[row.columns] = _Scalars(row.columns)
        scalars.written = index
        self._add(scalars.fill(row.values.tolist()), index)

    def _write_table(self, run: Run, diagnosis: Diagnosis, last: int) -> None:
        from torch.utils.tensorboard.summary import hparams

        results = {
            "result/final_loss": run.history.last("loss"),
            "result/symptoms": float(len(diagnosis.symptoms)),
            "result/score": diagnosis.causes[0].score if diagnosis.causes else 0.0,
        }
        declared, _, _ = hparams(SETTINGS, results)  # type: ignore[no-untyped-call]
        _, begin, end = hparams(_settings(run), results)  # type: ignore[no-untyped-call]
        for summary in (declared, begin, end):
            self._write(summary, last)
        scalars = _Scalars(tuple((name, "") for name in results))
        self._add(scalars.fill(list(results.values())), last)

    def _write_text(self, tag: str, markdown: str, index: int) -> None:
        from tensorboard.plugins.text.summary_v2 import text_pb

        self._write(text_pb(tag, markdown), index)

    def _write(self, summary: Any, index: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._add(Event(summary=summary), index)

    def _add(self, event: Any, index: int) -> None:
        if self._writer is not None:  # an error can come before the start, and after the end
            event.step, event.wall_time = index, time.time()
            self._writer.add_event(event)  # it is bytes from here on, so it may be filled in again

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class _Scalars:
    """One event with a value for each column, made once for all steps with the same columns.

    Filling 300 values in takes a sixth of the time that making them takes.
    """

    def __init__(self, columns: tuple[tuple[str, str], ...]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self.event = Event()
        for metric, site in columns:
            self.event.summary.value.add(tag=f"{metric}/{site}" if site else metric)
        self._values = list(self.event.summary.value)
        self.written = 0  # the last step

    def fill(self, numbers: list[float]) -> Any:
        """Return the event, with these numbers in it."""
        for value, number in zip(self._values, numbers, strict=True):
            value.simple_value = number
        return self.event


def pixels(values: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """Colour an image [height width] by square roots, 0 to the largest; return it as [height width 3].

    What is not finite is red. A small image is magnified, each value a square. A large one keeps the largest
    of each block, so that a thin bright line above the diagonal is not lost.
    """
    block = -(-max(values.shape) // LARGE)
    for axis, length in enumerate(values.shape):
        values = np.maximum.reduceat(values, np.arange(0, length, block), axis=axis)
    finite = np.isfinite(values)
    level = np.where(finite, values, 0.0).clip(min=0)
    level = np.sqrt(level / (level.max() or 1.0))  # beside the 1 of the first row, 1/T would be black
    stops = np.linspace(0, 1, len(VIRIDIS))
    coloured = np.stack([np.interp(level, stops, channel) for channel in zip(*VIRIDIS, strict=True)], axis=-1)
    coloured[~finite] = RED
    zoom = max(1, min(-(-SMALL // min(values.shape)), LARGE // max(values.shape)))
    return coloured.astype(np.uint8).repeat(zoom, axis=0).repeat(zoom, axis=1)


def _settings(run: Run) -> dict[str, Any]:
    """Return what the run was made of, as far as it is known."""
    steps = run.steps if run.steps is not None else run.history.last_step + 1
    scenario = run.config
    if scenario is None:
        return {"steps": steps}
    model = scenario.model
    faults = ", ".join(fault.id for fault in scenario.fault) or "none"
    numbers = (run.seed, steps, scenario.train.lr, model.layers, model.width, model.heads)
    return {"scenario": scenario.title, "faults": faults} | dict(zip(NUMBERS, numbers, strict=True))


def _scenario(run: Run) -> str:
    """Return the scenario in markdown, as its file has it, without what is for learners and tests."""
    if run.config is None:
        return "A training that the lab did not write: there is no scenario."
    import tomli_w

    file = run.config.model_dump(by_alias=True, exclude_none=True, exclude={"check", "expect", "learn"})
    return f"# {run.config.title}\n\n{run.config.about}\n\n```toml\n{tomli_w.dumps(file)}```\n"


def _diagnosis(diagnosis: Diagnosis) -> str:
    """Return the diagnosis in markdown."""
    lists = {
        "Symptoms that no cause explains": [symptom.text for symptom in diagnosis.unexplained],
        "Checked": [f"{title} (`{rule}`)" for rule, title in diagnosis.checked.items()],
        "Not checked": [f"`{rule}`: {reason}" for rule, reason in diagnosis.not_checked.items()],
    }
    parts = [f"# Verdict: {diagnosis.verdict}"]
    parts += [_cause(place, cause) for place, cause in enumerate(diagnosis.causes, start=1)]
    parts += [f"## {heading}\n\n{_bullets(lines)}" for heading, lines in lists.items()]
    return "\n\n".join(parts)


def _cause(place: int, cause: Finding) -> str:
    where = ", ".join(f"`{at}`" for at in (cause.at, *cause.also_at) if at) or "the run as a whole"
    hints = {"Repair": cause.repair, "Refuted by": cause.refute, "Look at": cause.look}
    return "\n\n".join(
        [
            f"## {place}. {cause.title}",
            f"`{cause.id}`, at {where}, since step {cause.since_step}. Score {cause.score:.3g}.",
            f"Evidence:\n\n{_bullets(cause.evidence)}",
            *(f"{name}: {text}" for name, text in hints.items() if text),
        ]
    )


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines) or "None."
