"""Gradients: of every parameter, at every output, and whether each step starts from none."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from lab import NotChecked, Probe, Stage, Symptom, probe, rule, torch
from lab import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn

    from lab import History, Run, Site, Step


class Carried(NamedTuple):
    """What gradients held when a backward pass began: these parameters none, those gradients of these norms."""

    empty: list[nn.Parameter]
    full: list[nn.Parameter]
    norms: Sequence[Tensor]

    def norm(self) -> Tensor | None:
        """Their joint norm; None, or 0, if some held nothing and hold something now, as after a clearing.

        The others' are then of the same pass: a head that the loop calls by itself, behind the model's output, gets its
        gradient before the rest.
        """
        if not self.full or any(p.grad is not None for p in self.empty):
            return None
        before = torch.stack(list(self.norms))
        now = torch.stack(torch._foreach_norm([p.grad if p.grad is not None else p.new_zeros(()) for p in self.full]))
        joint: Tensor = torch.linalg.vector_norm(before)
        return torch.where(((before == 0) & (now > 0)).any(), 0.0, joint)


@probe(
    "gradients",
    title="Norm of the gradient of every parameter, and at the output of every branch and block",
    every=10,
    cost="one norm a tensor, on measured steps; in the others one of what the gradients held before",
    stages={"gradient.total": Stage("norm")},
)
class Gradients(Probe):
    """Reads gradients after the backward pass, and what they hold when it begins.

    It measures in the first three steps, in each tenth, in those that are examined, and where the joint norm that the
    clipping of gradients gave is not finite; in each step, where that norm is not known, or not on the host.

    Records ``gradient.norm`` by parameter and ``gradient.site`` at the outputs of modules made of others, and in
    each step ``gradient.total`` before clipping, and ``gradient.carried``: the norm of what the gradients already held
    when a backward pass of the step began, the least of its passes; 0 where some held nothing and got something.
    """

    def lab_start(self, run: Run) -> None:
        self._run = run
        self._seen: dict[str, Tensor] = {}
        self._carried: list[Carried] = []
        if run.sites.output:
            self.read(run, run.sites.output, self._backward_begins, grad=True, always=True)
        # Those made of other modules: what happens inside a leaf shows in the gradients of its parameters.
        inner = {name for name, module in run.model.named_modules() if next(module.children(), None) is not None}
        for site in run.sites.match("**.out"):
            if site.module in inner:
                self.read(run, site.name, self._see, grad=True, always=True)

    def _backward_begins(self, _site: Site, _value: Tensor) -> None:
        """The gradient at the output is the first of a backward pass; nothing has been added to any parameter yet."""
        # A parameter that the optimiser does not hold is not cleared by it: another mistake, with a rule of its own.
        # And one of another module, which takes up this one's output, has its gradient already.
        held_ids = self._run.held
        params = [p for p in self._run.parameters.values() if id(p) in held_ids]
        held = [(p, p.grad) for p in params if p.grad is not None and not p.grad.is_sparse]
        norms = torch._foreach_norm([grad for _, grad in held]) if held else ()
        self._carried.append(Carried([p for p in params if p.grad is None], [p for p, _ in held], norms))

    def _record_carried(self, step: Step) -> None:
        """Of all backward passes of a step, one has to start from nothing: the first, where gradients accumulate."""
        norms = [norm for norm in (each.norm() for each in self._carried) if norm is not None]
        if norms and len(norms) == len(self._carried):
            step.record("gradient.carried", torch.stack(norms).amin())
        elif self._carried:
            step.record("gradient.carried", 0.0)
        self._carried.clear()

    def _see(self, site: Site, value: Tensor) -> None:
        self._seen[site.name] = value

    def lab_before_update(self, run: Run, step: Step) -> None:
        self._record_carried(step)
        seen, self._seen = self._seen, {}
        if step.grad_norm is not None:
            step.record("gradient.total", step.grad_norm)
            if self.is_finite(step.grad_norm) and not self.due(step):
                return
        held = {name: p.grad for name, p in run.parameters.items() if p.grad is not None and not p.grad.is_sparse}
        if held:
            norms = torch.stack(torch._foreach_norm(list(held.values())))
            step.record_all("gradient.norm", tuple(held), norms)
            if step.grad_norm is None:
                step.record("gradient.total", torch.linalg.vector_norm(norms))
        if seen:
            # A second name of one tensor costs nothing.
            once = {id(value): torch.linalg.vector_norm(value) for value in seen.values()}
            step.record_all("gradient.site", tuple(seen), torch.stack([once[id(value)] for value in seen.values()]))


@rule(
    "gradient.nonfinite",
    title="Every gradient is finite",
    reads=("gradient.norm",),
    basis="theory",
    phase="backward",
)
def gradient_nonfinite(history: History) -> Iterator[Symptom]:
    """A gradient that is NaN or infinite destroys whatever it is added to."""
    for metric in ("gradient.site", "gradient.norm"):
        for place, series in history.each(metric):
            if found := series.first(~np.isfinite(series.values)):
                step, seen = found
                text = f"the gradient of {place} is not finite from step {step}"
                yield Symptom(at=place, since=step, seen=seen, expected="finite", text=text)


@rule(
    "gradient.carried",
    title="Each step's backward pass starts from empty gradients",
    reads=("gradient.carried",),
    basis="experiment",
    phase="backward",
)
def gradient_carried(history: History) -> Iterator[Symptom]:
    """``backward`` adds to what the gradients hold. Whatever they hold when a step begins is from an older batch."""
    series = history.series("gradient.carried")
    if len(series) < 2 and not np.any(series.values > 0):
        raise NotChecked("one step was seen; what it leaves behind shows in the next")
    carried = np.flatnonzero(series.values > 0)
    if len(carried):
        first = int(carried[0])
        step, norm = int(series.steps[first]), float(series.values[first])
        yield Symptom(
            at="",
            since=step,
            seen=norm,
            expected="0",
            text=f"when the backward pass of step {step} began, the gradients still held norm {norm:.3g} from before; "
            f"so in {len(carried)} of {len(series)} steps",
        )
