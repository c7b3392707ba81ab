"""Norms that do not normalise, or over what they should not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from annotated_types import Gt

from lab import BadInput, Cause, Fault, fault, torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from lab import Run

MISSING = Cause(
    id="norm.missing",
    title="A norm does not normalise",
    must=("norm.identity",),
    may=("start.*", "value.nonfinite", "gradient.nonfinite", "loss.nonfinite", "weight.nonfinite"),
    repair="Divide by the root mean square: call the norm on the way into each branch, and use what it returns. "
    "An nn.Identity left as a placeholder, or a result that is not assigned, passes the input on as it is.",
    refute="An input that is 1024 times as large gives the same output.",
    look="What the norm named returns, and whether its result is what the branch is given.",
    source="Ba, Kiros and Hinton, 2016, section 3",
)

WRONG_AXIS = Cause(
    id="norm.wrong_axis",
    title="A norm takes its statistics over other tokens",
    must=("norm.other_tokens",),
    may=("causality.leak", "attention.future", "mixing.padding*", "generation.*"),
    locate=("norm.other_tokens", "causality.future", "mixing.padding"),
    repair="Take mean and variance over the last dimension, the width, with keepdim=True: x.mean(-1, keepdim=True). "
    "Over positions or rows, each token is told what the others are, those that come later too.",
    refute="The output at one token does not move when the others change.",
    look="The dim of mean and var in the norm named, and the layout of what it is given: [B T C] or [T B C].",
    source="Ba, Kiros and Hinton, 2016, section 3, equation 3",
)

EPS_HUGE = Cause(
    id="norm.eps_huge",
    title="A norm's eps outweighs what it normalises",
    must=("norm.eps",),
    repair="Set eps to 1e-5 (layer norm) or 1e-6 (RMS norm). Mind the order of positional arguments, and what a "
    "configuration file calls eps.",
    refute="The output of the norm, without gain and shift, has mean square 1.",
    look="module.eps, against the variance of what the module is given.",
    source="PyTorch documentation: torch.nn.LayerNorm, eps",
)

SHIFTED = Cause(
    id="norm.shifted",
    title="A norm adds a constant to what it gives out",
    must=("norm.offset",),
    repair="Give out x_hat * weight + bias. A gain that is stored as its distance from 1 is x_hat * (1 + weight), not "
    "x_hat * weight + 1; and a bias is added once.",
    refute="An input of 0 gives the bias.",
    look="The last line of the norm's forward, and how its weights were converted.",
    source="Ba, Kiros and Hinton, 2016, section 3; PyTorch documentation: torch.nn.LayerNorm",
)

SUM_NOT_MEAN = Cause(
    id="norm.sum_not_mean",
    title="A norm divides by the root of the sum of squares, not of their mean",
    must=("norm.sum",),
    repair="Divide by x.square().mean(-1, keepdim=True).add(eps).sqrt(). x.norm(dim=-1) and F.normalize give vectors "
    "of length 1, whose elements are sqrt(C) times too small: multiply by sqrt(C), or use nn.RMSNorm.",
    refute="The output of the norm, without gain and shift, has mean square 1.",
    look="What the norm named divides by.",
    source="Zhang and Sennrich, 2019, Root Mean Square Layer Normalization, equation 4",
)


class _Norms(Fault):
    def norms(self, run: Run) -> Iterator[nn.Module]:
        """The norms that are named, which have a gain and an eps."""
        found = [m for name, m in run.model.named_modules() if self.holds(name) and hasattr(m, "eps")]
        if not found:
            raise BadInput(f"{self.info.id}: no norm at {self.at!r}")
        yield from found

    def act(self, run: Run) -> None:
        """Put what `make` makes of their inputs in the place of their outputs."""

        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
            return self.make(module, args[0]) if self.active(run) else output

        for norm in self.norms(run):
            run.cleanup.callback(norm.register_forward_hook(hook).remove)

    def make(self, norm: nn.Module, x: Tensor) -> Tensor:  # [... T C] -> [... T C]
        raise NotImplementedError


def _gained(norm: nn.Module, x: Tensor) -> Tensor:
    weight, bias = norm.weight, getattr(norm, "bias", None)
    assert torch.is_tensor(weight)
    return x * weight if bias is None else x * weight + bias


@fault(
    "norm.missing",
    title="A norm passes its input on as it is",
    cause="norm.missing",
    moves="norm.follows_scale",
    repair=MISSING.repair,
)
class Missing(_Norms):
    """Leaves gain and shift, and takes out what stands before them."""

    at: str = "blocks.0.mlp_norm"

    def lab_start(self, run: Run) -> None:
        self.act(run)

    def make(self, norm: nn.Module, x: Tensor) -> Tensor:
        return _gained(norm, x)


@fault(
    "norm.wrong_axis",
    title="A norm takes mean and variance over the positions",
    cause="norm.wrong_axis",
    moves="norm.other_tokens",
    repair=WRONG_AXIS.repair,
)
class WrongAxis(_Norms):
    """Normalises each feature over the positions of a row, in place of each position over its features."""

    at: str = "blocks.0.attn_norm"

    def lab_start(self, run: Run) -> None:
        self.act(run)

    def make(self, norm: nn.Module, x: Tensor) -> Tensor:
        eps = float(norm.eps)  # type: ignore[arg-type]
        variance, mean = torch.var_mean(x, dim=-2, correction=0, keepdim=True)  # [... 1 C]
        return _gained(norm, (x - mean) * (variance + eps).rsqrt())


@fault(
    "norm.eps_huge",
    title="A norm's eps is far larger than any variance",
    cause="norm.eps_huge",
    moves="norm.eps",
    repair=EPS_HUGE.repair,
)
class EpsHuge(_Norms):
    """Sets `eps` of the norms named."""

    at: str = "blocks.0.attn_norm"
    eps: Annotated[float, Gt(0)] = 100.0

    def lab_start(self, run: Run) -> None:
        self.from_the_start()
        for norm in self.norms(run):
            run.cleanup.callback(setattr, norm, "eps", norm.eps)
            norm.eps = self.eps  # type: ignore[assignment]


@fault(
    "norm.shifted",
    title="A constant is added to what a norm gives out",
    cause="norm.shifted",
    moves="norm.offset",
    repair=SHIFTED.repair,
)
class Shifted(_Norms):
    """Adds `shift` to every element."""

    at: str = "blocks.0.mlp_norm"
    shift: Annotated[float, Gt(0)] = 1.0

    def lab_start(self, run: Run) -> None:
        def hook(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
            return output + self.shift if self.active(run) else output

        for norm in self.norms(run):
            run.cleanup.callback(norm.register_forward_hook(hook).remove)


@fault(
    "norm.sum_not_mean",
    title="A norm divides by the length of its input",
    cause="norm.sum_not_mean",
    moves="norm.factor",
    repair=SUM_NOT_MEAN.repair,
)
class SumNotMean(_Norms):
    """Takes the sum over the width where its mean should stand; a layer norm still subtracts the mean."""

    at: str = "blocks.0.mlp_norm"

    def lab_start(self, run: Run) -> None:
        self.act(run)

    def make(self, norm: nn.Module, x: Tensor) -> Tensor:
        eps = float(norm.eps)  # type: ignore[arg-type]
        x = x - x.mean(-1, keepdim=True) if getattr(norm, "bias", None) is not None else x
        return _gained(norm, x * (x.square().sum(-1, keepdim=True) + eps).rsqrt())
