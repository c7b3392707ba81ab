"""Every hook of the lab, in the order in which it fires. This file is the contract.

A training run, whole::

    with lab_run:                                  # scope
        data      = lab_build_data                 # action
        model     = lab_build_model                # action
        optimizer = lab_build_optimizer            # action
        lab_start                                  # event: everything is built; attach taps here
        for step in steps:
            with lab_step:                         # scope
                lab_zero_grad                      # action
                step.batch  = lab_batch            # action
                step.logits = lab_forward          # action; values pass through taps
                step.loss   = lab_loss             # action
                lab_backward                       # action; gradients pass through taps
                step.grad_norm = lab_clip          # action
                step.lr     = lab_schedule         # action
                lab_before_update                  # event: gradients are final, weights are old
                lab_update                         # action
            with lab_evaluate:                     # scope, on evaluated steps
                lab_batch, lab_forward, lab_loss   # the same actions; step.mode is "evaluate"
            lab_step_end                           # event: weights are new
            lab_examine                            # event, on examined steps: experiments in a sandbox
            -- what was recorded moves to the host, once --
            lab_metrics, lab_artifact              # events: numbers and pictures, on the host
            lab_finding                            # event, for each new symptom
        with lab_generate:                         # scope
            lab_forward, lab_next_token            # the same; step.mode is "generate"
        lab_end                                    # event: with the diagnosis
    lab_error                                      # event: something raised

Three families:

*Actions* do the work, and the first answer that is not None counts. The lab's own answer comes last. A fault
answers first, or wraps the others (a generator with one ``yield``, which gives back what the others answered).

*Scopes* are actions that contain others. A profiler is a ``with`` around a ``yield``.

*Events* are listened to. Their answers are not read.

Hooks carry what exists a few times a step. Tensors inside the model go through taps (see ``lab.sites``).

On training that the lab did not write (``lab.watch``), the events fire and the actions do not: there the
user's own code acts. So whatever only measures listens to events and taps.
"""

# A specification has a docstring and no body.
# mypy: disable-error-code="empty-body"

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from lab.context import Artifact, Batch, Run, Step
    from lab.diagnosis.model import Diagnosis, Symptom
    from lab.store import Metric

hookspec = pluggy.HookspecMarker("lab")
first = hookspec(firstresult=True)

# ---------------------------------------------------------------- scopes


@first
def lab_run(run: Run) -> Diagnosis:
    """The whole run, from nothing to the diagnosis."""


@first
def lab_step(run: Run, step: Step) -> bool:
    """One training step: every action from `lab_zero_grad` to `lab_update`."""


@first
def lab_evaluate(run: Run, step: Step) -> Tensor:
    """Evaluation on held-out data; the mean loss [] in nats a token. ``step.mode`` is ``"evaluate"``."""


@first
def lab_generate(run: Run, step: Step, prompt: Tensor, length: int) -> Tensor:
    """`length` tokens after `prompt` [B T]; the whole, [B T+length]. ``step.mode`` is ``"generate"``."""


# ---------------------------------------------------------------- actions


@first
def lab_build_data(run: Run) -> Any:
    """The data source that ``run.data`` becomes (see ``lab.runtime.data.Source``)."""


@first
def lab_build_model(run: Run) -> nn.Module:
    """The model that ``run.model`` becomes."""


@first
def lab_build_optimizer(run: Run) -> Optimizer:
    """The optimiser that ``run.optimizer`` becomes."""


@first
def lab_zero_grad(run: Run, step: Step) -> bool:
    """Clear the gradients. Answer True when done."""


@first
def lab_batch(run: Run, step: Step) -> Batch:
    """The batch of this step, on ``run.device``; from the held-out split when evaluating."""


@first
def lab_forward(run: Run, step: Step) -> Tensor:
    """Logits [B T V] of ``step.batch``."""


@first
def lab_loss(run: Run, step: Step) -> Tensor:
    """The loss [] of ``step.logits`` against ``step.batch.targets``, in nats a token."""


@first
def lab_backward(run: Run, step: Step) -> bool:
    """Propagate ``step.loss`` backward. Answer True when done."""


@first
def lab_clip(run: Run, step: Step) -> Tensor:
    """Clip the gradients; answer their norm [] before clipping."""


@first
def lab_schedule(run: Run, step: Step) -> float:
    """Set the learning rate for this step; answer it."""


@first
def lab_update(run: Run, step: Step) -> bool:
    """Let the optimiser change the weights. Answer True when done."""


@first
def lab_next_token(run: Run, step: Step) -> Tensor:
    """The next token [B 1] from the last row of ``step.logits``."""


# ---------------------------------------------------------------- events


@hookspec
def lab_start(run: Run) -> None:
    """Model, optimiser and data are built; no step has run. Taps are attached here."""


@hookspec
def lab_before_update(run: Run, step: Step) -> None:
    """Gradients are final and the weights are still those that produced them."""


@hookspec
def lab_step_end(run: Run, step: Step) -> None:
    """The weights have been updated."""


@hookspec
def lab_examine(run: Run, step: Step) -> None:
    """Run an experiment with a known right answer. Weights, buffers, modes, gradients and random state are put back."""


@hookspec
def lab_metrics(run: Run, step: Step, metrics: Sequence[Metric]) -> None:
    """What was recorded in this step, as numbers on the host."""


@hookspec
def lab_artifact(run: Run, step: Step, artifact: Artifact) -> None:
    """A histogram or an image that was recorded in this step, on the host."""


@hookspec
def lab_finding(run: Run, step: Step, symptom: Symptom) -> None:
    """A symptom seen for the first time."""


@hookspec
def lab_error(run: Run, error: BaseException) -> None:
    """Something raised; the run ends after this."""


@hookspec
def lab_end(run: Run, diagnosis: Diagnosis) -> None:
    """The run is over. Taps are still attached; they are removed after this."""
