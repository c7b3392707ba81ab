"""The callback in the Trainer of Lightning, under both of its names."""

from __future__ import annotations

import copy
import importlib
import os
import pickle
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from attach_loops import LanguageModel, batches
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import lab
from lab.ranks import together

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Fit = Callable[..., Any]

ROWS = [row for batch in batches(25, 0) for row in batch]  # [T+1] each
STEPS = 24


@pytest.fixture(scope="module")
def lightning() -> SimpleNamespace:
    """The library, imported when the first test asks for it: that takes seconds; and a module that it trains."""
    import lightning.pytorch

    callback = importlib.import_module("lab.plugins.lightning").LabCallback
    return SimpleNamespace(LabCallback=callback, Lit=lit(lightning.pytorch), pl=lightning.pytorch)


def lit(package: Any) -> Any:
    """A LightningModule around the model, of one of the two packages."""

    class Lit(package.LightningModule):  # type: ignore[misc]
        def __init__(self, *, through_forward: bool = False, interval: str = "", **options: Any) -> None:
            super().__init__()
            self.net = LanguageModel(**options)
            self.through_forward, self.interval = through_forward, interval
            self.losses: list[str] = []

        def forward(self, tokens: torch.Tensor) -> Any:
            return self.net(tokens)

        def logits(self, tokens: torch.Tensor) -> Any:
            return self(tokens) if self.through_forward else self.net(tokens)

        def training_step(self, tokens: torch.Tensor, _: int) -> torch.Tensor:
            loss = F.cross_entropy(self.logits(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            self.log("loss", loss)
            self.losses.append(f"{loss.item():.17g}")
            return loss

        def validation_step(self, tokens: torch.Tensor, _: int) -> None:
            loss = F.cross_entropy(self.net(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            self.losses.append(f"{loss.item():.17g}")

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
            if not self.interval:
                return optimizer
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
            return [optimizer], [{"scheduler": scheduler, "interval": self.interval}]

    return Lit


@pytest.fixture
def fit(lightning: SimpleNamespace, tmp_path: Path) -> Iterator[Fit]:
    """A function that trains; the module begins with the same weights each time."""

    def run(
        *callbacks: Any, kind: Any = None, module: dict[str, Any] | None = None, path: str | None = None, **options: Any
    ) -> Any:
        torch.manual_seed(0)
        made = (kind or lightning.Lit)(**module or {})
        quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
        settings = {"max_steps": STEPS, "accelerator": "cpu", "default_root_dir": str(tmp_path), **quiet, **options}
        trainer = lightning.pl.Trainer(callbacks=[*callbacks], **settings)
        loader: DataLoader[torch.Tensor] = DataLoader(ROWS, 8, shuffle=True)  # type: ignore[arg-type]
        trainer.fit(made, loader, DataLoader(ROWS[:16], 8), ckpt_path=path)  # type: ignore[arg-type]
        return made

    yield run
    if dist.is_initialized():  # by the strategy, which leaves it so
        dist.destroy_process_group()


def same(one: Any, other: Any) -> bool:
    weights = one.state_dict().values(), other.state_dict().values()
    return one.losses == other.losses and all(map(torch.equal, *weights))


# ---------------------------------------------------------------- right and wrong trainings


@pytest.mark.parametrize("through_forward", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 4, "gradient_clip_val": 1.0, "val_check_interval": 7},
        {"precision": "bf16-mixed"},
        {"strategy": "ddp", "devices": 1},
    ],
    ids=["plain", "accumulation", "bf16", "ddp"],
)
def test_a_right_training_is_healthy_and_as_it_is_without(
    lightning: SimpleNamespace, fit: Fit, tmp_path: Path, options: dict[str, Any], through_forward: bool
) -> None:
    callback, module = lightning.LabCallback(out=tmp_path / "run"), {"through_forward": through_forward}
    seen, bare = fit(callback, module=module, **options), fit(module=module, **options)
    assert callback.diagnosis.verdict == "healthy", callback.diagnosis.not_checked
    assert callback.diagnosis.symptoms == ()
    assert callback.watching.run.model is (seen if through_forward else seen.net)
    checked = {"causality.future", "movement.unheld", "targets.ahead", "start.loss_high"}
    assert checked <= set(callback.diagnosis.checked)
    assert len(lab.load(tmp_path / "run").table("gradient.total")) == STEPS
    assert same(seen, bare)


@pytest.mark.parametrize(("interval", "checked"), [("step", True), ("epoch", False)])
def test_a_schedule_of_updates_is_checked_and_one_of_epochs_is_not(
    lightning: SimpleNamespace, fit: Fit, tmp_path: Path, interval: str, checked: bool
) -> None:
    callback = lightning.LabCallback(out=tmp_path / "run")
    fit(callback, module={"interval": interval})
    assert callback.diagnosis.verdict == "healthy"
    assert ("schedule.never_stepped" in callback.diagnosis.checked) is checked


def variant(lightning: SimpleNamespace, name: str) -> Any:
    class Twice(lightning.Lit):  # type: ignore[misc, name-defined]
        def logits(self, tokens: torch.Tensor) -> torch.Tensor:
            return super().logits(tokens).softmax(-1)  # type: ignore[no-any-return]

    class LeftOut(lightning.Lit):  # type: ignore[misc, name-defined]
        def configure_optimizers(self) -> Any:
            kept = [p for name, p in self.named_parameters() if "layers.1.linear1" not in name]
            return torch.optim.AdamW(kept, lr=1e-3)

    class NotShifted(lightning.Lit):  # type: ignore[misc, name-defined]
        def training_step(self, tokens: torch.Tensor, _: int) -> torch.Tensor:
            inputs = tokens[:, :-1]
            return F.cross_entropy(self.logits(inputs).flatten(0, 1), inputs.flatten())

    return {"twice": Twice, "left_out": LeftOut, "not_shifted": NotShifted}[name]


@pytest.mark.parametrize(
    ("name", "module", "cause", "at"),
    [
        ("", {"causal": False}, "mask.future_leak", "encoder.layers.0.self_attn"),
        ("", {"causal": False, "through_forward": True}, "mask.future_leak", "net.encoder.layers.0.self_attn"),
        ("twice", {}, "loss.softmax_twice", "loss"),
        ("left_out", {}, "optimizer.missing_parameter", "encoder.layers.1.linear1.weight"),
        ("not_shifted", {}, "targets.not_shifted", "targets"),
    ],
)
def test_a_mistake_is_named(
    lightning: SimpleNamespace, fit: Fit, tmp_path: Path, name: str, module: dict[str, Any], cause: str, at: str
) -> None:
    callback = lightning.LabCallback(out=tmp_path / "run")
    fit(callback, module=module, kind=variant(lightning, name) if name else None)
    assert [(found.id, found.at) for found in callback.diagnosis.causes] == [(cause, at)]
    assert callback.diagnosis.unexplained == ()


def test_of_two_optimisers_the_one_is_watched_that_trains_what_is_called(
    lightning: SimpleNamespace, fit: Fit, tmp_path: Path
) -> None:
    class Both(lightning.Lit):  # type: ignore[misc, name-defined]
        automatic_optimization = False

        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(4, 4)

        def training_step(self, tokens: torch.Tensor, _: int) -> None:
            small, large = self.optimizers()
            loss = F.cross_entropy(self.net(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            large.zero_grad()
            self.manual_backward(loss)
            large.step()
            small.zero_grad()
            self.manual_backward(self.other(torch.ones(2, 4)).square().mean())
            small.step()
            self.losses.append(f"{loss.item():.17g}")

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.other.parameters(), lr=0.1), torch.optim.AdamW(self.net.parameters(), lr=1e-3)

    callback = lightning.LabCallback(out=tmp_path / "run")
    seen, bare = fit(callback, kind=Both), fit(kind=Both)
    assert isinstance(callback.watching.run.optimizer, torch.optim.AdamW)
    assert callback.watching.run.model is seen.net
    assert callback.diagnosis.verdict == "healthy"
    assert same(seen, bare)


def test_the_trainer_of_the_other_package_takes_it_too(lightning: SimpleNamespace, tmp_path: Path) -> None:
    import pytorch_lightning

    torch.manual_seed(0)
    callback = lightning.LabCallback(out=tmp_path / "run")
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = pytorch_lightning.Trainer(max_steps=12, accelerator="cpu", callbacks=[callback], **quiet)
    trainer.fit(lit(pytorch_lightning)(causal=False), DataLoader(ROWS, 8))  # type: ignore[arg-type]
    assert [found.id for found in callback.diagnosis.causes] == ["mask.future_leak"]


# ---------------------------------------------------------------- what the Trainer keeps


def test_checkpoints_are_those_without_it(lightning: SimpleNamespace, fit: Fit, tmp_path: Path) -> None:
    saved: dict[str, Any] = {}
    for name in ("bare", "seen"):
        keep = lightning.pl.callbacks.ModelCheckpoint(tmp_path / name, "{step}", save_top_k=-1, every_n_train_steps=6)
        callbacks = [lightning.LabCallback(out=tmp_path / "run")] if name == "seen" else []
        fit(*callbacks, keep, enable_checkpointing=True)
        for path in sorted((tmp_path / name).iterdir()):
            checkpoint = torch.load(path, weights_only=False)
            checkpoint["callbacks"] = [str(key).replace(name, "NAME") for key in checkpoint["callbacks"]]
            saved.setdefault(path.name, []).append(pickle.dumps(plain(checkpoint)))
    assert len(saved) == 4
    assert all(one == other for one, other in saved.values())

    callback = lightning.LabCallback(out=tmp_path / "resumed")
    middle = str(tmp_path / "seen" / "step=12.ckpt")
    seen, again = fit(callback, path=middle), fit(path=middle)
    assert callback.diagnosis.verdict == "healthy"
    assert len(lab.load(tmp_path / "resumed").table("loss")) == 12
    assert same(seen, again)


def plain(thing: Any) -> Any:
    """Tensors as bytes and lists, so that pickles can be compared: those of equal tensors may differ."""
    if isinstance(thing, torch.Tensor):
        return thing.dtype, thing.tolist()
    if isinstance(thing, dict):
        return {key: plain(value) for key, value in thing.items()}
    return [*map(plain, thing)] if isinstance(thing, (list, tuple)) else thing


def test_copies_in_the_middle_watch_nothing(lightning: SimpleNamespace, fit: Fit, tmp_path: Path) -> None:
    callback = lightning.LabCallback(out=tmp_path / "run", examine_every=7)
    copies: list[Any] = []

    class Middle(lightning.pl.Callback):  # type: ignore[misc, name-defined]
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, index: int) -> None:
            if index == 3:
                copies.extend([copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))])
                copies.append(copy.deepcopy(pl_module.net))

    trained = fit(callback, Middle())
    assert callback.diagnosis.verdict == "healthy"
    assert [other.diagnosis for other in copies[:2]] == [None, None]
    assert [other._options for other in copies[:2]] == [callback._options] * 2
    copies[2](torch.zeros(2, 5, dtype=torch.long)).sum().backward()
    assert len(lab.load(tmp_path / "run").table("loss")) == STEPS
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in trained.modules())


