"""Numbers of pretraining that theory knows."""

from __future__ import annotations

import functools
import math
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lab.projects.attention.component import Attention
from lab.projects.backprop.component import AdamW
from lab.projects.decoder.component import Decoder
from lab.projects.pretraining.component import (
    Tokenizer,
    bits_per_byte,
    capture,
    load_checkpoint,
    restore,
    save_checkpoint,
    shared_ngrams,
    split_documents,
    train_tokenizer,
    training_flops,
)
from lab.spec import measure, normal

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

STEPS = 10
WEIGHTS, TOKENS = 174_600_000_000, 300_000_000_000  # of GPT-3 (Brown et al., 2020, table D.1)


def _topics() -> list[str]:
    """Return the topics of the Python language reference, which ships with every CPython."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


@functools.cache
def _parts() -> tuple[str, str]:
    """Return the first nine tenths of the reference, and the rest."""
    text = "\n\n".join(_topics())
    cut = len(text) - len(text) // 10
    return text[:cut], text[cut:]


@functools.cache
def _tokenizer() -> Tokenizer:
    return train_tokenizer(_parts()[0], 512)


@measure("bytes a token of the last tenth of the Python docs, by 512 tokens of the rest; above the 1 of bytes")
def compression(_seed: int) -> float:
    text = _parts()[1]
    return len(text.encode()) / len(_tokenizer().encode(text))


@measure("characters that do not come back from the tokens of the last tenth of the Python docs; 0")
def characters_lost(_seed: int) -> float:
    text, made = _parts()[1], _tokenizer()
    again = made.decode(made.encode(text))
    return abs(len(text) - len(again)) + sum(a != b for a, b in zip(text, again, strict=False))


@measure("bits a byte of a model that gives each of 256 bytes equal odds; log2 256 = 8")
def uniform_bits(_seed: int) -> float:
    text = _parts()[1]
    tokens = Tokenizer([]).encode(text)
    logits = torch.zeros(len(tokens), 256, dtype=torch.float64)
    nats = nn.functional.cross_entropy(logits, torch.tensor(tokens))
    return bits_per_byte(float(nats), len(tokens), len(text.encode()))


def _frequency_bits(made: Tokenizer) -> float:
    """Return the bits a byte of the best model that knows how often each token is, and nothing else."""
    text = _parts()[1]
    tokens = made.encode(text)
    shares = [count / len(tokens) for count in Counter(tokens).values()]
    nats = -sum(share * math.log(share) for share in shares)
    return bits_per_byte(nats, len(tokens), len(text.encode()))


@measure("bits a byte of the Python docs by how often each byte is; their entropy, below 8")
def frequency_bits_of_bytes(_seed: int) -> float:
    return _frequency_bits(Tokenizer([]))


@measure("the same by how often each of 512 tokens is; lower: a merge knows what follows what")
def frequency_bits_of_tokens(_seed: int) -> float:
    return _frequency_bits(_tokenizer())


def _shared(train: list[str], held_out: list[str]) -> float:
    made = _tokenizer()
    return shared_ngrams([t for d in train for t in made.encode(d)], [t for d in held_out for t in made.encode(d)])


@measure("share of 13-grams of held-out Python docs, split by whole topics, that the rest holds; 0 without copied text")
def shared_13grams(seed: int) -> float:
    return _shared(*split_documents(_topics(), 0.1, seed))


@measure("the same where each line is there once and lines are split; near 0: what was shared was copied lines")
def shared_13grams_of_lines(seed: int) -> float:
    lines = dict.fromkeys(line.strip() for topic in _topics() for line in topic.split("\n"))
    return _shared(*split_documents(list(lines), 0.1, seed))


def _copies(seed: int) -> list[str]:
    """Return 1000 documents of random letters, each twice."""
    rows = torch.randint(97, 123, (1000, 40), generator=torch.Generator().manual_seed(seed)).tolist()
    return [bytes(row).decode() for row in rows for _ in range(2)]


def _shared_copies(train: list[str], held_out: list[str]) -> float:
    """Return the share of the 13-grams within held-out documents that the others hold."""
    # Other tokens between documents on each side, so that no 13-gram across two of them is shared.
    ours, theirs = ([t for d in side for t in (*d.encode(), end)] for side, end in ((train, 256), (held_out, 257)))
    return shared_ngrams(ours, theirs) * (len(theirs) - 12) / sum(len(d) - 12 for d in held_out)


@measure("shared 13-grams where each document is there twice and is split by its text; 0")
def shared_of_copies(seed: int) -> float:
    return _shared_copies(*split_documents(_copies(seed), 0.1, seed))


@measure("the same where copies are dealt one by one, a tenth held out; near 0.9: the other copy is trained on")
def shared_of_copies_dealt(seed: int) -> float:
    copies = _copies(seed)
    held_out = torch.rand(len(copies), generator=torch.Generator().manual_seed(seed)) < 0.1
    sides: tuple[list[str], list[str]] = ([], [])
    for document, side in zip(copies, held_out.tolist(), strict=True):
        sides[side].append(document)
    return _shared_copies(*sides)


class _Training:
    """A model with dropout, AdamW, and a generator that draws the batches."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(8, 32), nn.Dropout(0.2), nn.Linear(32, 8))
        self.optimizer = AdamW(self.model.parameters(), lr=0.01)
        self.generators = {"data": torch.Generator().manual_seed(seed)}

    def go(self, start: int, stop: int) -> Tensor:
        for _ in range(start, stop):
            x = torch.randn(16, 8, generator=self.generators["data"])
            self.optimizer.zero_grad()
            (self.model(x) - x.flip(1)).square().mean().backward()
            self.optimizer.step()
        return nn.utils.parameters_to_vector(self.model.parameters()).detach()


