"""The reference that a policy is compared with: a copy of its own, which stays as it was."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab import NotChecked, Probe, Symptom, probe, rule, torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from lab import History, Run, Step

NONE = "no reference in this run"


def reference_of(run: Run) -> nn.Module | None:
    """Return the reference, where a part of the run has one of that name."""
    found = (getattr(plugin, "reference", None) for _, plugin in run.plugins.list_name_plugin())
    return next((model for model in found if isinstance(model, torch.nn.Module)), None)


@probe(
    "reference",
    title="Is the reference a copy of its own, and does it stay as it was?",
    cost="one copy of the reference's weights; reading it on examined steps",
    examines=True,
)
class Reference(Probe):
    """Compares the weights of the reference with those at the start, and their memory with the policy's.

    Records ``reference.shared``, how many trained parameters of the policy the reference holds too, and
    ``reference.moved``, how far its other weights are from where they were.
    """

    def lab_start(self, run: Run) -> None:
        model = reference_of(run)
        self._start = {} if model is None else {name: p.detach().clone() for name, p in model.named_parameters()}

    def lab_examine(self, run: Run, step: Step) -> None:
        model = reference_of(run)
        if model is None:
            raise NotChecked(NONE)
        trained = {p.data_ptr() for p in run.parameters.values() if p.numel()}
        shared = [name for name, p in model.named_parameters() if p.data_ptr() in trained]
        own = {name: p.detach() for name, p in model.named_parameters() if name not in {*shared}}
        step.record("reference.shared", float(len(shared)))
        names = [name for name in own if name in self._start and self._start[name].shape == own[name].shape]
        if names:
            away = torch._foreach_sub([own[n] for n in names], [self._start[n] for n in names])
            step.record("reference.moved", torch.linalg.vector_norm(torch.stack(torch._foreach_norm(away))))


def _judged(history: History) -> None:
    if not history.sites("reference.shared"):
        raise NotChecked(history.reasons.get("reference", NONE))


@rule(
    "reference.shared",
    title="The reference shares no trained weight with the policy",
    reads=(),
    basis="experiment",
    phase="forward",
)
def reference_shared(history: History) -> Iterator[Symptom]:
    """What is trained in both leaves a margin of 0, whatever is learned. Frozen weights may be shared."""
    _judged(history)
    series = history.series("reference.shared")
    if found := series.first(series.values > 0):
        step, seen = found
        text = f"{seen:.0f} trained parameters of the policy are those of the reference too, at step {step}"
        yield Symptom(at="", since=step, seen=seen, expected="0", text=text)


@rule(
    "reference.moved",
    title="The reference stays as it was",
    reads=(),
    basis="experiment",
    phase="update",
)
def reference_moved(history: History) -> Iterator[Symptom]:
    """DPO's reference is what the policy was at the start (Rafailov et al., 2023): it moves by exactly 0."""
    _judged(history)
    series = history.series("reference.moved")
    if found := series.first(series.values > 0):
        step, seen = found
        text = f"the weights of the reference have moved by {seen:.3g} at step {step}"
        yield Symptom(at="", since=step, seen=seen, expected="0", text=text)
