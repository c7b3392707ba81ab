"""What any cache of keys and values, and any sampling, must do."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from lab.projects.decoder.component import Decoder
from lab.projects.residuals.component import Choices
from lab.spec import Built, equal, floats, holds, near, normal, prop, seeds

if TYPE_CHECKING:
    from collections.abc import Callable

V, LAYERS, CONTEXT = 11, 2, 16
places = st.sampled_from(["learned", "sinusoidal", "rope", "alibi", "none"])


def _model(seed: int, positions: str = "learned") -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        choices = Choices(positions=positions, kv_heads=2)
        made = Decoder(V, context=CONTEXT, layers=LAYERS, width=16, heads=4, choices=choices).double()
        made.head.weight.data *= 50  # logits far enough apart to choose by
    return made


def _tokens(seed: int, *shape: int) -> Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def _refuses(call: Callable[[], object], what: str) -> str:
    """Return the error's text; raise `Mismatch` if there is none. What is not written yet refuses nothing."""
    try:
        call()
    except NotImplementedError:
        raise
    except Exception as error:  # noqa: BLE001 - which error it is, the component may choose
        return str(error)
    holds(condition=False, text=f"{what} raised nothing")
    return ""


@prop(
    "Logits piece by piece differ from those of one pass: keys are written at the wrong place, or too many are read.",
    seed=seeds,
    cuts=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    positions=places,
)
def piece_by_piece_equals_one_pass(built: Built, seed: int, cuts: list[int], positions: str) -> None:
    model, tokens = _model(seed, positions), _tokens(seed, 2, sum(cuts))
    cache = built.Cache(LAYERS, CONTEXT)
    with torch.no_grad():
        pieces = [model(piece, cache) for piece in torch.split(tokens, cuts, dim=1)]
        equal(torch.cat(pieces, dim=1), model(tokens), "the logits", rtol=1e-5, atol=1e-5)
    holds(cache.length == sum(cuts), f"the cache's length is {cache.length} after {sum(cuts)} tokens")


@prop(
    "Extending must return all keys and values until now, in order, and nothing of the storage that is not yet filled.",
    seed=seeds,
    cuts=st.lists(st.integers(1, 3), min_size=1, max_size=4),
)
def extending_returns_all_until_now(built: Built, seed: int, cuts: list[int]) -> None:
    k, v = normal(seed, 2, 3, sum(cuts), 4), normal(seed + 1, 2, 3, sum(cuts), 4)
    memory, end = built.Memory(sum(cuts) + 2), 0
    for part_k, part_v in zip(torch.split(k, cuts, dim=2), torch.split(v, cuts, dim=2), strict=True):
        end += part_k.shape[2]
        keys, values = memory.extend(part_k, part_v)
        equal(keys, k[:, :, :end], "the keys")
        equal(values, v[:, :, :end], "the values")
        holds(memory.length == end, f"the length is {memory.length}, expected {end}")


@prop(
    "Generation with the cache chose other tokens than without: the cache changes the model, or a token is fed twice.",
    seed=seeds,
    prompt=st.integers(1, 5),
    length=st.integers(0, 8),
    positions=places,
)
def generates_the_same_with_and_without(built: Built, seed: int, prompt: int, length: int, positions: str) -> None:
    model, start = _model(seed, positions), _tokens(seed, 2, prompt)
    results = [built.generate(model, start, length, built.greedy, layers=LAYERS, cached=c) for c in (True, False)]
    for tokens in results:
        equal(tokens[:, :prompt], start, "the prompt in what is returned")
        holds(tokens.shape[1] == prompt + length, f"{tokens.shape[1]} tokens, expected {prompt + length}")
    equal(results[0], results[1], "the tokens with the cache")


@prop(
    "With a cache each new token must pass the model once; without, the whole text each time: count what you pass.",
    prompt=st.integers(1, 6),
    length=st.integers(0, 9),
    cached=st.booleans(),
)
def passes_as_many_tokens_as_the_closed_form(built: Built, prompt: int, length: int, cached: bool) -> None:
    seen = 0

    class Counting(torch.nn.Module):
        def forward(self, tokens: Tensor, cache: Any = None) -> Tensor:  # noqa: ARG002
            nonlocal seen
            seen += tokens.shape[1]
            return torch.zeros(*tokens.shape, V)

    built.generate(Counting(), _tokens(0, 1, prompt), length, built.greedy, layers=0, cached=cached)
    expected = prompt + length - 1 if cached else sum(prompt + i for i in range(length))
    expected = expected if length else 0
    holds(seen == expected, f"{seen} tokens passed the model, expected {expected}")
    got = built.token_passes(prompt, length, cached=cached)
    holds(got == expected, f"token_passes is {got}, expected {expected}")


