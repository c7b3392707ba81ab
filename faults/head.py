"""The output head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from annotated_types import Gt

from lab import BadInput, Cause, Fault, fault

if TYPE_CHECKING:
    from lab import Run

SCALED = Cause(
    id="head.scaled",
    title="Logits are multiplied by a constant",
    must=("head.multiplied", "start.loss_high"),
    repair="Drop the factor between the head and the loss, or start the head smaller by it. A temperature that "
    "sharpens belongs to sampling (generate(temperature=...)), and a logit scale of its own to normalised vectors "
    "only (CLIP).",
    refute="The logits are the head's weights times its input.",
    look="What stands between the head and the loss: a temperature, a scale, a softcap before its tanh.",
    source="Guo et al., 2017, section 4.2 (temperature); Radford et al., 2021, section 2.5 (logit scale)",
)

DEAD = Cause(
    id="head.dead",
    title="The output is dead: no gradient passes it",
    must=("arrival.dead",),
    may=("movement.none",),
    cannot=("flow.zero", "adapter.dead", "backward.lost", "objective.clamped"),
    place="model",
    repair="Drop the activation behind the last layer: a ReLU is 0, with a slope of 0, for all that is negative. For "
    "an output that has to be positive take softplus or exp, which have a slope everywhere. A factor or a matrix of "
    "zeros there stops gradients as well.",
    refute="Some parameter has a gradient that is not 0.",
    look="What the module named gives out: the same for every row?",
    source="Lu et al., 2019, Dying ReLU and Initialization",
)


@fault(
    "head.scaled",
    title="Logits are multiplied by a constant",
    cause="head.scaled",
    moves="head.factor",
    repair=SCALED.repair,
)
class Scaled(Fault):
    """Multiplies what the head gives out by `factor`."""

    at: str = "head"
    factor: Annotated[float, Gt(0)] = 30.0

    def lab_start(self, run: Run) -> None:
        self.from_the_start()
        if run.config is not None and run.config.train.start:
            raise BadInput("head.scaled: needs a new model, whose loss starts where theory says")
        self.replace(run, f"{self.at}.out", lambda logits: logits * self.factor)
