"""The callback in the Trainer of Hugging Face, over tiny models with random weights."""

from __future__ import annotations

import copy
import filecmp
import importlib
import io
import os
import pickle
import subprocess
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from attach_loops import CONTEXT, VOCABULARY, batches
from torch import nn
from torch.nn import functional as F

import lab
from lab.ranks import together

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Train = Callable[..., Any]

EACH_EIGHTH = {"eval_strategy": "steps", "eval_steps": 8, "save_strategy": "steps", "save_steps": 8}
ROWS = [row for batch in batches(25, 0) for row in batch]  # [T+1] each


@pytest.fixture(scope="module")
def hf() -> SimpleNamespace:
    """The library, imported when the first test asks for it: that takes seconds."""
    import transformers

    callback = importlib.import_module("lab.plugins.transformers").LabCallback
    names = ("GPT2Config", "GPT2LMHeadModel", "LlamaConfig", "LlamaForCausalLM", "Trainer", "TrainerCallback")
    found = {name: getattr(transformers, name) for name in (*names, "TrainingArguments", "PrinterCallback")}
    return SimpleNamespace(LabCallback=callback, **found)


def gpt2(hf: SimpleNamespace) -> Any:
    config = {"n_embd": 48, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=VOCABULARY, n_positions=CONTEXT, **config))


def llama(hf: SimpleNamespace) -> Any:
    config = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "max_position_embeddings": CONTEXT, "bos_token_id": 0, "eos_token_id": 0}
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=VOCABULARY, **config, **more))


def rows(shift: int = 0) -> list[dict[str, torch.Tensor]]:
    """Labels as the models take them, who shift by themselves; or shifted before, too."""
    length = CONTEXT - shift
    return [{"input_ids": row[:length], "labels": row[shift : shift + length]} for row in ROWS]


@pytest.fixture
def trainer(hf: SimpleNamespace, tmp_path: Path) -> Iterator[Train]:
    """A function that makes a Trainer; its model begins with the same weights each time."""

    def make(
        *callbacks: Any, model: Any = gpt2, change: Any = None, shift: int = 0, kind: Any = None, **options: Any
    ) -> Any:
        torch.manual_seed(0)
        made = model(hf)
        if change is not None:
            change(made)
        settings: dict[str, Any] = {
            "output_dir": str(tmp_path / "hf"),
            "max_steps": 24,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "report_to": [],
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            **options,
        }
        data, evaluation = rows(shift), rows(shift)[:16]
        args = hf.TrainingArguments(**settings)
        trainer = (kind or hf.Trainer)(model=made, args=args, train_dataset=data, eval_dataset=evaluation)
        trainer.remove_callback(hf.PrinterCallback)
        for callback in callbacks:
            trainer.add_callback(callback)
        return trainer

    yield make
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # the next one may ask for another precision


def trained(trainer: Any, **options: Any) -> Any:
    """A Trainer, when it has trained: it draws from what its making left of the seed, so one comes after the other."""
    trainer.train(**options)
    return trainer


def losses(trainer: Any) -> list[Any]:
    return [(log.get("loss"), log.get("eval_loss"), log.get("grad_norm")) for log in trainer.state.log_history]


def same_weights(one: Any, other: Any) -> bool:
    return all(map(torch.equal, one.model.state_dict().values(), other.model.state_dict().values()))


# ---------------------------------------------------------------- right and wrong trainings


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"model": llama},
        {"gradient_accumulation_steps": 4, "model": llama},
        {"eval_strategy": "steps", "eval_steps": 5, "gradient_accumulation_steps": 2},
        {"bf16": True, "warmup_steps": 5, "lr_scheduler_type": "cosine"},
        {"activation_checkpointing": True, **EACH_EIGHTH, "load_best_model_at_end": True},
    ],
    ids=["gpt2", "llama", "accumulation", "evaluation", "bf16", "best"],
)
def test_a_right_training_is_healthy_and_as_it_is_without(
    hf: SimpleNamespace, trainer: Train, tmp_path: Path, options: dict[str, Any]
) -> None:
    callback = hf.LabCallback(out=tmp_path / "run")
    seen, bare = trained(trainer(callback, **options)), trained(trainer(**options))
    assert callback.diagnosis.verdict == "healthy"
    assert callback.diagnosis.symptoms == ()
    checked = {"causality.future", "movement.unheld", "schedule.stepped_often", "targets.copied", "start.loss_high"}
    assert checked <= set(callback.diagnosis.checked)
    assert len(lab.load(tmp_path / "run").table("loss")) == 24
    assert losses(seen) == losses(bare)
    assert same_weights(seen, bare)


