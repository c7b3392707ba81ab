"""What any causal multi-head attention must do."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lab.errors import BadInput
from lab.spec import Built, equal, gradients, holds, near, normal, prop, seeds, tapped

NAMES = ("qkv.weight", "qkv.bias", "proj.weight", "proj.bias")
SITES = ("q", "k", "v", "out")

counts, slices, lengths = st.integers(1, 4), st.integers(1, 4), st.integers(1, 9)


def _layer(built: Built, seed: int, width: int, heads: int) -> Any:
    """Build one in float64, with biases that are not 0: the ones it starts with would hide what is done to them."""
    made = built.MultiHeadAttention(width, heads).double()
    with torch.no_grad():
        made.qkv.weight.copy_(normal(seed, 3 * width, width, scale=width**-0.5))
        made.qkv.bias.copy_(normal(seed + 1, 3 * width, scale=0.5))
        made.proj.weight.copy_(normal(seed + 2, width, width, scale=width**-0.5))
        made.proj.bias.copy_(normal(seed + 3, width, scale=0.5))
    return made


def _formula(made: Any, x: Tensor, heads: int) -> Tensor:
    """One head at a time, on its own slice of the width, and no reshape at all."""
    q, k, v = F.linear(x, made.qkv.weight, made.qkv.bias).chunk(3, dim=-1)  # [B T C] each
    each, mixed = x.shape[-1] // heads, torch.empty_like(q)
    for h in range(heads):
        own = slice(h * each, (h + 1) * each)
        mixed[..., own] = F.scaled_dot_product_attention(q[..., own], k[..., own], v[..., own], is_causal=True)
    return F.linear(mixed, made.proj.weight, made.proj.bias)


def _torch(made: Any, x: Tensor, heads: int) -> Tensor:
    """PyTorch's own layer, given the same weights."""
    width, length = x.shape[-1], x.shape[1]
    with torch.random.fork_rng(devices=[]):  # its own start, drawn from torch's generator, is written over
        theirs = nn.MultiheadAttention(width, heads, batch_first=True, dtype=x.dtype)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(made.qkv.weight)
        theirs.in_proj_bias.copy_(made.qkv.bias)
        theirs.out_proj.weight.copy_(made.proj.weight)
        theirs.out_proj.bias.copy_(made.proj.bias)
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)  # [T T], True where it may not look
    out: Tensor = theirs(x, x, x, attn_mask=hidden, need_weights=False)[0]
    return out


@prop(
    "One position sees only itself, so the output is its value, projected: a projection, a bias or a slice is lost.",
    seed=seeds,
    heads=counts,
    each=slices,
)
def a_single_position_gives_its_own_value_projected(built: Built, seed: int, heads: int, each: int) -> None:
    width = heads * each
    made, x = _layer(built, seed, width, heads), normal(seed + 4, 2, 1, width)
    value = F.linear(x, made.qkv.weight[2 * width :], made.qkv.bias[2 * width :])  # [2 1 C]
    equal(made(x), F.linear(value, made.proj.weight, made.proj.bias))


@prop(
    "There must be 4 C^2 weights and 4 C biases, whatever the number of heads: each head has C / H of the width.",
    heads=counts,
    each=slices,
)
def has_4_c_squared_and_4_c_parameters(built: Built, heads: int, each: int) -> None:
    width = heads * each
    made = built.MultiHeadAttention(width, heads)
    shapes = {name: tuple(p.shape) for name, p in made.named_parameters()}
    expected = dict(zip(NAMES, ((3 * width, width), (3 * width,), (width, width), (width,)), strict=True))
    holds(shapes == expected, f"the parameters are {shapes}, expected {expected}")
    count = sum(p.numel() for p in made.parameters())
    holds(count == 4 * width**2 + 4 * width, f"{count} parameters, expected {4 * width**2 + 4 * width}")


@prop(
    "Head h must get channels h D to (h + 1) D of each position: split cuts positions, or deals the channels out.",
    seed=seeds,
    heads=counts,
    each=slices,
    length=lengths,
)
def each_head_gets_its_own_contiguous_slice(built: Built, seed: int, heads: int, each: int, length: int) -> None:
    made, x = _layer(built, seed, heads * each, heads), normal(seed + 4, 2, length, heads * each)
    expected = torch.stack([x[..., h * each : (h + 1) * each] for h in range(heads)], dim=1)  # [2 H T D]
    equal(made.split(x), expected, "what split returns")


