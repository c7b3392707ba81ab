"""A loop with Hugging Face Accelerate, watched in the main process."""

from __future__ import annotations

import contextlib
import filecmp
import importlib
import os
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from attach_loops import LanguageModel, batches
from torch.nn import functional as F
from torch.utils.data import DataLoader

import lab
from lab.ranks import together

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Loop = Callable[..., "Trained"]

ROWS = [row for batch in batches(32, 0) for row in batch]  # [T+1] each


@dataclass
class Trained:
    """What a loop ends with."""

    model: Any
    watching: Any = None
    losses: list[float] = field(default_factory=list)


@pytest.fixture(scope="module")
def library() -> SimpleNamespace:
    import accelerate

    watch = importlib.import_module("lab.plugins.accelerate").watch
    return SimpleNamespace(accelerate=accelerate, watch=watch)


@pytest.fixture
def loop(library: SimpleNamespace, tmp_path: Path) -> Iterator[Loop]:
    """A function that trains as the documentation of Accelerate does."""

    def run(
        *,
        accumulate: int = 1,
        precision: str = "no",
        model: dict[str, Any] | None = None,
        head: bool = True,
        schedule: bool = True,
        save: str = "",
        fail_at: int = -1,
        **options: Any,
    ) -> Trained:
        library.accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        torch.manual_seed(0)
        accelerator = library.accelerate.Accelerator(
            cpu=True, gradient_accumulation_steps=accumulate, mixed_precision=precision
        )
        made = LanguageModel(**model or {})
        kept = [p for name, p in made.named_parameters() if head or not name.startswith("head")]
        optimizer: Any = torch.optim.AdamW(kept, lr=1e-3)
        scheduler: Any = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 32)
        loader: Any = DataLoader(ROWS, 8, shuffle=True)  # type: ignore[arg-type]
        net, optimizer, loader, scheduler = accelerator.prepare(made, optimizer, loader, scheduler)
        known = [scheduler] if schedule else []
        watched = library.watch(accelerator, net, optimizer, *known, **options) if options else contextlib.nullcontext()
        trained = Trained(net)
        with watched as trained.watching:
            for index, tokens in enumerate(loader):
                if index == fail_at:
                    raise KeyError("no more data")
                with accelerator.accumulate(net):
                    loss = F.cross_entropy(net(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(net.parameters(), 1.0)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                trained.losses.append(loss.item())
                if index % 10 == 9:
                    net.eval()
                    with torch.no_grad():
                        trained.losses.append(net(tokens[:, :-1]).sum().item())
                    net.train()
            if save:
                accelerator.save_state(str(tmp_path / save))
        return trained

    yield run
    library.accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def same(one: Trained, other: Trained) -> bool:
    weights = one.model.state_dict().values(), other.model.state_dict().values()
    return one.losses == other.losses and all(map(torch.equal, *weights))


@pytest.mark.parametrize(
    ("options", "steps"), [({}, 32), ({"accumulate": 4}, 8), ({"precision": "bf16"}, 32)], ids=["plain", "sum", "bf16"]
)
def test_a_right_loop_is_healthy_and_as_it_is_without(
    loop: Loop, tmp_path: Path, options: dict[str, Any], steps: int
) -> None:
    seen, bare = loop(out=tmp_path / "run", **options), loop(**options)
    diagnosis = seen.watching.diagnosis
    assert diagnosis.verdict == "healthy", diagnosis
    checked = {"causality.future", "movement.unheld", "targets.ahead", "start.loss_high", "schedule.never_stepped"}
    assert checked <= set(diagnosis.checked)
    assert len(lab.load(tmp_path / "run").table("loss")) == steps
    assert same(seen, bare)


@pytest.mark.parametrize(
    ("options", "cause", "at"),
    [
        ({"model": {"causal": False}}, "mask.future_leak", "encoder.layers.0.self_attn"),
        ({"head": False, "accumulate": 2}, "optimizer.missing_parameter", "head.weight"),
    ],
)
def test_a_mistake_is_named(loop: Loop, tmp_path: Path, options: dict[str, Any], cause: str, at: str) -> None:
    diagnosis = loop(out=tmp_path / "run", quiet=True, **options).watching.diagnosis
    assert [(found.id, found.at) for found in diagnosis.causes] == [(cause, at)]
    assert diagnosis.unexplained == ()


def test_what_it_saves_is_what_it_saves_without(loop: Loop, tmp_path: Path) -> None:
    loop(out=tmp_path / "run", save="seen")
    loop(save="bare")
    names = sorted(path.name for path in (tmp_path / "bare").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "seen").iterdir())
    assert filecmp.cmpfiles(tmp_path / "bare", tmp_path / "seen", names, shallow=False) == (names, [], [])


def test_a_loop_that_fails_is_diagnosed_until_there(
    library: SimpleNamespace, loop: Loop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KeyError, match="no more data"):
        loop(out=tmp_path / "run", fail_at=7)
    assert "lab: inconclusive: LanguageModel, 7 steps" in capsys.readouterr().err
    assert (tmp_path / "run" / "diagnosis.json").is_file()


def test_what_is_found_ends_the_loop(loop: Loop, tmp_path: Path) -> None:
    with pytest.raises(lab.FaultFound, match=r"causality\.future"):
        loop(out=tmp_path / "run", on_finding="raise", model={"causal": False})


def test_a_loop_cannot_be_asked_to_stop(library: SimpleNamespace) -> None:
    with pytest.raises(lab.BadInput, match="on_finding = 'stop'"):
        library.watch(library.accelerate.Accelerator(cpu=True), LanguageModel(), None, on_finding="stop")


def test_the_arguments_of_lab_watch_are_told_from_these(library: SimpleNamespace) -> None:
    model = LanguageModel()
    with pytest.raises(lab.BadInput, match=r"a LanguageModel is no Accelerator: watch\(accelerator, model, optimizer"):
        library.watch(model, torch.optim.SGD(model.parameters()), None)


def test_of_two_processes_the_main_one_watches(loop: Loop, tmp_path: Path) -> None:
    def work(rank: int) -> tuple[Any, ...]:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # the group is there: nobody connects
        os.environ.update(address, RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE="2")
        seen, bare = loop(out=tmp_path / f"run-{rank}"), loop()
        diagnosis = seen.watching.diagnosis
        about = None if diagnosis is None else (diagnosis.verdict, "schedule.never_stepped" in diagnosis.checked)
        return type(seen.model).__name__, same(seen, bare), about

    name = "DistributedDataParallel"
    # The schedule is stepped once for each process, so what it should say is not known.
    assert together(2, work, timeout=120.0) == [(name, True, ("healthy", False)), (name, True, None)]
