"""Memory that does not keep what was put there: bits that flip, and rows that are lost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Interval

from lab import BadInput, Cause, Fault, fault, torch

if TYPE_CHECKING:
    from torch import Tensor

    from lab import Run

WEIGHT_FLIP = Cause(
    id="weights.bit_flip",
    title="A bit of a weight flipped in memory",
    must=("integrity.weight_bit",),
    may=("*",),  # a weight of 10^36 ends anywhere
    repair="Go back to a checkpoint from before the step named, on another device; clipping does not help, as the "
    "weight is wrong already. Test the device (dcgmi diag -r 3), read its ECC counters (nvidia-smi -q -d ECC), and "
    "keep checksums of weights between updates.",
    refute="The weight named was set by a line of the training loop at that step.",
    look="The ECC and Xid counters of the device, and whether it happens again on another.",
    source="Altenbernd et al., 2026 (arXiv:2604.00726), on silent corruption; Grattafiori et al., 2024, section 3.3",
)

STATE_FLIP = Cause(
    id="optimizer.state_flip",
    title="A bit of the optimiser's memory flipped",
    must=("integrity.state_bit",),
    may=("*",),  # the weight that it divides or moves stands still, or leaps
    repair="Go back to a checkpoint from before the step named, with the optimiser's state. A second moment that "
    "became huge stops its weight for thousands of steps, and no loss shows it: keep checksums of optimizer.state too.",
    refute="The state named was set by a line of the training loop at that step.",
    look="The ECC and Xid counters of the device, and whether it happens again on another.",
    source="Altenbernd et al., 2026 (arXiv:2604.00726); Kingma and Ba, 2015, algorithm 1",
)

ROWS = Cause(
    id="weights.reset_rows",
    title="Rows of the output table that had been learned were set anew in the middle of training",
    must=("integrity.rows_reset",),
    may=("loss.*", "gradient.*", "spectrum.*"),
    repair="Add or re-initialise rows before training, and only those of new tokens: with "
    "model.resize_token_embeddings(n) copy what was learned, and call it before the optimiser is built.",
    refute="The rows named belong to classes that were never a target.",
    look="What runs between two updates at that step: resize_token_embeddings, an init of 'unused' tokens, a mask.",
    source="Hugging Face Transformers documentation: resize_token_embeddings (new rows are drawn at random)",
)


def trained(run: Run, fault: Fault) -> dict[str, Tensor]:
    """Return the trainable parameters that a fault names, of numbers in 32 bits.

    Raises:
        BadInput: There is none.
    """
    found: dict[str, Tensor] = {
        name: p for name, p in run.parameters.items() if fault.holds(name) and p.dtype == torch.float32
    }
    if not found:
        raise BadInput(f"{fault.info.id}: no trainable parameter in float32 at {fault.at!r}")
    return found


def flip(x: Tensor, element: int, bit: int) -> None:
    """Flip one bit of one element of a tensor in float32, counted modulo its size."""
    place = element % x.numel()
    one = -(2**31) if bit == 31 else 2**bit  # as an integer of 32 bits
    x.detach().view(torch.int32).view(-1)[place] ^= one


@fault(
    "weights.bit_flip",
    title="One bit of one weight flips",
    cause="weights.bit_flip",
    moves="integrity.changed",
    repair=WEIGHT_FLIP.repair,
)
class WeightFlip(Fault):
    """Flips bit `bit` (31 is the sign, 30 to 23 the exponent) of one element of the first parameter at `at`, once."""

    at: str = "blocks.0.mlp.up"
    from_step: Annotated[int, Ge(1)] = 10
    bit: Annotated[int, Interval(ge=0, le=31)] = 30
    element: Annotated[int, Ge(0)] = 7

    def lab_start(self, run: Run) -> None:
        trained(run, self)

    def lab_zero_grad(self, run: Run) -> None:
        if run.step.index == self.from_step:
            flip(next(iter(trained(run, self).values())), self.element, self.bit)


@fault(
    "optimizer.state_flip",
    title="One bit of the optimiser's memory flips",
    cause="optimizer.state_flip",
    moves="integrity.state_changed",
    repair=STATE_FLIP.repair,
)
class StateFlip(Fault):
    """Flips a bit of one element of what the optimiser keeps as `key` for the first parameter at `at`, once."""

    at: str = "blocks.0.mlp.up"
    from_step: Annotated[int, Ge(1)] = 10
    bit: Annotated[int, Interval(ge=0, le=31)] = 30
    element: Annotated[int, Ge(0)] = 7
    key: str = "exp_avg_sq"

    def lab_start(self, run: Run) -> None:
        held = run.held
        if not any(id(p) in held for p in trained(run, self).values()):
            raise BadInput(f"optimizer.state_flip: the optimiser holds no parameter at {self.at!r}")

    def lab_zero_grad(self, run: Run) -> None:
        if run.step.index == self.from_step:
            states = [run.optimizer.state.get(p, {}) for p in trained(run, self).values()]
            found = [state[self.key] for state in states if self.key in state]
            if not found:
                raise BadInput(f"optimizer.state_flip: the optimiser keeps no {self.key!r} at {self.at!r}")
            flip(found[0], self.element, self.bit)


@fault(
    "weights.reset_rows",
    title="Rows of the output table are drawn anew during training",
    cause="weights.reset_rows",
    moves="integrity.rows_changed",
    repair=ROWS.repair,
)
class ResetRows(Fault):
    """Draws every `each`-th row of the table at `at` anew, once; rows of 0 with `std` = 0."""

    at: str = "head.weight"
    from_step: Annotated[int, Ge(1)] = 10
    each: Annotated[int, Ge(2)] = 2
    std: Annotated[float, Ge(0)] = 0.02

    def lab_start(self, run: Run) -> None:
        tables = [p for p in trained(run, self).values() if p.dim() == 2]
        if not tables:
            raise BadInput(f"weights.reset_rows: no trainable table at {self.at!r}")
        self._table = tables[0]

    def lab_zero_grad(self, run: Run) -> None:
        if run.step.index == self.from_step:
            rows = self._table.detach()[:: self.each]
            draw = torch.Generator(device=rows.device).manual_seed(run.seed)
            rows.copy_(torch.randn(rows.shape, generator=draw, device=rows.device) * self.std)
