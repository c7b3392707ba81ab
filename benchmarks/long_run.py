"""A long training, watched with the default cadence: what is kept of it on disk and in memory, and what it costs.

    python benchmarks/long_run.py --steps 100000

Prints a line for each tenth of the run: the size of the run folder, the memory of the process beyond that at the first
line, and the time of a step, against the same training unwatched in alternating stretches.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import psutil
import torch
from torch import nn
from torch.nn import functional as F

import lab


class Language(nn.Module):
    """A transformer language model small enough for many steps: 2 layers, width 32."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(40, 32), nn.Embedding(16, 32)
        layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 40)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(16), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:  # [B T] -> [B T V]
        """Return the logits of the next tokens."""
        x = self.embed(tokens) + self.places.weight
        logits: torch.Tensor = self.head(self.body(x, mask=self.mask, is_causal=True))
        return logits


def training() -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a model and what trains it."""
    torch.manual_seed(0)
    model = Language()
    return model, torch.optim.AdamW(model.parameters(), lr=3e-4)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One step on a new batch."""
    tokens = (torch.randint(40, (4, 1)) + torch.arange(17) * torch.randint(1, 4, (4, 1))) % 40
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def main() -> None:
    """Train, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    steps: int = parser.parse_args().steps
    alone, other = training()
    model, optimizer = training()
    process, tenth = psutil.Process(), max(1, steps // 10)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        print(f"{'steps':>8}  {'disk MB':>8}  {'memory MB':>10}  {'ms a step':>10}  {'unwatched':>10}")
        with lab.watch(model, optimizer, out=run) as watching:
            for _ in range(50):
                step(model, optimizer)
            begin = process.memory_info().rss
            for done in range(50 + tenth, steps + 1, tenth):
                start = time.perf_counter()
                for _ in range(tenth):
                    step(model, optimizer)
                watched = (time.perf_counter() - start) / tenth
                start = time.perf_counter()
                for _ in range(max(20, tenth // 20)):
                    step(alone, other)
                plain = (time.perf_counter() - start) / max(20, tenth // 20)
                disk = sum(path.stat().st_size for path in run.rglob("*") if path.is_file()) / 2**20
                memory = (process.memory_info().rss - begin) / 2**20
                print(f"{done:8}  {disk:8.1f}  {memory:10.1f}  {1e3 * watched:10.2f}  {1e3 * plain:10.2f}", flush=True)
        start = time.perf_counter()
        lab.load(run)
        print(f"verdict {watching.diagnosis.verdict}; the folder is read again in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
