"""Data with nothing to download: a Markov source, arithmetic, the Python language reference, or a text of yours."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from lab.context import Batch
from lab.errors import BadInput, nearest, shown
from lab.projects.pretraining.component import Tokenizer, train_tokenizer
from lab.scenario import SOURCES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lab.scenario import DataSection

Split = Literal["train", "held-out"]


class Tokens(Protocol):
    """What turns text into tokens and back.

    Attributes:
        vocabulary: V, how many different tokens there are.
    """

    vocabulary: int

    def encode(self, text: str) -> list[int]:
        """Turn text into tokens."""
        ...

    def decode(self, tokens: Iterable[int]) -> str:
        """Turn tokens into text."""
        ...


class Source(Protocol):
    """Where batches come from.

    Attributes:
        vocabulary: V, how many different tokens there are.
        floor: The best possible loss in nats a token, where it is known.
    """

    vocabulary: int
    floor: float | None

    def batch(self, step: int, split: Split) -> Batch:
        """Inputs [B T] and the tokens that follow them [B T]; the same for the same step and split."""
        ...

    def prompt(self) -> Tensor:
        """What a trained model is given to write on from, [1 T]."""
        ...

    def encode(self, text: str) -> list[int]:
        """Turn text into tokens."""
        ...

    def decode(self, tokens: list[int]) -> str:
        """Turn tokens into text."""
        ...


class Characters:
    """A token for each character that occurs in a text."""

    def __init__(self, text: str) -> None:
        self.characters = sorted(set(text))
        self.vocabulary = len(self.characters)
        self._number = {c: i for i, c in enumerate(self.characters)}

    def encode(self, text: str) -> list[int]:
        """A number for each character.

        Raises:
            BadInput: A character does not occur in the text.
        """
        unknown = [c for c in text if c not in self._number]
        if unknown:
            raise BadInput(f"the character {unknown[0]!r} does not occur in the data")
        return [self._number[c] for c in text]

    def decode(self, tokens: Iterable[int]) -> str:
        """The characters."""
        return "".join(self.characters[t] for t in tokens)


def make_source(section: DataSection, context: int, seed: int, tokenizer: Tokens | None = None) -> Source:
    """Build the source that a scenario names.

    Args:
        section: What the scenario says of its data.
        context: T, the length of a window.
        seed: Of the batches, and of data that is made up.
        tokenizer: For text; None makes the one that the scenario names from the part that is trained on.

    Raises:
        BadInput: It is none of the lab's, and no text that can be read.
    """
    if section.source == "markov":
        return Markov(section.order, section.vocabulary, section.batch, context, seed)
    if section.source == "arithmetic":
        text = _arithmetic(seed)
    elif section.source == "python-docs":
        text = _python_docs()
    else:
        text = _read_path(section.source)
    cut = len(text) - len(text) // 10
    if tokenizer is None:
        tokenizer = make_tokenizer(section, text, cut)
    return Text(text[:cut], text[cut:], tokenizer, section.batch, context, seed, section.source)


def make_tokenizer(section: DataSection, text: str, cut: int) -> Tokens:
    """Build the tokenizer that a scenario names; merges are learned from the text up to `cut`."""
    if section.tokenizer == "characters":
        return _characters(text)
    if section.tokenizer == "bytes":
        return Tokenizer([])
    return train_tokenizer(text[:cut], 256 + section.merges)


def generator(*keys: int) -> torch.Generator:
    """Make a generator of its own for a purpose, so that batches do not depend on who else draws numbers."""
    mixed = 0
    for key in keys:
        mixed = (mixed * 1_000_003 + key + 1) % (2**63 - 25)
    return torch.Generator().manual_seed(mixed)


class Text:
    """Windows at random places of a text. A part of it is held out.

    Attributes:
        bytes_per_token: Of the held-out part: what turns nats a token into bits a byte, whatever the tokenizer.
    """

    floor: float | None = None

    def __init__(
        self, train: str, held_out: str, tokenizer: Tokens, batch: int, context: int, seed: int, name: str
    ) -> None:
        self.tokenizer, self.vocabulary = tokenizer, tokenizer.vocabulary
        splits = {"train": train, "held-out": held_out}
        self._splits = {split: _encoded(tokenizer, text) for split, text in splits.items()}
        self._size, self._context, self._seed = batch, context, seed
        rest = len(self._splits["held-out"])
        if min(map(len, self._splits.values())) <= context + 1:  # merges may shorten a repetitive text a lot
            need = 10 * (context + 2)
            found = sum(len(tokens) for tokens in self._splits.values())
            kind = "characters" if isinstance(tokenizer, Characters) else "tokens"
            raise BadInput(f"data.source {name}: {found} {kind}; a context of {context} needs {need}")
        self.bytes_per_token = len(held_out.encode(errors="surrogatepass")) / rest

    def batch(self, step: int, split: Split) -> Batch:
        """Draw windows for a step."""
        tokens = self._splits[split]
        draw = generator(self._seed, step, 0 if split == "train" else 1)
        starts = torch.randint(len(tokens) - self._context, (self._size, 1), generator=draw)  # [B 1]
        windows = tokens[starts + torch.arange(self._context + 1)]  # [B T+1]
        return Batch((windows[:, :-1].contiguous(),), targets=windows[:, 1:].contiguous())

    def prompt(self) -> Tensor:
        """The beginning of a held-out window, [1 8]."""
        return self.batch(0, "held-out").args[0][:1, :8]  # type: ignore[no-any-return]

    def encode(self, text: str) -> list[int]:
        """Tokens of a text.

        Raises:
            BadInput: It has a character that the tokenizer does not know.
        """
        return self.tokenizer.encode(text)

    def decode(self, tokens: list[int]) -> str:
        """The text."""
        return self.tokenizer.decode(tokens)


class Markov:
    """A chain whose next token depends on the last `order` tokens, with a random table of probabilities.

    Its entropy rate is known (Cover and Thomas, theorem 4.2.4): ``floor = sum_s mu(s) H(P(. | s))`` nats a token,
    with mu the stationary distribution over states. No model can do better on average.
    """

    CHUNK = 16  # steps drawn at once

    def __init__(self, order: int, vocabulary: int, batch: int, context: int, seed: int) -> None:
        if vocabulary**order > 1_000_000:
            raise BadInput(f"data: a table of {vocabulary}**{order} states is too large; lower order or vocabulary")
        self.order, self.vocabulary = order, vocabulary
        self._size, self._context, self._seed = batch, context, seed
        draw = generator(seed, 0xC4A1)
        # Exponential noise to a power, normalised: uneven probabilities, none of them 0.
        noise = -torch.log(torch.rand(vocabulary**order, vocabulary, generator=draw, dtype=torch.float64))
        table = noise**2 + 1e-3
        self.table = table / table.sum(-1, keepdim=True)  # [V^k V]
        self.stationary = self._stationary()  # [V^k]
        entropy = -(self.table * self.table.log()).sum(-1)  # [V^k]
        self.floor: float | None = float((self.stationary * entropy).sum())
        self._cumulative = self.table.cumsum(-1)
        self._cache: tuple[int, Split, Tensor] | None = None

    def _next_state(self, state: Tensor, token: Tensor) -> Tensor:
        return (state * self.vocabulary + token) % len(self.table)

    def _stationary(self) -> Tensor:
        """Iterate ``mu P`` to its fixed point."""
        states = len(self.table)
        after = self._next_state(torch.arange(states)[:, None], torch.arange(self.vocabulary)[None])  # [S V]
        mu = torch.full((states,), 1 / states, dtype=torch.float64)
        for _ in range(10_000):
            new = torch.zeros_like(mu).index_add_(0, after.reshape(-1), (mu[:, None] * self.table).reshape(-1))
            if float((new - mu).abs().sum()) < 1e-13:
                break
            mu = new
        return mu / mu.sum()

    def _draw(self, chunk: int, split: Split) -> Tensor:
        """Sample the windows of a chunk of steps, started from the stationary distribution, [n B T+1]."""
        draw = generator(self._seed, chunk, 0 if split == "train" else 1)
        rows = self.CHUNK * self._size
        state = torch.multinomial(self.stationary, rows, replacement=True, generator=draw)
        tokens = torch.empty(self._context + 1, rows, dtype=torch.long)
        noise = torch.rand(self._context + 1, rows, 1, generator=draw, dtype=torch.float64)
        for t in range(self._context + 1):
            token = (self._cumulative[state] < noise[t]).sum(-1).clamp(max=self.vocabulary - 1)
            tokens[t] = token
            state = self._next_state(state, token)
        return tokens.t().reshape(self.CHUNK, self._size, -1)

    def batch(self, step: int, split: Split) -> Batch:
        """Draw fresh windows for a step: the source never repeats itself."""
        chunk = step // self.CHUNK
        if self._cache is None or self._cache[:2] != (chunk, split):
            self._cache = (chunk, split, self._draw(chunk, split))
        windows = self._cache[2][step % self.CHUNK]  # [B T+1]
        return Batch((windows[:, :-1].contiguous(),), targets=windows[:, 1:].contiguous())

    def prompt(self) -> Tensor:
        """The beginning of a held-out window, [1 8]."""
        return self.batch(0, "held-out").args[0][:1, :8]  # type: ignore[no-any-return]

    def encode(self, text: str) -> list[int]:
        """Numbers separated by spaces."""
        return [int(word) for word in text.split()]

    def decode(self, tokens: list[int]) -> str:
        """Numbers separated by spaces."""
        return " ".join(map(str, tokens))


def _encoded(tokenizer: Tokens, text: str) -> Tensor:  # -> [N]
    return _numbers(tokenizer, text) if isinstance(tokenizer, Characters) else torch.tensor(tokenizer.encode(text))


@functools.lru_cache(8)
def _numbers(tokenizer: Characters, text: str) -> Tensor:  # -> [N]
    """The characters of a text, counted once in a process that runs many times on it. Nobody writes into them."""
    return torch.tensor(tokenizer.encode(text))


@functools.lru_cache(4)
def _characters(text: str) -> Characters:
    return Characters(text)


@functools.cache
def _python_docs() -> str:
    """The Python language reference, which ships with every CPython."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


