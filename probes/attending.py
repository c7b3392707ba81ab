"""Attention that nobody named: its softmax, its heads and its padding mask, as its operators show them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab import Cause, NotChecked, Probe, Symptom, probe, rule, torch

from .operands import EVEN, Operands

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from lab import History, Run, Step

ROWS, FEW = 4, 2  # fewer where no key was hidden before: rows of other lengths are of use to padding alone
NONE = "no attention in this model was seen to do that: its operators are others"

PADDING_INVERTED = Cause(
    id="mask.padding_inverted",
    title="The padding mask is the wrong way round: tokens are hidden, and padding is seen",
    must=("attending.padding",),
    may=("mixing.padding", "mixing.padding_module", "numerics.*"),
    module=True,
    repair="Exchange the two values of the mask. For key_padding_mask and src_key_padding_mask of PyTorch's modules "
    "True means 'do not look here': tokens == PAD. For scaled_dot_product_attention True means 'look here', and the "
    "attention_mask of Hugging Face models is 1 at a token.",
    refute="A key that some query sees is a token other than that of padding.",
    look="Which convention the attention called here takes, and where the mask was made.",
    source="PyTorch documentation: MultiheadAttention, key_padding_mask; scaled_dot_product_attention, attn_mask",
)


@probe(
    "attending",
    title="Over which axis is a softmax, are heads joined in their order, and which tokens are hidden?",
    cost="a forward pass on four rows, operator by operator",
    examines=True,
    seldom=True,
)
class Attending(Probe):
    """Calls the model in evaluation mode and follows what it multiplies: for attention whose parts are no sites.

    A pattern is the softmax of a product of two tensors that both depend on the batch, square, and multiplied by a
    third. Records ``attending.uneven`` (by how much the sums of its weights differ from one position to another, where
    another axis sums to 1; else 0), ``attending.joined`` (1 where heads [B H T D] become [B T H*D] without changing
    places with positions, 0 where they change, -1 where it is neither) and, where the batch holds tokens [B T],
    ``attending.hides``: whether any is hidden from everybody, and ``attending.inverted``: in how many rows all that is
    hidden are several tokens, and all that is seen is one and the same at an end. It is 0 unless the rows with
    something to see have it in different number, and none of them is an exception.
    """

    def lab_examine(self, run: Run, step: Step) -> None:
        if step.batch is None or step.batch.inputs is None or not step.batch.inputs.dim():
            raise NotChecked("the batch is not known")
        hides = not run.history.sites("attending.looked") or any(
            (series.values > 0).any() for _, series in run.history.each("attending.hides")
        )
        batch = step.batch.rows(ROWS if hides else FEW)
        given = [value for value in (*batch.args, *batch.kwargs.values()) if torch.is_tensor(value)]
        run.model.eval()
        operands = Operands(len(given[0]))
        with torch.no_grad():
            operands.run(run.model, given, lambda: run.answer(batch))
        for name, uneven in operands.uneven.items():
            step.record("attending.uneven", uneven, f"{name}.pattern" if name else "pattern")
        for name, joined in operands.joined.items():
            step.record("attending.joined", joined, name)
        tokens = given[0]
        for name, hidden in operands.hidden.items():
            if hidden.shape == tokens.shape and not tokens.is_floating_point():
                at = f"{name}.pattern" if name else "pattern"
                step.record("attending.hides", hidden.any(), at)
                step.record("attending.inverted", _inverted(tokens, hidden), at)
        step.record("attending.looked", 1.0)


def _inverted(tokens: Tensor, hidden: Tensor) -> Tensor:  # [B T] x 2 -> []
    """In how many rows one token is seen, at an end, and several others are hidden; 0 if that is not all there is."""
    seen = ~hidden
    some = seen.any(-1)  # [B]
    pad = torch.where(seen, tokens, tokens.amin() - 1).amax()  # the token that is seen, if it is one
    same = (~seen | (tokens == pad)).all() & (~hidden | (tokens != pad)).all()
    ends = (seen.long().diff(dim=-1) != 0).sum(-1) <= 1  # one change from what is hidden to what is seen, or back
    counts = seen.sum(-1)
    fewest = torch.where(some, counts, seen.shape[-1]).amin()
    varied = (counts.amax() > fewest) & (_spread(tokens, hidden) > 0)
    return some.sum() * (same & ends.all() & varied)


def _spread(tokens: Tensor, among: Tensor) -> Tensor:  # [B T] x 2 -> []
    """The largest less the smallest of some tokens; below 0 if there are none."""
    largest = torch.where(among, tokens, tokens.amin() - 1).amax()
    return largest - torch.where(among, tokens, tokens.amax() + 1).amin()


def _anywhere(history: History, metric: str) -> Iterator[tuple[str, int, float]]:
    if not any((series.values >= 0).any() for _, series in history.each(metric)):
        raise NotChecked(NONE)
    for site, series in history.each(metric):
        if found := series.first(series.values > 0):
            yield site, *found


@rule(
    "attention.columns_product",
    title="A product with values adds up weights that sum to 1",
    reads=("attending.looked",),
    basis="theory",
    phase="forward",
)
def attention_columns_product(history: History) -> Iterator[Symptom]:
    """The axis over which a softmax of ``q k^T`` is taken is the one along which the values are averaged."""
    for site, step, seen in _anywhere(history, "attending.uneven"):
        if seen > EVEN:
            text = f"{site} is a softmax over another axis than its product with the values adds up: there the sums of "
            yield Symptom(at=site, since=step, seen=seen, expected="0", text=f"{text}the weights differ by {seen:.2g}")


@rule(
    "attention.beside_joined",
    title="Heads and positions change places before heads are joined",
    reads=("attending.looked",),
    basis="experiment",
    phase="forward",
)
def attention_beside_joined(history: History) -> Iterator[Symptom]:
    """What is joined is compared with the output of the heads, bit for bit, in either order."""
    for site, step, seen in _anywhere(history, "attending.joined"):
        text = f"{site or 'the model'} makes [B T H*D] of [B H T D] as it lies: a vector holds several positions"
        yield Symptom(at=site, since=step, seen=seen, expected="0", text=text)


@rule(
    "attending.padding",
    title="Attention is not hidden from all tokens and open to padding",
    reads=("attending.looked",),
    basis="experiment",
    phase="forward",
)
def attending_padding(history: History) -> Iterator[Symptom]:
    """Padding is one token at an end of rows of different lengths: that is not all that there is to see."""
    if not any((series.values > 0).any() for _, series in history.each("attending.hides")):
        raise NotChecked("no attention in this model hides a token of the batch, as one that is told of padding would")
    for site, step, seen in _anywhere(history, "attending.inverted"):
        text = f"in {seen:.0f} rows all that {site} sees is one token at an end, in different number; others are hidden"
        yield Symptom(at=site, since=step, seen=seen, expected="0", text=text)
