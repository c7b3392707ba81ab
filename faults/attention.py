"""Attention that computes something else than ``softmax(q k^T / sqrt(D) + mask) v``, and the causes behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from annotated_types import Interval

from lab import BadInput, Cause, Fault, fault, torch

if TYPE_CHECKING:
    from torch import Tensor

    from lab import Run

# What follows where the sum that a row is divided by holds later positions, or padding; and what shows it as a whole.
LEAKS = (
    "attention.rows",
    "attention.beside",
    "causality.leak",
    "causality.blind",
    "told.leak",
    "mixing.padding*",
    "generation.*",
)
DEPENDS = ("causality.future", "told.future", "mixing.padding")

NO_SCALE = Cause(
    id="attention.no_scale",
    title="The scores are not divided by the square root of the head's width",
    must=("attention.scale",),
    module=True,
    repair="Divide the scores by math.sqrt(q.shape[-1]), the width of one head and not of the model, and do it once: "
    "scaled_dot_product_attention divides by itself.",
    refute="The scores equal q k^T / sqrt(D).",
    look="The line that multiplies queries by keys.",
    source="Vaswani et al., 2017, section 3.2.1",
)

WRONG_AXIS = Cause(
    id="attention.wrong_axis",
    title="The softmax is taken over the queries",
    must=("attention.columns*",),
    may=LEAKS,
    locate=("attention.columns", "attention.columns_product", *DEPENDS),  # what it divides by depends on later queries
    module=True,
    repair="Take the softmax over the keys: softmax(scores, dim=-1) for scores [B H T S].",
    refute="Every row of the pattern sums to 1.",
    look="The dim of the softmax, and the order of the axes of what it is given.",
    source="Vaswani et al., 2017, section 3.2.1; PyTorch documentation: softmax, dim",
)

MASK_AFTER = Cause(
    id="attention.mask_after_softmax",
    title="The mask is applied after the softmax",
    must=("attention.cut",),
    may=LEAKS,
    locate=("attention.cut", *DEPENDS),  # what it divides by depends on later keys
    module=True,
    repair="Set hidden scores to -inf before the softmax. To multiply the pattern by the mask afterwards leaves hidden "
    "positions in the sum that it was divided by.",
    refute="Every row of the pattern sums to 1.",
    look="Which comes first, masked_fill or softmax.",
    source="Vaswani et al., 2017, section 3.2.3",
)

WRONG_MERGE = Cause(
    id="attention.wrong_merge",
    title="Heads are put together along the wrong axis",
    must=("attention.beside*",),
    may=("causality.leak", "causality.blind"),
    cannot=("attention.rows", "attention.future", "mixing.rows"),  # heads and positions change places, rows do not
    locate=("attention.beside", "attention.beside_joined", "causality.future"),
    repair="Exchange heads and positions before joining: x.transpose(1, 2).reshape(B, T, H * D) for x [B H T D]. A "
    "reshape alone has the right shape and mixes positions.",
    refute="The layer's output depends on no position that its pattern leaves out.",
    look="The reshapes around the attention, when heads are split and when they are merged.",
    source="Vaswani et al., 2017, section 3.2.2; PyTorch documentation: Tensor.view",
)

QK_SWAPPED = Cause(
    id="attention.qk_swapped",
    title="Queries and keys have changed places",
    must=("attention.swapped",),
    may=("generation.*",),  # a query alone with its cache is multiplied in the order in which all were not
    module=True,
    repair="Multiply queries by keys in this order: q @ k.transpose(-2, -1), so that rows are queries. Check the order "
    "in which one projection is split into q, k and v.",
    refute="The scores at row t and column s are the product of query t and key s.",
    look="The line that multiplies queries by keys, and the arguments of the call around it.",
    source="Vaswani et al., 2017, section 3.2.1",
)

HEAD_DEAD = Cause(
    id="attention.head_dead",
    title="A head gives out nothing",
    must=("attention.head_silent",),
    repair="Look for a head mask that is left on, a slice that leaves the last head out, or values that were zeroed "
    "when weights were loaded.",
    refute="The head's output is not 0 on every examined step.",
    look="The values of that head, and whatever multiplies the pattern.",
    source="Michel et al., 2019 (heads that are masked)",
)

ROWS_MIXED = Cause(
    id="attention.rows_mixed",
    title="Rows of the batch reach each other",
    must=("mixing.rows",),
    may=("mixing.rows_module", "mixing.padding", "attention.beside", "causality.future", "causality.leak"),
    locate=("mixing.rows_module",),
    place="model",
    repair="Keep the batch dimension where it is: pass batch_first=True to nn.MultiheadAttention or give it [T B C], "
    "transpose rather than reshape, and normalise over the width only.",
    refute="A row's output stays the same when other rows of the batch are exchanged.",
    look="The shapes that the module named is given; which axis it takes for the batch.",
    source="PyTorch documentation: MultiheadAttention, batch_first",
)


class _Inside(Fault):
    """Remembers the scores of a layer until its pattern is made."""

    def lab_start(self, run: Run) -> None:
        self.scores: Tensor | None = None
        self.replace(run, f"{self.at}.scores", self.keep)
        self.replace(run, f"{self.at}.pattern", self.other)

    def keep(self, scores: Tensor) -> Tensor:  # [B H T S] -> [B H T S]
        self.scores = scores
        return scores

    def other(self, pattern: Tensor) -> Tensor:  # [B H T S] -> [B H T S]
        scores, self.scores = self.scores, None  # the graph must not outlive the step
        return pattern if scores is None else self.change(pattern, scores)

    def change(self, pattern: Tensor, scores: Tensor) -> Tensor:
        """Make another pattern."""
        raise NotImplementedError


@fault(
    "attention.no_scale",
    title="Scores are not divided by the square root of the head's width",
    cause="attention.no_scale",
    moves="attention.scale",
    repair=NO_SCALE.repair,
)
class NoScale(Fault):
    """Multiplies the scores by sqrt(D)."""

    at: str = "blocks.*.attn"

    def lab_start(self, run: Run) -> None:
        self.width = 1
        self.replace(run, f"{self.at}.q", self.note)
        self.replace(run, f"{self.at}.scores", lambda scores: scores * self.width**0.5)

    def note(self, q: Tensor) -> Tensor:  # [B H T D]
        self.width = q.shape[-1]
        return q


@fault(
    "attention.wrong_axis",
    title="The softmax is taken over the queries",
    cause="attention.wrong_axis",
    moves="attention.row_error",
    repair=WRONG_AXIS.repair,
)
class WrongAxis(_Inside):
    """Takes the softmax of the same masked scores over the queries: columns sum to 1, and rows do not."""

    at: str = "blocks.*.attn"

    def change(self, pattern: Tensor, scores: Tensor) -> Tensor:
        hidden = scores.masked_fill(pattern == 0, torch.finfo(scores.dtype).min)
        return torch.softmax(hidden, dim=-2) * (pattern != 0)


@fault(
    "attention.mask_after_softmax",
    title="The mask is applied after the softmax",
    cause="attention.mask_after_softmax",
    moves="attention.row_error",
    repair=MASK_AFTER.repair,
)
class MaskAfterSoftmax(_Inside):
    """Takes the softmax over all scores, and sets to 0 what the mask hides."""

    at: str = "blocks.*.attn"

    def change(self, pattern: Tensor, scores: Tensor) -> Tensor:
        return torch.softmax(scores, dim=-1) * (pattern != 0)


@fault(
    "attention.wrong_merge",
    title="Heads are joined without bringing them behind the positions",
    cause="attention.wrong_merge",
    moves="causality.future",
    repair=WRONG_MERGE.repair,
)
class WrongMerge(Fault):
    """Reshapes [B H T D] to [B T H*D] as it lies in memory."""

    at: str = "blocks.0.attn"

    def lab_start(self, run: Run) -> None:
        layers = [run.model.get_submodule(s.module) for s in run.sites.match(f"{self.at}.q")]
        layers = [layer for layer in layers if callable(getattr(layer, "merge", None))]
        if not layers:
            raise BadInput(f"attention.wrong_merge: at = {self.at!r}: no attention there merges heads")
        for layer in layers:
            self.patch(run, layer)

    def patch(self, run: Run, layer: torch.nn.Module) -> None:
        """Put another method in the place of `merge`, until the run ends."""
        right = layer.merge

        def merge(x: Tensor) -> Tensor:  # [B H T D] -> [B T C]
            if not self.active(run):
                return right(x)  # type: ignore[no-any-return, operator]
            b, h, t, d = x.shape
            return x.reshape(b, t, h * d)

        layer.__dict__["merge"] = merge
        run.cleanup.callback(layer.__dict__.pop, "merge", None)


@fault(
    "attention.qk_swapped",
    title="Queries and keys have changed places",
    cause="attention.qk_swapped",
    moves="attention.score_error",
    repair=QK_SWAPPED.repair,
)
class QKSwapped(Fault):
    """Transposes the scores: row t holds the products of key t with all queries."""

    at: str = "blocks.*.attn"

    def lab_start(self, run: Run) -> None:
        self.replace(run, f"{self.at}.scores", self.change)

    def change(self, scores: Tensor) -> Tensor:  # [B H T S]
        return scores.transpose(-2, -1) if scores.shape[-1] == scores.shape[-2] else scores


@fault(
    "attention.head_dead",
    title="One head gives out nothing",
    cause="attention.head_dead",
    moves="attention.head_output",
    repair=HEAD_DEAD.repair,
)
class HeadDead(Fault):
    """Sets the values of one head to 0, so that whatever it looks at gives 0."""

    at: str = "blocks.0.attn"
    head: Annotated[int, Interval(ge=0, le=1023)] = 0

    def lab_start(self, run: Run) -> None:
        self.replace(run, f"{self.at}.v", self.change)

    def change(self, v: Tensor) -> Tensor:  # [B K T D]
        if self.head >= v.shape[1]:
            raise BadInput(f"attention.head_dead: head = {self.head}, but there are {v.shape[1]} heads of values")
        return v * (torch.arange(v.shape[1], device=v.device) != self.head)[:, None, None]


@fault(
    "attention.rows_mixed",
    title="Each row of the batch is given some of the row before it",
    cause="attention.rows_mixed",
    moves="mixing.rows",
    repair=ROWS_MIXED.repair,
)
class RowsMixed(Fault):
    """Replaces `share` of the layer's output by that of the row before; the first row takes from the last."""

    at: str = "blocks.0.attn"
    share: Annotated[float, Interval(gt=0, le=1)] = 0.5

    def lab_start(self, run: Run) -> None:
        self.replace(run, f"{self.at}.out", lambda x: x + self.share * (x.roll(1, 0) - x))
