"""What any byte-level BPE, packing, evaluation by the byte and checkpoint must do."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lab.projects.backprop.component import AdamW, learning_rate
from lab.spec import Built, equal, holds, near, normal, prop, seeds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Pair = tuple[int, int]

SAMPLE = "The cat sat on the mat; the 33 cats sat, na\u00efve \u6f22\u5b57 \u6f22\u5b57 snake_case\n\n  the end\t\u00bd"
STEPS = 7

# Any text, and texts in which pairs come often, or kinds of characters meet.
texts = st.one_of(
    st.text(max_size=40),
    st.text("ab ", max_size=60),
    st.text("aZ1\u0663\u00b2_.' \n\t\u3000\u00e9\u6f22\u0301", max_size=40),
)
phrases = st.lists(st.sampled_from(["a", "ab", "abc", "bca", "cabab"]), max_size=40).map(" ".join)
repetitive = st.one_of(st.text("ab", max_size=30), st.text("abc ", max_size=120), phrases)
drawn_merges = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=9)
tokens_of = st.lists(st.integers(0, 2), max_size=24)
ways = st.sampled_from(["lab's AdamW", "AdamW", "SGD"])


def _refused(call: Callable[[], object], what: str) -> None:
    try:
        call()
    except NotImplementedError:
        raise
    except Exception:  # noqa: BLE001 - whatever refuses it
        return
    holds(False, f"{what} is taken")


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


# ---------------------------------------------------------------- the tokenizer


def _words(text: str) -> list[str]:
    """Cut a text as `split_words` should: character by character."""
    words, i = [], 0
    while i < len(text):
        start = i + 1 if text[i] == " " and i + 1 < len(text) and not text[i + 1].isspace() else i
        end = start + 1
        while end < len(text) and _kind(text[end]) == _kind(text[start]):
            end += 1
        # Of white space before a word, the last is left to it.
        if text[start].isspace() and end < len(text) and end - i > 1:
            end -= 1
        words.append(text[i:end])
        i = end
    return words


def _kind(character: str) -> str:
    if character.isspace():
        return "space"
    if character.isdecimal():
        return "digit"
    return "letter" if character.isalnum() else "other"


def _merges(draws: list[Pair]) -> list[Pair]:
    """Make merges of the bytes a, b, c and of what was merged before."""
    made: list[Pair] = []
    for first, second in draws:
        known = [*b"abc", *range(256, 256 + len(made))]
        pair = known[first % len(known)], known[second % len(known)]
        if pair not in made:
            made.append(pair)
    return made


def _textbook(word: bytes, merges: Sequence[Pair]) -> list[int]:
    """Merge one place at a time: the leftmost of the pair that was learned first."""
    tokens = list(word)
    while True:
        places = [(merges.index(p), i) for i, p in enumerate(itertools.pairwise(tokens)) if p in merges]
        if not places:
            return tokens
        rank, i = min(places)
        tokens[i : i + 2] = [256 + rank]


def _learned(text: str, size: int) -> list[Pair]:
    """Count all pairs anew for every merge."""
    merges: list[Pair] = []
    words = Counter(_words(text))
    while 256 + len(merges) < size:
        counts: Counter[Pair] = Counter()
        for word, times in words.items():
            for pair in itertools.pairwise(_textbook(word.encode(), merges)):
                counts[pair] += times
        best = min(counts, key=lambda pair: (-counts[pair], pair), default=None)
        if best is None or counts[best] < 2:
            break
        merges.append(best)
    return merges


@prop(
    "A text must come back from its tokens byte for byte, whatever it holds, and no token may reach the vocabulary.",
    text=texts,
    more=st.integers(0, 60),
)
def any_text_comes_back(built: Built, text: str, more: int) -> None:
    made = built.train_tokenizer(SAMPLE + text, 256 + more)
    tokens = made.encode(text)
    holds(all(0 <= token < made.vocabulary for token in tokens), f"of {made.vocabulary} tokens, {tokens} are used")
    held = b"".join(map(made.bytes_of, tokens))
    holds(held == text.encode(), f"the tokens hold the bytes {held!r}, expected {text.encode()!r}")
    holds(made.decode(iter(tokens)) == text, f"decoded {made.decode(tokens)!r}, expected {text!r}")
    holds(made.decode([0xC3, 0x28]) == "\ufffd(", "bytes that are no UTF-8 do not decode to U+FFFD")
    for token in (-1, made.vocabulary):
        _refused(partial(made.bytes_of, token), f"token {token} of {made.vocabulary}")


@prop(
    "Words must end where letters, digits, others and white space meet, hold one space in front, and join to the text.",
    text=texts,
    examples=80,
)
def words_end_where_the_kind_changes(built: Built, text: str) -> None:
    words = built.split_words(text)
    holds("".join(words) == text, f"the words join to {''.join(words)!r}, expected {text!r}")
    holds(list(words) == _words(text), f"the words are {list(words)}, expected {_words(text)}")


@prop(
    "Tokens are not the textbook's: merge the pair learned first, all through a word, from the left, not across words.",
    text=repetitive,
    draws=drawn_merges,
    examples=60,
)
def encodes_as_the_textbook_does(built: Built, text: str, draws: list[Pair]) -> None:
    merges, before = _merges(draws), math.inf
    for count in range(len(merges) + 1):
        made = built.Tokenizer(merges[:count])
        holds(made.vocabulary == 256 + count, f"the vocabulary is {made.vocabulary}, expected {256 + count}")
        tokens = list(made.encode(text))
        expected = [token for word in _words(text) for token in _textbook(word.encode(), merges[:count])]
        holds(tokens == expected, f"with merges {merges[:count]} the tokens are {tokens}, expected {expected}")
        holds(len(tokens) <= before, f"merge {count} gave more tokens: {len(tokens)}, before it {before}")
        made.encode(text).clear()
        holds(list(made.encode(text)) == expected, "to change the list of tokens changed what is encoded next")
        before = len(tokens)
    across = built.Tokenizer([(97, 32), (32, 32)]).encode("a a  a")
    holds(list(across) == [*b"a a  a"], f"the merge of 'a' and a space crossed words: {list(across)}")


@prop(
    "Merges are not those of counting all pairs anew each time: a count is not kept up to date, or a tie not broken.",
    text=repetitive,
    more=st.integers(0, 24),
    examples=60,
)
def merges_are_those_of_counting_anew(built: Built, text: str, more: int) -> None:
    got = built.train_tokenizer(text, 256 + more)
    expected = _learned(text, 256 + more)
    merges = [tuple(pair) for pair in got.merges]
    holds(merges == expected, f"the merges are {merges}, expected {expected}")
    holds(got.vocabulary == 256 + len(expected), f"the vocabulary is {got.vocabulary}, not that of the merges")
    _refused(lambda: built.train_tokenizer(text, 255), "a vocabulary of 255, less than the bytes,")


DAMAGED = ("", "{", "[]", "3", "null", '{"merges": 3}', '{"merges": {}}', '{"merges": [[97]]}', '{"merges": ["ab"]}')
WRONG: tuple[list[list[Any]], ...] = ([[97, 256]], [[-1, 97]], [[97, 98], [97, 98]], [[97.5, 98]], [[97, 98, 99]])


@prop(
    "A tokenizer that was saved must come back the same; a damaged file, or merges that cannot be, must be refused.",
    text=repetitive,
    examples=8,
)
def a_saved_tokenizer_comes_back(built: Built, text: str) -> None:
    made = built.train_tokenizer(SAMPLE + text, 300)
    with _folder() as folder:
        path = folder / "tokenizer.json"
        made.save(path)
        again = built.Tokenizer.load(path)
        holds(again.merges == made.merges, f"the merges are {again.merges}, expected {made.merges}")
        holds(again.encode(SAMPLE) == made.encode(SAMPLE), "the tokenizer that was read encodes otherwise")
        whole = path.read_text(encoding="utf-8")
        for damaged in (*DAMAGED, *(json.dumps({"merges": wrong}) for wrong in WRONG), whole[: len(whole) // 2]):
            path.write_text(damaged, encoding="utf-8")
            _refused(lambda: built.Tokenizer.load(path), f"the file {damaged[:40]!r}")
        _refused(lambda: built.Tokenizer.load(folder / "none.json"), "a file that is not there")


# ---------------------------------------------------------------- batches and evaluation


@prop(
    "Windows must share one token, so that each token is a target once, with the end token after each document.",
    documents=st.lists(st.lists(st.integers(0, 9), max_size=8), max_size=7),
    context=st.integers(1, 6),
)
def every_token_is_a_target_once(built: Built, documents: list[list[int]], context: int) -> None:
    stream = list(itertools.chain.from_iterable([*document, 99] for document in documents))
    count = max(0, len(stream) - 1) // context
    expected = [stream[i * context : (i + 1) * context + 1] for i in range(count)]
    windows = built.pack(documents, context, 99)
    equal(windows, torch.tensor(expected, dtype=torch.long).view(count, context + 1), "the windows")
    targets = torch.tensor(stream[1 : count * context + 1], dtype=torch.long)
    equal(windows[:, 1:].reshape(-1), targets, "the targets of all windows")
    if count > 1:
        windows[0, -1] = -1
        holds(windows[1, 0] >= 0, "two windows share memory: to write to one changes the other")
    _refused(lambda: built.pack(documents, 0, 99), "a context of 0")


@prop(
    "Each document must go whole to one side, by its text and the seed alone: a copy on the other side has been seen.",
    documents=st.lists(st.text("ab", max_size=3), max_size=12),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=seeds,
)
def whole_documents_are_split_by_their_text(built: Built, documents: list[str], share: float, seed: int) -> None:
    train, held_out = built.split_documents(documents, share, seed)
    both = set(train) & set(held_out)
    holds(not both, f"on both sides: {sorted(both)}")
    kept = [d for d in documents if d in train], [d for d in documents if d in held_out]
    holds((train, held_out) == kept, f"the sides are {train} and {held_out}, expected {kept[0]} and {kept[1]}")
    for document in documents:
        alone = built.split_documents([document], share, seed)
        holds(document in alone[document in held_out], f"{document!r} changes sides when the others are gone")
    many = [f"document {i}" for i in range(2000)]
    sides = built.split_documents(many, share, seed)
    near(len(sides[1]) / 2000, share, 5 * math.sqrt(share * (1 - share) / 2000), "the share held out of 2000")
    if 0 < share < 1:
        holds(built.split_documents(many, share, seed + 1) != sides, "another seed gives the same split")
    _refused(lambda: built.split_documents(documents, 1.5, seed), "a share of 1.5")


@prop(
    "The share counts the places of the held-out part whose n tokens stand anywhere in the train part, in this order.",
    train=tokens_of,
    held_out=tokens_of,
    n=st.integers(1, 4),
)
def shared_ngrams_are_places_of_the_held_out_part(built: Built, train: list[int], held_out: list[int], n: int) -> None:
    known = [train[i : i + n] for i in range(len(train) - n + 1)]
    places = [held_out[i : i + n] in known for i in range(len(held_out) - n + 1)]
    expected = sum(places) / len(places) if places else 0.0
    near(built.shared_ngrams(train, held_out, n), expected, 1e-12, f"the share of {n}-grams")
    text = list(range(100))
    for part, share in ((text, 1.0), (text[:56], 0.5), (text[::-1], 0.0), (text[:12], 0.0)):
        near(
            built.shared_ngrams(part, text), share, 1e-12, f"the share of 13-grams with {len(part)} of 100 to train on"
        )
    near(built.shared_ngrams([0], [0, 0, 0, 1], 1), 0.75, 1e-12, "the share of places of 0, 0, 0, 1 that hold a 0")
    near(built.shared_ngrams(text, text[:12]), 0.0, 0.0, "the share in a part that holds no 13-gram")
    _refused(lambda: built.shared_ngrams(train, held_out, 0), "n = 0")


@prop(
    "Bits a byte are all nats of the text, over ln 2 and its bytes: 8 for even odds on bytes, whatever the tokenizer.",
    text=st.text(min_size=1, max_size=40),
    draws=drawn_merges,
    nats=st.floats(0.01, 20),
)
def bits_a_byte_do_not_depend_on_the_tokenizer(built: Built, text: str, draws: list[Pair], nats: float) -> None:
    text = f"{text} abcabc"
    size = len(text.encode())
    near(built.bits_per_byte(math.log(256), size, size), 8.0, 1e-9, "a model of 256 equal odds for each byte")
    near(built.bits_per_byte(math.log(2), 3, 6), 0.5, 1e-9, "one bit a token, of two bytes")
    for merges in ([], _merges(draws)):
        tokens = built.Tokenizer(merges).encode(text)
        # The same model, whose loss is shared out over other tokens.
        got = built.bits_per_byte(nats * size / len(tokens), len(tokens), size)
        near(got, nats / math.log(2), 1e-9, f"{nats:.3g} nats a byte in {len(tokens)} tokens")
    _refused(lambda: built.bits_per_byte(nats, 0, 0), "a text of no byte")


def _counted(function: Callable[[], Tensor], parts: int) -> int:
    """Count the FLOPs forward, and backward too for 3 parts of 3."""
    with FlopCounterMode(display=False) as counter:
        out = function().sum()
        if parts == 3:
            out.backward()  # type: ignore[no-untyped-call]
    return int(counter.get_total_flops())


@prop(
    "FLOPs are 6 a parameter and token, and 12 L C W a token: 2 forward, 4 backward; all pairs in attention count.",
    widths=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    rows=st.integers(1, 9),
    heads=st.integers(1, 3),
    layers=st.integers(1, 3),
)
def flops_are_those_counted(built: Built, widths: list[int], rows: int, heads: int, layers: int) -> None:
    stack = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(widths)))
    x = normal(0, rows, widths[0], dtype=torch.float32).requires_grad_()
    got = built.training_flops(sum(p.numel() for p in stack.parameters()), rows)
    near(got, _counted(lambda: stack(x), 3), 0.5, "the FLOPs of a stack of matrices")
    near(got, 3 * _counted(lambda: stack(x), 1), 0.5, "the FLOPs of a stack, against three times forward,")
    q, k, v = (normal(i, heads, rows, 4).requires_grad_() for i in range(3))
    counted = layers * _counted(lambda: (q @ k.mT).softmax(-1) @ v, 3)
    attention = built.training_flops(0, rows, layers=layers, context=rows, width=4 * heads)
    near(attention, counted, 0.5, f"the FLOPs of attention in {layers} layers")
    both = built.training_flops(7, rows, layers=layers, context=rows, width=4 * heads)
    near(both, counted + 42 * rows, 0.5, "the FLOPs of 7 parameters and attention")
    # Brown et al., 2020, table D.1: 174.6 billion parameters, 300 billion tokens.
    near(built.training_flops(174_600_000_000, 300_000_000_000) / 3.14e23, 1.0, 2e-3, "GPT-3's FLOPs over 3.14e23")


# ---------------------------------------------------------------- stopping and going on


class Training:
    """A small training that draws numbers from torch's generator and from its own."""

    def __init__(self, seed: int, way: str, width: int = 8) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Dropout(0.3), nn.Linear(width, 2))
        self.optimizer: torch.optim.Optimizer
        if way == "SGD":
            self.optimizer = torch.optim.SGD(self.model.parameters(), momentum=0.9)
        else:
            self.optimizer = (AdamW if way == "lab's AdamW" else torch.optim.AdamW)(self.model.parameters())
        self.generators = {"data": torch.Generator().manual_seed(seed)}

    def go(self, start: int, stop: int) -> list[Tensor]:
        """Train, and return the losses, and all numbers at the end."""
        losses = []
        for step in range(start, stop):
            self.optimizer.param_groups[0]["lr"] = learning_rate(step, peak=0.05, warmup=2, total=STEPS)
            x = torch.randn(6, 4, generator=self.generators["data"])
            loss = (self.model(x) - x[:, :2]).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.detach())
        return [*losses, *(x.clone() for x in self.model.state_dict().values())]


