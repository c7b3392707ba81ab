"""What embeddings and any of the four kinds of positions must do."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lab.errors import BadInput
from lab.spec import Built, Mismatch, equal, explicit_taps, floats, gradients, holds, near, normal, prop, seeds

lengths, starts = st.integers(1, 9), st.integers(0, 40)
evens = st.integers(1, 8).map(lambda half: 2 * half)
bases = st.sampled_from([10000.0, 100.0])
tables = st.sampled_from(["LearnedPositions", "SinusoidalPositions"])


def _sinusoids(length: int, width: int) -> Tensor:
    """One number at a time, in float64: [T C]."""
    out = torch.empty(length, width, dtype=torch.float64)
    places = torch.arange(length, dtype=torch.float64)
    for channel in range(width):
        angle = places / 10000.0 ** (channel // 2 * 2 / width)
        out[:, channel] = angle.cos() if channel % 2 else angle.sin()
    return out


def _turned(x: Tensor, start: int, base: float) -> Tensor:  # [... T D] -> [... T D]
    """The rotation by complex numbers: channel i is the real part, channel i + D/2 the imaginary one."""
    length, width = x.shape[-2:]
    places = torch.arange(start, start + length, dtype=torch.float64)[:, None]  # [T 1]
    angles = places / base ** (torch.arange(0, width, 2, dtype=torch.float64) / width)  # [T D/2]
    a, b = x.double().chunk(2, dim=-1)
    z = torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([z.real, z.imag], dim=-1)


@prop(
    "An embedding must be a linear layer on one-hot vectors: a row for each token, its gradient summed over places.",
    seed=seeds,
    count=st.integers(1, 9),
    width=lengths,
)
def an_embedding_is_linear_in_one_hot_vectors(built: Built, seed: int, count: int, width: int) -> None:
    made = built.Embedding(count, width).double()
    tokens = torch.randint(count, (2, 5), generator=torch.Generator().manual_seed(seed))
    onehot = F.one_hot(tokens, count).double()  # [B T V]
    out, grad = made(tokens), normal(seed, 2, 5, width)
    equal(out, onehot @ made.weight, "the embedding")
    out.backward(grad)
    equal(made.weight.grad, torch.einsum("btv,btc->vc", onehot, grad), "the gradient of the table")


@prop(
    "Tables must start normal with the standard deviation asked for: the first loss of a model is off with them.",
    std=st.sampled_from([0.02, 1.0]),
    name=st.sampled_from(["Embedding", "LearnedPositions"]),
)
def tables_start_with_their_standard_deviation(built: Built, std: float, name: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weight = getattr(built, name)(100, 200, std=std).weight.detach().double()
    near(weight.std(), std, 0.03 * std, f"{name}: the standard deviation")
    near(weight.mean(), 0.0, 0.03 * std, f"{name}: the mean")


@prop(
    "A piece of a text must get the rows that it has in the whole: a cache decodes at `start`, not at 0 again.",
    seed=seeds,
    name=tables,
    length=lengths,
    start=starts,
)
def a_piece_has_the_rows_of_the_whole(built: Built, seed: int, name: str, length: int, start: int) -> None:
    torch.manual_seed(seed)
    made = getattr(built, name)(start + length, 6)
    whole = made(start + length)
    if name == "LearnedPositions":
        equal(whole, made.weight, "all positions")
    equal(made(length, start), whole[start:], f"{name}: {length} positions from {start} on", rtol=0, atol=0)
    equal(made(0, start), whole[:0], f"{name}: no positions at all")


@prop(
    "A text longer than the context must be refused with both numbers, and one that just fits must not.",
    name=tables,
    length=lengths,
    start=starts,
)
def more_positions_than_there_are_is_refused(built: Built, name: str, length: int, start: int) -> None:
    context = start + length
    made = getattr(built, name)(context, 4)
    made(length, start)
    try:
        made(length + 1, start)
    except BadInput as error:
        both = str(context + 1) in str(error) and str(context) in str(error)
        holds(both, f"{name}: the message names not both numbers, {context + 1} and {context}")
    else:
        raise Mismatch(f"{name}: {length + 1} positions from {start} on, of {context}, were not refused")


@prop(
    "Sinusoids differ from sin and cos of t 10000^(-2i/C), side by side: look at the exponent, and which comes first.",
    length=st.integers(0, 9),
    width=st.integers(1, 16),
)
def sinusoids_equal_the_formula(built: Built, length: int, width: int) -> None:
    equal(built.SinusoidalPositions(length, width)(length), _sinusoids(length, width).float(), "the sinusoids")


@prop(
    "Far positions are wrong: angles in float32 are rounded to 0.0005 near 8000. Make the table in float64.",
    width=evens,
)
def sinusoids_are_exact_far_away(built: Built, width: int) -> None:
    far = built.SinusoidalPositions(8192, width)(4, 8188)
    equal(far, _sinusoids(8192, width)[8188:].float(), "the sinusoids of positions 8188 to 8191", rtol=0, atol=2e-7)


@prop(
    "Each row of sinusoids has norm^2 C/2, by sin^2 + cos^2 = 1, and no two rows are alike: a pair has two rates.",
    width=evens,
)
def sinusoids_have_one_norm_and_are_distinct(built: Built, width: int) -> None:
    rows = built.SinusoidalPositions(512, width)(512).double()  # [T C]
    equal(rows.square().sum(-1), torch.full((512,), width / 2).double(), "norm^2 of a row", rtol=1e-6, atol=1e-6)
    gap = torch.cdist(rows, rows) + 9.0 * torch.eye(512)
    holds(gap.min() > 1e-3, f"two of 512 rows are only {float(gap.min()):.3g} apart")


@prop(
    "A shift of positions must be one matrix, the same for all: sine and cosine of a pair need the same angle.",
    width=evens,
    shift=st.integers(1, 20),
)
def a_shift_of_sinusoids_is_linear(built: Built, width: int, shift: int) -> None:
    rows = built.SinusoidalPositions(60, width)(60).double()  # [T C]
    rates = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)  # [C/2]
    cos, sin = (shift * rates).cos(), (shift * rates).sin()
    s, c = rows[:-shift, 0::2], rows[:-shift, 1::2]  # [T C/2] each
    expected = torch.stack([s * cos + c * sin, c * cos - s * sin], dim=-1).flatten(1)  # [T C]
    equal(rows[shift:], expected, f"rows {shift} later", rtol=0, atol=1e-6)


@prop(
    "Sinusoids are no parameter, and no part of a checkpoint: they would be trained, or tie it to one context.",
    width=evens,
    examples=3,
)
def sinusoids_are_not_learned(built: Built, width: int) -> None:
    made = built.SinusoidalPositions(5, width)
    holds(not list(made.parameters()), "SinusoidalPositions has parameters")
    holds(not made.state_dict(), "the state dict of SinusoidalPositions is not empty")
    equal(made.double()(5), made(5).double(), "after .double(), which must move the table,")


@prop(
    "The score of a query and a key moved when both moved alike: <R_m q, R_n k> must depend on m - n only.",
    seed=seeds,
    half=st.integers(1, 8),
    shift=st.integers(0, 4000),
    base=bases,
)
def scores_depend_on_distances_only(built: Built, seed: int, half: int, shift: int, base: float) -> None:
    q, k = normal(seed, 1, 2, 5, 2 * half), normal(seed + 1, 1, 2, 7, 2 * half)

    def scores(start: int) -> Tensor:
        out: Tensor = built.rotate(q, start, base) @ built.rotate(k, start, base).transpose(-2, -1)
        return out

    equal(scores(shift), scores(0), f"the scores {shift} positions later", rtol=1e-8, atol=1e-8)
    moved = built.rotate(q, 3, base) @ built.rotate(k, 0, base).transpose(-2, -1)
    holds(not torch.allclose(moved, scores(0)), "the scores stay the same though queries moved and keys did not")


@prop(
    "Not a rotation of channel i with channel i + D/2 by t base^(-2i/D): look at the pairs, the signs, the exponent.",
    seed=seeds,
    length=lengths,
    width=evens,
    start=starts,
    base=bases,
)
def rotation_equals_complex_multiplication(
    built: Built, seed: int, length: int, width: int, start: int, base: float
) -> None:
    x = normal(seed, 2, 3, length, width)
    out = built.rotate(x, start, base)
    equal(out, _turned(x, start, base), "rotate")
    equal(out.norm(dim=-1), x.norm(dim=-1), "the norm of what was turned")
    equal(built.rotate(x[..., :1, :], 0, base), x[..., :1, :], "position 0, which is turned by nothing,")


@prop(
    "A piece that begins at `start` must be turned as it is in the whole: with a cache, positions begin again at 0.",
    seed=seeds,
    length=lengths,
    start=starts,
)
def a_piece_is_turned_as_in_the_whole(built: Built, seed: int, length: int, start: int) -> None:
    x = normal(seed, 1, 2, start + length, 6)
    equal(built.rotate(x[..., start:, :], start), built.rotate(x)[..., start:, :], f"from position {start} on, rotate")


@prop(
    "The dtype is not kept, or angles have that of x: bfloat16 has 641 numbers for 2048 positions.",
    seed=seeds,
    dtype=floats,
    start=st.sampled_from([0, 300, 1900]),
)
def angles_are_exact_whatever_the_dtype(built: Built, seed: int, dtype: torch.dtype, start: int) -> None:
    x = normal(seed, 1, 2, 9, 8, dtype=dtype)
    rounding = max(8 * torch.finfo(dtype).eps, 1e-8) if dtype != torch.float32 else 1e-3
    expected = _turned(x, start, 10000.0).to(dtype)
    equal(built.rotate(x, start), expected, f"positions {start} on in {dtype}, rotate", rtol=rounding, atol=rounding)
    large = torch.full((1, 1, 3, 4), 20_000.0, dtype=dtype)
    holds(torch.isfinite(built.rotate(large)).all(), f"numbers of 20000 in {dtype} became inf or NaN")


@prop(
    "Backward disagrees with the values, or memory order, no position or a lone head upset it.",
    seed=seeds,
    examples=5,
)
def rotation_has_gradients_and_takes_any_layout(built: Built, seed: int) -> None:
    gradients(lambda x: built.rotate(x, 3), normal(seed, 1, 2, 3, 4))
    strided = normal(seed, 2, 5, 3, 4).transpose(1, 2)  # [B H T D], strided
    equal(built.rotate(strided, 2), _turned(strided, 2, 10000.0), "rotate of a strided input")
    for shape in ((1, 2, 0, 4), (0, 2, 3, 4), (3, 4)):
        x = normal(seed, *shape)
        equal(built.rotate(x), _turned(x, 0, 10000.0), f"rotate of shape {list(shape)}")


@prop(
    "A head of odd width must be refused by name and number: its last channel has no partner to be turned with.",
    half=st.integers(0, 8),
)
def an_odd_head_is_refused(built: Built, half: int) -> None:
    width = 2 * half + 1
    try:
        built.rotate(normal(0, 1, 1, 3, width))
    except BadInput as error:
        holds(str(width) in str(error), f"the message does not name the width, {width}")
    else:
        raise Mismatch(f"a head of width {width} was not refused")


@prop(
    "ALiBi must take 2^(-8 h / H) for each step of distance, with the queries at the end: slopes, sign or offset.",
    heads=st.integers(1, 12),
    queries=st.integers(0, 5),
    more=st.integers(0, 5),
)
def alibi_equals_the_formula(built: Built, heads: int, queries: int, more: int) -> None:
    keys = queries + more
    bias = built.alibi_bias(heads, queries, keys)
    holds(tuple(bias.shape) == (heads, queries, keys), f"shape {list(bias.shape)}, not {[heads, queries, keys]}")
    holds(torch.isfinite(bias).all(), "a bias is inf or NaN: what is later is the mask's to hide")
    for h in range(heads):
        for t in range(queries):
            seen = torch.arange(more + t + 1)
            expected = -(2.0 ** (-8.0 * (h + 1) / heads)) * (more + t - seen)
            equal(bias[h, t, : more + t + 1], expected.to(bias), f"head {h + 1} of {heads}, query {t}")


@prop("Probes and faults find nothing at a site that is not tapped, or is tapped twice.", examples=3, width=evens)
def the_tables_tap_their_output(built: Built, width: int) -> None:
    explicit_taps(built.Embedding(5, width), ("out",), torch.tensor([[0, 3]]))
    explicit_taps(built.LearnedPositions(5, width), ("out",), 3)
    explicit_taps(built.SinusoidalPositions(5, width), ("out",), 3)
