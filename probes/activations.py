"""What passes through the sites of a model: its size, and whether it is finite."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab import Probe, Symptom, probe, rule, torch
from lab import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from lab import History, Run, Site, Step

INSIDE_ATTENTION = {"mask", "scores", "pattern"}  # made only when someone asks; see probes.attention


@probe(
    "activations",
    title="Root mean square of the value at every site",
    every=10,
    cost="one norm a site, on measured steps; one of the output in each step",
)
class Activations(Probe):
    """Records ``activation.rms`` at every site, and now and then a histogram of what a block gives out.

    It measures in the first three steps, in each tenth, in those that are examined, and in those whose output is not
    finite: what is not finite inside makes the output so, and where the output is finite there is nothing to look for.
    That is known at once where the model is on the CPU, and its values are kept until then. A GPU is not waited for:
    there every step is measured. One norm serves as the test for NaN and infinity too: it is not finite when any
    value is not.
    """

    HISTOGRAM_EVERY = 50
    HISTOGRAM_VALUES = 4096

    def lab_start(self, run: Run) -> None:
        self._run = run
        self._names: list[str] = []
        self._norms: list[Tensor] = []
        self._scales: list[float] = []
        self._factors: dict[tuple[float, ...], Tensor] = {}
        self._last: tuple[int, Tensor, Tensor] | None = None
        self._kept: list[tuple[Site, Tensor]] = []
        for site in run.sites.match("**"):
            if site.name.rpartition(".")[2] not in INSIDE_ATTENTION:
                self.read(run, site.name, self._see, always=True)

    def _see(self, site: Site, value: Tensor) -> None:
        if not value.is_floating_point() or value.numel() == 0:
            return
        run = self._run
        measured = self.due(run.step)
        if measured or value.device.type != "cpu" or not run.sites.output:
            self._measure(site, value, parts=measured)
            return
        self._kept.append((site, value))
        if site.name == run.sites.output:
            if not self.is_finite(torch.linalg.vector_norm(value.detach())):
                for kept, held in self._kept:
                    self._measure(kept, held, parts=True)
            self._kept.clear()

    def _measure(self, site: Site, value: Tensor, *, parts: bool) -> None:
        value = value.detach()
        norm = self._known_norm(value, parts=parts)
        if norm is None:
            return
        self._names.append(site.name)
        self._norms.append(norm)
        self._scales.append(value.numel() ** -0.5)
        if self._run.step.index % self.HISTOGRAM_EVERY == 0 and site.module.rpartition(".")[2].isdigit():
            flat = value.reshape(-1)
            self._run.step.show(
                "histogram", "activation", flat[:: max(1, len(flat) // self.HISTOGRAM_VALUES)], site.name
            )

    def _known_norm(self, value: Tensor, *, parts: bool) -> Tensor | None:
        """Return the norm of a tensor; that of the last one, under a second name; or None for a part of the last one.

        What shares its memory with the tensor just read (heads split off, say) is as finite as that was, and its size
        is of interest only now and then (`parts`). What a fault put in its place has memory of its own.
        """
        memory = value.untyped_storage().data_ptr()
        if self._last is not None and self._last[0] == memory:
            if self._last[1].shape == value.shape:
                return self._last[2]
            if not parts:
                return None
            part: Tensor = torch.linalg.vector_norm(value)
            return part
        dtype = torch.promote_types(value.dtype, torch.float32)
        norm: Tensor = torch.linalg.vector_norm(value, dtype=dtype)
        self._last = (memory, value, norm)  # held, so that its memory is not given to another meanwhile
        return norm

    def lab_step_end(self, step: Step) -> None:
        if self._norms:
            norms = torch.stack(self._norms)
            scales = tuple(self._scales)
            if scales not in self._factors:  # a few kinds of steps: the factors are sent to the device once for each
                self._factors[scales] = torch.tensor(scales, device=norms.device)
            step.record_all("activation.rms", tuple(self._names), norms * self._factors[scales])
        self._last = None
        for done in (self._names, self._norms, self._scales, self._kept):
            done.clear()


@rule("value.nonfinite", title="Every value is finite", reads=("activation.rms",), basis="theory", phase="forward")
def value_nonfinite(history: History) -> Iterator[Symptom]:
    """No sum, product or exponential of finite numbers of ordinary size is NaN or infinite."""
    for site, series in history.each("activation.rms"):
        if found := series.first(~np.isfinite(series.values)):
            step, seen = found
            before = f"; it was finite until step {step - 1}" if step > series.steps[0] else ""
            text = f"the value at {site} is not finite from step {step}{before}"
            yield Symptom(at=site, since=step, seen=seen, expected="finite", text=text)