def _same(got: list[Tensor], expected: list[Tensor], what: str) -> None:
    gaps = [float((a.double() - b.double()).abs().max()) for a, b in zip(got, expected, strict=True)]
    holds(not any(gaps), f"{what}: losses and weights differ by up to {max(gaps):.3g} from those without a stop")


@prop(
    "A training that was stopped must go on as if it had not: a state is missing, of optimiser, buffers or generators.",
    seed=seeds,
    stop=st.integers(0, STEPS - 1),
    way=ways,
    examples=12,
)
def going_on_changes_no_bit(built: Built, seed: int, stop: int, way: str) -> None:
    with _folder() as folder, torch.random.fork_rng(devices=[]):
        path, whole = folder / "checkpoint", Training(seed, way)
        whole.go(0, stop)
        built.save_checkpoint(path, built.capture(whole.model, whole.optimizer, stop, whole.generators))
        expected = whole.go(stop, STEPS)
        later = Training(seed + 1, way)  # another process: other weights, other numbers drawn
        later.go(0, 2)
        step = built.restore(built.load_checkpoint(path), later.model, later.optimizer, later.generators)
        holds(step == stop, f"restore returns step {step}, expected {stop}")
        _same(later.go(stop, STEPS), expected, f"after a stop at step {stop}")


