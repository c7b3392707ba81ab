"""What `lab exec` costs on a model of another library, beside what other tools for the same purpose cost.

    pip install transformers wandb
    python benchmarks/attach.py                  # both sizes
    python benchmarks/attach.py --steps 60       # quicker, noisier
    python benchmarks/attach.py --steps 1000 --tool "lab exec"    # what a longer training pays in all

Each tool watches a model of its own, from the same seed; all are trained in one process, a step of each in turn.
Printed are ratios to the steps of a model that nobody watches. `a step`: the median over steps; `all steps`: the sum of
all, with whatever a tool does now and then (experiments, histograms). A tool that can look at every step, as `lab exec`
does, is measured so first, and then at the cadence at which it is used. Below each table stands which of them all steps
of `lab exec` cost less than.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import history
import torch

from lab.attach.intercept import Calls
from lab.attach.watch import Watch
from lab.manager import discover

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Tool = Callable[[Any, Any, Path], Any]

SIZES = {"6 layers x 256": (6, 256, 8), "4 layers x 64": (4, 64, 4)}
CONTEXT, BATCH, VOCABULARY, EVERY = 128, 8, 512, 10
Around = contextlib.AbstractContextManager[Any]


def make(size: str) -> tuple[Any, torch.optim.Optimizer]:
    """Return a GPT-2 of Hugging Face, with its own defaults but for its size, and AdamW."""
    from transformers import GPT2Config, GPT2LMHeadModel

    layers, width, heads = SIZES[size]
    torch.manual_seed(0)
    config = GPT2Config(n_layer=layers, n_embd=width, n_head=heads, n_positions=CONTEXT, vocab_size=VOCABULARY)
    model = GPT2LMHeadModel(config)
    model.train()
    return model, torch.optim.AdamW(model.parameters(), lr=3e-4)


# ---------------------------------------------------------------- the tools; each gives what stands around a step


def nobody(_model: Any, _optimizer: Any, _folder: Path) -> Callable[[], Around]:
    """No tool."""
    return contextlib.nullcontext


def lab_exec(model: Any, optimizer: Any, folder: Path) -> Callable[[], Around]:
    """What ``lab exec`` puts around a model, with its defaults."""
    calls = Calls()
    calls.__enter__()
    watch = Watch(model, optimizer, folder / "run", (), discover(), EVERY, calls=calls)
    watch.__enter__()

    @contextlib.contextmanager
    def mine() -> Iterator[None]:
        calls.listener = watch  # the other models of this process are not in its script
        yield
        calls.listener = None

    return mine


def wandb_watch(every: int) -> Tool:
    """``wandb.watch(log="all")`` with histograms of weights and gradients, written offline."""

    def start(model: Any, _optimizer: Any, folder: Path) -> Callable[[], Around]:
        os.environ |= {"WANDB_MODE": "offline", "WANDB_DIR": str(folder), "WANDB_SILENT": "true"}
        import wandb

        run = wandb.init(project="overhead", dir=str(folder), reinit="create_new")
        run.watch(model, log="all", log_freq=every)
        count = 0

        @contextlib.contextmanager
        def log() -> Iterator[None]:
            nonlocal count
            wandb.run = run  # its hooks write to whatever run is the newest, and this process has two
            yield
            count += 1
            run.log({"step": count})

        return log

    return start


def underflow(model: Any, _optimizer: Any, _folder: Path) -> Callable[[], Around]:
    """DebugUnderflowOverflow of transformers."""
    from transformers.debug_utils import DebugUnderflowOverflow

    model.debugged_by = DebugUnderflowOverflow(model)
    return contextlib.nullcontext


def anomaly(_model: Any, _optimizer: Any, _folder: Path) -> Callable[[], Around]:
    """torch.autograd.detect_anomaly."""
    import warnings

    warnings.filterwarnings("ignore", message="Anomaly Detection")
    return torch.autograd.detect_anomaly


def histograms(every: int) -> Tool:
    """Histograms of each weight and gradient for TensorBoard."""

    def start(model: Any, _optimizer: Any, folder: Path) -> Callable[[], Around]:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / "events"))
        count = 0

        @contextlib.contextmanager
        def write() -> Iterator[None]:
            nonlocal count
            yield
            if count % every == 0:
                for name, p in model.named_parameters():
                    writer.add_histogram(f"weights/{name}", p, count)
                    writer.add_histogram(f"gradients/{name}", p.grad, count)
            count += 1

        return write

    return start


LAB = "lab exec"
# By name, when it looks, and the tool.
TOOLS: dict[str, tuple[str, Tool]] = {
    "nobody": ("", nobody),
    LAB: ("each step; experiments at 0, 10, 20, 30, ...", lab_exec),
    "wandb.watch": ("each step", wandb_watch(1)),
    "TensorBoard histograms": ("each step", histograms(1)),
    "DebugUnderflowOverflow": ("each step", underflow),
    "detect_anomaly": ("each step", anomaly),
    "wandb.watch, 10th": ("each 10th", wandb_watch(EVERY)),
    "TensorBoard histograms, 10th": ("each 10th", histograms(EVERY)),
    "wandb.watch, 1000th": ("each 1000th, its default", wandb_watch(1000)),
}


def measure(size: str, steps: int, tools: dict[str, Tool]) -> dict[str, list[float]]:
    """Return the seconds of each step, by tool."""
    seconds: dict[str, list[float]] = {name: [] for name in tools}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        watched = {}
        for i, (name, tool) in enumerate(tools.items()):
            model, optimizer = make(size)
            place = Path(folder) / str(i)
            place.mkdir()
            watched[name] = (model, optimizer, tool(model, optimizer, place))
        order = list(watched)
        for index in range(steps):
            tokens = (torch.randint(VOCABULARY, (BATCH, 1)) + torch.arange(CONTEXT)) % VOCABULARY
            gc.collect()
            for name in order[index % len(order) :] + order[: index % len(order)]:
                model, optimizer, around = watched[name]
                start = time.perf_counter()
                with around():
                    loss = model(input_ids=tokens, labels=tokens).loss
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                seconds[name].append(time.perf_counter() - start)
    return seconds


def table(seconds: dict[str, list[float]]) -> list[str]:
    """Return the lines that say what each tool costs, and which of them ``lab exec`` is ahead of."""
    plain = seconds["nobody"]
    lines, cost = [f"{'':30}{'looks at':46}{'a step':>9}{'all steps':>11}"], {}
    for name, each in seconds.items():
        if name != "nobody":
            middle = statistics.median(a / b for a, b in zip(each, plain, strict=True))
            cost[name] = sum(each) / sum(plain)
            lines.append(f"{name:30}{TOOLS[name][0]:46}{middle:8.3f}x{cost[name]:10.3f}x")
    if LAB in cost and len(cost) > 1:
        dearer = [name for name in cost if cost[name] > cost[LAB]]
        cheaper = [name for name in cost if cost[name] < cost[LAB]]
        ahead, behind = ("; ".join(names) or "none" for names in (dearer, cheaper))
        lines.append(f"{LAB} is ahead of: {ahead}. Not of: {behind}.")
    return lines


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--size", choices=SIZES, action="append")
    parser.add_argument("--tool", choices=[name for name in TOOLS if name != "nobody"], action="append")
    given = parser.parse_args()
    tools = {name: tool for name, (_, tool) in TOOLS.items() if not given.tool or name in ("nobody", *given.tool)}
    for size in given.size or SIZES:
        seconds = measure(size, given.steps, tools)
        print(f"\nGPT-2 of transformers, {size}, {BATCH} x {CONTEXT} tokens, {given.steps} steps")
        print("\n".join(table(seconds)), flush=True)
        plain, found = seconds["nobody"], {}
        for name, each in seconds.items():
            if name != "nobody":
                found[f"{name}, every step"] = history.figure([a / b for a, b in zip(each, plain, strict=True)])
                found[f"{name}, all steps"] = history.single(sum(each) / sum(plain))
        history.append("attach", {"size": size, "steps": given.steps}, found)


if __name__ == "__main__":
    main()
