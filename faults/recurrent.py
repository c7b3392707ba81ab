"""Recurrences that remember nothing, too much, or what is not theirs; and the causes behind them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt

from lab import BadInput, Cause, Fault, fault, torch

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from torch import Tensor, nn

    from lab import Run

CARRIED = Cause(
    id="recurrent.state_carried",
    title="The state of a recurrence is kept from one batch to the next",
    must=("recurrence.carried", "evaluation.random"),
    may=("evaluation.random_site", "mixing.*", "generation.*", "start.*"),
    repair="Begin each batch from zeros: call the layer without a state. Where a state is meant to go on (truncated "
    "backpropagation), row i of a batch must continue row i of the one before: detach the state, and begin anew for "
    "evaluation and for each new text.",
    refute="The output for a batch is the same whatever batch came before.",
    look="Where the layer's last state is kept, and whether rows of consecutive batches belong together.",
    source="Merity et al., 2018, section 5 (states carried over in order); PyTorch documentation: nn.LSTM, h_0",
)

RESET = Cause(
    id="recurrent.state_reset",
    title="A recurrence forgets its state at each position",
    must=("recurrence.reset",),
    repair="Give each position the state of the one before: h = cell(x[:, t], h), or the whole row in one call, with "
    "positions on the axis that the layer takes for time (batch_first=True for [B T C]).",
    refute="An output depends on an earlier position of its input.",
    look="Whether positions were folded into the batch (view(B * T, 1, C)), and which state the loop hands on.",
    source="PyTorch documentation: nn.RNN, batch_first",
)

EXPLODES = Cause(
    id="recurrent.explodes",
    title="The matrix on a recurrence's state is far too large",
    must=("recurrence.grows",),
    # Clipping makes all other gradients so small beside these that what they belong to stays.
    may=("movement.none", "weight.nonfinite", "gradient.nonfinite", "loss.nonfinite", "value.nonfinite"),
    repair="Start the matrix on the state orthogonal (nn.init.orthogonal_(layer.weight_hh_l0), gate by gate), with "
    "gain 1 for tanh. Clipping bounds the step that is taken, not which positions it learns from.",
    refute="The gradient at the first position is no larger than that at the last.",
    look="The largest singular value of weight_hh, and how it was initialised.",
    source="Pascanu et al., 2013, section 2.1; Saxe et al., 2014 (orthogonal matrices)",
)

CLOSED = Cause(
    id="recurrent.forget_closed",
    title="The forget gate of an LSTM is shut",
    must=("recurrence.forgets",),
    repair="Start the bias of the forget gate at 0 or 1. In torch.nn it is the second quarter of bias_ih and bias_hh "
    "(i, f, g, o); other libraries stack the gates in another order, and their weights have to be put in order.",
    refute="In some unit the forget gate is above 1/4096 on average.",
    look="The second quarter of bias_ih + bias_hh, and the order of the gates where weights were converted.",
    source="Gers et al., 2000; Jozefowicz et al., 2015, section 4 (forget bias)",
)


def recurrences(run: Run, model: nn.Module, fault: Fault, kinds: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield the recurrences at `fault.at`; only those of so many gates, if that is given.

    Raises:
        BadInput: There is none, or the training is not the lab's own.
    """
    found = False
    for name, module in model.named_modules() if run.config is not None else ():
        weight = dict(module.named_parameters(recurse=False)).get("weight_hh")
        if weight is not None and fault.holds(name) and kinds in (0, len(weight) // weight.shape[1]):
            found = True
            yield name, module
    if not found:
        raise BadInput(f"{fault.info.id}: no such recurrence at {fault.at!r}")


@fault(
    "recurrent.state_carried",
    title="Each batch begins with the state in which the one before ended",
    cause="recurrent.state_carried",
    moves="recurrence.carried",
    repair=CARRIED.repair,
)
class StateCarried(Fault):
    """Gives a recurrence its own last state, detached, wherever the batch has as many rows; else it begins anew."""

    at: str = "blocks.0.attn.core"

    def lab_start(self, run: Run) -> None:
        for _, layer in [*recurrences(run, run.model, self)]:
            self._carry(run, layer)

    def _carry(self, run: Run, layer: nn.Module) -> None:
        kept: list[Any] = []

        def before(_layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if len(args) != 1 or not kept or not self.active(run):
                return None
            state = kept[0]
            rows = (state[0] if isinstance(state, tuple) else state).shape[0]
            return (args[0], state) if rows == args[0].shape[0] else None

        def after(_layer: nn.Module, _args: tuple[Any, ...], output: tuple[Tensor, Any]) -> None:
            state = output[1]
            kept[:] = [tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()]

        run.cleanup.callback(layer.register_forward_pre_hook(before).remove)
        run.cleanup.callback(layer.register_forward_hook(after).remove)
        run.cleanup.callback(kept.clear)


@fault(
    "recurrent.state_reset",
    title="The state is zero again at each position",
    cause="recurrent.state_reset",
    moves="recurrence.earlier",
    repair=RESET.repair,
)
class StateReset(Fault):
    """Calls a recurrence with each position as a row of its own."""

    at: str = "blocks.0.attn.core"

    def lab_start(self, run: Run) -> None:
        for _, layer in [*recurrences(run, run.model, self)]:
            self._reset(run, layer)

    def _reset(self, run: Run, layer: nn.Module) -> None:
        shape: list[int] = []

        def before(_layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            shape[:] = args[0].shape[:2] if self.active(run) else []
            return (args[0].flatten(0, 1)[:, None],) if shape else None

        def after(_layer: nn.Module, _args: tuple[Any, ...], output: tuple[Tensor, Any]) -> Any:
            return (output[0].reshape(*shape, output[0].shape[-1]), output[1]) if shape else None

        run.cleanup.callback(layer.register_forward_pre_hook(before).remove)
        run.cleanup.callback(layer.register_forward_hook(after).remove)


@fault(
    "recurrent.explodes",
    title="The matrix on the state starts far too large",
    cause="recurrent.explodes",
    moves="recurrence.growth",
    repair=EXPLODES.repair,
)
class Explodes(Fault):
    """Multiplies the matrix on the state by `factor`, of a plain recurrence: gates that saturate hold growth back.

    The growth for each position is about sqrt(factor / 2): it takes some fifty positions to be beyond all bits.
    """

    at: str = "blocks.0.attn.core"
    factor: Annotated[float, Gt(1)] = 8.0

    def lab_build_model(self, run: Run) -> Generator[None, nn.Module, nn.Module]:
        self.from_the_start()
        model = yield
        with torch.no_grad():
            for _, layer in recurrences(run, model, self, kinds=1):
                layer.weight_hh.mul_(self.factor)
        return model


@fault(
    "recurrent.forget_closed",
    title="The forget gate starts shut",
    cause="recurrent.forget_closed",
    moves="recurrence.forget",
    repair=CLOSED.repair,
)
class ForgetClosed(Fault):
    """Starts the bias of an LSTM's forget gate at -`bias`."""

    at: str = "blocks.0.attn.core"
    bias: Annotated[float, Ge(0)] = 14.0

    def lab_build_model(self, run: Run) -> Generator[None, nn.Module, nn.Module]:
        self.from_the_start()
        model = yield
        with torch.no_grad():
            for _, layer in recurrences(run, model, self, kinds=4):
                layer.bias_ih[layer.hidden : 2 * layer.hidden] = -self.bias
        return model
