"""The twenty projects: what a learner builds, in order, from a linear layer to distributed training.

Each has a folder here as soon as its component is built. This module imports none of them: it is the list.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Project:
    """One of the twenty things to build."""

    number: int
    id: str
    title: str
    builds: str

    @property
    def folder(self) -> Path:
        """Where it is kept; the name is an import name."""
        return Path(__file__).parent / self.id.replace("-", "_")

    @property
    def module(self) -> str:
        """The package it is: ``lab.projects.kv_cache``."""
        return f"lab.projects.{self.folder.name}"

    @property
    def built(self) -> bool:
        """Whether its component is built."""
        return (self.folder / "component.py").is_file()

    @property
    def ready(self) -> bool:
        """Whether it is complete: a component, and the spec that any implementation must pass."""
        return all((self.folder / name).is_file() for name in ("component.py", "spec.py", "measures.py", "maths.md"))


PROJECTS: tuple[Project, ...] = (
    Project(1, "linear", "Linear layers", "Linear, initialisers"),
    Project(2, "activations", "Activations", "ReLU, GELU, SiLU, SwiGLU"),
    Project(3, "losses", "Losses", "log-softmax, cross-entropy, label smoothing, mean squared error"),
    Project(4, "backprop", "Backpropagation", "reverse-mode autodiff, SGD, Adam, AdamW, schedules, clipping"),
    Project(5, "convolution", "Convolution", "causal Conv1d mixer, Conv2d"),
    Project(6, "recurrent", "Recurrent networks", "RNN, GRU, LSTM"),
    Project(7, "attention", "Attention", "scaled dot product, causal mask"),
    Project(8, "multihead", "Multi-head attention", "split, merge, output projection, grouped queries"),
    Project(9, "encoder", "Encoder", "bidirectional block, padding mask"),
    Project(10, "decoder", "Decoder", "causal and cross-attention, teacher forcing"),
    Project(11, "positions", "Positions", "learned, sinusoidal, RoPE, ALiBi"),
    Project(12, "normalisation", "Normalisation", "LayerNorm, RMSNorm, pre and post"),
    Project(13, "residuals", "Residual stream", "residual stream, depth scaling"),
    Project(14, "kv-cache", "Key-value cache", "cache, incremental decoding, sampling"),
    Project(15, "quantization", "Quantization", "int8, int4, per tensor, per row, groups"),
    Project(16, "pretraining", "Pretraining", "byte-level BPE, batching, schedule, checkpoint and resume, evaluation"),
    Project(17, "fine-tuning", "Fine-tuning", "SFT masking, LoRA, freezing, accumulation"),
    Project(18, "alignment", "Alignment", "reward model, DPO, GRPO"),
    Project(19, "parallel", "Parallel computation", "tiled attention, tensor parallel, mixed precision, checkpointing"),
    Project(20, "distributed", "Distributed training", "data parallel, sharded optimiser, accumulation under sync"),
)
