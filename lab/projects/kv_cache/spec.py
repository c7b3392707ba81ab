"""What any cache of keys and values, and any sampling, must do."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from lab.errors import BadInput
from lab.projects.decoder.component import Decoder
from lab.projects.residuals.component import Choices
from lab.spec import Built, equal, holds, normal, prop, seeds

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


@prop("A full cache must refuse more, with a BadInput that names its room: written over, the past is lost unseen.")
def refuses_more_than_its_capacity(built: Built) -> None:
    memory, x = built.Memory(3), torch.zeros(1, 1, 2, 2)
    memory.extend(x, x)
    try:
        memory.extend(x, x)
    except BadInput as error:
        holds("3" in str(error), f"the message does not name the capacity: {error}")
        holds(memory.length == 2, f"after the refusal the length is {memory.length}, expected 2")
    else:
        holds(False, "4 positions are taken by a memory for 3")


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


@prop(
    "The nucleus is the fewest tokens, the likeliest first, whose probabilities reach p; never none of them.",
    seed=seeds,
    p=st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.99]),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
)
def keeps_the_fewest_that_reach_p(built: Built, seed: int, p: float, scale: float) -> None:
    logits = normal(seed, V, scale=scale)
    kept = built.keep_top_p(logits[None], p)[0].isfinite()
    total, expected = 0.0, torch.zeros(V, dtype=torch.bool)
    for token in logits.argsort(descending=True).tolist():
        expected[token] = True
        total += float(logits.softmax(-1)[token])
        if total >= p:
            break
    equal(kept, expected, "which tokens are kept")


@prop(
    "Draws do not follow softmax(logits / temperature): divide the logits, not the probabilities, and draw by weight.",
    seed=seeds,
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    examples=6,
)
def draws_follow_the_softmax(built: Built, seed: int, temperature: float) -> None:
    count, logits = 20_000, normal(seed, 5)
    draw = torch.Generator().manual_seed(seed)
    drawn = built.sample(logits.expand(count, 5), temperature=temperature, generator=draw)
    holds(drawn.shape == (count, 1), f"the draws have shape {tuple(drawn.shape)}, expected ({count}, 1)")
    shares = torch.bincount(drawn[:, 0], minlength=5) / count
    expected = (logits / temperature).softmax(-1).float()
    equal(shares, expected, "the share of each token", rtol=0, atol=5 * 0.5 / count**0.5)  # five standard errors


@prop(
    "With top_k, top_p or a temperature near 0 only the likeliest token is left: one of them is not applied.",
    seed=seeds,
    way=st.sampled_from([{"top_k": 1}, {"top_p": 0.0}, {"temperature": 1e-4}]),
)
def in_the_limit_sampling_is_greedy(built: Built, seed: int, way: dict[str, float]) -> None:
    logits = normal(seed, 6, V)
    drawn = built.sample(logits, generator=torch.Generator().manual_seed(seed), **way)
    equal(drawn, logits.argmax(-1, keepdim=True), "the token drawn")
    equal(built.greedy(logits), logits.argmax(-1, keepdim=True), "the greedy token")