@prop(
    "Forgetting the last positions and decoding them again must give the same: truncate drops too many or too few.",
    seed=seeds,
    keep=st.integers(1, 5),
)
def truncating_and_going_on_equals_not_having_been_there(built: Built, seed: int, keep: int) -> None:
    model, tokens, cache = _model(seed), _tokens(seed, 1, 8), built.Cache(LAYERS, CONTEXT)
    with torch.no_grad():
        whole = model(tokens)
        model(torch.cat([tokens[:, :keep], (tokens[:, keep:] + 1) % V], dim=1), cache)
        cache.truncate(keep)
        holds(cache.length == keep, f"the length is {cache.length}, expected {keep}")
        equal(model(tokens[:, keep:], cache), whole[:, keep:], "the logits after truncating", rtol=1e-5, atol=1e-5)


@prop(
    "A cache holds 2 L K D T numbers a sequence: keys and values, in the dtype they come in, and nothing else.",
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    width=st.integers(1, 4),
    capacity=st.integers(1, 8),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.float64]),
)
def takes_the_bytes_of_the_closed_form(
    built: Built, batch: int, heads: int, width: int, capacity: int, dtype: torch.dtype
) -> None:
    cache, x = built.Cache(LAYERS, capacity), torch.zeros(batch, heads, 1, width, dtype=dtype)
    for layer in range(LAYERS):
        keys, _ = cache[layer].extend(x, x)
        holds(keys.dtype == dtype, f"the keys are {keys.dtype}, expected {dtype}")
    expected = 2 * LAYERS * heads * width * capacity * dtype.itemsize * batch
    holds(cache.bytes == expected, f"the cache takes {cache.bytes} bytes, expected {expected}")
    form = built.cache_bytes(LAYERS, heads, width, capacity, dtype.itemsize, batch)
    holds(form == expected, f"cache_bytes is {form}, expected {expected}")


@prop("A full cache must refuse more, with an error that names its room: written over, the past is lost unseen.")
def refuses_more_than_its_capacity(built: Built) -> None:
    memory, x = built.Memory(3), torch.zeros(1, 1, 2, 2)
    memory.extend(x, x)
    text = _refuses(lambda: memory.extend(x, x), "a fourth position, in a memory for 3,")
    holds("3" in text, f"the message does not name the capacity: {text}")
    holds(memory.length == 2, f"after the refusal the length is {memory.length}, expected 2")


@prop("Keys of other rows, heads, widths or dtypes were taken: assigned to a slice they are repeated or converted.")
def refuses_keys_unlike_those_held(built: Built) -> None:
    memory, x = built.Memory(6), normal(0, 2, 3, 1, 4)
    memory.extend(x, x)
    for name, other in (
        ("one row for two", x[:1]),
        ("one head for three", x[:, :1]),
        ("a width of 1 for 4", x[..., :1]),
        ("float32 for float64", x.float()),
    ):
        _refuses(partial(memory.extend, other, other), f"keys and values with {name}")
        _refuses(partial(memory.extend, other, x), f"keys with {name}")
        _refuses(partial(memory.extend, x, other), f"values with {name}")
    holds(memory.length == 1, f"after the refusals the length is {memory.length}, expected 1")
    keys, _ = memory.extend(x + 1, x + 1)
    equal(keys, torch.cat([x, x + 1], dim=2), "the keys after the refusals")
    _refuses(lambda: memory.truncate(-1), "a length of -1")
    memory.truncate(0)
    other = normal(1, 1, 2, 3, 5, dtype=torch.float32)
    equal(memory.extend(other, other)[0], other, "the keys of another text, once the memory is empty,")


@prop(
    "Rows picked anew must hold what the rows picked held, in every layer: else beams go on from each other's past.",
    seed=seeds,
    rows=st.lists(st.integers(0, 2), min_size=1, max_size=5),
    positions=places,
)
def rows_can_be_picked_anew(built: Built, seed: int, rows: list[int], positions: str) -> None:
    model, tokens, cache, picked = (
        _model(seed, positions),
        _tokens(seed, 3, 6),
        built.Cache(LAYERS, 7),
        torch.tensor(rows),
    )
    cache.reorder(picked)  # nothing is held yet
    with torch.no_grad():
        model(tokens[:, :4], cache)
        cache.reorder(picked)
        holds(cache.length == 4, f"the length is {cache.length} after picking rows, expected 4")
        got = model(tokens[picked, 4:], cache)
        equal(got, model(tokens[picked])[:, 4:], "the logits of the rows picked", rtol=1e-5, atol=1e-5)
    for wrong in (torch.tensor([len(rows)]), torch.tensor([-1]), torch.zeros(1), torch.zeros(1, 1, dtype=torch.long)):
        _refuses(partial(cache.reorder, wrong), f"rows {wrong.tolist()} of {len(rows)}")


