"""Numbers of a cache that theory knows."""

from __future__ import annotations

import torch

from lab.projects.decoder.component import Decoder
from lab.projects.kv_cache.component import Cache, cache_bytes, generate, greedy, keep_top_p, sample, token_passes
from lab.spec import measure, normal

LAYERS, WIDTH, HEADS = 2, 32, 4


def _model(seed: int) -> Decoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Decoder(64, context=128, layers=LAYERS, width=WIDTH, heads=HEADS)


def _tokens(seed: int, length: int) -> torch.Tensor:
    return torch.randint(64, (2, length), generator=torch.Generator().manual_seed(seed))


@measure(
    "largest distance of logits token by token with a cache from those of one pass, in float32; 0 but for rounding"
)
def cached_gap(seed: int) -> float:
    model, tokens, cache = _model(seed), _tokens(seed, 64), Cache(LAYERS, 64)
    with torch.no_grad():
        steps = torch.cat([model(token, cache) for token in torch.split(tokens, 1, dim=1)], dim=1)
        return float((steps - model(tokens)).abs().max())


@measure("tokens that differ between generation with and without a cache, of 2 x 64; 0")
def tokens_that_differ(seed: int) -> float:
    model, start = _model(seed), _tokens(seed, 8)
    with_cache, without = (generate(model, start, 64, greedy, layers=LAYERS, cached=c) for c in (True, False))
    return float((with_cache != without).sum())


@measure("tokens that pass the model with a cache for 1024 generated after one; 1024")
def passes_cached(seed: int) -> float:  # noqa: ARG001
    return token_passes(1, 1024, cached=True)


@measure("the same without a cache; 1024 x 1025 / 2 = 524800")
def passes_uncached(seed: int) -> float:  # noqa: ARG001
    return token_passes(1, 1024, cached=False)


@measure("bytes of a cache that was filled, over 2 L K D T x 4 x B; 1")
def bytes_over_closed_form(seed: int) -> float:
    model, cache = _model(seed), Cache(LAYERS, 64)
    with torch.no_grad():
        model(_tokens(seed, 64), cache)
    width = WIDTH // HEADS
    return cache.bytes / cache_bytes(LAYERS, HEADS, width, 64, 4, 2)


@measure("largest distance of logits after rows were picked anew from those of the picked text in one pass; rounding")
def reordered_gap(seed: int) -> float:
    model, tokens, cache, rows = _model(seed), _tokens(seed, 64), Cache(LAYERS, 64), torch.tensor([1, 1, 0])
    with torch.no_grad():
        model(tokens[:, :32], cache)
        cache.reorder(rows)
        got = model(tokens[rows, 32:], cache)
        return float((got - model(tokens[rows])[:, 32:]).abs().max())


@measure(
    "tokens of 50,000, logits of std 4, that top-p with p = 1 leaves out; 0, where a sum in float32 leaves out a third"
)
def lost_at_p_1(seed: int) -> float:
    return float(keep_top_p(normal(seed, 1, 50_000, dtype=torch.float32, scale=4.0), 1.0).isinf().sum())


@measure("share of 1,000 draws at a temperature of 1e-40 that are the likeliest token; 1, the greedy limit")
def greedy_at_temperature_0(seed: int) -> float:
    logits = normal(seed, 1000, 64, dtype=torch.float32)
    drawn = sample(logits, temperature=1e-40, generator=torch.Generator().manual_seed(seed))
    return float((drawn == greedy(logits)).double().mean())
