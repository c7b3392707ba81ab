"""Project 16: byte-level BPE, batches of packed documents, evaluation by the byte, and checkpoints that resume.

Sennrich et al., 2016, and Radford et al., 2019, section 2.2 (BPE on bytes); Brown et al., 2020 (packing, shared
13-grams); Kaplan et al., 2020, and Chowdhery et al., 2022, appendix B (FLOPs of training).
"""

from __future__ import annotations

import copy
import hashlib
import heapq
import io
import itertools
import json
import math
import os
import re
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lab.errors import BadInput, one_line, shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Generator, nn
    from torch.optim import Optimizer

    Pair = tuple[int, int]

# Letters, digits, or what is neither, with a space before them; white space, of which a word keeps the last.
WORD = r" ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+"
KNOWN_WORDS = 100_000  # kept with their tokens
LARGEST = 1 << 26  # bytes of all tokens together; merges of merges double
MARK = b"lab checkpoint 1\n"  # how the file of a checkpoint begins
DIGEST = 32  # bytes of a SHA-256
PARTS = ("model", "optimizer", "step", "random", "cuda", "generators")


class Tokenizer:
    """Byte-level BPE: a text is bytes, and pairs of tokens are merged, the pair that was learned first first.

    Tokens 0 to 255 are the bytes; token ``256 + i`` is the pair ``merges[i]``. Any text can be encoded.

    Args:
        merges: Pairs of tokens, each of tokens made before it; `BadInput` is raised where they are not, or one comes
            twice.

    Attributes:
        merges: As given.
        vocabulary: V, how many tokens there are.
    """

    def __init__(self, merges: Sequence[Pair]) -> None:
        self.merges = tuple((first, second) for first, second in merges)
        self.vocabulary = 256 + len(self.merges)
        self._ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self._bytes = [bytes([byte]) for byte in range(256)]
        self._known: dict[str, list[int]] = {}
        size = 0
        for first, second in self.merges:
            if not (0 <= first < len(self._bytes) and 0 <= second < len(self._bytes)):
                raise BadInput(f"merge {len(self._bytes) - 256} joins ({first}, {second}), not made before it")
            size += len(self._bytes[first]) + len(self._bytes[second])
            if size > LARGEST:
                raise BadInput(f"the tokens take more than {LARGEST} bytes together")
            self._bytes.append(self._bytes[first] + self._bytes[second])
        if len(self._ranks) < len(self.merges):
            raise BadInput("a merge comes twice")

    def encode(self, text: str) -> list[int]:
        """Turn a text into tokens, word by word; no token crosses the words of `split_words`.

        Raises:
            BadInput: The text holds a surrogate, which is no character: UTF-8 has no bytes for it.
        """
        tokens: list[int] = []
        for word in split_words(text):
            known = self._known.get(word)
            if known is None:
                known = self._encode_word(word)
                if len(self._known) < KNOWN_WORDS:
                    self._known[word] = known
            tokens += known
        return tokens

    def _encode_word(self, word: str) -> list[int]:
        tokens = list(_utf8(word))
        while len(tokens) > 1:
            # What a merge makes is only part of later merges, so that the rank rises from turn to turn.
            rank = min(self._ranks.get(pair, len(self.merges)) for pair in itertools.pairwise(tokens))
            if rank == len(self.merges):
                break
            tokens = _merged(tokens, self.merges[rank], 256 + rank)
        return tokens

    def decode(self, tokens: Iterable[int]) -> str:
        """Turn tokens into text; bytes that are no UTF-8, such as half a character, become U+FFFD.

        Raises:
            BadInput: As `bytes_of`.
        """
        return b"".join(map(self.bytes_of, tokens)).decode("utf-8", errors="replace")

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes that a token stands for.

        Raises:
            BadInput: There is no such token.
        """
        if not 0 <= token < self.vocabulary:
            raise BadInput(f"token {token}: there are {self.vocabulary}, from 0")
        return self._bytes[token]

    def save(self, path: Path) -> None:
        """Write the merges as JSON, whole or not at all.

        Raises:
            BadInput: It cannot be written there.
        """
        _write_whole(path, json.dumps({"merges": self.merges}).encode())

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read what `save` wrote.

        Raises:
            BadInput: It cannot be read, or is no tokenizer.
        """
        try:
            merges = json.loads(_read(path))["merges"]
        except (ValueError, TypeError, KeyError, RecursionError):
            merges = None
        if not isinstance(merges, list) or not all(map(_is_pair, merges)):
            raise BadInput(f"{path}: not a tokenizer: expected JSON with merges, each of two integers")
        try:
            return cls(merges)
        except BadInput as error:
            raise BadInput(f"{path}: not a tokenizer: {error}") from None


def _is_pair(thing: object) -> bool:
    return isinstance(thing, list) and len(thing) == 2 and all(type(token) is int for token in thing)


def split_words(text: str) -> list[str]:
    """Cut a text where the kind of its characters changes; joined, the words are the text.

    A word is a run of letters, of digits, of characters that are neither, or of white space. A space before one of the
    first three belongs to it. Before anything but a space, the last of a run of white space is a word of its own.
    """
    return re.findall(WORD, text)


