"""How much of a training step a profile can place, and what timing by place costs.

    python benchmarks/places.py
    python benchmarks/places.py --steps 40

Equal models as in throughput.py, the lab's own and others': for each the share of a timed step that is at a module, the
loss or the optimiser (the rest is Python between them), and a timed step over a plain one, by the median of pairs of
steps in turn; and the FLOPs that were counted over those of theory, which is 1 or a bug.
"""

from __future__ import annotations

import importlib.util
import time
from typing import TYPE_CHECKING, Any

import history
import throughput
import torch

from lab.profiling.counting import Clock, Counter
from lab.profiling.memory import Ledger
from lab.profiling.places import LOOP, Places
from lab.projects.decoder.component import Decoder

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

SKIPPED = 3  # steps at the beginning
SIZES = {"4 layers x 64": (4, 64, 4), "6 layers x 256": (6, 256, 8)}


def models(layers: int, width: int, heads: int) -> dict[str, tuple[nn.Module, Callable[[Any], Tensor]]]:
    """The lab's decoder, and GPT-2 of Hugging Face where that is installed, each with how to take its logits."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"context": throughput.CONTEXT, "layers": layers, "width": width, "heads": heads}
    found: dict[str, Any] = {"lab": (Decoder(throughput.VOCABULARY, **shape, tied=True), lambda out: out)}
    if importlib.util.find_spec("transformers"):
        found["GPT-2"] = throughput.hugging_face(layers, width, heads, "gelu"), lambda out: out.logits
    return found


def measure(model: nn.Module, step: Callable[[Tensor], None], steps: int) -> tuple[list[float], list[float]]:
    """The share that is placed, and a timed step over a plain one, for each pair of steps."""
    placed, ratios = [], []
    with Places(model) as places:
        for index in range(steps + SKIPPED):
            tokens = throughput.batch(index)
            begun = time.perf_counter()
            step(tokens)
            plain = time.perf_counter() - begun
            clock = Clock(torch.device("cpu"))
            places.follow(clock)
            clock.restart()
            step(tokens)
            clock.stop()
            places.rest()
            placed.append(1 - clock.spent[LOOP] / clock.total)
            ratios.append(clock.total / plain)
    return placed[SKIPPED:], ratios[SKIPPED:]


def flops(model: nn.Module, step: Callable[[Tensor], None]) -> int:
    """FLOPs that are counted in a step."""
    counter = Counter(Ledger(model, torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])))
    with Places(model) as places, counter:
        places.follow(counter)
        step(throughput.batch(0))
    return sum(cost.flops for cost in counter.costs.values())


def theory(layers: int, width: int) -> int:
    """Forward, and twice that backward: the matrices of the blocks, attention, and the head."""
    rows, length = throughput.BATCH, throughput.CONTEXT
    positions = rows * length
    block = 24 * positions * width**2 + 4 * rows * length**2 * width
    return 3 * (layers * block + 2 * positions * width * throughput.VOCABULARY)


def main() -> None:
    """Print, and keep."""
    parser = history.parser(__doc__)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    for size, (layers, width, heads) in SIZES.items():
        figures = {}
        for name, (model, logits) in models(layers, width, heads).items():
            step = throughput.stepper(model, logits, throughput.plain_loss)
            placed, ratios = measure(model, step, options.steps)
            figures[f"{name}: placed"] = history.figure(placed)
            figures[f"{name}: timed over plain"] = history.figure(ratios)
            figures[f"{name}: FLOPs over theory"] = history.figure([flops(model, step) / theory(layers, width)])
        history.tell("places", {"steps": options.steps, "size": size}, figures)


if __name__ == "__main__":
    main()
