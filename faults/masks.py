"""Masks that let through what they should hide, and the causes behind them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from annotated_types import Interval

from lab import BadInput, Cause, Fault, fault, torch

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
    may=("causality.leak", "attention.future", "attention.rows", "attention.hidden_past"),
    locate=("causality.blind",),
    repair="Exchange the two values of the mask. For scaled_dot_product_attention True means 'look here'; for "
    "nn.MultiheadAttention and nn.TransformerEncoder True means 'do not look here'.",
    refute="The layer's output depends on an earlier position.",
    look="Which convention the attention called here takes, and where the mask was made.",
    source="PyTorch documentation: scaled_dot_product_attention, attn_mask; MultiheadAttention, attn_mask",
)

PARTIAL_LEAK = Cause(
    id="mask.partial_leak",
    title="Some positions see later tokens, and most do not",
    must=("attention.partial",),
    may=("causality.leak", "attention.future"),
    cannot=("causality.blind",),
    locate=("attention.partial", "causality.future"),
    module=True,
    repair="Hide the whole triangle above the diagonal, in every row: compare with torch.ones(T, T).tril(). Rows that "
    "a second mask opens (a prefix, a separator, a global token) must be closed where the next token is learned.",
    refute="No row of the pattern reaches a later position.",
    look="Which rows reach later positions, and what they have in common.",
    source="Vaswani et al., 2017, section 3.2.3; Liu et al., 2018 (prefix masks)",
)

BLOCKS_PAST = Cause(
    id="mask.blocks_past",
    title="The mask hides earlier positions",
    must=("attention.hidden_past",),
    cannot=("causality.blind",),
    module=True,
    repair="Let every position see all up to itself. Where a window is meant, give its width to the layer named, and "
    "check that it is counted in positions and not in blocks.",
    refute="Every position puts weight on each position before it.",
    look="The lower edge of the mask of the layer named.",
    source="Beltagy et al., 2020 (sliding windows)",
)

PADDING_SEEN = Cause(
    id="mask.padding_seen",
    title="Attention sees padding",
    must=("mixing.padding",),
    may=("mixing.padding_module",),
    cannot=("mixing.rows",),
    locate=("mixing.padding_module",),
    place="model",
    repair="Hide the keys of padding in every layer: src_key_padding_mask for nn.TransformerEncoder (True is padding), "
    "attention_mask for Hugging Face models (1 is a token), attn_mask [B 1 1 S] for scaled_dot_product_attention.",
    refute="The outputs at tokens stay the same when the tokens in the padding are exchanged.",
    look="Whether the mask reaches the layer named, and which value means padding there.",
    source="PyTorch documentation: TransformerEncoder, src_key_padding_mask",
)

CAUSAL_ENCODER = Cause(
    id="mask.causal_in_encoder",
    title="An encoder is given a causal mask",
    must=("attention.hidden_future",),
    module=True,
    repair="Leave the causal mask out of layers that may read the whole row: is_causal=False, mask=None.",
    refute="A position puts weight on later positions.",
    look="The mask that the layer named is given; whether it was written for a decoder.",
    source="Devlin et al., 2019, section 3",
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


@fault(
    "mask.partial_leak",
    title="A few positions see the whole row",
    cause="mask.partial_leak",
    moves="attention.future",
    repair=PARTIAL_LEAK.repair,
)
class PartialLeak(Fault):
    """Lets the first `count` positions see all."""

    at: str = "blocks.*.attn"
    count: Annotated[int, Interval(ge=1, le=65536)] = 4

    def lab_start(self, run: Run) -> None:
        self.replace(run, f"{self.at}.mask", self.change)

    def change(self, mask: Tensor) -> Tensor:  # [T S] -> [T S]
        # In generation the queries are the last positions.
        places = torch.arange(mask.shape[0], device=mask.device) + mask.shape[1] - mask.shape[0]
        return mask | (places < self.count)[:, None]


@fault(
    "mask.blocks_past",
    title="Each position sees only a few before it",
    cause="mask.blocks_past",
    moves="attention.hidden_past",
    repair=BLOCKS_PAST.repair,
)
class BlocksPast(Fault):
    """Hides all but the last `window` positions, the own one among them."""

    at: str = "blocks.*.attn"
    window: Annotated[int, Interval(ge=1, le=65536)] = 8

    def lab_start(self, run: Run) -> None:
        self.replace(run, f"{self.at}.mask", self.change)

    def change(self, mask: Tensor) -> Tensor:  # [T S] -> [T S]
        return mask.triu(mask.shape[1] - mask.shape[0] - self.window + 1)


def not_causal(run: Run, fault: Fault) -> None:
    """Refuse layers that are causal by design: there the fault would be another, or none.

    Raises:
        BadInput: A layer that matches has a causal mask.
    """
    causal = run.sites.match(f"{fault.at}.mask")
    if causal:
        raise BadInput(f"{fault.info.id}: at = {fault.at!r}: {causal[0].module} has a causal mask; aim at an encoder")


@fault(
    "mask.padding_seen",
    title="Keys of padding are not hidden",
    cause="mask.padding_seen",
    moves="mixing.padding",
    repair=PADDING_SEEN.repair,
)
class PaddingSeen(Fault):
    """Takes the softmax over all keys; for layers without a causal mask."""

    at: str = "blocks.*.attn"

    def lab_start(self, run: Run) -> None:
        not_causal(run, self)
        self.scores: Tensor | None = None
        self.replace(run, f"{self.at}.scores", self.keep)
        self.replace(run, f"{self.at}.pattern", self.change)

    def keep(self, scores: Tensor) -> Tensor:  # [B H T S] -> [B H T S]
        self.scores = scores
        return scores

    def change(self, pattern: Tensor) -> Tensor:  # [B H T S] -> [B H T S]
        scores, self.scores = self.scores, None  # the graph must not outlive the step
        return pattern if scores is None else torch.softmax(scores, dim=-1)


@fault(
    "mask.causal_in_encoder",
    title="An encoder's positions see only those before them",
    cause="mask.causal_in_encoder",
    moves="attention.hidden_future",
    repair=CAUSAL_ENCODER.repair,
)
class CausalInEncoder(Fault):
    """Takes what lies on later positions out of the pattern, and lets each row sum to 1 again."""

    at: str = "blocks.*.attn"

    def lab_start(self, run: Run) -> None:
        not_causal(run, self)
        self.replace(run, f"{self.at}.pattern", self.change)

    def change(self, pattern: Tensor) -> Tensor:  # [B H T S] -> [B H T S]
        seen = pattern.tril()
        return seen / seen.sum(-1, keepdim=True).clamp_min(torch.finfo(pattern.dtype).tiny)
