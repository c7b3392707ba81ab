"""Sources for what is learned other than the next token: hidden tokens, another sequence, answers, preferences.

Each makes its batches from another source or from a rule, the same for the same seed, step and split.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lab.context import IGNORED, Batch
from lab.errors import BadInput
from lab.projects.decoder.component import shift_right
from lab.projects.encoder.component import mask_tokens, present_mask
from lab.projects.fine_tuning.component import mask_prompt
from lab.runtime.data import generator

if TYPE_CHECKING:
    from torch import Tensor

    from lab.runtime.data import Source, Split, Tokens

HIDDEN, LENGTHS, QUESTIONS, WRONG = 0x4D41, 0x1E46, 0x5F7A, 0x0D90  # purposes, so that draws are independent


class Wrapped:
    """A source that is made from another, with one token more: a mask, or a start."""

    floor: float | None = None

    def __init__(self, source: Source, seed: int) -> None:
        self.source, self.seed = source, seed
        self.extra = source.vocabulary
        self.vocabulary = source.vocabulary + 1

    def tokens(self, step: int, split: Split) -> Tensor:
        """The windows [B T] of a step."""
        inputs = self.source.batch(step, split).inputs
        assert inputs is not None
        return inputs

    def encode(self, text: str) -> list[int]:
        """Tokens of a text."""
        return self.source.encode(text)

    def decode(self, tokens: list[int]) -> str:
        """The text, with ``_`` for the token that is added here."""
        parts = ["_" if t == self.extra else self.source.decode([t]) for t in tokens]
        return "".join(parts)


class MaskedText(Wrapped):
    """Windows of different lengths, padded, with some tokens hidden: the targets are these tokens (Devlin et al.)."""

    def batch(self, step: int, split: Split) -> Batch:
        """Inputs [B T] and which of them are present [B T]; targets [B T], ignored where nothing is hidden."""
        tokens = self.tokens(step, split)
        rows, length = tokens.shape
        held = int(split == "held-out")
        lengths = torch.randint(length // 2, length + 1, (rows,), generator=generator(self.seed, LENGTHS, step, held))
        present = present_mask(lengths, length)
        tokens = tokens.masked_fill(~present, 0)
        draw = generator(self.seed, HIDDEN, step, held)
        inputs, targets = mask_tokens(
            tokens, mask_token=self.extra, vocabulary=self.source.vocabulary, present=present, generator=draw
        )
        return Batch((inputs, present), targets=targets)

    def prompt(self) -> Tensor:
        """A held-out row with hidden tokens, [1 T]."""
        inputs = self.batch(0, "held-out").inputs
        assert inputs is not None
        return inputs[:1]


class Reversed(Wrapped):
    """Windows, to be written backward: a target is a function of all of the source, and its entropy is 0."""

    def batch(self, step: int, split: Split) -> Batch:
        """The source [B T] and the target shifted by one [B T]; targets [B T]."""
        tokens = self.tokens(step, split)
        targets = tokens.flip(1)
        return Batch((tokens, shift_right(targets, self.extra)), targets=targets)

    def prompt(self) -> Tensor:
        """A held-out sequence, [1 T]."""
        return self.tokens(0, "held-out")[:1]


class Questions:
    """Sums of two numbers below 100, a row each: ``12+30=`` and the answer. A tenth of all sums is held out.

    Attributes:
        end: The token that ends each answer, and fills up the row after it.
    """

    floor: float | None = None

    def __init__(self, tokenizer: Tokens, batch: int, context: int, seed: int) -> None:
        self.tokenizer, self.vocabulary = tokenizer, tokenizer.vocabulary
        self.batch_size, self.seed = batch, seed
        order = torch.randperm(10_000, generator=generator(0, QUESTIONS))  # the same split for every seed
        self.sums = {"held-out": order[:1000], "train": order[1000:]}
        self.end = tokenizer.encode("\n")[0]
        longest = self.row(99, 99)
        self.length = 1 + max(len(question) + len(answer) for question, answer in (longest, self.row(10, 99)))
        if self.length > context + 1:
            raise BadInput(f"data.source arithmetic: a sum takes {self.length - 1} tokens, model.context is {context}")

    def row(self, a: int, b: int, wrong: int = 0) -> tuple[list[int], list[int]]:
        """Tokens of a question and of its answer, off by `wrong`."""
        return self.tokenizer.encode(f"{a}+{b}="), self.tokenizer.encode(f"{a + b + wrong}\n")

    def draw(self, step: int, split: Split, rows: int) -> list[list[int]]:
        """The two numbers of each row."""
        sums = self.sums[split]
        draw = generator(self.seed, QUESTIONS, step, int(split == "held-out"))
        chosen = sums[torch.randint(len(sums), (rows,), generator=draw)]
        return torch.stack([chosen // 100, chosen % 100], dim=1).tolist()

    def padded(self, rows: list[tuple[list[int], list[int]]]) -> Batch:
        """Inputs [B T] and targets [B T], ignored in questions and after the answers."""
        tokens = torch.full((len(rows), self.length), self.end)
        ends = torch.tensor([len(question) + len(answer) for question, answer in rows])
        for i, (question, answer) in enumerate(rows):
            tokens[i, : int(ends[i])] = torch.tensor(question + answer)
        inputs, targets = mask_prompt(tokens, torch.tensor([len(question) for question, _ in rows]))
        after = torch.arange(1, self.length) >= ends[:, None]  # [B T], what follows the line break that ends an answer
        return Batch((inputs,), targets=targets.masked_fill(after, IGNORED))

    def batch(self, step: int, split: Split) -> Batch:
        """Questions and answers of a step."""
        return self.padded([self.row(a, b) for a, b in self.draw(step, split, self.batch_size)])

    def prompt(self) -> Tensor:
        """A held-out question, [1 T]."""
        (a, b), *_ = self.draw(0, "held-out", 1)
        return torch.tensor([self.row(a, b)[0]])

    def encode(self, text: str) -> list[int]:
        """Tokens of a text."""
        return self.tokenizer.encode(text)

    def decode(self, tokens: list[int]) -> str:
        """The text."""
        return self.tokenizer.decode(tokens)


class Pairs(Questions):
    """Two answers to each question, the right one in even rows and a wrong one in the row after it."""

    def __init__(self, tokenizer: Tokens, batch: int, context: int, seed: int) -> None:
        super().__init__(tokenizer, batch, context, seed)
        if batch % 2:
            raise BadInput(f"data.batch = {batch}: preferences come in pairs of rows; it must be even")

    def batch(self, step: int, split: Split) -> Batch:
        """Pairs of rows."""
        sums = self.draw(step, split, self.batch_size // 2)
        draw = generator(self.seed, WRONG, step, int(split == "held-out"))
        wrong = (1 + torch.randint(9, (len(sums),), generator=draw)).tolist()
        rows = [self.row(a, b, off) for (a, b), w in zip(sums, wrong, strict=True) for off in (0, int(w))]
        return self.padded(rows)


class Rows:
    """The rows of a source that one process of several trains on."""

    def __init__(self, source: Source, rank: int, world: int) -> None:
        self.source, self.rank, self.world = source, rank, world
        self.vocabulary, self.floor = source.vocabulary, source.floor
        self.extra = source.extra if isinstance(source, Wrapped) else source.vocabulary

    def batch(self, step: int, split: Split) -> Batch:
        """This process's rows of the batch of all."""
        whole = self.source.batch(step, split)
        return split_rows(whole, self.world, "train.ranks")[self.rank]

    def prompt(self) -> Tensor:
        """The same for every process."""
        return self.source.prompt()

    def encode(self, text: str) -> list[int]:
        """Tokens of a text."""
        return self.source.encode(text)

    def decode(self, tokens: list[int]) -> str:
        """The text."""
        return self.source.decode(tokens)


def split_rows(batch: Batch, parts: int, key: str) -> list[Batch]:
    """Cut a batch into equal parts along its rows.

    Raises:
        BadInput: The rows are no multiple of the parts; `key` is what asked for them.
    """
    if parts == 1:
        return [batch]
    rows = len(batch.args[0])
    if rows % parts:
        raise BadInput(f"data.batch = {rows} is no multiple of {key} = {parts}")
    args = [arg.chunk(parts) for arg in batch.args]
    targets = [None] * parts if batch.targets is None else batch.targets.chunk(parts)
    return [Batch(tuple(arg[i] for arg in args), targets=targets[i]) for i in range(parts)]