@prop(
    "What is captured or restored is still in use: training on changes it. A state dict points at tensors: copy them.",
    seed=seeds,
    way=ways,
    examples=6,
)
def a_capture_is_a_copy(built: Built, seed: int, way: str) -> None:
    with torch.random.fork_rng(devices=[]):
        made = Training(seed, way)
        made.go(0, 3)
        state = built.capture(made.model, made.optimizer, 3, made.generators)
        expected = made.go(3, STEPS)
        for turn in ("first", "second"):
            built.restore(state, made.model, made.optimizer, made.generators)
            _same(made.go(3, STEPS), expected, f"restored for the {turn} time")


class _NotPickled:
    def __reduce__(self) -> str:
        raise RuntimeError("it cannot be pickled")


@prop(
    "The old checkpoint must stay whole until the new one is: write beside it, then replace; refuse what is not read.",
    seed=seeds,
    examples=4,
)
def the_old_one_stays_until_the_new_one_is_whole(built: Built, seed: int) -> None:
    old, new = ({"step": i, "x": normal(seed + i, 100), "more": [(1, 2.5), {"a": "b"}]} for i in range(2))
    with _folder() as folder:
        path = folder / "checkpoint"
        built.save_checkpoint(path, old)
        before = path.read_bytes()
        for what in (_NotPickled(), PurePosixPath("a")):
            state = {**new, "what": what}
            _refused(partial(built.save_checkpoint, path, state), f"a {type(what).__name__}")
            holds(path.read_bytes() == before, "a state that was refused changed the checkpoint that was there")
        with path.open("rb") as reader:
            built.save_checkpoint(path, new)
            holds(reader.read() == before, "the old file was written over: its readers find neither")
        found = built.load_checkpoint(path)
        equal(found["x"], new["x"], "the tensor in the new checkpoint")  # type: ignore[arg-type]
        holds((found["step"], found["more"]) == (1, new["more"]), f"the rest of the new checkpoint is {found}")
        names = sorted(each.name for each in folder.iterdir())
        holds(names == ["checkpoint"], f"other files are left beside it: {names}")
        _refused(lambda: built.save_checkpoint(folder / "none" / "checkpoint", new), "a folder that is not there")


