"""Counts of pairs kept up to date at each merge, against counting all pairs of all words anew for each merge."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import TYPE_CHECKING

from lab.projects.pretraining.component import Tokenizer, split_words, train_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

CHARACTERS, MERGES = 60_000, 128


def merged(tokens: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """Replace a pair by a token, from the left."""
    out: list[int] = []
    for token in tokens:
        # The last one may be `new` by now, which is no part of the pair.
        if out and (out[-1], token) == pair:
            out[-1] = new
        else:
            out.append(token)
    return out


def counted_anew(text: str, size: int) -> Tokenizer:
    """Learn merges with a recount for each."""
    words = [(list(word.encode()), times) for word, times in Counter(split_words(text)).items()]
    merges: list[tuple[int, int]] = []
    while 256 + len(merges) < size:
        counts: Counter[tuple[int, int]] = Counter()
        for word, times in words:
            for pair in itertools.pairwise(word):
                counts[pair] += times
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        words = [(merged(word, best, 256 + len(merges)), times) for word, times in words]
        merges.append(best)
    return Tokenizer(merges)


def variants() -> dict[str, Callable[[], object]]:
    """Learn 128 merges from 60,000 characters of the Python docs; the first is the one to beat."""
    from pydoc_data.topics import topics

    text, size = "\n\n".join(topics[name] for name in sorted(topics))[:CHARACTERS], 256 + MERGES
    assert counted_anew(text, size).merges == train_tokenizer(text, size).merges
    return {"counted anew": lambda: counted_anew(text, size), "kept up to date": lambda: train_tokenizer(text, size)}
