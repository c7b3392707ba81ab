"""What any encoder, its padding mask and its hidden tokens must do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lab.context import IGNORED
from lab.sites import sites_of
from lab.spec import Built, equal, explicit_taps, gradients, holds, near, normal, prop, seeds, tapped

if TYPE_CHECKING:
    from collections.abc import Callable

    from lab.sites import Sites

V, WIDTH, HEADS, CONTEXT = 11, 8, 2, 12
NAMES = ("qkv.weight", "qkv.bias", "proj.weight", "proj.bias")

counts, slices, lengths = st.integers(1, 3), st.integers(1, 4), st.integers(1, 7)
rows = st.lists(st.integers(1, 6), min_size=1, max_size=4)  # how many tokens each row of a batch has


def _layer(built: Built, seed: int, width: int, heads: int) -> Any:
    """Build one in float64, with biases that are not 0: the ones it starts with would hide what is done to them."""
    made = built.SelfAttention(width, heads).double()
    with torch.no_grad():
        made.qkv.weight.copy_(normal(seed, 3 * width, width, scale=width**-0.5))
        made.qkv.bias.copy_(normal(seed + 1, 3 * width, scale=0.5))
        made.proj.weight.copy_(normal(seed + 2, width, width, scale=width**-0.5))
        made.proj.bias.copy_(normal(seed + 3, width, scale=0.5))
    return made


def _block(built: Built, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = built.EncoderBlock(WIDTH, HEADS, 1).double()
    with torch.no_grad():  # gains of 1 would hide which norm is which
        made.attn_norm.weight.copy_(1 + normal(seed + 1, WIDTH, scale=0.3))
        made.mlp_norm.weight.copy_(1 + normal(seed + 2, WIDTH, scale=0.3))
    return made


def _encoder(built: Built, seed: int, *, vocabulary: int = V, width: int = WIDTH) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = built.Encoder(vocabulary, context=CONTEXT, layers=2, width=width, heads=HEADS).double()
    with torch.no_grad():  # so that tokens and positions are told apart by more than rounding
        made.tokens.weight.mul_(50)
        made.positions.weight.mul_(50)
    return made


def _tokens(seed: int, *shape: int, vocabulary: int = V) -> Tensor:
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def _scattered(seed: int, *shape: int) -> Tensor:
    """Draw which positions hold a token, in no order; in some rows none does."""
    return normal(seed, *shape) > 0.2


def _first(held: list[int], total: int) -> Tensor:  # [B total]
    return torch.tensor([[t < each for t in range(total)] for each in held])


def _explicitly(made: nn.Module) -> Sites:
    """Have the explicit path taken, as a fault does: replace the scores by themselves."""
    sites = sites_of(made)
    sites.replace("scores", lambda scores: scores)
    return sites


def _formula(made: Any, x: Tensor, present: Tensor, heads: int) -> Tensor:
    """One row and one head at a time, over only the keys that are tokens: no mask, and no reshape."""
    q, k, v = F.linear(x, made.qkv.weight, made.qkv.bias).chunk(3, dim=-1)  # [B T C] each
    each, mixed = x.shape[-1] // heads, torch.zeros_like(q)
    for b in range(len(x)):
        for h in range(heads if present[b].any() else 0):
            own = slice(h * each, (h + 1) * each)
            scores = q[b, :, own] @ k[b, present[b], own].t() / each**0.5  # [T n]
            mixed[b, :, own] = scores.softmax(-1) @ v[b, present[b], own]
    return F.linear(mixed, made.proj.weight, made.proj.bias)


def _torch(made: Any, x: Tensor, present: Tensor, heads: int) -> Tensor:
    """PyTorch's own layer, given the same weights; it takes the mask the other way round."""
    with torch.random.fork_rng(devices=[]):  # its own start, drawn from torch's generator, is written over
        theirs = nn.MultiheadAttention(x.shape[-1], heads, batch_first=True, dtype=x.dtype)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(made.qkv.weight)
        theirs.in_proj_bias.copy_(made.qkv.bias)
        theirs.out_proj.weight.copy_(made.proj.weight)
        theirs.out_proj.bias.copy_(made.proj.bias)
    out: Tensor = theirs(x, x, x, key_padding_mask=~present, need_weights=False)[0]
    return out


