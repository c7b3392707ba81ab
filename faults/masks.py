"""Masks that let through what they should hide, and the causes behind them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from annotated_types import Interval

from lab import Cause, Fault, fault

if TYPE_CHECKING:
    from torch import Tensor

    from lab import Run

FUTURE_LEAK = Cause(
    id="mask.future_leak",
    title="Attention sees later tokens",
    must=("causality.future",),
    may=("causality.leak", "attention.future"),
    cannot=("causality.blind",),
    locate=("causality.leak",),
    repair="Mask the scores above the diagonal before the softmax: is_causal=True, or "
    "scores.masked_fill(~torch.ones(T, T, dtype=bool).tril(), -inf). To nn.TransformerEncoder pass mask=...; "
    "by itself it has none.",
    refute="d out_i / d x_j is 0 for all j > i.",
    look="The mask of the layer named, and its diagonal: an offset of one is enough.",
    source="Vaswani et al., 2017, section 3.2.3",
)

INVERTED = Cause(
    id="mask.inverted",
    title="The causal mask is the wrong way round",
    must=("causality.blind", "causality.future"),
    may=("causality.leak", "attention.future", "attention.rows"),
    locate=("causality.blind",),
    repair="Exchange the two values of the mask. For scaled_dot_product_attention True means 'look here'; for "
    "nn.MultiheadAttention and nn.TransformerEncoder True means 'do not look here'.",
    refute="The layer's output depends on an earlier position.",
    look="Which convention the attention called here takes, and where the mask was made.",
    source="PyTorch documentation: scaled_dot_product_attention, attn_mask; MultiheadAttention, attn_mask",
)


@fault(
    "mask.future_leak",
    title="Each position also sees the ones after it",
    cause="mask.future_leak",
    moves="causality.future",
    repair=FUTURE_LEAK.repair,
)
class FutureLeak(Fault):
    """Moves the causal mask's diagonal up by `offset`: position t sees s <= t + offset."""

    at: str = "blocks.*.attn"
    offset: Annotated[int, Interval(ge=1, le=65536)] = 1

    def lab_start(self, run: Run) -> None:
        self.replace(run, f"{self.at}.mask", self.change)

    def change(self, mask: Tensor) -> Tensor:  # [T S] -> [T S]
        return mask.new_ones(mask.shape).tril(mask.shape[1] - mask.shape[0] + self.offset)


@fault(
    "mask.inverted",
    title="Each position sees only the ones after it",
    cause="mask.inverted",
    moves="causality.future",
    repair=INVERTED.repair,
)
class Inverted(Fault):
    """Exchanges True and False in the mask."""

    at: str = "blocks.*.attn"

    def lab_start(self, run: Run) -> None:
        self.replace(run, f"{self.at}.mask", lambda mask: ~mask)
