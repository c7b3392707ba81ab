"""The runtime against others: training steps of equal models with the same optimiser, alternating in one process.

    pip install transformers                      # without it that column is left out
    python benchmarks/throughput.py               # ratios of the medians: below 1 the lab is faster
    python benchmarks/throughput.py --steps 60    # more steps, less noise
    python benchmarks/throughput.py --shares      # what share of each one's step goes where

Prints ratios, not times: the machine may be busy. All have the same layers, widths, heads, learned positions, norms
before the branches, GELU and a tied head, no dropout, and torch's own fused AdamW; nobody is listening. GPT-2 stands
there twice: with the exact GELU of the others, and with its own default, the tanh form, which the lab then has too.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from typing import TYPE_CHECKING, Any

import history
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab.projects.decoder.component import Decoder
from lab.projects.losses.component import cross_entropy
from lab.projects.residuals.component import Choices

if TYPE_CHECKING:
    from collections.abc import Callable

SIZES = {"4 layers x 128": (4, 128, 4), "6 layers x 256": (6, 256, 8), "12 layers x 384": (12, 384, 6)}
# The budgets of DESIGN.md.
BUDGETS = {"nn.TransformerEncoder": 0.93, "GPT-2, gelu": 0.85, "GPT-2, gelu_new": 0.85}
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


def models(size: tuple[int, int, int]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the step of each model by name, and for each of the others which of ours it is compared with."""
    layers, width, heads = size
    torch.manual_seed(0)
    same: Callable[[Any], Tensor] = lambda out: out  # noqa: E731 - beside its sibling below
    steps, against = {}, {}
    for activation in ("gelu", "gelu-tanh"):
        shape = {"context": CONTEXT, "layers": layers, "width": width, "heads": heads}
        ours = Decoder(VOCABULARY, **shape, tied=True, choices=Choices(activation=activation))
        steps[f"lab, {activation}"] = stepper(ours, same, cross_entropy)
    steps["nn.TransformerEncoder"] = stepper(PlainEncoder(*size), same, plain_loss)
    against["nn.TransformerEncoder"] = "lab, gelu"
    if importlib.util.find_spec("transformers"):
        for form, activation in (("gelu", "gelu"), ("gelu_new", "gelu-tanh")):
            name = f"GPT-2, {form}"
            steps[name] = stepper(hugging_face(*size, form), lambda out: out.logits, plain_loss)
            against[name] = f"lab, {activation}"
    return steps, against


def batch(index: int) -> Tensor:
    """Random tokens [B T+1]."""
    return torch.randint(VOCABULARY, (BATCH, CONTEXT + 1), generator=torch.Generator().manual_seed(index))


def compare(size: tuple[int, int, int], steps: int) -> dict[str, history.Figure]:
    """Alternate the steps of all; return the lab's time as a share of each other's, by the medians of pairs."""
    steppers, against = models(size)
    times: dict[str, list[float]] = {name: [] for name in steppers}
    for index in range(steps + 3):
        for name, step in steppers.items():
            begun = time.perf_counter()
            step(batch(index))
            times[name].append(time.perf_counter() - begun)
    pairs = {name: zip(times[own][3:], times[name][3:], strict=True) for name, own in against.items()}
    return {
        name: history.figure([mine / theirs for mine, theirs in pair], BUDGETS[name]) for name, pair in pairs.items()
    }


KINDS = {"products": ("mm",), "attention": ("scaled_dot_product",), "optimiser": ("adamw",), "GELU": ("gelu",)}


def shares(size: tuple[int, int, int], steps: int) -> dict[str, dict[str, float]]:
    """Return by model which share of the operators' own time each kind of them takes.

    Products, attention and optimiser are the same work in all: what they take bounds what can be gained.
    """
    found = {}
    for name, step in models(size)[0].items():
        step(batch(0))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            for index in range(steps):
                step(batch(index))
        operators = [(event.key, event.self_cpu_time_total) for event in profile.key_averages()]
        total = sum(spent for _, spent in operators)
        found[name] = {
            kind: sum(spent for key, spent in operators if any(part in key for part in parts)) / total
            for kind, parts in KINDS.items()
        }
    return found


def main() -> None:
    """Print the ratios, or the shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--shares", action="store_true", help="profile in place of comparing")
    options = parser.parse_args()
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {threads} threads, batch {BATCH} x {CONTEXT}, {options.steps} steps", flush=True)
    for name, size in SIZES.items():
        if options.shares:
            for model, kinds in shares(size, min(options.steps, 5)).items():
                said = "  ".join(f"{kind} {share:.0%}" for kind, share in kinds.items())
                print(f"{name:>16}: {model:<22} {said}", flush=True)
            continue
        figures = {f"{name}: {other}": figure for other, figure in compare(size, options.steps).items()}
        history.tell("throughput", {"steps": options.steps, "size": name}, figures)


if __name__ == "__main__":
    main()