def train_tokenizer(text: str, size: int) -> Tokenizer:
    """Learn merges: again and again the pair of neighbours in words that occurs most often becomes a token.

    Of pairs that occur equally often the smallest is taken. Where a pair overlaps itself, each place counts. The words
    are counted once; a merge changes the counts of the pairs beside it alone.

    Args:
        text: To learn from.
        size: Of the vocabulary; it stays smaller where no pair occurs twice any more.

    Raises:
        BadInput: The size is below 256, or the text holds a surrogate.
    """
    if size < 256:
        raise BadInput(f"a vocabulary of {size}: the 256 bytes are part of it")
    pairs = _Pairs(Counter(split_words(text)))
    merges: list[Pair] = []
    while 256 + len(merges) < size and (pair := pairs.commonest()):
        pairs.merge(pair, 256 + len(merges))
        merges.append(pair)
    return Tokenizer(merges)


class _Pairs:
    """How often each pair of neighbours occurs, and in which words."""

    def __init__(self, words: Counter[str]) -> None:
        self.words, self.times = [list(_utf8(word)) for word in words], list(words.values())
        self.counts: Counter[Pair] = Counter()
        self.places: defaultdict[Pair, set[int]] = defaultdict(set)  # the words that hold a pair, or did
        for place, word in enumerate(self.words):
            for pair in itertools.pairwise(word):
                self.counts[pair] += self.times[place]
                self.places[pair].add(place)
        self.queue = [(-count, pair) for pair, count in self.counts.items()]
        heapq.heapify(self.queue)

    def commonest(self) -> Pair | None:
        """Return the smallest of the commonest pairs; None where none occurs twice."""
        # A count that has changed since stands in the queue a second time, as it is now.
        while self.queue and -self.queue[0][0] != self.counts[self.queue[0][1]]:
            heapq.heappop(self.queue)
        return self.queue[0][1] if self.queue and self.queue[0][0] <= -2 else None

    def merge(self, pair: Pair, new: int) -> None:
        """Replace a pair in the words that hold it, and count again in these alone."""
        changes: Counter[Pair] = Counter()
        for place in self.places.pop(pair):
            before = self.words[place]
            after = self.words[place] = _merged(before, pair, new)
            for old in itertools.pairwise(before):
                changes[old] -= self.times[place]
            for each in itertools.pairwise(after):
                changes[each] += self.times[place]
                self.places[each].add(place)
        for changed, change in changes.items():
            if change:
                self.counts[changed] += change
                heapq.heappush(self.queue, (-self.counts[changed], changed))


def _merged(tokens: list[int], pair: Pair, new: int) -> list[int]:
    """Replace a pair by a token, from the left."""
    (first, second), merged, i = pair, [], 0
    while i < len(tokens):
        here = tokens[i] == first and i + 1 < len(tokens) and tokens[i + 1] == second
        merged.append(new if here else tokens[i])
        i += 2 if here else 1
    return merged


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadInput(f"the text holds {text[error.start]!r}, a surrogate and no character") from None


def pack(documents: Sequence[Sequence[int]], context: int, end: int) -> Tensor:
    """Join documents, each with the token `end` after it, and cut them into windows, [N context+1].

    The last token of a window is the first of the next, so that inputs ``[:, :-1]`` and targets ``[:, 1:]`` have each
    token as a target once. The first token of all is no target; the rest that fills no window is dropped.

    Raises:
        BadInput: The context is below 1.
    """
    if context < 1:
        raise BadInput(f"a context of {context}: a window needs a token to predict from")
    stream = [token for document in documents for token in (*document, end)]
    count = max(0, len(stream) - 1) // context
    if not count:
        return torch.empty(0, context + 1, dtype=torch.long)
    tokens = torch.tensor(stream[: count * context + 1], dtype=torch.long)
    return tokens.unfold(0, context + 1, context).contiguous()  # [N context+1]


def split_documents(documents: Sequence[str], share: float, seed: int) -> tuple[list[str], list[str]]:
    """Split whole documents into those to train on and those held out, in order, each by a hash of its own text.

    Equal documents land on one side, and no other document moves one. The share is that of documents held out; it
    holds on average, so that of a few documents none may be held out.

    Raises:
        BadInput: The share is not from 0 to 1.
    """
    if not 0 <= share <= 1:
        raise BadInput(f"a share of {share}: from 0 to 1")
    sides: tuple[list[str], list[str]] = ([], [])
    for document in documents:
        digest = hashlib.sha256(f"{seed} {document}".encode(errors="surrogatepass")).digest()
        sides[int.from_bytes(digest[:8], "big") < share * 2**64].append(document)
    return sides


def shared_ngrams(train: Sequence[int], held_out: Sequence[int], n: int = 13) -> float:
    """Return the share of the n-grams of `held_out`, each place counted, that occur in `train`; 0 where it has none.

    Raises:
        BadInput: `n` is below 1.
    """
    if n < 1:
        raise BadInput(f"n-grams of {n} tokens: from 1")
    wanted = set(_ngrams(held_out, n))
    found = wanted.intersection(_ngrams(train, n))
    return sum(gram in found for gram in _ngrams(held_out, n)) / max(1, len(held_out) - n + 1)


