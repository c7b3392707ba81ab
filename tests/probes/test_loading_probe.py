"""Where weights come from: a strict load and a new head are silent, a wrong prefix and an untied table are named."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lab
from lab.projects.decoder.component import Decoder

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

    from conftest import SmallRun

    from lab import Run


@lab.plugin("loads", title="Loads weights while the model is built, as somebody else's code may do")
class Loads(lab.Plugin):
    def __init__(self, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self.change = change

    def lab_build_model(self, run: Run) -> Generator[None, nn.Module, nn.Module]:
        model = yield
        model.load_state_dict(self.change({n: x + 0 for n, x in model.state_dict().items()}), strict=False)
        return model


def missed(diagnosis: lab.Diagnosis) -> set[str]:
    return {s.at for s in diagnosis.symptoms if s.id == "loading.missed"}


def without_head(weights: dict[str, Any]) -> dict[str, Any]:
    return {n: x for n, x in weights.items() if not n.startswith("head")}


def other_head(weights: dict[str, Any]) -> dict[str, Any]:
    return {**without_head(weights), "old.head.weight": weights["head.weight"][:3]}


def more(weights: dict[str, Any]) -> dict[str, Any]:
    return {**weights, "ema.head.weight": weights["head.weight"], "value_head": torch.zeros(3)}


def prefixed(weights: dict[str, Any]) -> dict[str, Any]:
    return {(f"module.{n}" if n.startswith("blocks.1.mlp.") else n): x for n, x in weights.items()}


@pytest.mark.parametrize("change", [dict, without_head, other_head, more])
def test_what_a_checkpoint_does_not_hold_is_no_mistake(small_run: SmallRun, change: Any) -> None:
    diagnosis, history = small_run(Loads(change), steps=2)
    assert "loading.missed" in diagnosis.checked
    assert missed(diagnosis) == set()
    assert history.last("loading.lost") == 0


def test_a_prefix_is_named(small_run: SmallRun) -> None:
    plain = nn.Module.load_state_dict
    diagnosis, history = small_run(Loads(prefixed), steps=2)
    assert missed(diagnosis) == {f"blocks.1.mlp.{n}" for n in ("up.weight", "up.bias", "down.weight", "down.bias")}
    assert [(c.id, c.at) for c in diagnosis.causes] == [("init.not_loaded", "blocks.1.mlp.up")]
    assert history.last("loading.lost") == 4
    assert nn.Module.load_state_dict is plain


@lab.plugin("changes", title="Changes a model that was loaded")
class Changes(lab.Plugin):
    def __init__(self, change: Callable[[nn.Module], None]) -> None:
        self.change = change

    def lab_build_model(self, run: Run) -> Generator[None, nn.Module, nn.Module]:
        model = yield
        other = Decoder(run.data.vocabulary, context=24, layers=2, width=32, heads=2)
        model.load_state_dict(other.state_dict())
        with torch.no_grad():
            self.change(model)
        return model


def anew(model: nn.Module, names: str = "") -> None:
    for name, p in model.named_parameters():
        if p.dim() == 2 and name.startswith(names):
            p.normal_(std=0.02)


def rounded(model: nn.Module) -> None:
    for p in model.parameters():
        unit = p.abs().amax().clamp_min(1e-9) / 7
        p.copy_((p / unit).round() * unit)


def disturbed(model: nn.Module) -> None:
    for p in model.parameters():
        p.mul_(0.3).add_(torch.randn_like(p) * 0.02)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda _: None, 0),
        (rounded, 0),
        (disturbed, 0),
        (lambda model: anew(model, "tokens"), 0),
        (lambda model: anew(model, "blocks"), 0),
        (anew, 1),
    ],
)
def test_only_a_model_without_anything_it_was_given_is_named(small_run: SmallRun, change: Any, found: int) -> None:
    diagnosis, _ = small_run(Changes(change), steps=2)
    assert "loading.replaced" in diagnosis.checked
    assert [c.id for c in diagnosis.causes] == ["init.after_loading"] * found
    assert diagnosis.unexplained == ()


def test_what_was_not_seen_is_not_checked(small_run: SmallRun) -> None:
    diagnosis, _ = small_run(steps=2)
    assert "no weights were loaded" in diagnosis.not_checked["loading.missed"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model": {"layers": 1, "width": 32, "heads": 2, "context": 24, "tied": True}},
        {"train": {"objective": "masked"}},
        {"train": {"lr": 0.3, "warmup": 0}, "model": {"layers": 0, "width": 8, "heads": 1, "context": 8}},
    ],
)
def test_tables_that_are_one_or_two_are_silent(small_run: SmallRun, changes: dict[str, Any]) -> None:
    diagnosis, _ = small_run(**changes)
    assert "ties.apart" in diagnosis.checked
    assert [s.id for s in diagnosis.symptoms] == []


@pytest.mark.parametrize("tied", [True, False])
def test_a_copy_in_place_of_a_table_is_named(small_run: SmallRun, *, tied: bool) -> None:
    size = {"layers": 1, "width": 32, "heads": 2, "context": 24, "tied": tied}
    diagnosis, _ = small_run(faults=[{"id": "weights.untied"}], model=size)
    assert [(c.id, c.at) for c in diagnosis.causes] == [("weights.untied", "head")]
    assert diagnosis.unexplained == ()


class Foreign(nn.Module):
    """Somebody else's model, whose head is filled as asked."""

    def __init__(self, fill: str) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 16, padding_idx=0)
        self.lm_head = nn.Linear(16, 11, bias=False)
        nn.init.normal_(self.emb.weight, std=0.1)
        if fill == "tied":
            self.lm_head.weight = self.emb.weight
        if fill == "copied":
            self.lm_head.weight.data.copy_(self.emb.weight)
        if fill == "zero":
            self.lm_head.weight.data.zero_()
        if fill == "frozen":
            self.lm_head.weight = nn.Parameter(self.emb.weight.detach().clone(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.lm_head(self.emb(x))
        return answer


def untied(folder: Path, model: nn.Module) -> list[str]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with lab.watch(model, optimizer, out=folder / "run") as watch:
        for _ in range(24):
            x = torch.randint(1, 11, (8, 6))
            optimizer.zero_grad()
            F.cross_entropy(model(x).flatten(0, 1), (x * 3 % 11).flatten()).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return [s.at for s in watch.diagnosis.symptoms if s.id == "ties.apart"]


@pytest.mark.parametrize(("fill", "found"), [("", 0), ("tied", 0), ("zero", 0), ("frozen", 0), ("copied", 1)])
def test_in_a_loop_of_ones_own(tmp_path: Path, fill: str, found: int) -> None:
    torch.manual_seed(0)
    assert untied(tmp_path, Foreign(fill)) == ["lm_head.weight"] * found


class Placed(Foreign):
    """Of as many positions as tokens, which makes another table of that shape."""

    def __init__(self, fill: str) -> None:
        super().__init__(fill)
        self.places = nn.Embedding(11, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.lm_head(self.emb(x) + self.places(torch.arange(x.shape[1])))
        return answer


@pytest.mark.parametrize(("fill", "found"), [("", 0), ("tied", 0), ("copied", 1)])
def test_a_table_of_positions_is_not_what_a_head_is_tied_to(tmp_path: Path, fill: str, found: int) -> None:
    torch.manual_seed(0)
    assert untied(tmp_path, Placed(fill)) == ["lm_head.weight"] * found


def test_a_model_of_the_lab_has_the_names_that_faults_use() -> None:
    model = Decoder(5, context=8, layers=1, width=8, heads=1)
    assert model.tokens.weight.shape == model.head.weight.shape