@prop(
    "Values differ from an average over the keys that are tokens: look at the mask's sense, its axis, and the scale.",
    seed=seeds,
    heads=counts,
    each=slices,
    length=lengths,
)
@torch.no_grad()
def equals_a_loop_over_rows_and_torch(built: Built, seed: int, heads: int, each: int, length: int) -> None:
    made, x = _layer(built, seed, heads * each, heads), normal(seed + 4, 3, length, heads * each)
    present = _scattered(seed + 5, 3, length)
    present[:, seed % length] = True  # rows without a token have a property of their own
    expected = _formula(made, x, present, heads)
    equal(_torch(made, x, present, heads), expected, "torch's own layer")
    equal(made(x, present), expected)
    everywhere = torch.ones_like(present)
    equal(made(x), _formula(made, x, everywhere, heads), "the output without a mask")


@prop(
    "The fused and the explicit path differ, or a probe changes the output: a fault would change more than it says.",
    seed=seeds,
    heads=counts,
    length=lengths,
    masked=st.booleans(),
)
def the_fused_and_the_explicit_path_agree(built: Built, seed: int, heads: int, length: int, masked: bool) -> None:
    made, other = (_layer(built, seed, 2 * heads, heads) for _ in range(2))
    sites = _explicitly(other)
    x, present = normal(seed + 4, 2, length, 2 * heads), _scattered(seed + 5, 2, length) if masked else None
    expected = made(x, present)
    with sites.capture("pattern") as whole:
        equal(other(x, present), expected, "the output of the explicit path")
    watched: dict[str, Tensor] = {}
    pattern = tapped(made, call=lambda: watched.update(out=made(x, present)))["pattern"]
    equal(watched["out"], expected, "the output while a probe reads")
    equal(pattern, whole["pattern"][:1].detach(), "the pattern that is computed aside, for the first row,")


@prop(
    "What stands in the padding moved an output: its keys are not hidden, or hidden only after the softmax.",
    seed=seeds,
    held=rows,
    more=st.integers(1, 3),
)
@torch.no_grad()
def the_contents_of_padding_change_nothing(built: Built, seed: int, held: list[int], more: int) -> None:
    present = _first(held, max(held) + more)  # [B T]
    made, x = _layer(built, seed, 4, 2), normal(seed + 4, *present.shape, 4)
    moved = torch.where(present[..., None], x, 100 * normal(seed + 5, *x.shape))
    before, after = made(x, present), made(moved, present)
    equal(after[present], before[present], "the output at the tokens")
    model, tokens = _encoder(built, seed), _tokens(seed, *present.shape)
    other = torch.where(present, tokens, _tokens(seed + 1, *present.shape))
    equal(model(other, present)[present], model(tokens, present)[present], "the logits at the tokens")


@prop(
    "A row gave other logits in a batch than alone: it sees its neighbours, their masks, or how long they are.",
    seed=seeds,
    held=rows,
    more=st.integers(0, 3),
)
@torch.no_grad()
def a_row_is_encoded_as_if_it_were_alone(built: Built, seed: int, held: list[int], more: int) -> None:
    total = max(held) + more
    present, tokens, model = _first(held, total), _tokens(seed, len(held), total), _encoder(built, seed)
    together = model(tokens, present)
    for b, length in enumerate(held):
        alone = model(tokens[b : b + 1, :length])
        equal(together[b : b + 1, :length], alone, f"the logits of row {b} in the batch")


@prop(
    "A row with no token must average nothing and give the bias alone, with finite gradients: 0/0 makes NaN of it.",
    seed=seeds,
    explicit=st.booleans(),
    length=lengths,
)
def a_row_without_tokens_averages_nothing(built: Built, seed: int, explicit: bool, length: int) -> None:
    made, x = _layer(built, seed, 4, 2), normal(seed + 4, 3, length, 4).requires_grad_()
    if explicit:
        _explicitly(made)
    present = torch.ones(3, length, dtype=torch.bool)
    present[1] = False
    out = made(x, present)
    equal(out[1], made.proj.bias.expand(length, 4), "the output of the empty row")
    equal(out[::2], _formula(made, x, present, 2)[::2], "the output of its neighbours")
    out.sum().backward()
    for name, leaf in (("the input", x), *made.named_parameters()):
        holds(leaf.grad is not None and torch.isfinite(leaf.grad).all(), f"the gradient of {name} is not finite")


