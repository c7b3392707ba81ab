"""What any decoder must do, alone and after an encoder."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lab.context import IGNORED
from lab.projects.residuals.component import Choices
from lab.sites import sites_of
from lab.spec import Built, equal, floats, gradients, holds, near, normal, prop, seeds, tapped

if TYPE_CHECKING:
    from collections.abc import Callable

V, WIDTH, HEADS, LAYERS, CONTEXT = 11, 8, 2, 2, 10
CROSS = ("query.weight", "query.bias", "kv.weight", "kv.bias", "proj.weight", "proj.bias")
STILL = 1e-12  # above rounding in float64, far below what any weight of a softmax over ten positions lets through

lengths = st.integers(2, CONTEXT)


def _start(kind: Any, seed: int, **changes: Any) -> Any:
    size = {"context": CONTEXT, "layers": LAYERS, "width": WIDTH, "heads": HEADS, **changes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(size.pop("vocabulary", V), **size).double()


def _model(kind: Any, seed: int, **changes: Any) -> Any:
    made = _start(kind, seed, **changes)
    with torch.no_grad():  # gains of 1 would hide which norm is which
        for i, (name, p) in enumerate(made.named_parameters()):
            if "norm" in name and p.dim() == 1:
                p.add_(normal(seed + i, len(p), scale=0.2))
    return made


def _tokens(seed: int, *shape: int, vocabulary: int = V) -> Tensor:
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def _changed(tokens: Tensor, place: int) -> Tensor:
    """Return them with another token at one place of each row."""
    after = tokens.clone()
    after[:, place] = (after[:, place] + 1) % V
    return after


def _same(parts: tuple[tuple[Any, Any], ...]) -> None:
    """Give modules of PyTorch the weights of ours."""
    with torch.no_grad():
        for theirs, ours in parts:
            theirs.load_state_dict(ours.state_dict())


def _block_pairs(theirs: Any, block: Any) -> tuple[tuple[Any, Any], ...]:
    """Give the self-attention its weights; return what else the two have in common."""
    with torch.no_grad():
        theirs.self_attn.in_proj_weight.copy_(block.attn.qkv.weight)
        theirs.self_attn.in_proj_bias.copy_(block.attn.qkv.bias)
    return (
        (theirs.self_attn.out_proj, block.attn.proj),
        (theirs.norm1, block.attn_norm),
        (theirs.linear1, block.mlp.up),
        (theirs.linear2, block.mlp.down),
    )


def _future(length: int) -> Tensor:  # [T T], True where it may not look
    return torch.ones(length, length, dtype=torch.bool).triu(1)


@prop(
    "A logit moved when a later token did: something sees the future, and the loss no longer measures prediction.",
    seed=seeds,
    length=lengths,
)
@torch.no_grad()
def no_logit_depends_on_a_later_token(built: Built, seed: int, length: int) -> None:
    model, tokens = _model(built.Decoder, seed), _tokens(seed, 2, length)
    before = model(tokens)
    for place in range(1, length):
        equal(model(_changed(tokens, place))[:, :place], before[:, :place], f"the logits before position {place}")


@prop(
    "A logit ignored an earlier token, or the order of two: a part of the text never reaches the prediction.",
    seed=seeds,
    length=st.integers(3, CONTEXT),
)
@torch.no_grad()
def every_logit_depends_on_every_earlier_token(built: Built, seed: int, length: int) -> None:
    model, tokens = _model(built.Decoder, seed), _tokens(seed, 1, length)
    before = model(tokens)
    for place in range(length):
        gap = (model(_changed(tokens, place)) - before)[0, place:].abs().amax(-1)  # [T - place]
        still = [place + int(i) for i in torch.nonzero(gap <= STILL)]
        holds(not still, f"token {place} does not move the logits at {still}")
    row = torch.arange(length)[None]
    swapped = row[:, [1, 0, *range(2, length)]]
    gap = (model(swapped) - model(row))[0, -1].abs().amax()
    holds(gap > STILL, "the last logits do not depend on the order of the first two tokens")


@prop(
    "The loss of a token must be the same in the whole text and in a text cut after it: else training sees too much.",
    seed=seeds,
    length=lengths,
)
@torch.no_grad()
def the_loss_of_a_prefix_is_that_of_the_whole(built: Built, seed: int, length: int) -> None:
    model, text = _model(built.Decoder, seed), _tokens(seed, 2, length + 1)
    inputs, targets = text[:, :-1], text[:, 1:]
    full = F.cross_entropy(model(inputs).transpose(1, 2), targets, reduction="none")  # [2 T]
    for cut in range(1, length):
        logits = model(inputs[:, :cut]).transpose(1, 2)  # [2 V cut]
        part = F.cross_entropy(logits, targets[:, :cut], reduction="none")
        equal(part, full[:, :cut], f"the losses of the first {cut} tokens alone")


@prop(
    "The decoder must equal torch's own layers, with the same weights and a causal mask: a part is lost or misplaced.",
    seed=seeds,
    length=st.integers(1, CONTEXT),
    norm_at=st.sampled_from(["pre", "post"]),
    examples=12,
)
@torch.no_grad()
def equals_a_model_of_torchs_parts(built: Built, seed: int, length: int, norm_at: str) -> None:
    model = _model(built.Decoder, seed, choices=Choices(norm_at=norm_at))
    tokens = _tokens(seed, 2, length)
    x = F.embedding(tokens, model.tokens.weight) + model.positions.weight[:length]  # [2 T C]
    for block in model.blocks:
        with torch.random.fork_rng(devices=[]):
            theirs = nn.TransformerEncoderLayer(
                WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=norm_at == "pre", dtype=x.dtype
            )
        _same((*_block_pairs(theirs, block), (theirs.norm2, block.mlp_norm)))
        x = theirs(x, src_mask=_future(length))
    if norm_at == "pre":
        x = F.layer_norm(x, (WIDTH,), model.norm.weight, model.norm.bias)
    equal(model(tokens), x @ model.head.weight.t(), "the logits")


class _Memory:
    """The simplest memory of a layer: it joins."""

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


class _Cache:
    """A memory for each layer."""

    def __init__(self) -> None:
        self.memories = [_Memory() for _ in range(LAYERS)]

    def __getitem__(self, layer: int) -> _Memory:
        return self.memories[layer]

    @property
    def length(self) -> int:
        return self.memories[0].length


@prop(
    "With a cache, tokens piece by piece must give the logits of one pass: positions or layers are confused.",
    seed=seeds,
    cuts=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    positions=st.sampled_from(["learned", "rope", "none"]),
)
@torch.no_grad()
def with_a_cache_pieces_give_what_one_pass_gives(built: Built, seed: int, cuts: list[int], positions: str) -> None:
    model, tokens = _model(built.Decoder, seed, choices=Choices(positions=positions)), _tokens(seed, 2, sum(cuts))
    cache = _Cache()
    pieces = [model(piece, cache=cache) for piece in torch.split(tokens, cuts, dim=1)]
    equal(torch.cat(pieces, dim=1), model(tokens), "the logits piece by piece")


@prop(
    "A part has too many or too few weights, a tied head is a copy, or a parameter takes no part in the loss.",
    seed=seeds,
    tied=st.booleans(),
    examples=4,
)
def has_its_sizes_and_every_parameter_learns(built: Built, seed: int, tied: bool) -> None:
    alone, both = _model(built.Decoder, seed, tied=tied), _model(built.EncoderDecoder, seed)
    c, ends = WIDTH, (V + CONTEXT) * WIDTH + 2 * WIDTH  # tokens, positions and the last norm
    block = 12 * c**2 + 13 * c  # attention, feed-forward, two norms
    crossed = block + 4 * c**2 + 6 * c  # and cross-attention with its norm
    expected = (
        ("the decoder", alone, LAYERS * block + ends + (0 if tied else V * c)),
        ("the encoder and decoder", both, LAYERS * (block + crossed) + 2 * ends + V * c),
    )
    for name, model, size in expected:
        count = sum(p.numel() for p in model.parameters())
        holds(count == size, f"{name} has {count} parameters, expected {size}")
    holds((alone.head.weight is alone.tokens.weight) == tied, f"tied = {tied}, but the head's table is not so")
    inputs, targets = _tokens(seed, 4, CONTEXT), _tokens(seed + 1, 4, CONTEXT)
    for model, logits in ((alone, alone(inputs)), (both, both(inputs, _tokens(seed + 2, 4, CONTEXT)))):
        loss: Any = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        # All rows of the tables together: not every token occurs.
        idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        holds(not idle, f"no gradient reaches {', '.join(idle)}")


@prop(
    "Training must start from even odds, at a loss of ln V + C 0.02^2 / 2: logits start too wide, or all alike.",
    seed=seeds,
    examples=4,
)
@torch.no_grad()
def the_loss_starts_at_the_logarithm_of_the_vocabulary(built: Built, seed: int) -> None:
    vocabulary, width = 1000, 64  # so many that the variance over them is known within 5%
    size = {"vocabulary": vocabulary, "width": width, "context": 32, "layers": 1}
    tokens, targets = _tokens(seed, 32, 32, vocabulary=vocabulary), _tokens(seed + 1, 32, 32, vocabulary=vocabulary)
    excess = width * 0.02**2 / 2
    for name, logits in (
        ("the decoder", _start(built.Decoder, seed, **size)(tokens)),
        ("the encoder and decoder", _start(built.EncoderDecoder, seed, **size)(tokens, tokens.flip(1))),
    ):
        near(float(logits.var()), 2 * excess, 0.5 * excess, f"the variance of the logits of {name}")
        loss = float(F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
        # Random targets: the mean over n tokens has a spread of sqrt(2 excess / n).
        spread = (2 * excess / targets.numel()) ** 0.5
        near(loss, math.log(vocabulary) + excess, 5 * spread + 0.25 * excess, f"the loss of {name}")


@prop(
    "Each of three branches must end in a gain of 1/sqrt(3 layers): with that of two the stream grows with depth.",
    layers=st.sampled_from([1, 2, 8, 32]),
    examples=4,
)
def branches_end_in_a_gain_of_1_over_the_root_of_3_layers(built: Built, layers: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(layers)
        made = built.CrossBlock(64, 4, layers)
    for name, part in (("attn.proj", made.attn.proj), ("cross.proj", made.cross.proj), ("mlp.down", made.mlp.down)):
        weight = part.weight.detach().double()
        unit = float(weight.std()) * (3 * layers * weight.shape[1]) ** 0.5
        # Five standard errors of a standard deviation of so many normal numbers.
        near(unit, 1.0, 5 / (2 * weight.numel()) ** 0.5, f"the standard deviation of {name}'s weights, in its units,")


@prop(
    "Shifted targets are the start and then all but the last: shifted twice, or not at all, it trains and is useless.",
    seed=seeds,
    length=st.integers(0, 6),
    start=st.integers(0, V),
)
def targets_are_shifted_once(built: Built, seed: int, length: int, start: int) -> None:
    targets = _tokens(seed, 3, length)
    targets = torch.where(normal(seed, 3, length) > 0.8, IGNORED, targets)
    before = targets.clone()
    rows = [[start, *row][:length] for row in targets.tolist()]
    expected = torch.tensor([[start if t == IGNORED else t for t in row] for row in rows], dtype=targets.dtype)
    equal(built.shift_right(targets, start), expected.view(3, length), "the shifted targets")
    equal(targets, before, "the caller's own targets, afterwards,")


@prop(
    "Told its targets, the decoder must use each for the logits after it and none for its own: the answer leaks.",
    seed=seeds,
    length=lengths,
)
@torch.no_grad()
def each_target_is_told_only_to_the_logits_after_it(built: Built, seed: int, length: int) -> None:
    model, source, targets = _model(built.EncoderDecoder, seed), _tokens(seed, 1, 4), _tokens(seed + 1, 1, length)
    before = model(source, built.shift_right(targets, V - 1))
    for place in range(length):
        after = model(source, built.shift_right(_changed(targets, place), V - 1))
        equal(after[:, : place + 1], before[:, : place + 1], f"the logits up to target {place}")
        still = [int(t) for t in torch.nonzero((after - before)[0].abs().amax(-1) <= STILL) if t > place]
        holds(not still, f"target {place} does not move the logits at {still}")
    encoded = model.encoder.encode(source)
    equal(model.decode(built.shift_right(targets, V - 1), encoded), before, "what decode makes of the encoded source")


@prop(
    "Every logit must depend on every token of the source and on no padding: it is not read, or not as it is meant.",
    seed=seeds,
    held=st.integers(0, 5),
    more=st.integers(0, 3),
    examples=15,
)
@torch.no_grad()
def reads_every_token_of_the_source_and_no_padding(built: Built, seed: int, held: int, more: int) -> None:
    model, total = _model(built.EncoderDecoder, seed), max(1, held + more)
    source, said = _tokens(seed, 2, total), _tokens(seed + 1, 2, 4)
    present = torch.ones(2, total, dtype=torch.bool)
    present[0, held:] = False
    before = model(source, said, present)
    holds(torch.isfinite(before).all(), f"the logits are not finite for a source of {held} tokens")
    for place in range(total):
        moved = (model(_changed(source, place), said, present) - before)[0].abs().amax(-1)  # [T]
        if place >= held:
            holds(
                (moved <= STILL).all(),
                f"the padding of the source at {place} moves a logit by {float(moved.max()):.3g}",
            )
        else:
            holds((moved > STILL).all(), f"token {place} of the source moves not every logit")
    if held:
        alone = model(source[:1, :held], said[:1])
        equal(before[:1], alone, "the logits with a padded source")


def _cross(built: Built, seed: int, width: int, heads: int) -> Any:
    """Build one in float64, with biases that are not 0: the ones it starts with would hide what is done to them."""
    made = built.CrossAttention(width, heads).double()
    with torch.no_grad():
        for i, p in enumerate(made.parameters()):
            p.copy_(normal(seed + i, *p.shape, scale=0.5 if p.dim() == 1 else width**-0.5))
    return made


def _formula(made: Any, x: Tensor, source: Tensor, present: Tensor, heads: int) -> Tensor:
    """One row and one head at a time, over only the keys that are tokens: no mask, and no reshape."""
    q = F.linear(x, made.query.weight, made.query.bias)  # [B T C]
    k, v = F.linear(source, made.kv.weight, made.kv.bias).chunk(2, dim=-1)  # [B S C] each
    each, mixed = x.shape[-1] // heads, torch.zeros_like(q)
    for b in range(len(x)):
        for h in range(heads if present[b].any() else 0):
            own = slice(h * each, (h + 1) * each)
            scores = q[b, :, own] @ k[b, present[b], own].t() / each**0.5  # [T n]
            mixed[b, :, own] = scores.softmax(-1) @ v[b, present[b], own]
    return F.linear(mixed, made.proj.weight, made.proj.bias)


@prop(
    "Cross-attention differs from an average over the source's tokens: look at what asks, what offers, and the mask.",
    seed=seeds,
    heads=st.integers(1, 3),
    queries=st.integers(1, 5),
    keys=st.integers(1, 5),
    dtype=floats,
)
@torch.no_grad()
def cross_attention_equals_a_loop_and_torch(
    built: Built, seed: int, heads: int, queries: int, keys: int, dtype: torch.dtype
) -> None:
    width = 4 * heads
    made = _cross(built, seed, width, heads).to(dtype)
    x, source = normal(seed + 6, 3, queries, width, dtype=dtype), normal(seed + 7, 3, keys, width, dtype=dtype)
    present = normal(seed + 8, 3, keys) > 0.0  # in some rows there is none
    got, plain = made(x, source, present), made(x, source)
    kept = [made.attend(x[:, t : t + 1], *made.keys_values(source), present) for t in range(queries)]
    holds(got.dtype == dtype, f"the output is {got.dtype}, the input is {dtype}")
    half = dtype != torch.float64
    rtol, atol = (0.0, 64 * torch.finfo(dtype).eps) if half else (None, None)
    sites_of(made).replace("scores", lambda scores: scores)
    explicit = made(x, source, present)
    made, x, source = made.double(), x.double(), source.double()
    expected = _formula(made, x, source, present, heads)
    equal(got.double(), expected, rtol=rtol, atol=atol)
    equal(explicit.double(), expected, "the output of the explicit path", rtol=rtol, atol=atol)
    equal(
        torch.cat(kept, dim=1).double(),
        expected,
        "the output position by position, keys and values kept,",
        rtol=rtol,
        atol=atol,
    )
    with torch.random.fork_rng(devices=[]):
        theirs = nn.MultiheadAttention(width, heads, batch_first=True, dtype=x.dtype)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([made.query.weight, made.kv.weight]))
        theirs.in_proj_bias.copy_(torch.cat([made.query.bias, made.kv.bias]))
        _same(((theirs.out_proj, made.proj),))
        equal(
            plain.double(),
            theirs(x, source, source, need_weights=False)[0],
            "the output without a mask",
            rtol=rtol,
            atol=atol,
        )


@prop(
    "A block must equal torch's TransformerDecoderLayer with norm_first and the same weights: a branch is misplaced.",
    seed=seeds,
    length=st.integers(1, 5),
    total=st.integers(1, 5),
)
@torch.no_grad()
def equals_torchs_decoder_layer(built: Built, seed: int, length: int, total: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = built.CrossBlock(WIDTH, HEADS, 1).double()
        theirs = nn.TransformerDecoderLayer(
            WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True, dtype=torch.float64
        )
    with torch.no_grad():
        for i, norm in enumerate((made.attn_norm, made.cross_norm, made.mlp_norm)):
            norm.weight.copy_(1 + normal(seed + i, WIDTH, scale=0.3))
        theirs.multihead_attn.in_proj_weight.copy_(torch.cat([made.cross.query.weight, made.cross.kv.weight]))
        theirs.multihead_attn.in_proj_bias.copy_(torch.cat([made.cross.query.bias, made.cross.kv.bias]))
    _same(
        (
            *_block_pairs(theirs, made),
            (theirs.norm2, made.cross_norm),
            (theirs.norm3, made.mlp_norm),
            (theirs.multihead_attn.out_proj, made.cross.proj),
        )
    )
    x, source = normal(seed, 2, length, WIDTH), normal(seed + 1, 2, total, WIDTH, scale=2.0)
    present = normal(seed + 2, 2, total) > 0.0
    present[:, seed % total] = True
    expected = theirs(x, source, tgt_mask=_future(length), memory_key_padding_mask=~present)
    equal(made(x, source, present), expected)


@prop(
    "Backward disagrees with the values: the stream, the source or a projection is detached, or changed in place.",
    seed=seeds,
    examples=2,
)
def gradients_are_those_of_finite_differences(built: Built, seed: int) -> None:
    made, x, source = _cross(built, seed, 4, 2), normal(seed + 6, 1, 2, 4), normal(seed + 7, 1, 3, 4)
    present = torch.tensor([[True, False, True]])

    def call(x: Tensor, source: Tensor, *parameters: Tensor) -> Any:
        return torch.func.functional_call(made, dict(zip(CROSS, parameters, strict=True)), (x, source, present))

    parameters = dict(made.named_parameters())
    gradients(call, x, source, *(parameters[name] for name in CROSS))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        block = built.CrossBlock(4, 2, 1).double()
    gradients(block, x, source)


@prop(
    "Sites must be tapped in order, by head; memory order is no part of the values; what does not fit must be refused.",
    seed=seeds,
    heads=st.integers(2, 4),
    each=st.integers(1, 3),
    examples=10,
)
def taps_its_sites_and_refuses_what_does_not_fit(built: Built, seed: int, heads: int, each: int) -> None:
    width = heads * each
    made, source = _cross(built, seed, width, heads), normal(seed + 7, 2, 3, width)
    x = normal(seed + 6, width, 5, 2).permute(2, 1, 0)  # [2 5 C], strided
    present = torch.tensor([[True, True, True], [True, False, True]])
    equal(
        made(x, source, present),
        _formula(made, x.contiguous(), source, present, heads),
        "the output of a strided input",
    )
    names = ("q", "k", "v", "scores", "pattern", "out")
    values = {name: value for name, value in tapped(made, x, source, present).items() if name in names}
    holds(
        tuple(values) == names, f"its own sites tapped are {', '.join(values) or 'none'}; expected {', '.join(names)}"
    )
    asked = F.linear(x, made.query.weight, made.query.bias)  # [2 5 C]
    offered = F.linear(source, made.kv.weight, made.kv.bias)[..., :width]  # [2 3 C]
    equal(values["q"], asked.reshape(2, 5, heads, each).transpose(1, 2), "what is tapped as q")
    equal(values["k"], offered.reshape(2, 3, heads, each).transpose(1, 2), "what is tapped as k")
    alone, both, whole = _model(built.Decoder, seed), _model(built.EncoderDecoder, seed), _tokens(seed, 1, CONTEXT)
    longer, mixed = _tokens(seed, 1, CONTEXT + 1), _model(built.Decoder, seed, choices=Choices(mixer="none"))
    for model, args in ((alone, (whole,)), (both, (whole, whole))):
        last = list(tapped(model, *args))[-1:]
        holds(last == ["head.out"], f"the last site tapped is {last}, expected head.out: the logits")
    refused: tuple[tuple[str, Callable[[], object]], ...] = (
        ("a width that is no multiple of the heads", lambda: built.CrossAttention(width + 1, heads)),
        ("a text longer than the context", lambda: alone(longer)),
        ("a source longer than the context", lambda: both(longer, whole)),
        ("a target longer than the context", lambda: both(whole, longer)),
        ("a cache of keys and values for a model that has none", lambda: mixed(whole, cache=_Cache())),
    )
    for name, attempt in refused:
        try:
            attempt()
        except NotImplementedError:
            raise
        except Exception:  # noqa: BLE001, S112 - any refusal will do
            continue
        holds(condition=False, text=f"{name} is taken")