def _ngrams(tokens: Sequence[int], n: int) -> Iterator[tuple[int, ...]]:
    return zip(*(tokens[start:] for start in range(n)), strict=False)


def bits_per_byte(nats: float, tokens: int, size: int) -> float:
    """Return what a model needs for a byte of text, in bits: comparable whatever the tokenizer.

    Args:
        nats: Mean loss of a token.
        tokens: How many there are in the text.
        size: Of the text in bytes.

    Raises:
        BadInput: The text has no byte.
    """
    if size < 1:
        raise BadInput(f"a text of {size} bytes has no bits a byte")
    return nats * tokens / (size * math.log(2))


def training_flops(parameters: int, tokens: int, *, layers: int = 0, context: int = 0, width: int = 0) -> float:
    """Return the FLOPs of training: 6 a parameter and token, and ``12 layers context width`` a token for attention.

    Attention counts every pair of positions, not halved for causality (Chowdhery et al., 2022, appendix B).

    Args:
        parameters: Of the matrices that tokens are multiplied by; a look-up of an embedding costs nothing.
        tokens: Seen in all.
        layers: Of attention; 0 leaves it out.
        context: Positions that each one meets.
        width: Of all heads together.
    """
    return float(tokens * (6 * parameters + 12 * layers * context * width))


def save_checkpoint(path: Path, state: Mapping[str, object]) -> None:
    """Write a state; killed at any moment, it leaves the old checkpoint or the new one, whole.

    Args:
        path: Where; a folder that is there.
        state: Tensors, numbers, text, and lists, tuples and dicts of them.

    Raises:
        BadInput: It holds something else, or cannot be written there. What was at `path` stays.
    """
    buffer = io.BytesIO()
    try:
        torch.save(dict(state), buffer)
    except Exception as error:
        raise BadInput(f"{path}: not saved: {one_line(error)}") from error
    data = buffer.getvalue()
    _unpickled(path, data)  # what cannot be read again is told now, not after a crash
    _write_whole(path, MARK + hashlib.sha256(data).digest() + data)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, with its tensors on the CPU. Nothing in the file is run.

    Raises:
        BadInput: It cannot be read, is no checkpoint, or is not what was written.
    """
    held = _read(path)
    if not held.startswith(MARK):
        raise BadInput(f"{path}: not a checkpoint")
    digest, data = held[len(MARK) :][:DIGEST], held[len(MARK) + DIGEST :]
    if hashlib.sha256(data).digest() != digest:
        raise BadInput(f"{path}: damaged: its checksum is that of other data")
    return _unpickled(path, data)


def _unpickled(path: Path, data: bytes) -> dict[str, Any]:
    try:
        state = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception as error:
        raise BadInput(f"{path}: holds more than tensors, numbers, text, lists and dicts") from error
    if not isinstance(state, dict):
        raise BadInput(f"{path}: not a checkpoint: found {shown(type(state).__name__)}")
    return state


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from None


def _write_whole(path: Path, data: bytes) -> None:
    """Write beside the file, wait for the disk, and give the new file the old one's name."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # a name of its own, should another process save too
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise BadInput(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        part.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Wait until the disk has the names in a folder; Windows opens no folders."""
    if os.name != "nt":
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def capture(
    model: nn.Module, optimizer: Optimizer, step: int, generators: Mapping[str, Generator] | None = None
) -> dict[str, Any]:
    """Return a copy of all that the next steps depend on; training on does not change it.

    Args:
        model: Of it, parameters and persistent buffers.
        optimizer: Of it, state and settings.
        step: How many are done.
        generators: Those that draw numbers in training, by name, beside torch's own.
    """
    return {
        "model": copy.deepcopy(model.state_dict()),
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "step": step,
        "random": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "generators": {name: generator.get_state() for name, generator in (generators or {}).items()},
    }


def restore(
    state: Mapping[str, Any],
    model: nn.Module,
    optimizer: Optimizer,
    generators: Mapping[str, Generator] | None = None,
) -> int:
    """Set everything to what `capture` found, and return the step; `state` may be restored again.

    Raises:
        BadInput: It is no such state, or that of another model, optimiser, or set of generators.
    """
    generators = generators or {}
    missing = [part for part in PARTS if part not in state]
    if missing:
        raise BadInput(f"the state has no {missing[0]}: it is none of a training")
    if set(generators) != set(state["generators"]):
        raise BadInput(f"generators {sorted(generators)}, but the state has those of {sorted(state['generators'])}")
    try:
        model.load_state_dict(state["model"])
        # A copy, since the optimiser goes on in the very tensors that it is given.
        optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
    except (RuntimeError, ValueError, KeyError) as error:
        raise BadInput(f"the state is that of another training: {one_line(error)}") from None
    for name, generator in generators.items():
        generator.set_state(state["generators"][name])
    torch.set_rng_state(state["random"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    return int(state["step"])
