"""What is compiled again and again: told at the compiler's own limit, and silent below it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lab
from lab import History, Row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from conftest import SmallRun

    from lab.catalogue import Catalogue


@pytest.fixture(autouse=True)
def _nothing_is_compiled_before() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Block(nn.Module):
    """A norm and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.norm(x))  # type: ignore[no-any-return]


class Net(nn.Module):
    """Tokens in, logits out, through a few blocks, each of which may be compiled by itself, and a function."""

    def __init__(self, blocks: int = 2, function: Callable[[Tensor], Tensor] = F.gelu) -> None:
        super().__init__()
        self.tokens, self.head, self.function = nn.Embedding(11, 16), nn.Linear(16, 11), function
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x)
        for block in self.blocks:
            h = h + self.function(block(h))
        return self.head(h)  # type: ignore[no-any-return]


class Counting(Net):
    """Counts its calls, and computes with their number."""

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * (1 + 0 * self.calls)


def compiled(function: Any, **options: Any) -> Any:
    return torch.compile(function, backend="eager", **options)


def in_parts() -> nn.Module:
    net = Net(blocks=12)
    for block in net.blocks:
        block.compile(backend="eager")
    return net


def weighted(loss: Tensor, step: int) -> Tensor:
    return loss * (1 + 0 * step)


LENGTHS = [9] * 40
CHANGING = [*range(4, 24)] * 2
MODELS: dict[str, tuple[Callable[[], nn.Module], list[int], bool]] = {
    "once": (lambda: compiled(Net()), LENGTHS, False),
    "rows of all lengths": (lambda: compiled(Net()), CHANGING, False),
    "each of twelve blocks": (in_parts, CHANGING, False),
    "a function inside": (lambda: Net(function=compiled(lambda x: F.gelu(x) * 2)), CHANGING, False),
    "four lengths, each compiled for": (lambda: compiled(Net(), dynamic=False), [*range(4, 8)] * 10, False),
    "too many lengths, each compiled for": (lambda: compiled(Net(), dynamic=False), CHANGING, True),
    "a counter": (lambda: compiled(Counting()), LENGTHS, True),
}


def watched(folder: Path, model: nn.Module, lengths: list[int], loss: Any = None) -> lab.Diagnosis:
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lab.watch(model, optimizer, out=folder) as watch:
        for step, length in enumerate(lengths):
            x = torch.randint(11, (4, length))
            optimizer.zero_grad()
            value = F.cross_entropy(model(x).flatten(0, 1), x.flatten())
            (loss(value, step) if loss else value).backward()
            optimizer.step()
            if step % 10 == 9:
                model.eval()
                with torch.no_grad():
                    model(torch.randint(11, (4, length)))
                model.train()
    return watch.diagnosis


@pytest.mark.parametrize("name", MODELS)
def test_the_limit_tells(tmp_path: Path, name: str) -> None:
    make, lengths, wrong = MODELS[name]
    diagnosis = watched(tmp_path / "run", make(), lengths)
    assert ("compilation.again" in [symptom.id for symptom in diagnosis.symptoms]) == wrong
    assert "compilation.again" in diagnosis.checked
    assert [cause.id for cause in diagnosis.causes if cause.id.startswith("performance.")] == (
        ["performance.recompilation"] * wrong
    )


def test_a_compiled_loss_is_seen_too(tmp_path: Path) -> None:
    diagnosis = watched(tmp_path / "run", Net(), [9] * 12, compiled(weighted, dynamic=False))
    assert [(cause.id, cause.at) for cause in diagnosis.causes] == [("performance.recompilation", "loop")]


def test_what_is_not_compiled_is_not_checked(tmp_path: Path) -> None:
    compiled(weighted, dynamic=False)(torch.ones(()), 3)  # before, and by somebody else
    diagnosis = watched(tmp_path / "run", Net(), [9] * 3)
    assert diagnosis.not_checked["compilation.again"].endswith("nothing was compiled in this run")


def test_the_fault_changes_no_number(small_run: SmallRun) -> None:
    fault = {"id": "performance.recompilation", "from_step": 2}
    _, healthy = small_run(steps=14)
    for _ in range(2):  # what the first run compiled is not there for the second
        diagnosis, broken = small_run(steps=14, faults=[fault])
        assert broken.series("loss").values.tolist() == healthy.series("loss").values.tolist()
        assert broken.series("compilation.steps").values.tolist() == [0, 0, *range(1, 10), 9, 9, 9]
        assert [(cause.id, cause.at, cause.since_step) for cause in diagnosis.causes] == [(fault["id"], "loop", 3)]


@pytest.mark.parametrize(
    ("steps", "limit", "since"), [([1, 2, 8], 8, None), ([1, 1, 3, 9], 8, 2), ([1, 9, 20], 64, None)]
)
def test_the_rule_on_made_histories(catalogue: Catalogue, steps: list[int], limit: int, since: int | None) -> None:
    history = History()
    for index, value in enumerate(steps):
        columns = (("compilation.steps", ""), ("compilation.limit", ""))
        history.add(index, Row(columns, np.array([value, limit], dtype=float)))
    found = list(catalogue.rules["compilation.again"].judge(history))
    assert [symptom.since for symptom in found] == ([] if since is None else [since])