@prop(
    "Merging must undo splitting, whatever the memory order: heads and positions change places only on the way in.",
    seed=seeds,
    heads=counts,
    each=slices,
    length=lengths,
)
def merging_undoes_splitting(built: Built, seed: int, heads: int, each: int, length: int) -> None:
    made, x = _layer(built, seed, heads * each, heads), normal(seed + 4, 3, length, heads * each)
    equal(made.merge(made.split(x)), x, "what merge makes of split's output")
    equal(made.merge(made.split(x).contiguous()), x, "what merge makes of split's output, copied,")


@prop(
    "Values differ from heads side by side, each in its slice: look at the order q, k, v, the scale, the projections.",
    seed=seeds,
    heads=counts,
    each=slices,
    length=lengths,
)
def equals_a_loop_over_heads_and_torch(built: Built, seed: int, heads: int, each: int, length: int) -> None:
    made, x = _layer(built, seed, heads * each, heads), normal(seed + 4, 2, length, heads * each)
    expected = _formula(made, x, heads)
    equal(_torch(made, x, heads), expected, "torch's own layer")
    equal(made(x), expected)


@prop(
    "Heads have no order: permuting them in both projections must change nothing, or a head's slice is not its own.",
    seed=seeds,
    order=st.permutations(range(3)),
    each=st.integers(2, 4),
)
def permuting_the_heads_changes_nothing(built: Built, seed: int, order: list[int], each: int) -> None:
    width = 3 * each
    made, permuted = _layer(built, seed, width, 3), _layer(built, seed, width, 3)
    columns = torch.cat([torch.arange(h * each, (h + 1) * each) for h in order])  # [C]
    rows = torch.cat([columns + part * width for part in range(3)])  # [3C]: of queries, keys and values
    with torch.no_grad():
        permuted.qkv.weight.copy_(made.qkv.weight[rows])
        permuted.qkv.bias.copy_(made.qkv.bias[rows])
        permuted.proj.weight.copy_(made.proj.weight[:, columns])
    x = normal(seed + 4, 2, 5, width)
    equal(permuted(x), made(x), "the output with permuted heads")


@prop(
    "An output moved when a later input did: the mask is missing, or split and merge disagree about the positions.",
    seed=seeds,
    heads=counts,
    length=st.integers(2, 9),
)
def no_output_depends_on_a_later_input(built: Built, seed: int, heads: int, length: int) -> None:
    made, x = _layer(built, seed, 3 * heads, heads), normal(seed + 4, 1, length, 3 * heads)
    before = made(x)
    for place in range(1, length):
        moved = x.clone()
        moved[:, place] += normal(seed + 5, 3 * heads)
        equal(made(moved)[:, :place], before[:, :place], f"the output before position {place}")


@prop(
    "An output ignored an earlier input: a reshape without a transpose gives each head a few positions, not all.",
    seed=seeds,
    heads=counts,
    length=st.integers(2, 9),
)
def every_output_depends_on_every_earlier_input(built: Built, seed: int, heads: int, length: int) -> None:
    made, x = _layer(built, seed, 3 * heads, heads), normal(seed + 4, 1, length, 3 * heads)
    before = made(x)
    for place in range(length):
        moved = x.clone()
        moved[:, place] += normal(seed + 5, 3 * heads)
        gap = (made(moved) - before)[0, place:].abs().amax(-1)  # [T - place]
        # Above rounding, far below what any weight of a softmax over nine positions lets through.
        still = [place + int(i) for i in torch.nonzero(gap <= 1e-12)]
        holds(not still, f"input {place} does not move the outputs at {still}")


@prop(
    "A width that is no multiple of the heads leaves channels over: refuse it with a BadInput that names both numbers.",
    heads=st.integers(2, 6),
    each=slices,
    over=st.integers(1, 5),
)
def refuses_a_width_that_is_no_multiple_of_the_heads(built: Built, heads: int, each: int, over: int) -> None:
    width = heads * each + 1 + over % (heads - 1)
    try:
        built.MultiHeadAttention(width, heads)
    except BadInput as error:
        text = str(error)
        holds(str(width) in text and str(heads) in text, f"the message names not both {width} and {heads}: {text}")
    else:
        holds(False, f"a width of {width} for {heads} heads is taken")


@prop(
    "The output projection must start with variance gain^2 / C: a deep residual stream relies on a small gain.",
    seed=seeds,
    gain=st.sampled_from([0.25, 1.0, 2.0]),
    examples=10,
)
def the_output_projection_starts_with_its_gain(built: Built, seed: int, gain: float) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = built.MultiHeadAttention(64, 4, gain=gain)
    for name, weight, expected in (("qkv", made.qkv.weight, 1.0), ("proj", made.proj.weight, gain)):
        unit = weight.detach().double() * 64**0.5 / expected  # of variance 1
        # Five standard errors of a variance of so many normal numbers.
        near(float(unit.var()), 1.0, 5 * (2 / unit.numel()) ** 0.5, f"the variance of {name}'s weights, in its units,")