def _gap(seed: int, go_on: Callable[[Path, _Training], int]) -> float:
    """Return how far the weights end from those of a training that was not stopped, half-way."""
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
        whole, path = _Training(seed), Path(folder) / "checkpoint"
        whole.go(0, STEPS // 2)
        save_checkpoint(path, capture(whole.model, whole.optimizer, STEPS // 2, whole.generators))
        expected = whole.go(STEPS // 2, STEPS)
        later = _Training(seed + 1)
        return float((later.go(go_on(path, later), STEPS) - expected).abs().max())


@measure("largest gap between weights after a stop and a resume half-way and those without; 0")
def resume_gap(seed: int) -> float:
    return _gap(seed, lambda path, made: restore(load_checkpoint(path), made.model, made.optimizer, made.generators))


@measure("the same where all but the optimiser's state is restored; not 0, but some steps of the rate 0.01")
def resume_gap_without_optimizer(seed: int) -> float:
    def weights_and_numbers(path: Path, made: _Training) -> int:
        state = load_checkpoint(path)
        state["optimizer"] = made.optimizer.state_dict()
        return restore(state, made.model, made.optimizer, made.generators)

    return _gap(seed, weights_and_numbers)


@measure("FLOPs counted in forward and backward of a decoder, over 6 N a token and 12 L T C for attention; 1")
def flops_over_closed_form(seed: int) -> float:
    layers, context, width, heads, batch = 2, 32, 48, 4, 3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Decoder(64, context=context, layers=layers, width=width, heads=heads)
    q, k, v = (normal(i, batch, heads, context, width // heads).requires_grad_() for i in range(3))
    with FlopCounterMode(display=False) as counter:  # it knows the matrix products, and no fused attention on CPUs
        model(torch.zeros(batch, context, dtype=torch.long)).sum().backward()
        for _ in range(layers):
            Attention().explicit(q, k, v).sum().backward()  # type: ignore[no-untyped-call]
    looked_up = {"tokens.weight", "positions.weight"}
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and name not in looked_up]
    size, tokens = sum(p.numel() for p in matrices), batch * context
    return int(counter.get_total_flops()) / training_flops(size, tokens, layers=layers, context=context, width=width)


@measure("6 N a token for GPT-3, over the 3.14e23 FLOPs of its paper; 1, to three digits")
def flops_of_gpt3(_seed: int) -> float:
    return training_flops(WEIGHTS, TOKENS) / 3.14e23


@measure("what attention adds to these FLOPs, at 96 layers, 2048 positions and a width of 12288; 2 L T C / N = 0.0277")
def attention_share_of_gpt3(_seed: int) -> float:
    return training_flops(WEIGHTS, TOKENS, layers=96, context=2048, width=12_288) / training_flops(WEIGHTS, TOKENS) - 1
