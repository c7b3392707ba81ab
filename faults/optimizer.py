"""Optimisers that do not hold what they should train, or do not follow their formula."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Interval

from lab import BadInput, Cause, Fault, fault, torch

if TYPE_CHECKING:
    from collections.abc import Generator

    from torch import Tensor
    from torch.optim import Optimizer

    from lab import Run, Step

MISSING = Cause(
    id="optimizer.missing_parameter",
    title="A parameter is missing from the optimiser",
    must=("movement.unheld",),
    repair="Build the groups from model.parameters() and check that their sizes add up. A module kept in a plain list, "
    "or added after the optimiser was built, is easily left out; to freeze on purpose, set requires_grad=False.",
    refute="The parameter is in optimizer.param_groups, and moves.",
    look="How the parameter groups are built, above all how names are filtered.",
    source="PyTorch documentation: torch.optim, constructing it",
)

NO_CORRECTION = Cause(
    id="optimizer.no_bias_correction",
    title="Adam's means are not corrected for their start at 0",
    must=("update.uncorrected",),
    place="optimizer",
    repair="Divide the mean of the gradients by 1 - beta1^t and that of their squares by 1 - beta2^t, with t from 1.",
    refute="The first update is lr g / (|g| + eps), apart from the decay.",
    look="How the optimiser counts its steps, and whether the count reaches both powers.",
    source="Kingma and Ba, 2015, section 3",
)

COUPLED = Cause(
    id="optimizer.coupled_decay",
    title="Weight decay goes through Adam's quotient",
    must=("update.coupled",),
    place="optimizer",
    repair="Take torch.optim.AdamW, or multiply the weights by 1 - lr * weight_decay and leave the gradients alone.",
    refute="With a gradient of 0 and no history, a weight shrinks by the factor 1 - lr * weight_decay.",
    look="Whether weight_decay is added to the gradient anywhere.",
    source="Loshchilov and Hutter, 2019, algorithm 2",
)

STALE = Cause(
    id="optimizer.stale_parameters",
    title="The optimiser holds tensors that the model no longer has",
    must=("optimizer.stale",),
    may=("movement.unheld", "gradient.carried"),  # nothing moves, and zero_grad clears other tensors
    place="optimizer",
    repair="Build the optimiser last: after the model is loaded, copied, wrapped or moved to its device. What makes "
    "new tensors of parameters makes a new optimiser necessary. Clear with model.zero_grad() and compare.",
    refute="For each group, every tensor in it is one of model.parameters(), by identity.",
    look="Every line between the making of the optimiser and the first step that assigns the model or a parameter.",
    source="PyTorch documentation: torch.optim, constructing it (move the model to its device before)",
)

STATE_LOST = Cause(
    id="optimizer.state_lost",
    title="The optimiser lost its means in the middle of the run",
    must=("optimizer.forgot",),
    place="optimizer",
    repair="Save and load optimizer.state_dict() with the model's, and make no new optimiser in the middle of a run. "
    "To start again on purpose, warm the rate up again: Adam's first update moves each weight by the whole rate.",
    refute="state['step'] of each parameter grows by 1 with each update.",
    look="What is loaded on resuming; whether an optimiser is made inside the loop; a state.clear().",
    source="PyTorch tutorials: saving and loading a checkpoint; Lialin et al., 2023 (ReLoRA: resets, warmed up)",
)

BAD_BETAS = Cause(
    id="optimizer.bad_betas",
    title="Adam's betas are swapped, or beta2 is far too small for beta1",
    must=("optimizer.betas",),
    place="optimizer",
    repair="Give betas=(0.9, 0.999), or (0.9, 0.95) for large models: first that of the gradients, then that of their "
    "squares, which has to be nearer to 1.",
    refute="beta1^2 is below sqrt(beta2).",
    look="The order in which both betas are handed on, and a beta that is given as 1 - beta.",
    source="Kingma and Ba, 2015, theorem 4.1; Reddi et al., 2018, theorem 3",
)


@fault(
    "optimizer.missing_parameter",
    title="The optimiser is not given a parameter",
    cause="optimizer.missing_parameter",
    moves="movement.distance",
    repair=MISSING.repair,
)
class MissingParameter(Fault):
    """Takes the parameters named out of the optimiser's groups; puts them back when the run ends."""

    at: str = "blocks.0.mlp.up"

    def lab_build_optimizer(self, run: Run) -> Generator[None, Optimizer, Optimizer]:
        self.from_the_start()
        optimizer = yield
        left_out = {id(p) for name, p in run.model.named_parameters() if self.holds(name)}
        if not left_out:
            raise BadInput(f"optimizer.missing_parameter: no parameter at {self.at!r}")
        for group in optimizer.param_groups:
            run.cleanup.callback(group.__setitem__, "params", group["params"])
            group["params"] = [p for p in group["params"] if id(p) not in left_out]
        return optimizer


