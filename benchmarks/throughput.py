"""The runtime against others: training steps of equal models with the same optimiser, alternating in one process.

    pip install transformers                      # without it that column is left out
    python benchmarks/throughput.py               # ratios of the medians: below 1 the lab is faster
    python benchmarks/throughput.py --steps 60    # more steps, less noise

Prints ratios, not times: the machine may be busy. All have the same layers, widths, heads, learned positions, norms
before the branches, GELU and a tied head, no dropout, and torch's own fused AdamW; nobody is listening. GPT-2 stands
there twice: with the exact GELU of the others, and with its own default, the tanh form, which the lab then has too.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab.projects.decoder.component import Decoder
from lab.projects.losses.component import cross_entropy
from lab.projects.residuals.component import Choices

if TYPE_CHECKING:
    from collections.abc import Callable

SIZES = {"4 layers x 128": (4, 128, 4), "6 layers x 256": (6, 256, 8), "12 layers x 384": (12, 384, 6)}
VOCABULARY, CONTEXT, BATCH = 512, 128, 8


class PlainEncoder(nn.Module):
    """A language model around `nn.TransformerEncoder`, as one would write it by hand."""

    def __init__(self, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(CONTEXT, width)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:  # [B T] -> [B T V]
        """Logits."""
        places = torch.arange(tokens.shape[-1], device=tokens.device)
        x = self.tokens(tokens) + self.positions(places)  # [B T C]
        logits: Tensor = self.head(self.encoder(x, mask=self.mask, is_causal=True))
        return logits


def hugging_face(layers: int, width: int, heads: int, activation: str) -> nn.Module:
    """Return GPT-2 of this size, without dropout, with its fused attention."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        activation_function=activation,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    model: nn.Module = GPT2LMHeadModel(config)
    return model


def stepper(model: nn.Module, logits: Callable[[Any], Tensor], loss: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """Return a training step of this model."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(tokens: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(logits(model(tokens[:, :-1])), tokens[:, 1:]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def plain_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy by torch."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def compare(size: tuple[int, int, int], steps: int) -> dict[str, float]:
    """Alternate the steps of all; return the lab's time as a share of each other's, by the medians of pairs."""
    layers, width, heads = size
    torch.manual_seed(0)
    same: Callable[[Any], Tensor] = lambda out: out  # noqa: E731 - beside its sibling in the table below
    ours = {
        activation: stepper(
            Decoder(
                VOCABULARY,
                context=CONTEXT,
                layers=layers,
                width=width,
                heads=heads,
                tied=True,
                choices=Choices(activation=activation),
            ),
            same,
            cross_entropy,
        )
        for activation in ("gelu", "gelu-tanh")
    }
    # Name of another to its step, and which of ours it is compared with.
    others = {"nn.TransformerEncoder": (stepper(PlainEncoder(*size), same, plain_loss), "gelu")}
    if importlib.util.find_spec("transformers"):
        for form, activation in (("gelu", "gelu"), ("gelu_new", "gelu-tanh")):
            step = stepper(hugging_face(*size, form), lambda out: out.logits, plain_loss)
            others[f"GPT-2, {form}"] = (step, activation)
    steppers = {**ours, **{name: step for name, (step, _) in others.items()}}
    times: dict[str, list[float]] = {name: [] for name in steppers}
    for index in range(steps + 3):
        tokens = torch.randint(VOCABULARY, (BATCH, CONTEXT + 1), generator=torch.Generator().manual_seed(index))
        for name, step in steppers.items():
            begun = time.perf_counter()
            step(tokens)
            times[name].append(time.perf_counter() - begun)
    pairs = {name: zip(times[own][3:], times[name][3:], strict=True) for name, (_, own) in others.items()}
    return {name: statistics.median(mine / theirs for mine, theirs in pair) for name, pair in pairs.items()}


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {threads} threads, batch {BATCH} x {CONTEXT}, {options.steps} steps", flush=True)
    for name, size in SIZES.items():
        figures = compare(size, options.steps)
        print(f"{name:>16}: " + "  ".join(f"{other} {ratio:.2f}x" for other, ratio in figures.items()), flush=True)


if __name__ == "__main__":
    main()
