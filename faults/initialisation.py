"""Weights that start wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from annotated_types import Gt

from lab import BadInput, Cause, Fault, fault, torch

if TYPE_CHECKING:
    from collections.abc import Generator

    from torch import nn

    from lab import Run

TOO_LARGE = Cause(
    id="init.too_large",
    title="Weights start too large",
    must=("start.loss_high",),
    may=("start.scale_high",),
    locate=("start.scale_high",),
    place="head",
    module=True,
    repair="Initialise with standard deviation gain / sqrt(fan_in); the head, and a table tied to it, smaller still "
    "(0.02 in GPT-2). nn.Embedding starts with 1, which is too large for a tied head.",
    refute="At step 0 the standard deviation of the logits is at most sqrt(2).",
    look="The standard deviation of each matrix at step 0 against sqrt(2 / fan_in).",
    source="He et al., 2015, section 2.2; Glorot and Bengio, 2010",
)

SYMMETRIC = Cause(
    id="init.symmetric",
    title="Neurons start as copies of each other",
    must=("flow.twins",),
    module=True,
    repair="Draw each weight at random: neurons with equal weights in and out have equal gradients, and stay equal. "
    "torch.full, expand or repeat of one row make such copies.",
    refute="Two rows of the weight differ after an update.",
    look="How the weight named is filled, and whether the layer that reads it treats all its outputs alike.",
    source="Goodfellow, Bengio and Courville, 2016, section 8.4",
)

ZERO = Cause(
    id="init.zero",
    title="A weight starts at 0 and has no gradient to leave it",
    must=("flow.zero",),
    may=("ffn.silent", "arrival.dead"),  # a ReLU of 0 is 0, with a slope of 0
    repair="Of two matrices in a row, at most one may start at 0: the gradient of each is a product with the other.",
    refute="The gradient of the weight named is not 0 at some step.",
    look="The initialisation of the layers before and after the one named.",
    source="Goodfellow, Bengio and Courville, 2016, section 8.4; Hu et al., 2021, section 4.1 (one factor at 0)",
)

TOO_SMALL = Cause(
    id="init.too_small",
    title="Matrices start far too small",
    must=("start.scale_low",),
    may=("flow.zero", "stream.*", "arrival.dead"),
    place="blocks",
    repair="Initialise with standard deviation gain / sqrt(fan_in), 0.02 at that order: a variance where a standard "
    "deviation is meant (normal_(std=0.02**2)), or a scale applied twice, makes branches that give out nothing.",
    refute="Some matrix of the layers starts with at least a hundredth of sqrt(2 / fan_in).",
    look="The standard deviation of each matrix at step 0 against sqrt(2 / fan_in).",
    source="Glorot and Bengio, 2010, section 4.2; Radford et al., 2019, section 2.3 (0.02, and less by depth)",
)


def _of_a_new_model(fault: Fault, run: Run) -> None:
    """A model that was trained before is not initialised here."""
    if run.config.train.start:
        raise BadInput(f"{fault.info.id}: needs a new model, and this one is trained already (train.start)")


@fault(
    "init.too_large",
    title="Matrices start with a standard deviation far too large",
    cause="init.too_large",
    moves="start.loss",
    repair=TOO_LARGE.repair,
)
class TooLarge(Fault):
    """Scales the matrices of the modules named to standard deviation `std`."""

    at: str = "head"
    std: Annotated[float, Gt(0)] = 1.0

    def lab_build_model(self, run: Run) -> Generator[None, nn.Module, nn.Module]:
        self.from_the_start()
        _of_a_new_model(self, run)
        model = yield
        matrices = [p for name, p in model.named_parameters() if p.dim() >= 2 and self.holds(name)]
        if not matrices:
            raise BadInput(f"init.too_large: no matrix at {self.at!r}")
        with torch.no_grad():
            for p in matrices:
                p.mul_(self.std / p.std())
        return model


@fault(
    "init.symmetric",
    title="All neurons of a feed-forward layer start alike",
    cause="init.symmetric",
    moves="flow.twins",
    repair=SYMMETRIC.repair,
)
class Symmetric(Fault):
    """Gives every neuron the weights in of the first one, and weights out that are the mean over all."""

    at: str = "blocks.0.mlp"

    def lab_build_model(self, run: Run) -> Generator[None, nn.Module, nn.Module]:
        self.from_the_start()
        _of_a_new_model(self, run)
        model = yield
        names = [name for name, _ in model.named_modules() if name.endswith(".up") and self.holds(name)]
        if not names:
            raise BadInput(f"init.symmetric: no feed-forward layer at {self.at!r}")
        with torch.no_grad():
            for name in names:
                layer = model.get_submodule(name.removesuffix(".up"))
                for p_name, p in layer.named_parameters():
                    if p.dim() == 2:
                        alike = p.mean(1, keepdim=True) if p_name.startswith("down") else p[:1].clone()
                        p.copy_(alike.expand_as(p))
        return model


@fault(
    "init.zero",
    title="All matrices of a branch start at 0",
    cause="init.zero",
    moves="flow.size",
    repair=ZERO.repair,
)
class Zero(Fault):
    """Sets every matrix of the modules named to 0."""

    at: str = "blocks.0.mlp"

    def lab_build_model(self, run: Run) -> Generator[None, nn.Module, nn.Module]:
        self.from_the_start()
        _of_a_new_model(self, run)
        model = yield
        matrices = [p for name, p in model.named_parameters() if p.dim() >= 2 and self.holds(name)]
        if not matrices:
            raise BadInput(f"init.zero: no matrix at {self.at!r}")
        with torch.no_grad():
            for p in matrices:
                p.zero_()
        return model


@fault(
    "init.too_small",
    title="All matrices of the blocks start far too small",
    cause="init.too_small",
    moves="start.scale",
    repair=TOO_SMALL.repair,
)
class TooSmall(Fault):
    """Multiplies every matrix at `at` by `factor`."""

    at: str = "blocks"
    factor: Annotated[float, Gt(0)] = 1e-3

    def lab_build_model(self, run: Run) -> Generator[None, nn.Module, nn.Module]:
        self.from_the_start()
        _of_a_new_model(self, run)
        model = yield
        matrices = [p for name, p in model.named_parameters() if p.dim() >= 2 and self.holds(name)]
        if len(matrices) < 4:
            raise BadInput(f"init.too_small: fewer than four matrices at {self.at!r}")
        with torch.no_grad():
            for p in matrices:
                p.mul_(self.factor)
        return model
