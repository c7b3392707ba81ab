"""Data: batches that depend on nothing but seed, step and split; a chain whose entropy is known; texts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.errors import BadInput
from lab.runtime.data import Markov, Source, Split, Text, make_source
from lab.scenario import DataSection

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

quick = settings(max_examples=15, deadline=None, derandomize=True, database=None)
SOURCES = ("markov", "arithmetic", "python-docs")
SPLITS: tuple[Split, Split] = ("train", "held-out")


def source(name: str, *, seed: int = 0, context: int = 16, batch: int = 4) -> Source:
    return make_source(DataSection(source=name, batch=batch), context, seed)


def tokens(made: Source, step: int, split: Split = "train") -> torch.Tensor:
    """What a model sees of a batch and of its targets, [B T+1]."""
    batch = made.batch(step, split)
    assert batch.inputs is not None
    assert batch.targets is not None
    return torch.cat([batch.inputs, batch.targets[:, -1:]], dim=1)


# ---------------------------------------------------------------- every source


@pytest.fixture(params=SOURCES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("split", SPLITS)
def test_targets_are_the_inputs_shifted_by_one(name: str, split: Split) -> None:
    batch = source(name).batch(3, split)
    assert batch.inputs is not None
    assert batch.targets is not None
    assert batch.inputs.shape == batch.targets.shape == (4, 16)
    assert batch.inputs.dtype == batch.targets.dtype == torch.long
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    assert batch.inputs.is_contiguous()
    assert batch.targets.is_contiguous()


def test_a_batch_depends_only_on_seed_step_and_split(name: str) -> None:
    asked: list[tuple[int, Split]] = [(step, split) for step in (0, 1, 15, 16, 40) for split in SPLITS]
    first = {key: tokens(source(name), *key) for key in asked}
    again = source(name)
    torch.manual_seed(99)  # neither who else draws numbers,
    for key in reversed(asked):  # nor what was asked for before
        assert torch.equal(tokens(again, *key), first[key]), key
        torch.rand(3)


def test_asking_for_a_batch_draws_no_global_number(name: str) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    source(name).batch(0, "train")
    assert torch.equal(torch.get_rng_state(), before)


def test_other_seeds_steps_and_splits_give_other_batches(name: str) -> None:
    keys: list[tuple[int, int, Split]] = [(seed, step, split) for seed in (0, 1) for step in (0, 1) for split in SPLITS]
    drawn = [tokens(source(name, seed=seed), step, split) for seed, step, split in keys]
    assert len({tuple(d.flatten().tolist()) for d in drawn}) == len(keys)


def test_every_token_is_below_the_vocabulary(name: str) -> None:
    made = source(name, context=60)
    for split in SPLITS:
        drawn = torch.cat([tokens(made, step, split) for step in range(5)])
        assert int(drawn.min()) >= 0
        assert int(drawn.max()) < made.vocabulary


def test_decoding_undoes_encoding(name: str) -> None:
    made = source(name)
    drawn: list[int] = tokens(made, 0)[0].tolist()
    assert made.encode(made.decode(drawn)) == drawn


# ---------------------------------------------------------------- the chain


def transitions(chain: Markov) -> npt.NDArray[np.float64]:
    """The matrix over states, [S S], built from the table by the definition of a state: the last `order` tokens."""
    count, v = len(chain.table), chain.vocabulary
    matrix = np.zeros((count, count))
    for state in range(count):
        history = [state // v**k % v for k in reversed(range(chain.order))]
        for token in range(v):
            after = [*history, token][1:]
            matrix[state, sum(t * v**k for k, t in enumerate(reversed(after)))] += float(chain.table[state, token])
    return matrix


@pytest.mark.parametrize(("order", "vocabulary"), [(1, 2), (1, 5), (1, 16), (2, 3), (2, 6), (3, 2)], ids=str)
def test_the_floor_is_the_entropy_rate_by_the_eigenvector_of_the_chain(order: int, vocabulary: int) -> None:
    chain = Markov(order, vocabulary, 4, 8, seed=1)
    values, vectors = np.linalg.eig(transitions(chain).T)
    assert np.sum(np.abs(values - 1) < 1e-9) == 1  # one stationary distribution
    stationary = np.real(vectors[:, np.argmin(np.abs(values - 1))])
    stationary /= stationary.sum()
    table = chain.table.numpy()
    entropy = -(table * np.log(table)).sum(-1)
    np.testing.assert_allclose(chain.stationary.numpy(), stationary, atol=1e-9)
    assert chain.floor == pytest.approx(float(stationary @ entropy), abs=1e-9)
    assert chain.floor is not None
    assert 0 < chain.floor < math.log(vocabulary)


@quick
@given(st.integers(0, 10_000))
def test_the_floor_of_two_states_is_that_of_the_formula(seed: int) -> None:
    chain = Markov(1, 2, 1, 4, seed)
    a, b = float(chain.table[0, 1]), float(chain.table[1, 0])  # of leaving the one, and the other

    def h(p: float) -> float:
        return -p * math.log(p) - (1 - p) * math.log(1 - p)

    assert chain.floor == pytest.approx((b * h(a) + a * h(b)) / (a + b), abs=1e-5)


@quick
@given(st.integers(1, 3), st.integers(2, 6), st.integers(0, 999))
def test_every_row_of_the_table_is_a_distribution_without_a_zero(order: int, vocabulary: int, seed: int) -> None:
    chain = Markov(order, vocabulary, 1, 4, seed)
    assert chain.table.shape == (vocabulary**order, vocabulary)
    assert (chain.table > 0).all()
    torch.testing.assert_close(chain.table.sum(-1), torch.ones(vocabulary**order, dtype=torch.float64))


@pytest.fixture(scope="module", params=[(1, 4), (2, 3)], ids=["order 1", "order 2"])
def sampled(request: pytest.FixtureRequest) -> tuple[Markov, torch.Tensor]:
    order, vocabulary = request.param
    chain = Markov(order, vocabulary, 64, 64, seed=2)
    return chain, torch.cat([tokens(chain, step) for step in range(32)])  # [2048 65]


def states(chain: Markov, drawn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The state before each token that has a whole one, [N], and the token, [N]."""
    powers = chain.vocabulary ** torch.arange(chain.order - 1, -1, -1)
    return (drawn.unfold(1, chain.order, 1)[:, :-1] * powers).sum(-1).flatten(), drawn[:, chain.order :].flatten()