@functools.lru_cache(4)
def _arithmetic(seed: int) -> str:
    """Sums of two numbers below 100, and copies of short words: ``12+30=42``, ``abca>abca``; a line each."""
    draw = generator(seed, 0xA517)
    numbers = torch.randint(100, (20_000, 2), generator=draw).tolist()
    words = torch.randint(8, (20_000, 4), generator=draw).tolist()
    lines = []
    for (a, b), word in zip(numbers, words, strict=True):
        text = "".join("abcdefgh"[i] for i in word)
        lines += [f"{a}+{b}={a + b}", f"{text}>{text}"]
    return "\n".join(lines)


def _read_path(name: str) -> str:
    """Read a text file, or every ``.txt``, ``.md``, ``.rst`` and ``.py`` file of a folder.

    Raises:
        BadInput: Nothing can be read there.
    """
    path = Path(name)
    try:
        there = path.exists()
    except OSError as error:
        raise BadInput(f"data.source: found {shown(name)}: {error.strerror}") from None
    if not there:
        raise BadInput(f"data.source: found {name!r}, no source and no file or folder{nearest(name, SOURCES)}")
    kinds = (".txt", ".md", ".rst", ".py")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in kinds and p.is_file())
    if not files:
        raise BadInput(f"data.source {name}: no .txt, .md, .rst or .py file in that folder")
    texts = []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"data.source {file}: not UTF-8 text that can be read: {error}") from None
    return "\n\n".join(texts)