@prop(
    "Backward disagrees with the values: the input, a projection or a bias is detached, or changed in place.",
    seed=seeds,
    examples=4,
)
def gradients_are_those_of_finite_differences(built: Built, seed: int) -> None:
    made, x = _layer(built, seed, 4, 2), normal(seed + 4, 1, 3, 4)

    def call(x: Tensor, *parameters: Tensor) -> Any:
        return torch.func.functional_call(made, dict(zip(NAMES, parameters, strict=True)), (x,))

    parameters = dict(made.named_parameters())
    gradients(call, x, *(parameters[name] for name in NAMES))


@prop(
    "Memory order is no part of the values, and q, k, v and out must be tapped by head, in that order.",
    seed=seeds,
    heads=counts,
    each=slices,
)
def takes_strided_inputs_and_taps_its_sites(built: Built, seed: int, heads: int, each: int) -> None:
    width = heads * each
    made, x = _layer(built, seed, width, heads), normal(seed + 4, width, 5, 2).permute(2, 1, 0)  # [2 5 C], strided
    equal(made(x), _formula(made, x.contiguous(), heads), "the output of a strided input")
    values = {name: value for name, value in tapped(made, x).items() if name in SITES}
    holds(tuple(values) == SITES, f"its own sites tapped are {', '.join(values) or 'none'}; expected q, k, v, out")
    parts = F.linear(x, made.qkv.weight, made.qkv.bias).chunk(3, dim=-1)  # [2 5 C] each
    for name, part in zip("qkv", parts, strict=True):
        by_head = part.reshape(2, 5, heads, each).transpose(1, 2)  # [2 H 5 D]
        equal(values[name].detach(), by_head.detach(), f"what is tapped as {name}")
    equal(values["out"], made(x), "what is tapped as out")


@prop(
    "Each head of keys and values must serve H / K neighbouring heads of queries: one too many, or dealt out in turn.",
    seed=seeds,
    groups=st.integers(1, 3),
    size=st.integers(1, 3),
    each=slices,
)
def grouped_keys_and_values_serve_neighbouring_heads(
    built: Built, seed: int, groups: int, size: int, each: int
) -> None:
    heads, width = groups * size, groups * size * each
    made = built.MultiHeadAttention(width, heads, kv_heads=groups).double()
    rows = width + 2 * groups * each
    shape = tuple(made.qkv.weight.shape)
    holds(shape == (rows, width), f"the projection's weight is {shape}, expected {(rows, width)}")
    with torch.no_grad():
        made.qkv.bias.copy_(normal(seed + 1, rows))
    x = normal(seed, 2, 5, width)
    q, k, v = F.linear(x, made.qkv.weight, made.qkv.bias).tensor_split([width, width + groups * each], dim=-1)
    mixed = torch.empty_like(q)
    for h in range(heads):
        own, group = slice(h * each, (h + 1) * each), slice(h // size * each, (h // size + 1) * each)
        mixed[..., own] = F.scaled_dot_product_attention(q[..., own], k[..., group], v[..., group], is_causal=True)
    equal(made(x), F.linear(mixed, made.proj.weight, made.proj.bias))


class _Memory:
    """The simplest memory: it joins."""

    def __init__(self) -> None:
        self.kept: tuple[Tensor, Tensor] | None = None

    @property
    def length(self) -> int:
        return 0 if self.kept is None else self.kept[0].shape[2]

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.kept is not None:
            k, v = torch.cat([self.kept[0], k], dim=2), torch.cat([self.kept[1], v], dim=2)
        self.kept = k, v
        return k, v


def _turned(x: Tensor, start: int) -> Tensor:  # [B H T D] -> [B H T D]
    """Scale by the position: no rotation, but as sensitive to where it stands."""
    return x * (1 + 0.1 * torch.arange(start, start + x.shape[2], dtype=x.dtype))[:, None]


@prop(
    "Decoding piece by piece must give what one pass gives: the memory is not read, or positions begin again at 0.",
    seed=seeds,
    cuts=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    heads=st.integers(1, 2),
)
def with_a_memory_the_outputs_are_those_without(built: Built, seed: int, cuts: list[int], heads: int) -> None:
    made = built.MultiHeadAttention(4 * heads, 2 * heads, kv_heads=heads, turn=_turned).double()
    x, memory = normal(seed, 2, sum(cuts), 4 * heads), _Memory()
    pieces = [made(piece, memory) for piece in torch.split(x, cuts, dim=1)]
    equal(torch.cat(pieces, dim=1), made(x), "the output piece by piece")