@prop("The cache that generates must have the capacity asked for, prompt + length if none is, and refuse too little.")
def generates_with_the_capacity_asked_for(built: Built) -> None:
    took = []

    class Keeping(torch.nn.Module):
        def forward(self, tokens: Tensor, cache: Any) -> Tensor:
            x = torch.zeros(*tokens.shape, 2)[:, None]  # [B 1 T 2]
            cache[0].extend(x, x)
            took.append(cache.bytes)
            return torch.zeros(*tokens.shape, V)

    start = _tokens(0, 2, 3)
    for asked, expected in ((None, 8), (7, 7), (20, 20)):
        built.generate(Keeping(), start, 5, built.greedy, layers=1, capacity=asked)
        closed = 2 * 2 * 2 * 4 * expected  # keys and values, two rows, width 2, float32
        holds(took[-1] == closed, f"with capacity={asked} the cache takes {took[-1]} bytes, expected {closed}")
    passes = len(took)
    _refuses(
        lambda: built.generate(Keeping(), start, 5, built.greedy, layers=1, capacity=6), "7 passes with room for 6"
    )
    holds(len(took) == passes, "tokens passed the model before the capacity was refused")
    _refuses(lambda: built.generate(Keeping(), start[:, :0], 5, built.greedy, layers=1), "an empty prompt")
    _refuses(lambda: built.generate(Keeping(), start, -1, built.greedy, layers=1), "a length of -1")


@prop(
    "Of the k largest logits one is missing, or another is left: count from the largest, and compare with the k-th.",
    seed=seeds,
    k=st.integers(1, 15),
)
def keeps_the_k_largest(built: Built, seed: int, k: int) -> None:
    logits = normal(seed, 2, V)
    kept = built.keep_top_k(logits, k).isfinite()
    ranks = logits.argsort(dim=-1, descending=True).argsort(dim=-1)
    equal(kept, ranks < k, "which logits are kept")
    equal(built.keep_top_k(logits, k)[kept], logits[kept], "the logits kept")


def _nucleus(logits: Tensor, p: float) -> Tensor:  # [V] -> [V]
    """Return which tokens are kept: one after the other, the likeliest first, until their probabilities reach p."""
    probabilities, kept, total = logits.double().softmax(-1), torch.zeros(len(logits), dtype=torch.bool), 0.0
    for token in logits.argsort(descending=True, stable=True).tolist():
        if total >= p:
            break
        kept[token] = True
        total += float(probabilities[token])
    return kept


@prop(
    "The nucleus is the fewest tokens, the likeliest first, whose probabilities reach p; never none of them.",
    seed=seeds,
    p=st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.99, 1.0]),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
)
def keeps_the_fewest_that_reach_p(built: Built, seed: int, p: float, scale: float) -> None:
    logits = normal(seed, V, scale=scale)
    left = built.keep_top_p(logits[None], p)[0]
    equal(left.isfinite(), _nucleus(logits, p), "which tokens are kept")
    equal(left[left.isfinite()], logits[left.isfinite()], "the logits kept")
    for count in range(1, V + 1):
        left = built.keep_top_p(torch.zeros(1, V), count / V)[0]
        equal(left.isfinite(), torch.arange(V) < count, f"which of {V} equal tokens are kept with p = {count}/{V}")


@prop(
    "Of a wide vocabulary too many or too few tokens were left: a sum of probabilities in float32 reaches p early.",
    seed=seeds,
    dtype=floats,
    examples=5,
)
def nothing_is_lost_from_a_wide_vocabulary(built: Built, seed: int, dtype: torch.dtype) -> None:
    for scale in (1.0, 8.0):  # at 8 the last have less than 1e-12 between them
        left = built.keep_top_p(normal(seed, 1, 50_000, dtype=dtype, scale=scale), 1.0)
        holds(left.dtype == dtype, f"the logits left are {left.dtype}, given {dtype}")
        lost = int(left.isinf().sum())
        holds(lost == 0, f"with p = 1, {lost} of 50000 tokens are lost")
    logits = normal(seed, 1, 50_000, dtype=dtype)
    for p in (0.5, 0.999999):
        kept = built.keep_top_p(logits, p)[0].isfinite()
        probabilities = logits[0].double().softmax(-1)[kept]
        total = math.fsum(probabilities.tolist())
        holds(total >= p - 1e-8, f"with p = {p} the tokens kept have probability {total:.9f}")
        least = float(probabilities.min())
        holds(total - least < p + 1e-8, f"with p = {p} the tokens kept have probability {total:.9f} without the last")


