"""Models of `transformers` and `peft`, small and random, each with data and a loop that are right."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import transformers
from third_party_loop import (
    END,
    FIRST,
    PAD,
    START,
    C,
    T,
    Training,
    V,
    captions,
    classes,
    hidden_tokens,
    images,
    next_tokens,
    next_tokens_padded,
    speech,
    tags,
    trainable,
    turned_round,
    waves,
)

if TYPE_CHECKING:
    from collections.abc import Callable

SPECIAL: dict[str, Any] = {"pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END}
SIZE: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": C,
    "intermediate_size": 2 * C,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": V,  # as many as tokens: two tables of one shape
    **SPECIAL,
}
SEEN: dict[str, Any] = {"hidden_size": C, "intermediate_size": 2 * C, "num_hidden_layers": 2, "num_attention_heads": 4}
# An encoder and a decoder, as those that come from fairseq name their sizes.
BOTH: dict[str, Any] = {
    "vocab_size": V,
    "d_model": C,
    **{
        f"{part}_{name}": value
        for part in ("encoder", "decoder")
        for name, value in (("layers", 2), ("ffn_dim", 2 * C))
    },
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "decoder_start_token_id": START,
    **SPECIAL,
}

# ---------------------------------------------------------------- decoders


def gpt2(**config: Any) -> Training:
    sizes = {"vocab_size": V, "n_positions": T, "n_embd": C, "n_layer": 2, "n_head": 4, **SPECIAL}
    return Training(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **config)), next_tokens)


def gpt2_padded() -> Training:
    training = gpt2()
    training.batch = next_tokens_padded
    return training


def gpt_neox() -> Training:
    return Training(transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZE)), next_tokens)


def opt() -> Training:
    sizes = {**SIZE, "ffn_dim": 2 * C, "word_embed_proj_dim": C}
    return Training(transformers.OPTForCausalLM(transformers.OPTConfig(**sizes)), next_tokens)


def llama() -> Training:
    config = transformers.LlamaConfig(**SIZE, num_key_value_heads=2)
    return Training(transformers.LlamaForCausalLM(config), next_tokens)


def mistral(**changes: Any) -> Training:
    config = transformers.MistralConfig(**SIZE, num_key_value_heads=2, sliding_window=8, **changes)
    return Training(transformers.MistralForCausalLM(config), next_tokens_padded)


def mistral_eager() -> Training:
    return mistral(attn_implementation="eager")


def gemma2() -> Training:
    config = transformers.Gemma2Config(**SIZE, num_key_value_heads=2, head_dim=8, sliding_window=8)
    return Training(transformers.Gemma2ForCausalLM(config), next_tokens)


def qwen2() -> Training:
    config = transformers.Qwen2Config(**SIZE, num_key_value_heads=2)
    return Training(transformers.Qwen2ForCausalLM(config), next_tokens_padded)


def qwen3() -> Training:
    config = transformers.Qwen3Config(**SIZE, num_key_value_heads=2, head_dim=8)
    return Training(transformers.Qwen3ForCausalLM(config), next_tokens_padded)


def mixtral() -> Training:
    config = transformers.MixtralConfig(
        **SIZE, num_key_value_heads=2, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.02
    )
    return Training(transformers.MixtralForCausalLM(config), next_tokens)


def mamba() -> Training:
    config = transformers.MambaConfig(vocab_size=V, hidden_size=C, num_hidden_layers=2, state_size=8, **SPECIAL)
    training = Training(transformers.MambaForCausalLM(config), next_tokens)
    training.changed(lambda batch: {name: batch[name] for name in ("input_ids", "labels")})
    return training


def lora() -> Training:
    peft: Any = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.05, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    return Training(peft.get_peft_model(llama().model, config), next_tokens, rate=2e-3, params=trainable)


# ---------------------------------------------------------------- encoders


def bert() -> Training:
    return Training(transformers.BertForMaskedLM(transformers.BertConfig(**SIZE)), hidden_tokens)


def roberta() -> Training:
    config = transformers.RobertaConfig(**SIZE, num_labels=2)
    return Training(transformers.RobertaForSequenceClassification(config), classes)


def distilbert() -> Training:
    sizes = {"vocab_size": V, "dim": C, "hidden_dim": 2 * C, "n_layers": 2, "n_heads": 4, "pad_token_id": PAD}
    config = transformers.DistilBertConfig(**sizes, max_position_embeddings=V, num_labels=2)
    return Training(transformers.DistilBertForSequenceClassification(config), classes)


def electra() -> Training:
    config = transformers.ElectraConfig(**SIZE, embedding_size=C, num_labels=3)
    return Training(transformers.ElectraForTokenClassification(config), tags)


def vit() -> Training:
    config = transformers.ViTConfig(**SEEN, image_size=16, patch_size=4, num_labels=4)
    return Training(transformers.ViTForImageClassification(config), images, rate=3e-3)


def wav2vec2() -> Training:
    config = transformers.Wav2Vec2Config(
        **SEEN,
        vocab_size=V,
        conv_dim=(16, 16),
        conv_stride=(5, 4),
        conv_kernel=(10, 8),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        num_labels=3,
        classifier_proj_size=16,
        mask_time_length=4,
    )
    return Training(transformers.Wav2Vec2ForSequenceClassification(config), waves)


def clip() -> Training:
    words = {**SEEN, **SPECIAL, "vocab_size": V, "max_position_embeddings": 16, "eos_token_id": V - 1}
    config = transformers.CLIPConfig(
        text_config=words, vision_config={**SEEN, "image_size": 16, "patch_size": 4}, projection_dim=16
    )
    return Training(transformers.CLIPModel(config), captions)


# ---------------------------------------------------------------- both


def t5() -> Training:
    config = transformers.T5Config(
        vocab_size=V,
        d_model=C,
        d_kv=8,
        d_ff=2 * C,
        num_layers=2,
        num_heads=4,
        pad_token_id=PAD,
        eos_token_id=END,
        decoder_start_token_id=PAD,
    )
    return Training(transformers.T5ForConditionalGeneration(config), turned_round)


def bart() -> Training:
    config = transformers.BartConfig(**BOTH, max_position_embeddings=V, forced_eos_token_id=END)
    return Training(transformers.BartForConditionalGeneration(config), turned_round)


def whisper() -> Training:
    config = transformers.WhisperConfig(
        **BOTH,
        num_mel_bins=16,
        max_source_positions=24,
        max_target_positions=FIRST + T,
        begin_suppress_tokens=None,
        suppress_tokens=None,
    )
    return Training(transformers.WhisperForConditionalGeneration(config), speech)


MODELS: tuple[Callable[[], Training], ...] = (
    gpt2,
    gpt2_padded,
    gpt_neox,
    opt,
    llama,
    mistral,
    mistral_eager,
    gemma2,
    qwen2,
    qwen3,
    mixtral,
    mamba,
    lora,
    bert,
    roberta,
    distilbert,
    electra,
    vit,
    wav2vec2,
    clip,
    t5,
    bart,
    whisper,
)