@prop(
    "An output ignored a token of its row: a causal mask is left in, or a reshape deals positions out to the heads.",
    seed=seeds,
    heads=counts,
    length=st.integers(2, 7),
    masked=st.booleans(),
)
def every_position_sees_every_token(built: Built, seed: int, heads: int, length: int, masked: bool) -> None:
    made, x = _layer(built, seed, 3 * heads, heads), normal(seed + 4, 1, length, 3 * heads).requires_grad_()
    present = _scattered(seed + 5, 1, length) if masked else None
    out, seen = made(x, present), torch.ones(length, dtype=torch.bool) if present is None else present[0]
    for t in range(length):
        (grad,) = torch.autograd.grad(out[0, t].sum(), x, retain_graph=True)
        moved = (grad[0].abs().amax(-1) > 1e-12) | ~seen  # padding is another property's
        moved[t] = True  # a position that is padding may see itself through its query
        holds(moved.all(), f"output {t} does not depend on the tokens at {torch.nonzero(~moved).flatten().tolist()}")


@prop(
    "Without positions a row is a set: permuting it must permute the output alike, or order leaks in by another way.",
    seed=seeds,
    order=st.permutations(range(5)),
)
@torch.no_grad()
def is_permutation_equivariant_without_positions(built: Built, seed: int, order: list[int]) -> None:
    made, x, present = _block(built, seed), normal(seed, 2, 5, WIDTH), _scattered(seed + 1, 2, 5)
    equal(made(x[:, order], present[:, order]), made(x, present)[:, order], "a block's output of the permuted row")
    model, tokens = _encoder(built, seed), _tokens(seed, 2, 5)
    nn.init.zeros_(model.positions.weight)
    equal(model(tokens[:, order]), model(tokens)[:, order], "the logits of the permuted row")


@prop(
    "A block must equal torch's TransformerEncoderLayer with norm_first, the same weights and the same padding.",
    seed=seeds,
    length=st.integers(1, 6),
)
@torch.no_grad()
def equals_torchs_encoder_layer(built: Built, seed: int, length: int) -> None:
    made, x = _block(built, seed), normal(seed, 3, length, WIDTH, scale=2.0)
    with torch.random.fork_rng(devices=[]):
        theirs = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True, dtype=torch.float64
        )
    pairs = (
        (theirs.norm1, made.attn_norm),
        (theirs.norm2, made.mlp_norm),
        (theirs.self_attn.out_proj, made.attn.proj),
        (theirs.linear1, made.mlp.up),
        (theirs.linear2, made.mlp.down),
    )
    with torch.no_grad():
        theirs.self_attn.in_proj_weight.copy_(made.attn.qkv.weight)
        theirs.self_attn.in_proj_bias.copy_(made.attn.qkv.bias)
        for target, source in pairs:
            target.load_state_dict(source.state_dict())
    present = _scattered(seed + 1, 3, length)
    present[:, 0] = True
    equal(made(x, present), theirs(x, src_key_padding_mask=~present))


@prop(
    "The encoder is tokens + positions, blocks, a norm and a head that starts small: a part is lost, or starts wide.",
    seed=seeds,
    length=st.integers(1, CONTEXT),
    examples=10,
)
@torch.no_grad()
def is_assembled_of_its_parts_in_order(built: Built, seed: int, length: int) -> None:
    model, tokens = _encoder(built, seed), _tokens(seed, 2, length)
    present = _first([length, max(length - 2, 1)], length)
    with torch.no_grad():
        model.norm.weight.copy_(1 + normal(seed, WIDTH, scale=0.3))
    x = model.tokens.weight[tokens] + model.positions.weight[:length]  # [2 T C]
    for block in model.blocks:
        x = block(x, present)
    x = F.layer_norm(x, (WIDTH,), model.norm.weight, model.norm.bias)
    equal(model.encode(tokens, present), x, "what encode returns")
    equal(model(tokens, present), x @ model.head.weight.t(), "the logits")
    count = sum(p.numel() for p in model.parameters())
    expected = 2 * V * WIDTH + CONTEXT * WIDTH + 2 * (12 * WIDTH**2 + 13 * WIDTH) + 2 * WIDTH
    holds(count == expected, f"{count} parameters, expected {expected}")
    wide = _encoder(built, seed, vocabulary=100, width=64).head.weight.detach()
    near(float(wide.std()), 0.02, 0.02 * 5 / (2 * wide.numel()) ** 0.5, "the standard deviation of the head's weights")


