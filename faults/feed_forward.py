"""Feed-forward layers without an activation, or with neurons that cannot speak or learn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from annotated_types import Gt, Interval

from lab import BadInput, Cause, Fault, fault, torch

if TYPE_CHECKING:
    from collections.abc import Generator

    from torch import Tensor, nn

    from lab import Run

LINEAR = Cause(
    id="ffn.no_activation",
    title="A feed-forward layer has no activation",
    must=("ffn.linear*",),
    repair="Apply the activation between the two matrices: down(F.gelu(up(x))). An nn.Identity left as a placeholder, "
    "or a result that is not assigned (F.relu(x) instead of x = F.relu(x)), leaves the layer linear.",
    refute="What enters the second matrix differs from what the first gives out.",
    look="The line between the two matrices, and what the name of the activation in the configuration resolves to.",
    source="Vaswani et al., 2017, section 3.3, equation 2",
)

DEAD = Cause(
    id="ffn.dead",
    title="All neurons of a feed-forward layer are dead",
    must=("ffn.silent",),
    repair="Start biases at 0 (nn.init.zeros_(up.bias)), and lower the learning rate if they get there by training. A "
    "neuron that is below 0 at every token has a gradient of 0 with ReLU and GELU: nothing brings it back.",
    refute="One neuron of the layer named is above 0 at one token.",
    look="The bias and the size of the first matrix, and what the layer is given.",
    source="Lu et al., 2019, Dying ReLU and Initialization: Theory and Numerical Examples",
)

SATURATED = Cause(
    id="ffn.saturated",
    title="Most hidden values lie where their activation is flat",
    must=("ffn.flat",),
    repair="Widen or drop the bounds (clamp, ReLU6, hardtanh), or make what the activation is given smaller: a norm "
    "before the layer, weights of standard deviation 1 / sqrt(fan_in). At a bound the gradient is exactly 0.",
    refute="The derivative of the hidden values by what the activation is given is not 0 at most entries.",
    look="clamp, clip and bounded functions between the two matrices, against the size of what they are given.",
    source="Glorot and Bengio, 2010, section 3; PyTorch documentation: torch.clamp",
)

DROPPED = Cause(
    id="ffn.neurons_dropped",
    title="The same neurons are left out at every token",
    must=("ffn.cut",),
    repair="Draw a dropout mask anew in each forward pass, and none in evaluation: nn.Dropout does both. A mask made "
    "in __init__, or kept as a buffer, removes its neurons for good.",
    refute="Each neuron that is given something above 0 gives out something.",
    look="What the hidden values are multiplied by, and where it is made.",
    source="Srivastava et al., 2014, section 4",
)


class _Layers(Fault):
    """Acts on the feed-forward layers with one activation between two matrices that are named."""

    def layers(self, run: Run) -> list[nn.Module]:
        """Return them.

        Raises:
            BadInput: There is none. A gated layer without its activation is a layer of another kind.
        """
        found = [m for name, m in run.model.named_modules() if self.holds(name) and hasattr(m, "activation")]
        if not found:
            raise BadInput(f"{self.info.id}: no feed-forward layer with an activation of its own at {self.at!r}")
        return found


@fault(
    "ffn.no_activation",
    title="Nothing stands between the two matrices",
    cause="ffn.no_activation",
    moves="ffn.bend",
    repair=LINEAR.repair,
)
class NoActivation(_Layers):
    """Passes on what the first matrix gives as it is."""

    at: str = "blocks.0.mlp"

    def lab_start(self, run: Run) -> None:
        for layer in self.layers(run):
            self.patch(run, layer)

    def patch(self, run: Run, layer: nn.Module) -> None:
        right = layer.activation

        def activation(x: Tensor) -> Tensor:
            return x if self.active(run) else right(x)  # type: ignore[operator]

        layer.activation = activation  # type: ignore[assignment]
        run.cleanup.callback(setattr, layer, "activation", right)


@fault(
    "ffn.dead",
    title="Biases start so far below 0 that no neuron ever speaks",
    cause="ffn.dead",
    moves="ffn.silent",
    repair=DEAD.repair,
)
class Dead(_Layers):
    """Sets the biases of the first matrix to `bias`."""

    at: str = "blocks.0.mlp"
    bias: Annotated[float, Interval(ge=-1e4, le=-10)] = -20.0

    def lab_build_model(self, run: Run) -> Generator[None, nn.Module, nn.Module]:
        self.from_the_start()
        if run.config.train.start:
            raise BadInput("ffn.dead: needs a new model, and this one is trained already (train.start)")
        model = yield
        found = [(name, m) for name, m in model.named_modules() if self.holds(name) and hasattr(m, "activation")]
        with torch.no_grad():
            # A sigmoid or SiLU is never exactly 0, and always has a slope.
            dead = [m for _, m in found if float(m.activation(torch.tensor(self.bias))) == 0]
            if not dead:
                raise BadInput(f"ffn.dead: no feed-forward layer at {self.at!r} whose activation is 0 at {self.bias}")
            for layer in dead:
                layer.get_parameter("up.bias").fill_(self.bias)
        return model


@fault(
    "ffn.saturated",
    title="Hidden values are clamped to a range that most of them reach",
    cause="ffn.saturated",
    moves="ffn.flat",
    repair=SATURATED.repair,
)
class Saturated(Fault):
    """Clamps the hidden values to plus or minus `limit`."""

    at: str = "blocks.0.mlp"
    limit: Annotated[float, Gt(0)] = 0.001

    def lab_start(self, run: Run) -> None:
        self.replace(run, f"{self.at}.hidden", lambda x: x.clamp(-self.limit, self.limit))


@fault(
    "ffn.neurons_dropped",
    title="A dropout mask is drawn once, and kept",
    cause="ffn.neurons_dropped",
    moves="ffn.cut",
    repair=DROPPED.repair,
)
class NeuronsDropped(Fault):
    """Multiplies the hidden values by one mask, drawn from the run's seed: 0 for `share` of the neurons, else 1."""

    at: str = "blocks.0.mlp"
    share: Annotated[float, Interval(gt=0, lt=1)] = 0.3

    def lab_start(self, run: Run) -> None:
        self.seed = run.seed
        self.replace(run, f"{self.at}.hidden", self.change)

    def change(self, x: Tensor) -> Tensor:  # [B T F]
        draw = torch.Generator().manual_seed(self.seed)
        kept = torch.rand(x.shape[-1], generator=draw) >= self.share
        return x * kept.to(x.device)
