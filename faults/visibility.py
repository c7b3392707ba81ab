"""Masks that are there and hide the wrong way: too weakly, by the wrong operation, along the wrong axis, or all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from annotated_types import Interval

from lab import BadInput, Cause, Fault, fault, torch

if TYPE_CHECKING:
    from torch import Tensor

    from lab import Run

# What a later key that has a weight brings with it.
SEEN = ("attention.future", "attention.partial", "causality.leak", "told.leak", "generation.*")

FINITE = Cause(
    id="mask.finite",
    title="What the mask hides has a finite score, which a larger one outweighs",
    must=("scores.finite",),
    may=SEEN,
    cannot=("causality.blind",),
    locate=("scores.finite", "causality.future", "told.future"),
    module=True,
    repair="Fill hidden scores with float('-inf') or torch.finfo(scores.dtype).min, in the dtype in which the softmax "
    "is taken; or give a boolean attn_mask to scaled_dot_product_attention. A constant that was large once is not when "
    "scores grow.",
    refute="Weights above the diagonal are exactly 0.",
    look="The number in masked_fill, or the one that the mask is multiplied by before it is added.",
    source="huggingface/transformers#17306 (torch.finfo(dtype).min in the place of a constant)",
)

MULTIPLIED = Cause(
    id="mask.multiplied",
    title="The mask multiplies the scores: what it hides has the score 0",
    must=("scores.multiplied",),
    may=SEEN,
    cannot=("causality.blind",),
    locate=("scores.multiplied", "causality.future", "told.future"),
    module=True,
    repair="Use scores.masked_fill(mask == 0, float('-inf')), or add a mask of 0 and -inf. exp(0) is 1: a score of 0 "
    "is an ordinary one, and often the largest of its row.",
    refute="Weights above the diagonal are exactly 0.",
    look="The operator between scores and mask. A float mask given to scaled_dot_product_attention is added as it is.",
    source="PyTorch documentation: scaled_dot_product_attention, attn_mask",
)

EMPTY_ROW = Cause(
    id="mask.empty_row",
    title="The mask hides every key from some position, and its softmax is NaN",
    must=("scores.empty_row",),
    may=("*",),  # NaN reaches everything
    module=True,
    repair="Let each position see itself, padding too; or fill with torch.finfo(scores.dtype).min and not -inf; "
    "or set such rows to 0 after the softmax. Padding on the left under a causal mask makes such rows.",
    refute="Each row of the mask lets one key through at least.",
    look="Which rows of the pattern are NaN, and the same rows of the mask: mask.any(-1).",
    source="pytorch/pytorch#41508 (NaN where all keys are masked)",
)

PADDING_AXIS = Cause(
    id="mask.padding_wrong_axis",
    title="The padding mask hides queries in the place of keys",
    must=("scores.padding",),
    may=("mixing.padding_module", "attention.hidden_future"),  # a row that is all hidden hides what is later
    cannot=("mixing.rows",),
    locate=("scores.padding", "mixing.padding"),
    module=True,
    repair="Lay the mask [B S] along the keys: mask[:, None, None, :] for scores [B H T S]. mask[:, None, :, None] "
    "silences what padding asks, which nobody reads, and leaves open what it says.",
    refute="The columns of padding in the pattern are 0.",
    look="The None that stand around the mask, or its unsqueeze calls.",
    source="PyTorch documentation: MultiheadAttention, key_padding_mask",
)

TOLD_FUTURE = Cause(
    id="mask.told_future",
    title="A decoder sees later ones of the targets that it is told",
    must=("told.future",),
    may=("told.leak",),
    locate=("told.leak",),
    repair="Give the decoder's attention to itself a causal mask, while that to the encoder has none: tgt_mask="
    "nn.Transformer.generate_square_subsequent_mask(T) and tgt_is_causal=True for nn.Transformer and "
    "nn.TransformerDecoder, which have none by themselves.",
    refute="d out_i / d told_j is 0 for all j > i.",
    look="Which of the masks of the layer named is causal: that of the decoder, of the memory, or none.",
    source="Vaswani et al., 2017, section 3.2.3; PyTorch documentation: nn.Transformer, tgt_mask",
)


class _Masked(Fault):
    """Opens the causal mask of a layer, and does something else where it was closed."""

    at: str = "blocks.*.attn"

    def lab_start(self, run: Run) -> None:
        self.mask: Tensor | None = None
        self.replace(run, f"{self.at}.mask", self.keep)
        self.replace(run, f"{self.at}.scores", self.other)

    def keep(self, mask: Tensor) -> Tensor:  # [T S] -> [T S]
        self.mask = mask
        return torch.ones_like(mask)

    def other(self, scores: Tensor) -> Tensor:  # [B H T S] -> [B H T S]
        mask, self.mask = self.mask, None
        return scores if mask is None else self.change(scores, mask)

    def change(self, scores: Tensor, mask: Tensor) -> Tensor:
        """Make other scores."""
        raise NotImplementedError


@fault(
    "mask.finite",
    title="Hidden scores become a finite number",
    cause="mask.finite",
    moves="scores.open",
    repair=FINITE.repair,
)
class Finite(_Masked):
    """Fills what the causal mask hides with `value` in the place of minus infinity."""

    value: Annotated[float, Interval(ge=-12, le=-1)] = -8.0

    def change(self, scores: Tensor, mask: Tensor) -> Tensor:
        return scores.masked_fill(~mask, self.value)


@fault(
    "mask.multiplied",
    title="The mask multiplies the scores",
    cause="mask.multiplied",
    moves="scores.open",
    repair=MULTIPLIED.repair,
)
class Multiplied(_Masked):
    """Multiplies the scores by 1 where a position may look, and by 0 elsewhere."""

    def change(self, scores: Tensor, mask: Tensor) -> Tensor:
        return scores * mask


@fault(
    "mask.empty_row",
    title="A position sees nothing, not even itself",
    cause="mask.empty_row",
    moves="scores.empty_rows",
    repair=EMPTY_ROW.repair,
)
class EmptyRow(Fault):
    """Hides all keys from the first `count` positions, and takes a plain softmax, which makes NaN of such a row."""

    at: str = "blocks.*.attn"
    count: Annotated[int, Interval(ge=1, le=65536)] = 1

    def lab_start(self, run: Run) -> None:
        self.from_the_start()
        self.empty: Tensor | None = None
        self.replace(run, f"{self.at}.mask", self.hide)
        self.replace(run, f"{self.at}.pattern", self.softmax)

    def hide(self, mask: Tensor) -> Tensor:  # [T S] -> [T S]
        # In generation the queries are the last positions.
        places = torch.arange(mask.shape[0], device=mask.device) + mask.shape[1] - mask.shape[0]
        mask = mask & (places >= self.count)[:, None]
        self.empty = ~mask.any(-1)  # [T]
        return mask

    def softmax(self, pattern: Tensor) -> Tensor:  # [B H T S] -> [B H T S]
        empty, self.empty = self.empty, None
        return pattern if empty is None else pattern.masked_fill(empty[:, None], torch.nan)


@fault(
    "mask.padding_wrong_axis",
    title="Padding is hidden among the queries",
    cause="mask.padding_wrong_axis",
    moves="mixing.padding",
    repair=PADDING_AXIS.repair,
)
class PaddingWrongAxis(Fault):
    """Takes the softmax over all keys, and leaves the rows of padding without any; for layers without a causal mask."""

    at: str = "blocks.*.attn"

    def lab_start(self, run: Run) -> None:
        causal = run.sites.match(f"{self.at}.mask")
        if causal:
            raise BadInput(f"mask.padding_wrong_axis: {causal[0].module} has a causal mask; aim at an encoder")
        self.scores: Tensor | None = None
        self.replace(run, f"{self.at}.scores", self.keep)
        self.replace(run, f"{self.at}.pattern", self.change)

    def keep(self, scores: Tensor) -> Tensor:  # [B H T S] -> [B H T S]
        self.scores = scores
        return scores

    def change(self, pattern: Tensor) -> Tensor:  # [B H T S] -> [B H T S]
        scores, self.scores = self.scores, None  # the graph must not outlive the step
        if scores is None or scores.shape[-1] != scores.shape[-2]:
            return pattern
        present = (pattern != 0).flatten(1, 2).any(1)  # [B S]
        return torch.softmax(scores, dim=-1) * present[:, None, :, None]


@fault(
    "mask.told_future",
    title="A decoder's positions see later ones of what it is told",
    cause="mask.told_future",
    moves="told.future",
    repair=TOLD_FUTURE.repair,
)
class ToldFuture(Fault):
    """Opens the causal mask of a decoder that is told the targets, beside the inputs."""

    at: str = "blocks.*.attn"

    def lab_start(self, run: Run) -> None:
        if run.config is None or run.config.train.objective != "seq2seq":
            raise BadInput("mask.told_future: needs an encoder and a decoder, train.objective = 'seq2seq'")
        self.replace(run, f"{self.at}.mask", torch.ones_like)
