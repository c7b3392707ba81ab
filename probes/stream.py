"""Does each block pass its input on? An experiment: with its matrices at 0, a Transformer block is the identity."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING

from lab import NotChecked, Probe, Symptom, probe, rule, torch
from lab import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import Tensor, nn

    from lab import Batch, History, Run, Step

ATTENTION = re.compile(r"attn|attention|mha", re.IGNORECASE)
ROUNDING = 1e-6
# The mean of two equal variances, sqrt(1/2), in each of three branches: the smallest factor that keeps a variance.
SMALLEST = 0.5**1.5
LOOKS = 3


@probe(
    "stream",
    title="Does each block add its branches to its input?",
    cost="forward and backward on one row",
    examines=True,
    seldom=True,
)
class Stream(Probe):
    """Sets the matrices of all blocks to 0 and differentiates what each block gives out by what it is given.

    Only blocks with an attention branch and another one are asked, which stand in a list of blocks. Records
    ``stream.carried``: the norm of what comes back, relative to what was sent (1 in a block that adds to its input, 0
    where no path leads around a branch); ``stream.factor``, the multiple of it that comes back; ``stream.rest``, what
    is no multiple of it. When a block carries nothing, the next experiment sets one branch after the other to 0:
    ``stream.branch_carried``.
    """

    def lab_examine(self, run: Run, step: Step) -> None:
        batch = step.batch
        if batch is None or batch.inputs is None:
            raise NotChecked("the batch is not known")
        blocks = dict(_blocks(run.model))
        if not blocks:
            raise NotChecked("no attention in this model: blocks without it may do without a path around a branch")
        rows = batch.rows(1)
        suspects = {
            name: block for name, block in blocks.items() if run.history.last("stream.carried", name) < ROUNDING
        }
        run.model.eval()  # dropout would let through another part of the stream each time
        with zeroed(_matrices(blocks.values())):
            for name, (sent, back) in _differentiate(run, rows, blocks).items():
                size = torch.linalg.vector_norm(sent)
                factor = (back * sent).sum() / size**2
                step.record("stream.carried", torch.linalg.vector_norm(back) / size, name)
                step.record("stream.factor", factor, name)
                step.record("stream.rest", torch.linalg.vector_norm(back - factor * sent) / size, name)
        for branch in sorted({name for block in suspects.values() for name, _ in _branches(block)}):
            here = {name: block for name, block in suspects.items() if hasattr(block, branch)}
            with zeroed(_matrices(getattr(block, branch) for block in here.values())):
                for name, (sent, back) in _differentiate(run, rows, here).items():
                    carried = torch.linalg.vector_norm(back) / torch.linalg.vector_norm(sent)
                    step.record("stream.branch_carried", carried, f"{name}.{branch}")


def _branches(block: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the children that hold a matrix."""
    return [(name, child) for name, child in block.named_children() if any(p.dim() >= 2 for p in child.parameters())]


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield what stands in a list and holds attention beside something else."""
    for path, parent in model.named_modules():
        if isinstance(parent, torch.nn.ModuleList):
            for index, block in parent.named_children():
                mixes = [bool(ATTENTION.search(f"{name} {type(m).__name__}")) for name, m in _branches(block)]
                if any(mixes) and not all(mixes):
                    yield f"{path}.{index}" if path else index, block


def _matrices(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    return (p for module in modules for p in module.parameters() if p.dim() >= 2)


@contextlib.contextmanager
def zeroed(parameters: Iterable[Tensor]) -> Iterator[None]:
    """These at 0 while in the block."""
    kept = [(p, p.detach().clone()) for p in {id(p): p for p in parameters}.values()]
    with torch.no_grad():
        for p, _ in kept:
            p.zero_()
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in kept:
                p.copy_(value)


def _differentiate(run: Run, batch: Batch, blocks: dict[str, nn.Module]) -> dict[str, tuple[Tensor, Tensor]]:
    """Send a direction back through each block alone; return by name what was sent and what came back."""
    inputs: dict[str, Tensor] = {}
    sent: dict[str, Tensor] = {}
    handles = []
    for name, block in blocks.items():
        handles.append(block.register_forward_pre_hook(_cut(inputs, name), with_kwargs=True))
        handles.append(block.register_forward_hook(_direct(sent, inputs, name)))
    try:
        with torch.enable_grad():
            run.call(batch)
            if not sent or not all(out.requires_grad for out in sent.values()):
                raise NotChecked("no block's output can be differentiated")
            directions = {name: _signs(out) for name, out in sent.items()}
            total = torch.stack([(out * directions[name]).sum() for name, out in sent.items()]).sum()
            # Not total.backward(): the parameters of several processes have hooks that add up their gradients.
            names = [name for name in inputs if name in sent]
            try:
                back = torch.autograd.grad(total, [inputs[name] for name in names], allow_unused=True)
            except RuntimeError as error:  # a block that is checkpointed the older way allows only backward()
                raise NotChecked("the blocks cannot be differentiated by their inputs") from error
    finally:
        for handle in handles:
            handle.remove()
    return {name: (directions[name], grad) for name, grad in zip(names, back, strict=True) if grad is not None}


def _signs(like: Tensor) -> Tensor:
    """A direction of mean 0 that no symmetry of the block cancels."""
    return (
        torch.cos(torch.arange(like.numel(), device=like.device, dtype=torch.float32)).view(like.shape).to(like.dtype)
    )


def _cut(inputs: dict[str, Tensor], name: str) -> Callable[..., object]:
    """Give a block a copy of its first floating-point input [R T C], from which no path leads to the block before."""

    def hook(_block: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        places = [*enumerate(args), *kwargs.items()]
        for place, value in places:
            if torch.is_tensor(value) and value.is_floating_point() and value.dim() == 3 and name not in inputs:
                inputs[name] = value.detach().clone().requires_grad_()
                args = tuple(inputs[name] if i == place else a for i, a in enumerate(args))
                return args, {key: inputs[name] if key == place else v for key, v in kwargs.items()}
        return None

    return hook


def _direct(sent: dict[str, Tensor], inputs: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(_block: nn.Module, _args: object, output: object) -> None:
        out = output[0] if isinstance(output, tuple) and output else output
        given = inputs.get(name)
        if torch.is_tensor(out) and given is not None and out.shape == given.shape and name not in sent:
            sent[name] = out

    return hook


def _carried(history: History, metric: str) -> Iterator[Symptom]:
    for name, series in history.each(metric):
        finite = series.finite
        if found := finite.first(finite.values < ROUNDING):
            step, seen = found
            what = "its matrices are" if metric == "stream.carried" else "the matrices of this branch alone are"
            text = f"{name}: when {what} 0, what the block gives out does not depend on what it is given"
            yield Symptom(at=name, since=step, seen=seen, expected="above 0", text=text)


@rule(
    "stream.blocked",
    title="Every block passes its input on beside its branches",
    reads=("stream.carried",),
    basis="experiment",
    phase="forward",
)
def stream_blocked(history: History) -> Iterator[Symptom]:
    """A block is ``x + f(x)``, before a norm or after it: with f at 0, its output still depends on x."""
    yield from _carried(history, "stream.carried")


@rule(
    "stream.branch",
    title="Every branch is added to the stream, in a block that does not pass its input on",
    reads=("stream.carried",),
    basis="experiment",
    phase="forward",
)
def stream_branch(history: History) -> Iterator[Symptom]:
    """Asked only of a block that carries nothing: of its branches, the one whose matrices alone stop everything."""
    yield from _carried(history, "stream.branch_carried")


@rule(
    "stream.scaled",
    title="No block passes its input on times a fixed factor far from 1",
    reads=("stream.factor", "stream.rest"),
    basis="theory",
    phase="forward",
)
def stream_scaled(history: History) -> Iterator[Symptom]:
    """The factor of a block that keeps variances: 1, or ``sqrt(1/2)`` a branch, so above 0.35 in three; below 1 / 0.35.

    Only a factor that is the same in at least three looks is judged: one that is learned moves. And only where all
    that comes back is a multiple: a norm on the stream itself makes any factor good.
    """
    judged = False
    for name, series in history.each("stream.factor"):
        factor, rest = series.values, history.series("stream.rest", name).values
        if len(factor) < LOOKS or not np.all(np.isfinite(factor)):
            continue
        judged = True
        # A fault that begins later: the last looks count.
        newest = factor[-LOOKS:]
        fixed = np.ptp(newest) <= 1e-4 * abs(newest[-1]) and np.all(rest[-LOOKS:] <= 1e-3 * np.abs(newest))
        if fixed and abs(newest[-1]) >= ROUNDING and not SMALLEST <= newest[-1] <= 1 / SMALLEST:
            same = np.abs(factor - newest[-1]) <= 1e-4 * abs(newest[-1])
            step, seen = int(series.steps[same][0]), float(newest[-1])
            text = f"{name} passes its input on times {seen:.3g}, at each of {same.sum()} looks"
            yield Symptom(at=name, since=step, seen=seen, expected="1", text=text)
    if not judged:
        raise NotChecked(f"fewer than {LOOKS} looks: a factor that is learned would not be told from a fixed one")