def without_mask(model: Any) -> None:
    for block in model.transformer.h:
        block.attn.is_causal = False


def softmax_twice(hf: SimpleNamespace) -> Any:
    class SoftmaxTwice(hf.Trainer):  # type: ignore[misc, name-defined]
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> torch.Tensor:
            labels = inputs.pop("labels")
            probabilities = model(**inputs).logits[:, :-1].softmax(-1)
            return F.cross_entropy(probabilities.flatten(0, 1), labels[:, 1:].flatten())

    return SoftmaxTwice


def left_out(hf: SimpleNamespace) -> Any:
    class LeftOut(hf.Trainer):  # type: ignore[misc, name-defined]
        def create_optimizer(self, *_: Any) -> Any:
            kept = [p for name, p in self.model.named_parameters() if "h.1.mlp.c_fc" not in name]
            self.optimizer = torch.optim.AdamW(kept, lr=1e-3)
            return self.optimizer

    return LeftOut


@pytest.mark.parametrize(
    ("options", "kind", "cause", "at"),
    [
        ({"model": llama, "shift": 1}, None, "targets.shifted_twice", "targets"),
        ({"change": without_mask}, None, "mask.future_leak", "transformer.h.0.attn"),
        ({}, softmax_twice, "loss.softmax_twice", "loss"),
        ({}, left_out, "optimizer.missing_parameter", "transformer.h.1.mlp.c_fc.weight"),
    ],
)
def test_a_mistake_is_named(
    hf: SimpleNamespace, trainer: Train, tmp_path: Path, options: dict[str, Any], kind: Any, cause: str, at: str
) -> None:
    callback = hf.LabCallback(out=tmp_path / "run")
    trainer(callback, kind=kind and kind(hf), **options).train()
    assert [(found.id, found.at) for found in callback.diagnosis.causes] == [(cause, at)]
    assert callback.diagnosis.unexplained == ()


# ---------------------------------------------------------------- what the Trainer keeps


def test_checkpoints_are_those_without_it(hf: SimpleNamespace, trainer: Train, tmp_path: Path) -> None:
    options = {"max_steps": 12, "save_strategy": "steps", "save_steps": 6, "output_dir": str(tmp_path / "hf")}
    trained(trainer(**options))
    (tmp_path / "hf").rename(tmp_path / "bare")
    trained(trainer(hf.LabCallback(out=tmp_path / "run"), **options))
    for step in (6, 12):
        there, here = tmp_path / "bare" / f"checkpoint-{step}", tmp_path / "hf" / f"checkpoint-{step}"
        names = sorted(path.name for path in there.iterdir())
        assert names == sorted(path.name for path in here.iterdir())
        assert filecmp.cmpfiles(there, here, names, shallow=False) == (names, [], [])

    callback = hf.LabCallback(out=tmp_path / "resumed")
    options["max_steps"] = 20
    middle = str(tmp_path / "bare" / "checkpoint-6")
    seen, again = (
        trained(trainer(*callbacks, **options), resume_from_checkpoint=middle) for callbacks in ([callback], [])
    )
    assert callback.diagnosis.verdict == "healthy"
    assert losses(seen) == losses(again)
    assert same_weights(seen, again)
    assert len(lab.load(tmp_path / "resumed").table("loss")) == 14


def test_copies_in_the_middle_watch_nothing(hf: SimpleNamespace, trainer: Train, tmp_path: Path) -> None:
    callback = hf.LabCallback(out=tmp_path / "run", examine_every=7)
    copies: list[Any] = []

    class Middle(hf.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_step_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
            if state.global_step == 3:
                copies.extend([copy.deepcopy(callback), pickle.loads(pickle.dumps(callback)), copy.deepcopy(model)])
                file = io.BytesIO()
                torch.save(model, file)
                file.seek(0)
                copies.append(torch.load(file, weights_only=False))

    watched = trained(trainer(callback, Middle()))
    assert callback.diagnosis.verdict == "healthy"
    *callbacks, copied, loaded = copies
    for other in callbacks:
        assert other.diagnosis is None
        assert other._options == callback._options
    for model in (copied, loaded):
        model(input_ids=torch.zeros(2, 5, dtype=torch.long)).logits.sum().backward()
    assert len(lab.load(tmp_path / "run").table("loss")) == 24
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in watched.model.modules())


