"""What is learned other than the next token: the batches are what they should be, the same for the same seed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from lab import BadInput, Batch
from lab.context import IGNORED
from lab.projects.pretraining.component import Tokenizer
from lab.runtime.data import make_source
from lab.runtime.tasks import MaskedText, Pairs, Questions, Reversed, Rows, split_rows
from lab.scenario import DataSection

if TYPE_CHECKING:
    from collections.abc import Callable

BYTES = Tokenizer([])


def markov(seed: int = 0) -> Any:
    return make_source(DataSection(source="markov", vocabulary=8, batch=6), 16, seed)


SOURCES: dict[str, Callable[[int], Any]] = {
    "masked": lambda seed: MaskedText(markov(seed), seed),
    "reversed": lambda seed: Reversed(markov(seed), seed),
    "questions": lambda seed: Questions(BYTES, 6, 16, seed),
    "pairs": lambda seed: Pairs(BYTES, 6, 16, seed),
    "rows": lambda seed: Rows(markov(seed), 1, 2),
}


def equal(a: Batch, b: Batch) -> bool:
    assert a.targets is not None
    assert b.targets is not None
    return all(map(torch.equal, (*a.args, a.targets), (*b.args, b.targets)))


@pytest.mark.parametrize("name", SOURCES)
def test_a_batch_depends_on_seed_step_and_split_alone(name: str) -> None:
    make = SOURCES[name]
    source = make(3)
    source.batch(0, "train")  # what was drawn before changes nothing
    assert equal(source.batch(5, "train"), make(3).batch(5, "train"))
    assert not equal(source.batch(5, "train"), source.batch(6, "train"))
    assert not equal(source.batch(5, "train"), source.batch(5, "held-out"))
    assert not equal(source.batch(5, "train"), make(4).batch(5, "train"))
    assert int(source.prompt().max()) < source.vocabulary
    assert source.prompt().shape[0] == 1


def test_hidden_tokens_are_the_targets() -> None:
    source = MaskedText(markov(), 0)
    inputs, present = source.batch(0, "train").args
    targets = source.batch(0, "train").targets
    assert targets is not None
    chosen = targets != IGNORED
    assert chosen.any(1).all()
    assert not (chosen & ~present).any()
    assert torch.equal(inputs[~chosen & present], source.tokens(0, "train")[~chosen & present])
    assert torch.equal(targets[chosen], source.tokens(0, "train")[chosen])
    assert source.vocabulary == 9
    assert source.decode([0, 8, 1]) == "0_1"


def test_a_sequence_is_written_backward_from_what_was_said_so_far() -> None:
    source = Reversed(markov(), 0)
    tokens, said = source.batch(0, "train").args
    targets = source.batch(0, "train").targets
    assert targets is not None
    assert torch.equal(targets, tokens.flip(1))
    assert torch.equal(said[:, 1:], targets[:, :-1])
    assert (said[:, 0] == 8).all()


def test_only_answers_count_and_held_out_sums_are_never_trained_on() -> None:
    source = Questions(BYTES, 64, 16, 0)
    seen: dict[str, set[tuple[int, ...]]] = {"train": set(), "held-out": set()}
    for split in ("train", "held-out"):
        for step in range(20):
            batch = source.batch(step, split)
            assert batch.targets is not None
            for row, targets in zip(batch.args[0], batch.targets, strict=True):
                text = BYTES.decode(row.tolist())
                question, answer = text.split("\n", maxsplit=1)[0].split("=")
                a, b = map(int, question.split("+"))
                assert int(answer) == a + b
                kept = targets[targets != IGNORED].tolist()
                assert BYTES.decode(kept) == f"{a + b}\n"
                seen[split].add((a, b))
    assert not seen["train"] & seen["held-out"]
    assert len(seen["held-out"]) > 500


def test_pairs_differ_in_the_answer_alone() -> None:
    batch = Pairs(BYTES, 32, 16, 0).batch(0, "train")
    texts = [BYTES.decode(row.tolist()).split("\n")[0] for row in batch.args[0]]
    for right, wrong in zip(texts[0::2], texts[1::2], strict=True):
        (question, answer), (same, other) = right.split("="), wrong.split("=")
        assert question == same
        assert eval(question) == int(answer) != int(other)


def test_ranks_share_out_all_rows() -> None:
    source = markov()
    whole = source.batch(3, "train")
    parts = [Rows(source, rank, 3).batch(3, "train") for rank in range(3)]
    assert torch.equal(torch.cat([part.args[0] for part in parts]), whole.args[0])
    assert torch.equal(torch.cat([part.targets for part in parts if part.targets is not None]), whole.targets)


def test_bad_sizes_are_told_in_a_line() -> None:
    with pytest.raises(BadInput, match=r"data.batch = 6 is no multiple of train.accumulate = 4"):
        split_rows(markov().batch(0, "train"), 4, "train.accumulate")
    with pytest.raises(BadInput, match=r"must be even"):
        Pairs(BYTES, 5, 16, 0)
    with pytest.raises(BadInput, match=r"model.context is 4"):
        Questions(BYTES, 4, 4, 0)
