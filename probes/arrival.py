"""Between the loss and the weights: do gradients arrive at the optimiser, and does it act on them?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab import LookAgain, NotChecked, Probe, Symptom, probe, rule, torch
from lab import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from lab import History, Run, Site, Step

NOTHING = -1.0
LOOKS = 3  # in a row and up to now: a single update may be left out on purpose


@probe(
    "arrival",
    title="Do gradients reach the optimiser, and does it act on them?",
    every=10,
    cost="one norm of the gradient at the output and of each gradient, on measured steps",
)
class Arrival(Probe):
    """Follows a gradient from the output of the model to the update.

    Records on measured steps ``arrival.output``, the largest element of the gradient at the model's output in the
    backward passes since the last update, and ``arrival.share``: the share of what may learn (trainable parameters,
    and all that the optimiser holds) whose gradient is there and not 0 when the weights are about to change; and in
    each step ``update.calls``: how often the optimiser took a step. Where that share was 0, it listens at these
    tensors from then on: ``arrival.reached``, the largest element of a gradient that a backward pass brought to any, or
    -1 if it brought none.
    """

    def lab_start(self, run: Run) -> None:
        self._sent: list[Tensor] = []
        self._reached: list[Tensor] | None = None  # None as long as nobody listens
        self._calls = 0
        self._listen(run)
        if run.sites.output:
            self.read(run, run.sites.output, self._see, grad=True)

    def _listen(self, run: Run) -> None:
        self._optimizer = run.optimizer
        run.cleanup.callback(run.optimizer.register_step_post_hook(self._count).remove)

    def _count(self, *_: object) -> None:
        self._calls += 1

    def _see(self, _site: Site, gradient: Tensor) -> None:
        self._sent.append(gradient.abs().amax())

    def _arrived(self, gradient: Tensor | None) -> None:
        if gradient is None:  # DistributedDataParallel asks for those of outputs that the loss does not use
            return
        if self._reached is not None and not gradient.is_sparse and gradient.numel():
            self._reached.append(gradient.abs().amax())

    def lab_before_update(self, run: Run, step: Step) -> None:
        self._calls = 0
        if run.optimizer is not self._optimizer:  # another has taken over
            self._listen(run)
        if not self.due(step):
            return
        held = [p for group in run.optimizer.param_groups for p in group["params"]]
        learning = list({id(p): p for p in (*held, *run.parameters.values())}.values())
        arrived = [p.grad for p in learning if p.grad is not None]
        if not learning or any(grad.is_sparse for grad in arrived):
            return
        share: Tensor | float = 0.0
        if arrived:
            sizes = torch.stack(torch._foreach_norm(arrived))
            share = (sizes != 0).double().sum() / len(learning)  # NaN is not 0
        step.record("arrival.share", share)
        step.record("arrival.output", torch.stack(self._sent).amax() if self._sent else 0.0)
        if self._reached is not None:
            step.record("arrival.reached", torch.stack(self._reached).amax() if self._reached else NOTHING)
        elif run.history.last("arrival.share") == 0:  # a hook at each parameter costs too much to be there unasked
            self._reached = []
            for p in learning:
                if p.requires_grad:
                    run.cleanup.callback(p.register_hook(self._arrived).remove)

    def lab_step_end(self, step: Step) -> None:
        step.record("update.calls", self._calls)
        self._sent.clear()  # what a closure propagated within the update is of this step
        if self._reached:
            self._reached.clear()


@rule(
    "arrival.none",
    title="The gradients of a step are there when the optimiser takes it",
    reads=("arrival.share", "arrival.output"),
    basis="experiment",
    phase="backward",
)
def arrival_none(history: History) -> Iterator[Symptom]:
    """A gradient that was not 0 passed the output, and no parameter has one when the weights are about to change.

    Neither those of the model nor those that the optimiser holds, which may be copies in another format. Exact: all
    are None or 0, in each of at least three measured steps up to now. And a backward pass has brought one to some of
    them that is not 0: what is 0 when it arrives, as at an adapter of which the other factor is 0, nobody has cleared.
    """
    share, output = history.series("arrival.share"), history.series("arrival.output").values
    if not np.any(output > 0):
        raise NotChecked("no gradient was seen at the output before an update")
    begin = share.until_now((share.values == 0) & (output > 0), LOOKS)
    if begin is not None:
        reached = history.series("arrival.reached").values
        if not len(reached):
            raise LookAgain("no parameter has a gradient; whether one was brought there shows in the next step")
        if not np.any(reached > 0):
            raise NotChecked("every gradient that a backward pass brings to a parameter is 0 there, if there is any")
        step, sent = int(share.steps[begin]), float(output[begin])
        yield Symptom(
            at="",
            since=step,
            seen=0.0,
            expected="above 0",
            text=f"from step {step} on no parameter has a gradient when the optimiser is to take its step, although a "
            f"gradient (largest element {sent:.2g}) had gone backward from the output",
        )


@rule(
    "arrival.dead",
    title="A gradient that passes the output reaches some weight",
    reads=("arrival.share", "arrival.output"),
    basis="experiment",
    phase="backward",
)
def arrival_dead(history: History) -> Iterator[Symptom]:
    """Every gradient that the backward pass brings to a weight is exactly 0, and that at the output is not.

    In each of three measured steps up to now, so that nothing is learned. Of the modules that a gradient reaches, the
    first of the forward pass is where it ends.
    """
    share, output = history.series("arrival.share"), history.series("arrival.output").values
    begin = share.until_now((share.values == 0) & (output > 0), LOOKS)
    if begin is None:
        return
    reached = history.series("arrival.reached").values
    if not len(reached):
        raise LookAgain("no parameter has a gradient; whether one was brought there shows in the next step")
    if not np.all(reached == 0):
        raise NotChecked("no gradient is brought to a parameter, or one is that is not 0")
    passed = {site: series.values[-1] for site, series in history.each("backward.passed")}
    if not passed:
        raise LookAgain("all gradients are 0 at the weights; where they end shows when they are looked at")
    ended = min(
        (site for site, size in passed.items() if size > 0), key=lambda site: history.order.get(site, 0), default=""
    )
    place, step = ended.rpartition(".")[0], int(share.steps[begin])
    yield Symptom(
        at=place,
        since=step,
        seen=0.0,
        expected="above 0",
        text=f"from step {step} on the gradient of every weight is 0, though that at the output (largest element "
        f"{output[begin]:.2g}) is not: {place or 'the last step of the model'} lets nothing through",
    )


@rule(
    "update.calls",
    title="The optimiser takes a step once the gradients are there",
    reads=("update.calls", "arrival.share"),
    basis="experiment",
    phase="update",
)
def update_calls(history: History) -> Iterator[Symptom]:
    """Gradients are there and finite, and the optimiser is not called, in each of at least three measured steps.

    A step that is left out because a gradient is not finite (loss scaling) is left out rightly.
    """
    share, calls = history.series("arrival.share"), history.series("update.calls")
    total = history.series("gradient.total")
    at = np.isin(calls.steps, share.steps)
    finite = ~np.isin(share.steps, total.steps[~np.isfinite(total.values)])
    if not np.any(finite & (share.values > 0)):
        raise NotChecked("no gradient that is finite was there before an update")
    asked = calls.values[at][: len(share)]
    begin = share.until_now((asked == 0) & (share.values > 0)[: len(asked)] & finite[: len(asked)], LOOKS)
    if begin is not None:
        step = int(share.steps[begin])
        text = f"from step {step} on the optimiser is not called, although the gradients are there"
        yield Symptom(at="", since=step, seen=0.0, expected="1 call a step", text=text)