def test_tokens_follow_each_other_as_often_as_the_table_says(sampled: tuple[Markov, torch.Tensor]) -> None:
    chain, drawn = sampled
    before, token = states(chain, drawn)
    counts = torch.zeros_like(chain.table).index_put_((before, token), torch.ones((), dtype=torch.float64), True)
    visits = counts.sum(-1, keepdim=True)
    assert (visits > 500).all()
    # Given the state, tokens are independent draws: a binomial spread, of which none of a dozen exceeds four.
    spread = (chain.table * (1 - chain.table) / visits).sqrt()
    assert ((counts / visits - chain.table).abs() < 4 * spread).all()


def test_windows_start_from_the_stationary_distribution(sampled: tuple[Markov, torch.Tensor]) -> None:
    chain, drawn = sampled
    before, _ = states(chain, drawn[:, : chain.order + 1])  # the state that the first tokens make, one a window
    share = torch.bincount(before, minlength=len(chain.table)) / len(before)
    spread = (chain.stationary * (1 - chain.stationary) / len(before)).sqrt()
    assert ((share - chain.stationary).abs() < 4 * spread).all()


def test_the_best_possible_loss_on_samples_is_the_floor(sampled: tuple[Markov, torch.Tensor]) -> None:
    chain, drawn = sampled
    before, token = states(chain, drawn)
    losses = -chain.table[before, token].log().view(len(drawn), -1)
    windows = losses.mean(-1)  # independent of each other
    assert float(windows.mean()) == pytest.approx(chain.floor, abs=4 * float(windows.std()) / len(windows) ** 0.5)
    assert float(windows.std()) / len(windows) ** 0.5 < 0.01


def test_the_chain_of_a_seed_is_the_same_for_every_size_of_batch() -> None:
    one, other = Markov(1, 6, 2, 8, seed=3), Markov(1, 6, 5, 30, seed=3)
    assert torch.equal(one.table, other.table)
    assert not torch.equal(one.table, Markov(1, 6, 2, 8, seed=4).table)


def test_a_table_that_would_not_fit_is_refused() -> None:
    with pytest.raises(BadInput, match=r"4096\*\*4 states is too large; lower order or vocabulary"):
        make_source(DataSection(source="markov", order=4, vocabulary=4096), 8, 0)


# ---------------------------------------------------------------- texts


def whole(made: Source) -> str:
    assert isinstance(made, Text)
    return made.decode(torch.cat([made._splits["train"], made._splits["held-out"]]).tolist())


def test_arithmetic_is_right_in_every_line() -> None:
    lines = whole(source("arithmetic")).split("\n")
    sums, copies = lines[::2], lines[1::2]
    assert len(sums) == len(copies) == 20_000
    for line in sums:
        a, rest = line.split("+")
        b, c = rest.split("=")
        assert int(a) + int(b) == int(c)
        assert min(int(a), int(b)) >= 0
        assert max(int(a), int(b)) < 100
    for line in copies:
        word, again = line.split(">")
        assert word == again
        assert len(word) == 4


def test_arithmetic_is_right_in_every_whole_line_of_a_batch() -> None:
    made = source("arithmetic", context=64)
    sums = 0
    for row in tokens(made, 0):
        for line in made.decode(row.tolist()).split("\n")[1:-1]:
            if "+" in line:
                a, b, c = (int(number) for number in line.replace("+", "=").split("="))
                assert a + b == c
                sums += 1
    assert sums > 4


