"""Which tensor an answer of a module is about."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Categorical, Cauchy, Distribution, Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

import lab
from lab.context import first_tensor
from lab.errors import NotChecked

if TYPE_CHECKING:
    from pathlib import Path

Z = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "answer",
    [
        Z,
        (torch.tensor(1.5), Z),  # a loss beside it
        {"loss": torch.tensor(1.5), "logits": Z},
        SimpleNamespace(loss=torch.tensor(1.5), logits=Z),
        {"tokens": torch.arange(3), "out": [Z]},
        Normal(Z, 1.0),
        (torch.tensor(1.5), Normal(Z, 1.0)),
        Bernoulli(logits=Z),
    ],
)
def test_the_tensor_of_an_answer(answer: Any) -> None:
    assert torch.equal(first_tensor(answer), Z)


def test_a_categorical_has_logits_and_no_mean() -> None:
    assert torch.allclose(first_tensor(Categorical(logits=Z)), Z.log_softmax(-1))


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (Cauchy(Z, 1.0), "Cauchy"),
        (TransformedDistribution(Normal(Z, 1.0), [TanhTransform()]), "TransformedDistribution"),
        (torch.arange(3), "Tensor"),
        ({"tokens": torch.arange(3)}, "dict"),
        (None, "NoneType"),
    ],
)
def test_where_there_is_none_nothing_is_checked(answer: Any, kind: str) -> None:
    with pytest.raises(NotChecked, match=f"the model answers with a {kind}, in which no floating-point tensor"):
        first_tensor(answer)


class Process(nn.Module):
    """Answers with a distribution, squashed or not."""

    def __init__(self, *, squashed: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 2))
        self.squashed = squashed

    def forward(self, x: torch.Tensor) -> Distribution:
        mean, scale = self.body(x).chunk(2, dim=-1)
        normal = Normal(mean, 0.1 + nn.functional.softplus(scale))
        return TransformedDistribution(normal, [TanhTransform()]) if self.squashed else normal


@pytest.mark.parametrize("squashed", [False, True])
def test_a_model_that_answers_with_a_distribution(tmp_path: Path, *, squashed: bool) -> None:
    torch.manual_seed(0)
    model = Process(squashed=squashed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with lab.watch(model, optimizer, out=tmp_path / "run") as watch:
        for _ in range(12):
            x = torch.randn(16, 3)
            loss = -model(x).log_prob(0.5 * torch.tanh(x[:, :1])).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert watch.diagnosis.verdict == "healthy"
    assert watch.run.plugins.set_aside == {}
    assert ("evaluation.random" in watch.diagnosis.checked) is not squashed
    if squashed:
        assert "a TransformedDistribution" in watch.diagnosis.not_checked["evaluation.random"]


TOKENS = torch.arange(8 * 5).reshape(8, 5)  # [B T]


@pytest.mark.parametrize(
    ("args", "kwargs", "cut"),
    [
        ((TOKENS,), {}, {"0"}),
        (
            (),
            {"input_ids": TOKENS, "attention_mask": TOKENS > 3, "labels": TOKENS},
            {"input_ids", "attention_mask", "labels"},
        ),
        ((TOKENS, None, True), {"scale": 2.0, "places": TOKENS[:1]}, {"0"}),
        ((TOKENS, torch.rand(8)), {}, {"0", "1"}),
        ((TOKENS, torch.tensor(1.0)), {}, {"0"}),
        ((TOKENS,), {"mask": torch.zeros(5, 5)}, set()),  # [T T]
        ((TOKENS, torch.zeros(2, 30).long()), {}, set()),  # [2 E], as the edges of a graph
        ((TOKENS, torch.randperm(8)), {}, set()),  # places in the batch
        ((TOKENS, torch.rand(8, 8)), {}, set()),  # which of both is the batch?
        ((TOKENS, [TOKENS]), {}, set()),
        ((TOKENS.float(), torch.eye(8).to_sparse()), {}, set()),
    ],
)
def test_the_first_rows_of_a_batch(args: tuple[Any, ...], kwargs: dict[str, Any], cut: set[str]) -> None:
    batch = lab.Batch(args, kwargs, TOKENS)
    rows = batch.rows(3)
    was = {**{str(i): value for i, value in enumerate(args)}, **kwargs}
    now = {**{str(i): value for i, value in enumerate(rows.args)}, **rows.kwargs}
    for name, value in was.items():
        if name in cut:
            assert torch.equal(now[name], value[:3])
        else:
            assert now[name] is value
    assert rows.targets is not None
    assert torch.equal(rows.targets, TOKENS[:3] if cut else TOKENS)
    ends = batch.rows(3, last=True)
    assert ends.targets is not None
    assert torch.equal(ends.targets, TOKENS[-3:] if cut else TOKENS)
    for i, value in enumerate(args):
        assert torch.equal(ends.args[i], value[-3:]) if str(i) in cut else ends.args[i] is value


@pytest.mark.parametrize(
    ("inputs", "targets", "rows"),
    [
        (torch.zeros(6, 50, dtype=torch.long), torch.zeros(6, 50, dtype=torch.long), 3),
        (torch.zeros(6, 128, dtype=torch.long), torch.zeros(6, 128, dtype=torch.long), 1),
        (torch.zeros(6, 8, dtype=torch.long), torch.zeros(6, 8, dtype=torch.long), 4),
        (torch.zeros(6, 0, dtype=torch.long), torch.zeros(6, 0, dtype=torch.long), 4),
        (torch.zeros(6, 50, dtype=torch.long), torch.zeros(6, dtype=torch.long), 4),  # pooled: a target a row
        (torch.zeros(6, 50, dtype=torch.long), None, 4),
        (torch.zeros(6, 50), torch.zeros(6, 50), 4),
    ],
)
def test_no_more_rows_of_tokens_than_hold_enough_positions(
    inputs: torch.Tensor, targets: torch.Tensor | None, rows: int
) -> None:
    cut = lab.Batch((inputs,), {}, targets).rows(4, enough=128).inputs
    assert cut is not None
    assert len(cut) == rows