@prop(
    "A file that is cut, altered or of another training must be refused: its weights would look like a bug elsewhere.",
    seed=seeds,
    offset=st.integers(0, 30),
    examples=4,
)
def a_damaged_checkpoint_is_refused(built: Built, seed: int, offset: int) -> None:
    with _folder() as folder, torch.random.fork_rng(devices=[]):
        path, made = folder / "checkpoint", Training(seed, "AdamW")
        state = built.capture(made.model, made.optimizer, 1, made.generators)
        built.save_checkpoint(path, state)
        whole = path.read_bytes()
        for place in range(offset, len(whole), max(31, len(whole) // 60)):
            flipped = bytes([whole[place] ^ 1])
            for how, data in (
                ("cut", whole[:place]),
                ("one bit other", whole[:place] + flipped + whole[place + 1 :]),
                ("one byte longer", whole[:place] + b"\0" + whole[place:]),
            ):
                path.write_bytes(data)
                _refused(lambda: built.load_checkpoint(path), f"a checkpoint of {len(whole)} bytes, {how} at {place},")
        _refused(lambda: built.load_checkpoint(folder / "none"), "a file that is not there")
        _refused(lambda: built.load_checkpoint(folder), "a folder")
        other = Training(seed, "AdamW", width=9)
        args = (made.model, made.optimizer, made.generators)
        _refused(
            lambda: built.restore(state, other.model, other.optimizer, other.generators), "a state of another model"
        )
        _refused(
            lambda: built.restore(state, made.model, made.optimizer, {}), "a state with a generator that is not given"
        )
        for part in state:
            rest = {name: value for name, value in state.items() if name != part}
            _refused(partial(built.restore, rest, *args), f"a state without {part!r}")


# ---------------------------------------------------------------- in another process

IMPORT = """
import importlib.util, json, os, pathlib, sys
spec = importlib.util.spec_from_file_location("built", sys.argv[1])
built = importlib.util.module_from_spec(spec)
sys.modules["built"] = built
spec.loader.exec_module(built)
"""
SPLIT = """
print(json.dumps(built.split_documents(json.loads(sys.argv[2]), 0.5, 3)))
"""
SAVE = """
import torch
step, parent = 0, os.getppid()
while os.getppid() == parent:
    step += 1
    built.save_checkpoint(pathlib.Path(sys.argv[2]), {"step": step, "x": torch.full((300_000,), step)})
"""


def _started(built: Built, code: str, argument: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", IMPORT + code, str(built.__file__), argument]
    places = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=places, stdout=pipe, stderr=pipe, text=True)  # noqa: S603


@prop("Another process splits the documents otherwise: Python's own hash of a text changes from process to process.")
def another_process_splits_alike(built: Built) -> None:
    documents = [f"document {i}" for i in range(40)]
    train, held_out = built.split_documents(documents, 0.5, 3)
    with _started(built, SPLIT, json.dumps(documents)) as process:
        out, errors = process.communicate()
    holds(process.returncode == 0, f"the other process failed: {errors.strip()[-200:]}")
    holds(json.loads(out) == [train, held_out], "another process splits the same documents otherwise")


@prop("A process that is killed while it saves must leave a checkpoint that is whole: the old one or the new one.")
def a_process_killed_while_it_saves_leaves_a_whole_one(built: Built) -> None:
    with _folder() as folder:
        path = folder / "checkpoint"
        built.save_checkpoint(path, {"step": 0, "x": torch.zeros(1)})
        with _started(built, SAVE, str(path)) as process:
            try:
                step, until = 0, time.monotonic() + 15
                while step < 6 and process.poll() is None and time.monotonic() < until:
                    step = _whole(built.load_checkpoint(path))  # whoever reads at any moment finds a whole one
            finally:
                process.kill()
            errors = process.communicate()[1]
        holds(step >= 6, f"the process that saves came to step {step}: {errors.strip()[-200:]}")
        holds(_whole(built.load_checkpoint(path)) >= step, "after the kill, an older checkpoint is there again")


def _whole(state: dict[str, Any]) -> int:
    step = int(state["step"])
    holds((state["x"] == step).all(), f"the checkpoint of step {step} holds numbers of another")
    return step
