"""Mistakes that people make with models of others, made by hand in their code: each is named, and where it is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import third_party_models as models
import third_party_torch as plain
import torch
from third_party_loop import PAD, ROWS, T, V, text, train
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from third_party_loop import Batch, Training

    Change = Callable[[Training], None]


@dataclass(frozen=True)
class Mistake:
    """What is changed in whose training, what that should be called, and where."""

    make: Callable[[], Training]
    change: Change
    cause: str
    at: str

    @property
    def name(self) -> str:
        """For the test."""
        return f"{self.make.__name__}-{self.change.__name__}"


MISTAKES: list[Mistake] = []


def mistake(make: Callable[[], Training], cause: str, at: str) -> Callable[[Change], Change]:
    """Enter a change of a training as a mistake."""

    def enter(change: Change) -> Change:
        MISTAKES.append(Mistake(make, change, cause, at))
        return change

    return enter


def after(module: nn.Module, change: Callable[[Any], Any]) -> None:
    """Change what a module gives out."""
    module.register_forward_hook(lambda _module, _args, output: change(output))


def without(*parts: str) -> Callable[[nn.Module], list[nn.Parameter]]:
    """The parameters in whose names none of these parts is."""
    return lambda model: [p for name, p in model.named_parameters() if not any(part in name for part in parts)]


# ---------------------------------------------------------------- labels and targets


@mistake(models.gpt2, "targets.shifted_twice", "targets")
def labels_are_shifted_by_the_user_too(training: Training) -> None:
    def batch() -> Batch:
        ids = text(T + 1)
        return {"input_ids": ids[:, :-1], "labels": ids[:, 1:].contiguous()}

    training.batch = batch


@mistake(models.mamba, "targets.shifted_twice", "targets")
def labels_are_rolled(training: Training) -> None:
    training.changed(lambda batch: {**batch, "labels": F.pad(batch["labels"][:, 1:], (0, 1), value=-100)})


@mistake(models.gpt2_padded, "targets.padding_counted", "targets")
@mistake(models.qwen2, "targets.padding_counted", "targets")
def labels_are_a_copy_of_the_padded_inputs(training: Training) -> None:
    training.changed(lambda batch: {**batch, "labels": batch["input_ids"].clone()})


@mistake(models.opt, "targets.permuted", "targets")
def labels_are_shuffled_apart(training: Training) -> None:
    training.changed(lambda batch: {**batch, "labels": batch["labels"][torch.randperm(ROWS)]})


@mistake(models.bert, "targets.all_ignored", "targets")
def nothing_is_chosen_to_be_predicted(training: Training) -> None:
    training.changed(lambda batch: {**batch, "labels": torch.full_like(batch["labels"], -100)})


@mistake(models.t5, "targets.not_shifted", "targets")
@mistake(models.bart, "targets.not_shifted", "targets")
@mistake(models.whisper, "targets.not_shifted", "targets")
def the_decoder_is_given_its_labels(training: Training) -> None:
    training.changed(lambda batch: {**batch, "decoder_input_ids": batch["labels"].clamp_min(PAD)})


@mistake(plain.translator, "targets.not_shifted", "targets")
def the_target_is_not_shifted(training: Training) -> None:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        target = batch["target"][:, 1:]
        return F.cross_entropy(model(batch["source"], target).reshape(-1, V), target.reshape(-1), ignore_index=PAD)

    training.loss = loss


@mistake(plain.lstm, "targets.not_shifted", "targets")
def the_text_is_its_own_target(training: Training) -> None:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch["tokens"]).reshape(-1, V), batch["tokens"].reshape(-1))

    training.loss = loss


@mistake(models.vit, "loss.softmax_twice", "loss")
def cross_entropy_is_given_probabilities(training: Training) -> None:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(pixel_values=batch["pixel_values"]).logits.softmax(-1), batch["labels"])

    training.loss = loss


@mistake(plain.resnet, "loss.softmax_twice", "loss")
def the_network_ends_in_a_softmax(training: Training) -> None:
    training.model = nn.Sequential(training.model, nn.Softmax(dim=1))


# ---------------------------------------------------------------- masks


@mistake(models.gpt_neox, "mask.future_leak", "gpt_neox.layers.0.attention")
def attention_is_told_that_it_is_not_causal(training: Training) -> None:
    for layer in training.model.get_submodule("gpt_neox.layers").children():
        attention: Any = layer.get_submodule("attention")
        attention.is_causal = False


@mistake(models.llama, "mask.future_leak", "model.layers.0.self_attn")
def a_mask_of_four_dimensions_hides_no_later_token(training: Training) -> None:
    training.changed(lambda batch: {**batch, "attention_mask": torch.ones(ROWS, 1, T, T, dtype=torch.bool)})


@mistake(models.gemma2, "mask.future_leak", "model.layers.1.self_attn")
def one_layer_is_patched_and_loses_its_mask(training: Training) -> None:
    attention = training.model.get_submodule("model.layers.1.self_attn")
    made = attention.forward

    def forward(*args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        return made(*args, attention_mask=torch.zeros(1, 1, T, T), **kwargs)

    attention.forward = forward


@mistake(models.qwen3, "numerics.nonfinite", "model.layers.0.self_attn.o_proj.out")
def padding_on_the_left_leaves_rows_of_minus_infinity(training: Training) -> None:
    training.model.set_attn_implementation("eager")  # type: ignore[operator]

    def turned(batch: Batch) -> Batch:
        ids, mask, labels = (batch[name].flip(1) for name in ("input_ids", "attention_mask", "labels"))
        seen = mask[:, None, None].bool() & torch.ones(T, T, dtype=torch.bool).tril()
        added = torch.zeros(seen.shape).masked_fill(~seen, -math.inf)
        return {"input_ids": ids, "attention_mask": added, "labels": labels}

    training.changed(turned)


@mistake(plain.translator, "mask.told_future", "transformer.decoder.layers.0.self_attn")
def the_mask_of_the_target_is_left_out(training: Training) -> None:
    transformer = training.model.get_submodule("transformer")
    made = transformer.forward

    def forward(source: Tensor, target: Tensor, tgt_mask: Any = None, **masks: Any) -> Any:
        return made(source, target, **masks)

    transformer.forward = forward


# ---------------------------------------------------------------- weights


@mistake(models.gpt2, "init.too_large", "transformer.h.0.attn.c_attn")
@mistake(models.mistral, "init.too_large", "model.layers.0.self_attn.q_proj")
def the_initialiser_range_is_1(training: Training) -> None:
    kind = type(training.model)
    config: Any = training.model.config
    config.initializer_range = 1.0
    training.model = kind(config)


@mistake(models.gemma2, "weights.untied", "lm_head")
@mistake(models.bert, "weights.untied", "cls.predictions.decoder")
def the_head_is_a_copy_of_the_table(training: Training) -> None:
    head: Any = training.model.get_output_embeddings()  # type: ignore[operator]
    head.weight = nn.Parameter(head.weight.detach().clone())


@mistake(models.t5, "loop.detached", "encoder.final_layer_norm")
@mistake(models.whisper, "loop.detached", "model.encoder.layer_norm")
def the_encoder_is_detached(training: Training) -> None:
    encoder = training.model.get_encoder()  # type: ignore[operator]
    after(encoder, lambda output: type(output)(last_hidden_state=output.last_hidden_state.detach()))


@mistake(models.opt, "loop.detached", "model.decoder.layers.0")
def the_hidden_state_is_detached_on_its_way(training: Training) -> None:
    after(
        training.model.get_submodule("model.decoder.layers.0"),
        lambda output: (output[0].detach(), *output[1:]) if isinstance(output, tuple) else output.detach(),
    )


@mistake(models.lora, "tuning.base_not_frozen", "base_model.model.model.layers.0.self_attn.q_proj")
def everything_is_unfrozen_after_the_adapters_are_added(training: Training) -> None:
    training.model.requires_grad_(requires_grad=True)


@mistake(models.lora, "tuning.adapter_dead", "base_model.model.model.layers.0.self_attn.q_proj")
def the_other_factor_is_frozen(training: Training) -> None:
    for name, p in training.model.named_parameters():
        if "lora_B" in name:
            p.requires_grad = False


@mistake(models.lora, "tuning.adapter_dead", "base_model.model.model.layers.0.self_attn.q_proj")
def both_factors_are_set_to_0(training: Training) -> None:
    for name, p in training.model.named_parameters():
        if "lora_A" in name:
            nn.init.zeros_(p)


# ---------------------------------------------------------------- what the optimiser holds


@mistake(models.qwen2, "optimizer.missing_parameter", "model.layers.1.input_layernorm.weight")
def a_layer_is_left_out_of_the_optimiser(training: Training) -> None:
    training.params = without(".layers.1.")


@mistake(models.mamba, "optimizer.missing_parameter", "backbone.layers.0.mixer.A_log")
def what_must_not_decay_gets_no_group(training: Training) -> None:
    training.params = without("A_log", ".D")


@mistake(models.mixtral, "optimizer.missing_parameter", "model.layers.0.mlp.gate.weight")
def the_router_is_left_out_of_the_optimiser(training: Training) -> None:
    training.params = without("gate.weight")


@mistake(models.roberta, "optimizer.missing_parameter", "classifier.dense.weight")
def the_new_head_is_left_out_of_the_optimiser(training: Training) -> None:
    training.params = lambda model: model.get_submodule("roberta").parameters()


@mistake(models.electra, "optimizer.missing_parameter", "electra.embeddings.LayerNorm.weight")
def the_group_without_decay_is_forgotten(training: Training) -> None:
    training.params = without("bias", "LayerNorm")


@mistake(models.clip, "optimizer.missing_parameter", "logit_scale")
def the_scale_is_left_out_of_the_optimiser(training: Training) -> None:
    training.params = without("logit_scale")


@mistake(
    models.lora, "optimizer.missing_parameter", "base_model.model.model.layers.1.self_attn.q_proj.lora_B.default.weight"
)
def the_adapters_of_one_layer_are_left_out(training: Training) -> None:
    training.params = lambda model: [p for p in without(".layers.1.")(model) if p.requires_grad]


# ---------------------------------------------------------------- the loop


@mistake(models.wav2vec2, "loop.no_zero_grad", "loop")
@mistake(models.gpt2, "loop.no_zero_grad", "loop")
def gradients_are_never_cleared(training: Training) -> None:
    training.clears = False


@mistake(models.gpt2, "loop.evaluation_mode", "loop")
@mistake(plain.resnet, "loop.evaluation_mode", "loop")
def the_model_stays_in_evaluation_mode(training: Training) -> None:
    def before(step: int) -> None:
        if step == 8:
            training.model.eval()

    training.before = before


@mistake(models.whisper, "clip.ineffective", "clipping")
def gradients_are_clipped_after_the_update(training: Training) -> None:
    training.clips_late = True


@mistake(models.distilbert, "evaluation.dropout", "pre_classifier")
def dropout_is_not_told_of_the_mode(training: Training) -> None:
    after(training.model.get_submodule("pre_classifier"), lambda output: F.dropout(output, 0.2))


# ---------------------------------------------------------------- the test


@pytest.mark.parametrize("made", MISTAKES, ids=lambda made: made.name)
def test_a_mistake_is_named(tmp_path: Path, made: Mistake) -> None:
    _, diagnosis = train(made.make, tmp_path / "run", change=made.change)
    assert diagnosis is not None
    found = [(cause.id, cause.at) for cause in diagnosis.causes]
    assert found == [(made.cause, made.at)], found
    assert diagnosis.unexplained == (), [(s.id, s.at) for s in diagnosis.unexplained]


def test_every_model_has_a_mistake() -> None:
    without_one = {*models.MODELS, *plain.MODELS} - {made.make for made in MISTAKES}
    assert without_one == {models.mistral_eager}  # the same model as another