FAR = 10**9  # beta to this power is 0


def adam_groups(run: Run, fault: Fault) -> list[tuple[dict[str, Any], list[Tensor]]]:
    """Return the groups of an AdamW, each with its parameters that have a gradient.

    Raises:
        BadInput: The optimiser is another.
    """
    if type(run.optimizer).__name__ != "AdamW":
        raise BadInput(f"{fault.info.id}: needs AdamW; this is {type(run.optimizer).__name__}")
    return [(g, [p for p in g["params"] if p.grad is not None]) for g in run.optimizer.param_groups]


@fault(
    "optimizer.no_bias_correction",
    title="Adam's means are used as they are, near 0 at first",
    cause="optimizer.no_bias_correction",
    moves="update.error",
    repair=NO_CORRECTION.repair,
)
class NoBiasCorrection(Fault):
    """Tells the formula, for the length of an update, that so many steps have gone that nothing is to be corrected."""

    def lab_update(self, run: Run) -> Generator[None, bool, bool]:
        if not self.active(run):
            return (yield)
        states = run.optimizer.state
        held = [p for _, params in adam_groups(run, self) for p in params]
        counts: list[Any] = []
        for p in held:
            if not states[p]:
                states[p].update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            counts.append(states[p]["step"])
            states[p]["step"] = counts[-1] * 0 + FAR
        done = yield
        for p, count in zip(held, counts, strict=True):
            states[p]["step"] = count + 1
        return done


@fault(
    "optimizer.coupled_decay",
    title="The weight decay is added to the gradient",
    cause="optimizer.coupled_decay",
    moves="update.error",
    repair=COUPLED.repair,
)
class CoupledDecay(Fault):
    """For the length of an update, adds ``weight_decay p`` to each gradient and takes the decay out of the groups."""

    def lab_update(self, run: Run) -> Generator[None, bool, bool]:
        if not self.active(run):
            return (yield)
        groups = [(g, g["weight_decay"], params) for g, params in adam_groups(run, self)]
        if not any(decay for _, decay, _ in groups):
            raise BadInput("optimizer.coupled_decay: needs a weight decay above 0")
        kept = [(p, p.grad) for _, _, params in groups for p in params]
        for group, decay, params in groups:
            group["weight_decay"] = 0.0
            for p in params:
                assert p.grad is not None
                p.grad = p.grad + decay * p.detach()
        done = yield
        for group, decay, _ in groups:
            group["weight_decay"] = decay
        for p, grad in kept:
            p.grad = grad
        return done


@fault(
    "optimizer.stale_parameters",
    title="The optimiser is built for a copy of the model",
    cause="optimizer.stale_parameters",
    moves="movement.distance",
    repair=STALE.repair,
)
class StaleParameters(Fault):
    """Puts a copy of each parameter in its place in the groups; puts the model's own back when the run ends."""

    at: str = "optimizer"

    def lab_build_optimizer(self, run: Run) -> Generator[None, Optimizer, Optimizer]:
        self.from_the_start()
        optimizer = yield
        for group in optimizer.param_groups:
            run.cleanup.callback(group.__setitem__, "params", group["params"])
            group["params"] = [torch.nn.Parameter(p.detach().clone()) for p in group["params"]]
        return optimizer


@fault(
    "optimizer.state_lost",
    title="The optimiser's state is cleared once",
    cause="optimizer.state_lost",
    moves="optimizer.count",
    repair=STATE_LOST.repair,
)
class StateLost(Fault):
    """Clears the state before the update of `from_step`, as on resuming with the model's weights alone."""

    at: str = "optimizer"
    from_step: Annotated[int, Ge(1)] = 1

    def lab_update(self, run: Run, step: Step) -> None:
        if step.index == self.from_step:
            run.optimizer.state.clear()


@fault(
    "optimizer.bad_betas",
    title="Adam is given its betas the wrong way round",
    cause="optimizer.bad_betas",
    moves="optimizer.betas",
    repair=BAD_BETAS.repair,
)
class BadBetas(Fault):
    """Sets both betas of every group."""

    at: str = "optimizer"
    beta1: Annotated[float, Interval(ge=0, lt=1)] = 0.999
    beta2: Annotated[float, Interval(ge=0, lt=1)] = 0.9

    def lab_build_optimizer(self, run: Run) -> Generator[None, Optimizer, Optimizer]:
        self.from_the_start()
        optimizer = yield
        for group in optimizer.param_groups:
            if "betas" not in group:
                raise BadInput(f"{self.info.id}: {type(optimizer).__name__} has no betas")
            run.cleanup.callback(group.__setitem__, "betas", group["betas"])
            group["betas"] = (self.beta1, self.beta2)
        return optimizer