# ---------------------------------------------------------------- how it ends


def test_a_training_that_fails_is_diagnosed_until_there(
    lightning: SimpleNamespace, fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Failing(lightning.Lit):  # type: ignore[misc, name-defined]
        def training_step(self, tokens: torch.Tensor, index: int) -> torch.Tensor:
            if index == 7:
                raise KeyError("no more data")
            return super().training_step(tokens, index)  # type: ignore[no-any-return]

    callback = lightning.LabCallback(out=tmp_path / "run")
    with pytest.raises(KeyError, match="no more data"):
        fit(callback, kind=Failing)
    assert callback.diagnosis.verdict == "inconclusive"
    assert capsys.readouterr().err.count("lab: inconclusive: LanguageModel, 7 steps") == 1


def test_a_doomed_training_is_stopped_as_the_trainer_stops(
    lightning: SimpleNamespace, fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = lightning.LabCallback(out=tmp_path / "run", on_finding="stop")
    stopped = fit(callback, module={"causal": False})
    assert callback.watching.run.history.last_step == 0
    assert stopped.trainer.should_stop
    assert [found.at for found in callback.diagnosis.causes] == ["encoder.layers.0.self_attn"]
    assert capsys.readouterr().err.count("lab: faulty: LanguageModel, 1 step,") == 1


def test_a_doomed_training_is_ended_by_an_error(lightning: SimpleNamespace, fit: Fit, tmp_path: Path) -> None:
    callback = lightning.LabCallback(out=tmp_path / "run", on_finding="raise", quiet=True)
    with pytest.raises(lab.FaultFound, match=r"causality\.future"):
        fit(callback, module={"causal": False})
    assert [found.id for found in callback.diagnosis.causes] == ["mask.future_leak"]


def test_a_training_step_that_is_compiled_is_refused(lightning: SimpleNamespace, tmp_path: Path) -> None:
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    callback = lightning.LabCallback(out=tmp_path / "run")
    trainer = lightning.pl.Trainer(max_steps=2, accelerator="cpu", callbacks=[callback], **quiet)
    compiled = torch.compile(lightning.Lit(), backend="eager")
    with pytest.raises(lab.BadInput, match="compile the model inside it instead"):
        trainer.fit(compiled, DataLoader(ROWS, 8))  # type: ignore[arg-type]


def test_of_two_processes_the_main_one_watches_and_both_stop(
    lightning: SimpleNamespace, fit: Fit, tmp_path: Path
) -> None:
    def work(rank: int) -> tuple[Any, ...]:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # the group is there: nobody connects
        started = {"TORCHELASTIC_RUN_ID": "test", "LOCAL_RANK": f"{rank}", "RANK": f"{rank}", "WORLD_SIZE": "2"}
        os.environ.update(address, **started, LOCAL_WORLD_SIZE="2", GROUP_RANK="0")
        options = {"strategy": "ddp", "devices": 2, "max_steps": 8, "num_sanity_val_steps": 0}
        right, wrong = (lightning.LabCallback(out=tmp_path / f"{n}-{rank}", on_finding="stop") for n in ("a", "b"))
        seen, bare = fit(right, **options), fit(**options)
        stopped = fit(wrong, module={"causal": False}, **options)
        diagnoses = [callback.diagnosis and callback.diagnosis.verdict for callback in (right, wrong)]
        return same(seen, bare), stopped.trainer.global_step, *diagnoses

    assert together(2, work, timeout=120.0) == [(True, 1, "healthy", "faulty"), (True, 1, None, None)]
