"""Does the backward pass reach what the output depends on, and does a small gradient survive it?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab import LookAgain, Probe, Symptom, probe, rule, torch
from lab import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from lab import Batch, History, Run, Site, Step

ROWS = 4
FEW, POSITIONS = 2, 128  # of the experiment that goes backward twice, where so many positions are enough
LOOKS = 3
TRIED = 8  # parameters without a gradient that are changed, one by one
NOISE = 1e-4  # of the largest output: what two calls may differ by, as in probes.determinism
LOUDER = 4096.0  # a power of two: it changes no digit of a gradient


@probe(
    "backward",
    title="Do gradients reach what the output depends on, and do small ones survive?",
    cost="one forward and one or two backward passes on two rows, on one that is long, or on all that cannot be cut",
    examines=True,
    seldom=True,
)
class Backward(Probe):
    """Goes backward from the output with the gradient that training sent there, and with one 4096 times as large.

    A backward pass is linear: it gives 4096 times as much. Records by parameter ``backward.lost``: of the elements
    that have a gradient then, the share that had none before; on the CPU it is 0, and the second pass is not made,
    where at least half of all had one: most of those that should cannot have lost it. Parameters that the optimiser
    holds and that got no gradient in training are asked once more: ``backward.cut`` says, where the graph is cut before
    it reaches them, by how much the output changes with one of them, relative to its largest value. Its site is the
    place of the cut. And where every weight has had a gradient of 0, ``backward.passed``: the largest element of the
    gradient at each site.
    """

    def lab_start(self, run: Run) -> None:
        self._run = run
        self._sent: Tensor | None = None
        self._passed = False  # whether a gradient came by the output, also one of a single number
        self._was: dict[str, Tensor] = {}
        self._missing: list[str] = []
        self._all = False
        if run.sites.output:
            self.read(run, run.sites.output, self._see, grad=True)

    def _see(self, _site: Site, gradient: Tensor) -> None:
        step = self._run.step
        if step.thorough and step.part == step.parts - 1:
            self._passed = True
            if gradient.dim():
                self._sent = gradient.detach()  # until the examination, a moment later

    def lab_before_update(self, run: Run, step: Step) -> None:
        if not step.thorough:
            return
        held = run.held
        asked = {name: p for name, p in run.parameters.items() if p.requires_grad and id(p) in held}
        self._missing = [name for name, p in asked.items() if p.grad is None]
        self._all = len(self._missing) == len(asked)

    def lab_examine(self, run: Run, step: Step) -> None:
        sent, self._sent = self._sent, None
        passed, self._passed = self._passed, False
        if step.batch is None or not passed:
            return
        rows = step.batch.rows(ROWS)
        step.record("backward.looks", 1.0)
        if not self._all:
            _ask(run, step, rows, self._missing, self._was)
        if sent is None:
            return
        if run.history.last("arrival.share") == 0:
            _ended(run, step, rows, sent)
        _louder(run, step, rows.rows(FEW, enough=POSITIONS), sent)


def _ended(run: Run, step: Step, rows: Batch, sent: Tensor) -> None:
    """Go backward from the output to every site."""
    with run.sites.capture("**.out") as values:
        out = run.call(rows)
    traced = {name: value for name, value in values.items() if value.is_floating_point() and value.requires_grad}
    if traced and out.requires_grad and out.shape[1:] == sent.shape[1:] and len(out) <= len(sent):
        ask = list(traced.values())
        grads = torch.autograd.grad(out, ask, sent[: len(out)].to(out.dtype), allow_unused=True)
        sizes = [value.new_zeros(()) if g is None else g.abs().amax() for value, g in zip(ask, grads, strict=True)]
        step.record_all("backward.passed", tuple(traced), torch.stack([size.float() for size in sizes]))


def _louder(run: Run, step: Step, rows: Batch, sent: Tensor) -> None:
    """Go backward twice through one graph, and see which elements are 0 only where the gradient is small."""
    out = run.call(rows)
    named = {name: p for name, p in run.parameters.items() if p.requires_grad and p.numel()}
    if out.dim() != sent.dim() or out.shape[1:] != sent.shape[1:] or len(out) > len(sent):
        return
    if not named or not out.requires_grad:
        return
    sent = sent[: len(out)].to(out.dtype)
    found = torch.autograd.grad(out, list(named.values()), sent, retain_graph=True, allow_unused=True)
    plain = {name: small for name, small in zip(named, found, strict=True) if small is not None and not small.is_sparse}
    asked = [name for name, small in plain.items() if not _is_whole(small)]
    found = torch.autograd.grad(out, [named[name] for name in asked], sent * LOUDER) if asked else ()
    lost = {name: out.new_zeros((), dtype=torch.float32) for name in plain}
    for name, large in zip(asked, found, strict=True):
        there = large != 0
        lost[name] = ((plain[name] == 0) & there).sum() / there.sum().clamp_min(1)
    if lost:
        step.record_all("backward.lost", tuple(lost), torch.stack([*lost.values()]))


def _is_whole(gradient: Tensor) -> bool:
    """Whether at least half of a gradient is not 0: what was lost of it is not most of what there is.

    Asked only in the host's own memory, as any other is waited for.
    """
    return gradient.device.type == "cpu" and 2 * int(torch.count_nonzero(gradient).numpy()) >= gradient.numel()


def _ask(run: Run, step: Step, rows: Batch, missing: list[str], was: dict[str, Tensor]) -> None:
    """Look for a cut above parameters that got no gradient: the output depends on them, and its derivative does not.

    Where what the module that owns one gives out does have a derivative, the parameter itself has left the graph. That
    counts if it has not moved since the first look, `was`: somebody may update it without a gradient.
    """
    if not missing:
        return
    run.model.eval()  # so that two calls agree
    with run.sites.capture("**.out") as values:
        out = run.call(rows)
    if not out.requires_grad:
        return
    passed = {name: value for name, value in values.items() if value.is_floating_point()}
    traced = {name: value for name, value in passed.items() if value.requires_grad}
    asked = [run.parameters[name] for name in missing]
    found = torch.autograd.grad(out.sum(), [*asked, *traced.values()], allow_unused=True)
    unreached = [name for name, gradient in zip(missing, found[: len(asked)], strict=True) if gradient is None]
    blind = {name for name, gradient in zip(traced, found[len(asked) :], strict=True) if gradient is None}
    for name in unreached[-TRIED:]:
        p = run.parameters[name]
        place = _place(name, list(passed), set(traced), blind)
        if place:
            step.record("backward.cut", _change(run, rows, p, out), place)
        elif f"{name.rpartition('.')[0]}.out".removeprefix(".") in traced.keys() - blind:
            stayed = (was.setdefault(name, p.detach().clone()) == p).all()
            step.record("backward.cut", _change(run, rows, p, out) * stayed, name)


def _place(parameter: str, order: list[str], traced: set[str], blind: set[str]) -> str:
    """Where the graph is cut above a parameter, among the sites of the modules that hold it; empty if it is unknown.

    A module gives out a value with a history, in vain; or what holds it gives out one without. Where the module itself
    computes without a history (``no_grad``), that may be meant.
    """
    holders = [site for site in order if f"{parameter}.".startswith(f"{site.rpartition('.')[0]}.") and "." in site]
    if not holders or not any(site in blind for site in holders):
        return ""
    ended = [site for site in holders if site not in traced]
    return ended[0] if ended else [site for site in holders if site in blind][-1]


def _change(run: Run, rows: Batch, p: nn.Parameter, out: Tensor) -> Tensor:
    """By how much the output changes with a parameter; what is written is put back after the experiment."""
    with torch.no_grad():
        before = p.clone()
        size = before.float().square().mean().sqrt().clamp_min(0.01)
        way = torch.cos(torch.arange(p.numel(), device=p.device, dtype=torch.float32)).view_as(p)
        p.add_((size * way / 2).to(p.dtype))
        change = (run.call(rows) - out).abs().amax() / out.abs().amax().clamp_min(1e-30)
        p.copy_(before)
    return change


# ---------------------------------------------------------------- rules


@rule(
    "backward.cut",
    title="Gradients reach every parameter that the output depends on and that is to learn",
    reads=("backward.looks",),
    basis="experiment",
    phase="backward",
)
def backward_cut(history: History) -> Iterator[Symptom]:
    """The output changes with a parameter, and the graph that is built above it ends before the output.

    The parameter may learn (``requires_grad``), the optimiser holds it, and others do get gradients; so in three looks
    at least, which follow at once where the newest shows it. What is computed without a graph (``no_grad``), what the
    output does not depend on, and what is left out of some steps is not accused.
    """
    newest, most = history.series("backward.looks").steps[-1], 0  # looks that show it, where the newest does
    for place, series in history.each("backward.cut"):
        looks, changed = np.unique(series.steps[series.values > NOISE]), float(np.nanmax(series.values))
        if newest in looks:
            most = max(most, len(looks))
        if len(looks) >= LOOKS:
            at = place.removesuffix(".out")
            what = f"no gradient passes {place}: what is before it gets none"
            if at == place:
                what = f"{at} gets no gradient"
            yield Symptom(
                at=at,
                since=int(looks[0]),
                seen=changed,
                expected="a gradient",
                text=f"{what}, though the output changes by {changed:.2g} of its largest value when a weight there "
                "does",
            )
    if 0 < most < LOOKS:
        raise LookAgain(f"a graph ended before the output in {most} looks; {LOOKS} tell")


@rule(
    "backward.lost",
    title="Small gradients survive the backward pass",
    reads=("backward.lost",),
    basis="experiment",
    phase="backward",
)
def backward_lost(history: History) -> Iterator[Symptom]:
    """Most elements of a gradient are exactly 0, and are not when the gradient at the output is 4096 times as large.

    Linear in exact arithmetic: 0 stays 0. float32 and bfloat16 reach down to 1e-38, float16 to 6e-8. So it counts
    when the larger part of the elements of a parameter is lost, in three looks up to now.
    "Most" is a judgement: what is lost has no update, and Adam would have made it as large as any.
    """
    for name, series in history.each("backward.lost"):
        begin = series.until_now(series.values > 0.5, LOOKS)
        if begin is not None:
            step, share = int(series.steps[begin]), float(series.values[begin])
            yield Symptom(
                at=name,
                since=step,
                seen=share,
                expected="0",
                text=f"{share:.0%} of the gradient of {name} is 0 at step {step}, and is not when the gradient at the "
                "output is 4096 times as large",
            )