# ---------------------------------------------------------------- how it ends


def test_a_training_that_fails_is_diagnosed_until_there(
    hf: SimpleNamespace, trainer: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Failing(hf.Trainer):  # type: ignore[misc, name-defined]
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == 7:
                raise KeyError("no more data")
            return super().training_step(*args, **kwargs)

    callback = hf.LabCallback(out=tmp_path / "run")
    failing = trainer(callback, kind=Failing)
    with pytest.raises(KeyError, match="no more data"):
        failing.train()
    assert callback.diagnosis.verdict == "inconclusive"
    assert callback.diagnosis is callback.diagnosis
    assert capsys.readouterr().err.count("lab: inconclusive: GPT2LMHeadModel, 7 steps") == 1
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in failing.model.modules())

    trainer(callback).train()  # nobody asked what was found, and it trains again
    assert callback.diagnosis.verdict == "healthy"
    assert (tmp_path / "run-2" / "diagnosis.json").is_file()


SCRIPT = """
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from lab.plugins.transformers import LabCallback

class Failing(Trainer):
    def training_step(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise KeyError("no more data")
        return super().training_step(*args, **kwargs)

model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=16, n_layer=1, n_head=2))
rows = [{"input_ids": torch.arange(8) + i % 8, "labels": torch.arange(8) + i % 8} for i in range(64)]
args = TrainingArguments(output_dir="hf", max_steps=9, report_to=[], use_cpu=True, disable_tqdm=True)
Failing(model=model, args=args, train_dataset=rows, callbacks=[LabCallback(out="run")]).train()
"""


def test_a_script_that_fails_ends_with_its_error_and_a_diagnosis(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.index("KeyError: 'no more data'") < done.stderr.index("lab: inconclusive: GPT2LMHeadModel, 5")


def test_a_doomed_training_is_stopped_as_the_trainer_stops(hf: SimpleNamespace, trainer: Train, tmp_path: Path) -> None:
    callback = hf.LabCallback(out=tmp_path / "run", on_finding="stop")
    assert trainer(callback, change=without_mask).train().global_step == 1
    assert [found.at for found in callback.diagnosis.causes] == ["transformer.h.0.attn"]


def test_a_doomed_training_is_ended_by_an_error(hf: SimpleNamespace, trainer: Train, tmp_path: Path) -> None:
    callback = hf.LabCallback(out=tmp_path / "run", on_finding="raise", quiet=True)
    with pytest.raises(lab.FaultFound, match=r"causality\.future"):
        trainer(callback, change=without_mask).train()
    assert [found.id for found in callback.diagnosis.causes] == ["mask.future_leak"]


def test_what_it_prints_can_be_silenced(
    hf: SimpleNamespace, trainer: Train, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trainer(hf.LabCallback(out=tmp_path / "run", quiet=True), max_steps=3).train()
    assert "lab:" not in "".join(capfd.readouterr())


def test_of_two_processes_the_main_one_watches_and_both_stop(
    hf: SimpleNamespace, trainer: Train, tmp_path: Path
) -> None:
    def work(rank: int) -> tuple[Any, ...]:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # the group is there: nobody connects
        os.environ.update(address, RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE="2")
        options = {"max_steps": 8, "ddp_backend": "gloo"}
        right, wrong = (hf.LabCallback(out=tmp_path / f"{name}-{rank}", on_finding="stop") for name in ("a", "b"))
        seen, bare = trained(trainer(right, **options)), trained(trainer(**options))
        stopped = trained(trainer(wrong, change=without_mask, **options))
        diagnoses = [callback.diagnosis and callback.diagnosis.verdict for callback in (right, wrong)]
        return type(seen.model_wrapped).__name__, same_weights(seen, bare), stopped.state.global_step, *diagnoses

    assert together(2, work, timeout=120.0) == [
        ("DistributedDataParallel", True, 1, "healthy", "faulty"),
        ("DistributedDataParallel", True, 1, None, None),
    ]