@prop(
    "Draws do not follow softmax(logits / temperature) of what top_k, then top_p leave: scale first, then hide.",
    seed=seeds,
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    way=st.sampled_from([{}, {"top_k": 3}, {"top_p": 0.7}, {"top_k": 4, "top_p": 0.7}]),
    examples=12,
)
def draws_follow_the_softmax(built: Built, seed: int, temperature: float, way: dict[str, Any]) -> None:
    count, logits = 20_000, normal(seed, 5)
    draw = torch.Generator().manual_seed(seed)
    drawn = built.sample(logits.expand(count, 5), temperature=temperature, generator=draw, **way)
    holds(drawn.shape == (count, 1), f"the draws have shape {tuple(drawn.shape)}, expected ({count}, 1)")
    shares = torch.bincount(drawn[:, 0], minlength=5) / count
    left = logits / temperature
    if "top_k" in way:
        left = left.masked_fill(left < left.sort(descending=True).values[way["top_k"] - 1], -math.inf)
    if "top_p" in way:
        left = left.masked_fill(~_nucleus(left, way["top_p"]), -math.inf)
    expected = left.softmax(-1).float()
    equal(shares, expected, "the share of each token", rtol=0, atol=5 * 0.5 / count**0.5)  # five standard errors
    holds((shares[expected == 0] == 0).all(), "a token that is hidden was drawn")


@prop(
    "With top_k, top_p or a temperature near 0 only the likeliest token is left: subtract the largest, then divide.",
    seed=seeds,
    way=st.sampled_from([{"top_k": 1}, {"top_p": 1e-9}, *({"temperature": t} for t in (1e-5, 1e-40, 1e-300, 5e-324))]),
    scale=st.sampled_from([1.0, 4e3]),
    dtype=floats,
)
def in_the_limit_sampling_is_greedy(
    built: Built, seed: int, way: dict[str, float], scale: float, dtype: torch.dtype
) -> None:
    order = torch.rand(6, V, generator=torch.Generator().manual_seed(seed)).argsort(dim=-1)
    logits = (scale * (0.5 + order)).to(dtype)  # [6 V], no two of a row alike
    drawn = built.sample(logits, generator=torch.Generator().manual_seed(seed), **way)
    equal(drawn, logits.argmax(-1, keepdim=True), "the token drawn")
    equal(built.greedy(logits), logits.argmax(-1, keepdim=True), "the greedy token")


@prop(
    "No token is left to choose from, and yet one was chosen: refuse numbers out of range, and rows without a softmax.",
    seed=seeds,
    examples=3,
)
def refuses_what_leaves_no_token(built: Built, seed: int) -> None:
    logits = normal(seed, 2, V)
    for name, numbers in (
        ("temperature", (0.0, -1.0, math.nan, math.inf)),
        ("top_k", (0, -1)),
        ("top_p", (0.0, -0.1, 1.0001, math.nan)),
    ):
        for number in numbers:
            _refuses(partial(built.sample, logits, **{name: number}), f"{name} = {number}")
    for k in (0, -1):
        _refuses(partial(built.keep_top_k, logits, k), f"keep_top_k with k = {k}")
    for p in (0.0, 1.0001, math.nan):
        _refuses(partial(built.keep_top_p, logits, p), f"keep_top_p with p = {p}")
    for name, row in (
        ("one NaN", torch.cat([torch.tensor([math.nan]), logits[1, 1:]])),
        ("one inf", torch.cat([logits[1, 1:], torch.tensor([math.inf])])),
        ("nothing but -inf", torch.full((V,), -math.inf).double()),
    ):
        bad = torch.stack([logits[0], row])
        for choose in (built.greedy, built.sample, partial(built.keep_top_p, p=0.5), partial(built.keep_top_p, p=1.0)):
            _refuses(partial(choose, bad), f"a row with {name}")
    some = logits.index_fill(1, torch.tensor([0, 3]), -math.inf)  # tokens that must not come
    drawn = built.sample(some.repeat(500, 1), top_k=V, top_p=1.0, temperature=3.0)
    holds(((drawn != 0) & (drawn != 3)).all(), "a token with a logit of -inf was drawn")
    near(float(built.greedy(some)[0]), float(some[0].argmax()), 0, "the greedy token beside logits of -inf")