@prop(
    "Each branch must end in a gain of 1/sqrt(2 layers): without it the stream's variance grows with depth.",
    layers=st.sampled_from([1, 2, 8, 32]),
    examples=4,
)
def branches_end_in_a_gain_of_1_over_the_root_of_2_layers(built: Built, layers: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(layers)
        made = built.EncoderBlock(64, 4, layers)
    for name, weight in (("attn.proj", made.attn.proj.weight), ("mlp.down", made.mlp.down.weight)):
        unit = float(weight.detach().double().std()) * (2 * layers * weight.shape[1]) ** 0.5
        # Five standard errors of a standard deviation of so many normal numbers.
        near(unit, 1.0, 5 / (2 * weight.numel()) ** 0.5, f"the standard deviation of {name}'s weights, in its units,")


@prop(
    "The mask must be True at the first positions of each row, as many as it has tokens, and False after them.",
    held=st.lists(st.integers(0, 6), min_size=0, max_size=4),
    more=st.integers(0, 3),
)
def the_mask_marks_the_first_positions(built: Built, held: list[int], more: int) -> None:
    total = max([1, *held]) + more
    expected = _first(held, total) if held else torch.ones(0, total, dtype=torch.bool)
    equal(built.present_mask(torch.tensor(held, dtype=torch.long), total), expected, "the mask")


@prop(
    "Of the chosen tokens 80% must become the mask token, 10% any token and 10% stay, all of them at random places.",
    seed=seeds,
    share=st.sampled_from([0.05, 0.15, 0.5]),
    examples=5,
)
def hides_in_the_proportions_of_bert(built: Built, seed: int, share: float) -> None:
    tokens, draw = _tokens(seed, 200, 100, vocabulary=1000), torch.Generator().manual_seed(seed)
    inputs, targets = built.mask_tokens(tokens, mask_token=1000, vocabulary=1000, share=share, generator=draw)
    chosen = targets != IGNORED
    n = int(chosen.sum())
    near(n / tokens.numel(), share, 5 * (share / tokens.numel()) ** 0.5, "the share of tokens that are chosen")
    hidden, kept = inputs[chosen] == 1000, inputs[chosen] == tokens[chosen]
    drawn = inputs[chosen][~hidden & ~kept]
    for name, part, expected in (
        ("hidden by the mask token", hidden, 0.8),
        ("kept", kept, 0.1 + 0.1 / 1000),  # a random token may be the token itself
        ("replaced by a random token", ~hidden & ~kept, 0.1 - 0.1 / 1000),
    ):
        spread = (expected * (1 - expected) / n) ** 0.5
        near(float(part.double().mean()), expected, 5 * spread, f"the share of the chosen that are {name}")
    middle = 1000 / 12**0.5 / len(drawn) ** 0.5
    near(float(drawn.double().mean()), 499.5, 5 * middle, "the mean of the random tokens, of 0 to 999,")
    each = chosen.double().mean(0)  # [T], how often each position is chosen
    # A binomial share of 200 rows at each of 100 positions: beyond six standard errors once in a million runs.
    worst, allowed = float((each - share).abs().max()), 6 * (share * (1 - share) / 200) ** 0.5
    holds(worst <= allowed, f"a position is chosen {worst:.2g} more or less often than {share}, at most {allowed:.2g}")
    near(float(chosen[1:].eq(chosen[:-1]).all(-1).double().mean()), 0.0, 0.5, "the share of rows chosen alike")


@prop(
    "Each row must have a target of its own tokens, never of padding, and nothing may change where none is chosen.",
    seed=seeds,
    held=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    share=st.sampled_from([0.01, 0.15, 1.0]),
)
def each_row_has_targets_and_never_in_its_padding(built: Built, seed: int, held: list[int], share: float) -> None:
    present = _first(held, 10)
    tokens = _tokens(seed, *present.shape)
    before = tokens.clone()

    def call(draw: int) -> tuple[Tensor, Tensor]:
        made: tuple[Tensor, Tensor] = built.mask_tokens(
            tokens,
            mask_token=V,
            vocabulary=V,
            share=share,
            present=present,
            generator=torch.Generator().manual_seed(draw),
        )
        return made

    inputs, targets = call(seed)
    chosen = targets != IGNORED
    equal(targets, torch.where(chosen, before, IGNORED), "what is to be predicted")
    equal(inputs[~chosen], before[~chosen], "the inputs that are not chosen")
    equal(tokens, before, "the caller's own tokens, afterwards,")
    holds(not (chosen & ~present).any(), "padding is chosen")
    for b, length in enumerate(held):
        near(int(chosen[b].sum()), min(length, max(1, share * length)), 0.5, f"of {length} tokens, how many are chosen")
    torch.rand(1)  # what others draw must not matter
    again = call(seed)
    equal(again[0], inputs, "the inputs, drawn again by the same generator,")
    equal(again[1], targets, "the targets, drawn again by the same generator,")


@prop(
    "In half precision the output has another dtype, is far from the exact value, or overflows at large scores.",
    seed=seeds,
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    explicit=st.booleans(),
)
def keeps_the_dtype_and_stays_finite(built: Built, seed: int, dtype: torch.dtype, explicit: bool) -> None:
    made, x = _layer(built, seed, 8, 2).to(dtype), normal(seed + 4, 3, 5, 8, dtype=dtype)
    if explicit:
        _explicitly(made)
    present = _first([5, 2, 0], 5)
    out = made(x, present)
    holds(out.dtype == dtype, f"the output is {out.dtype}, the input is {dtype}")
    large = made(50 * x, present)  # scores of some thousands, of which float16 holds the value and not the exponential
    holds(torch.isfinite(large).all(), "the output is not finite for large scores")
    exact = _formula(made.double(), x.double(), present, 2)
    equal(out.double(), exact, rtol=0.0, atol=64 * torch.finfo(dtype).eps)


@prop(
    "Backward disagrees with the values: the input, a projection or a bias is detached, or changed in place.",
    seed=seeds,
    examples=2,
)
def gradients_are_those_of_finite_differences(built: Built, seed: int) -> None:
    made, x = _layer(built, seed, 4, 2), normal(seed + 4, 2, 3, 4)
    present = _first([3, 2], 3)

    def call(x: Tensor, *parameters: Tensor) -> Any:
        return torch.func.functional_call(made, dict(zip(NAMES, parameters, strict=True)), (x, present))

    parameters = dict(made.named_parameters())
    gradients(call, x, *(parameters[name] for name in NAMES))
    gradients(_block(built, seed), normal(seed, 1, 2, WIDTH))


@prop(
    "Sites must be tapped in order, by head; memory order is no part of the values; what does not fit must be refused.",
    seed=seeds,
    heads=st.integers(2, 4),
    each=slices,
)
def taps_its_sites_and_refuses_what_does_not_fit(built: Built, seed: int, heads: int, each: int) -> None:
    width = heads * each
    made, x = _layer(built, seed, width, heads), normal(seed + 4, width, 5, 2).permute(2, 1, 0)  # [2 5 C], strided
    present = _first([5, 3], 5)
    equal(made(x, present), _formula(made, x.contiguous(), present, heads), "the output of a strided input")
    explicit_taps(made, ("qkv.out", "q", "k", "v", "scores", "pattern", "proj.out", "out"), x, present)
    values = tapped(made, x, present)
    part = F.linear(x, made.qkv.weight, made.qkv.bias)[..., width : 2 * width]  # [2 5 C]
    equal(values["k"], part.reshape(2, 5, heads, each).transpose(1, 2), "what is tapped as k")
    equal(values["out"], made(x, present), "what is tapped as out")
    block, stream = _block(built, seed), normal(seed, 1, 3, WIDTH)
    equal(tapped(block, stream)["out"], block(stream), "what a block taps as out")
    model = _encoder(built, seed)
    refused: tuple[tuple[str, Callable[[], object]], ...] = (
        ("a width that is no multiple of the heads", lambda: built.SelfAttention(width + 1, heads)),
        ("a row longer than the context", lambda: model(_tokens(seed, 1, CONTEXT + 1))),
        ("a length above the total", lambda: built.present_mask(torch.tensor([2, 4]), 3)),
        ("a share of 0", lambda: built.mask_tokens(_tokens(0, 1, 4), mask_token=V, vocabulary=V, share=0.0)),
    )
    for name, call in refused:
        try:
            call()
        except NotImplementedError:
            raise
        except Exception:  # noqa: BLE001, S112 - any refusal will do
            continue
        holds(condition=False, text=f"{name} is taken")