def test_the_python_docs_are_long_and_of_about_a_hundred_characters() -> None:
    made = source("python-docs")
    assert len(whole(made)) > 400_000
    assert 80 <= made.vocabulary <= 200
    assert made.floor is None
    assert "yield" in whole(made)


def test_training_and_held_out_windows_come_from_two_parts_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("a" * 900 + "b" * 100, encoding="utf-8")
    made = source(str(path), context=20, batch=50)
    assert set(made.decode(tokens(made, 0, "train").flatten().tolist())) == {"a"}
    assert set(made.decode(tokens(made, 0, "held-out").flatten().tolist())) == {"b"}


def test_windows_reach_the_first_and_the_last_character_of_each_part(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(map(chr, range(1000, 1300))), encoding="utf-8")  # each character once
    made = source(str(path), context=20, batch=2000)
    for split, first, last in (("train", 0, 269), ("held-out", 270, 299)):
        drawn = tokens(made, 0, "train" if split == "train" else "held-out")
        assert (int(drawn.min()), int(drawn.max())) == (first, last)
        assert (drawn.diff(dim=1) == 1).all()


def test_a_file_is_read_a_token_a_character(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    text = "Übung macht den Meister.\n" * 20
    path.write_text(text, encoding="utf-8")
    made = source(str(path))
    assert whole(made) == text
    assert made.vocabulary == len(set(text))


def test_a_folder_is_read_in_order_of_its_names_and_only_what_is_text(tmp_path: Path) -> None:
    (tmp_path / "deeper").mkdir()
    for file, letter in (("b.md", "b"), ("a.txt", "a"), ("deeper/c.py", "c"), ("deeper/d.rst", "d"), ("x.bin", "x")):
        (tmp_path / file).write_text(letter * 100, encoding="utf-8")
    assert whole(source(str(tmp_path))) == "\n\n".join(letter * 100 for letter in "abcd")


def test_a_text_that_is_too_short_is_refused_with_what_it_needs_and_that_much_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("x" * 179, encoding="utf-8")
    with pytest.raises(BadInput, match=r"179 characters; a context of 16 needs 180"):
        source(str(path))
    path.write_text("x" * 180, encoding="utf-8")
    assert tokens(source(str(path)), 0, "held-out").shape == (4, 17)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, r"no source and no file or folder"),
        (lambda path: path.mkdir(), r"no \.txt, \.md, \.rst or \.py file in that folder"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00" * 100), r"not UTF-8 text that can be read"),
        (lambda path: path.write_bytes(b""), r"0 characters"),
    ],
    ids=["nothing there", "empty folder", "not text", "empty file"],
)
def test_what_cannot_be_read_is_refused_in_one_line(tmp_path: Path, make: object, said: str) -> None:
    path = tmp_path / "text"
    make(path)  # type: ignore[operator]
    with pytest.raises(BadInput, match=said) as caught:
        source(str(path))
    assert "\n" not in str(caught.value)


def test_a_misspelt_source_is_answered_with_the_nearest() -> None:
    with pytest.raises(BadInput, match=r"found 'markow', .*did you mean 'markov'\?"):
        source("markow")


def test_a_character_that_the_text_does_not_have_is_refused() -> None:
    with pytest.raises(BadInput, match=r"'z' does not occur"):
        source("arithmetic").encode("1+z")


@pytest.mark.parametrize("kind", ["characters", "bytes", "bpe"])
def test_a_tokenizer_gives_the_text_back(kind: Literal["characters", "bytes", "bpe"], tmp_path: Path) -> None:
    text = "for each of the words of a text, déjà vu, 12 + 30 = 42\n" * 40
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    section = DataSection(source=str(tmp_path / "text.txt"), tokenizer=kind, merges=40, batch=2)
    source = make_source(section, 8, 0)
    assert source.decode(source.encode("a text, déjà vu")) == "a text, déjà vu"
    assert max(int(source.batch(step, "train").args[0].max()) for step in range(20)) < source.vocabulary


def test_merges_are_learned_from_the_training_part_alone(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("ab" * 900 + "xy" * 100, encoding="utf-8")
    section = DataSection(source=str(tmp_path / "text.txt"), tokenizer="bpe", merges=2, batch=2)
    source = make_source(section, 8, 0)
    assert len(source.encode("xy" * 10)) == 20
    assert len(source.encode("ab" * 10)) < 20


def test_a_text_that_merges_make_too_short_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("ab" * 2000, encoding="utf-8")
    section = DataSection(source=str(tmp_path / "text.txt"), tokenizer="bpe", merges=200, batch=2)
    with pytest.raises(BadInput, match="tokens; a context of"):
        make_source(section, 512, 0)
