"""Scores that are rounded, ignored, the same in two heads, or of tokens that the head was not given: and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from annotated_types import Interval

from lab import BadInput, Cause, Fault, fault

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lab import Run

HALF = Cause(
    id="attention.scores_half",
    title="Scores are rounded to float16, although queries and keys are float32",
    must=("scores.half",),
    may=("value.nonfinite", "loss.nonfinite", "gradient.nonfinite"),  # above 65504 a score is infinite
    module=True,
    repair="Keep scores in the dtype of q and k until after the softmax: no .half() on q @ k.transpose(-2, -1). Where "
    "memory is short, call scaled_dot_product_attention, which never holds the scores; where float16 is meant, use "
    "torch.autocast, and upcast with softmax(scores, dim=-1, dtype=torch.float32).",
    refute="A score has more than the 11 significant bits of float16.",
    look="A cast between the product of queries and keys and the softmax.",
    source="Micikevicius et al., 2018, section 3; IEEE 754, binary16",
)

UNIFORM = Cause(
    id="attention.uniform",
    title="Attention weighs all keys alike, whatever their scores",
    must=("scores.ignored",),
    module=True,
    repair="Give the softmax the scores: softmax(scores.masked_fill(~mask, float('-inf')), dim=-1). Look for a mask "
    "that is normalised in their place, a temperature that is infinite, or scores that are multiplied by 0.",
    refute="A key with a larger score has a larger weight.",
    look="What the softmax is called with.",
    source="Vaswani et al., 2017, section 3.2.1",
)

TIED = Cause(
    id="attention.heads_tied",
    title="Heads of one layer are copies of each other",
    must=("scores.tied",),
    module=True,
    repair="Give each head rows of its own in the projections of queries and keys. Look for an expand or a repeat of "
    "one head's weights where new ones were meant, and draw each anew: what begins alike and learns alike stays so.",
    refute="Two heads have different scores.",
    look="How the projection of queries and keys is initialised, loaded or shared; repeat_interleave over the heads.",
    source="Vaswani et al., 2017, section 3.2.2; Goodfellow et al., 2016, section 8.4 (breaking symmetry)",
)

WRONG_SPLIT = Cause(
    id="attention.wrong_split",
    title="Heads are split along the wrong axis",
    must=("split.bare",),
    may=("attention.beside", "causality.leak", "causality.blind", "told.leak", "generation.*"),
    locate=(
        "split.bare",
        "causality.future",
        "told.future",
    ),  # a head's position holds parts of other tokens, later ones too
    repair="Split the width and then exchange heads and positions: x.view(B, T, H, D).transpose(1, 2) for x [B T H*D]. "
    "x.view(B, H, T, D) has the right shape and gives each head a few whole tokens, cut in pieces.",
    refute="Head h at position t holds the h-th slice of what the projection gives for token t.",
    look="The view before the attention. If the merge has the same mistake, causality holds and the context is short.",
    source="Vaswani et al., 2017, section 3.2.2; PyTorch documentation: Tensor.view",
)


@fault(
    "attention.scores_half",
    title="Scores are rounded to float16",
    cause="attention.scores_half",
    moves="scores.half",
    repair=HALF.repair,
)
class ScoresHalf(Fault):
    """Rounds the scores to float16 and back: 11 bits, and nothing above 65504."""

    at: str = "blocks.*.attn"

    def lab_start(self, run: Run) -> None:
        self.replace(run, f"{self.at}.scores", lambda scores: scores.half().to(scores.dtype))


@fault(
    "attention.uniform",
    title="All keys that are seen have the same weight",
    cause="attention.uniform",
    moves="scores.heeded",
    repair=UNIFORM.repair,
)
class Uniform(Fault):
    """Replaces each row of the pattern by the mean over what has a weight in it."""

    at: str = "blocks.*.attn"

    def lab_start(self, run: Run) -> None:
        self.replace(run, f"{self.at}.pattern", self.change)

    def change(self, pattern: Tensor) -> Tensor:  # [B H T S] -> [B H T S]
        seen = (pattern != 0).to(pattern.dtype)
        return seen / seen.sum(-1, keepdim=True).clamp_min(1)


@fault(
    "attention.heads_tied",
    title="One head repeats another",
    cause="attention.heads_tied",
    moves="scores.tied",
    repair=TIED.repair,
)
class HeadsTied(Fault):
    """Gives head `copy` the queries, keys and values of head `head`, as if they had the same weights."""

    at: str = "blocks.*.attn"
    head: Annotated[int, Interval(ge=0, le=1023)] = 0
    copy: Annotated[int, Interval(ge=0, le=1023)] = 1

    def lab_start(self, run: Run) -> None:
        if self.head == self.copy:
            raise BadInput(f"attention.heads_tied: head = copy = {self.head}: a head is itself")
        self.heads = 0
        self.replace(run, f"{self.at}.q", self.queries)
        for name in ("k", "v"):
            self.replace(run, f"{self.at}.{name}", self.keys)

    def queries(self, q: Tensor) -> Tensor:  # [B H T D]
        self.heads = q.shape[1]
        if max(self.head, self.copy) >= self.heads:
            raise BadInput(f"attention.heads_tied: head = {self.head}, copy = {self.copy} of {self.heads} heads")
        return self.tied(q, self.head, self.copy)

    def keys(self, x: Tensor) -> Tensor:  # [B K T D]; each serves H / K heads of queries
        group = max(1, self.heads // x.shape[1])
        return self.tied(x, self.head // group, self.copy // group)

    @staticmethod
    def tied(x: Tensor, head: int, copy: int) -> Tensor:
        """Put one head in the place of another."""
        order = [head if place == copy else place for place in range(x.shape[1])]
        return x[:, order]


@fault(
    "attention.wrong_split",
    title="Heads are split off without bringing them before the positions",
    cause="attention.wrong_split",
    moves="split.bare_error",
    repair=WRONG_SPLIT.repair,
)
class WrongSplit(Fault):
    """Reads [B T H*D] as [B H T D] as it lies in memory."""

    at: str = "blocks.0.attn"

    def lab_start(self, run: Run) -> None:
        layers = [run.model.get_submodule(s.module) for s in run.sites.match(f"{self.at}.q")]
        layers = [layer for layer in layers if callable(getattr(layer, "split", None))]
        if not layers:
            raise BadInput(f"attention.wrong_split: at = {self.at!r}: no attention there splits heads")
        if all(getattr(layer, "heads", 1) == 1 for layer in layers):
            raise BadInput(f"attention.wrong_split: at = {self.at!r}: a single head is split off rightly either way")
        for layer in layers:
            self.patch(run, layer)

    def patch(self, run: Run, layer: nn.Module) -> None:
        """Put another method in the place of `split`, until the run ends."""
        right = layer.split

        def split(x: Tensor) -> Tensor:  # [B T H*D] -> [B H T D]
            heads: Tensor = right(x)  # type: ignore[operator]
            return x.reshape(heads.shape) if self.active(run) else heads

        layer.__dict__["split"] = split
        run.cleanup.callback(layer.__dict__.pop, "split", None)
