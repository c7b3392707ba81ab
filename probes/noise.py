"""Where evaluation is random: is the stream itself? An experiment: with its parameters at 0, a block draws nothing."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from lab import NotChecked, Probe, Symptom, probe, rule, torch

from .blocks import lists_of_blocks
from .stream import zeroed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

    from lab import History, Run, Step

SUSPECT = 1e-4  # the bound of `evaluation.random`
ROUNDING = 1e-6
ROWS = 2


@probe(
    "noise",
    title="Does a block draw random numbers for the stream that passes it?",
    cost="a forward pass on two rows, each block twice; only where evaluation is random",
    examines=True,
    seldom=True,
)
class Noise(Probe):
    """Sets all parameters of all blocks to 0, and calls each block twice, in evaluation mode, on what it is given.

    Its branches are then 0, whatever is drawn for them: dropout of nothing is nothing. Records ``noise.stream``: the
    largest difference of the two answers, relative to the largest element of the input.
    """

    def lab_examine(self, run: Run, step: Step) -> None:
        if not run.history.last("determinism.difference") > SUSPECT:
            return
        if step.batch is None or step.batch.inputs is None:
            raise NotChecked("the batch is not known")
        blocks = {name: run.model.get_submodule(name) for names in lists_of_blocks(run.model) for name in names}
        if not blocks:
            raise NotChecked("no list of blocks with norms in this model")
        found: dict[str, Tensor] = {}
        run.model.eval()
        parameters = (p for block in blocks.values() for p in block.parameters())
        with zeroed(parameters), contextlib.ExitStack() as handles, torch.no_grad():
            for name, block in blocks.items():
                handles.callback(block.register_forward_hook(_again(found, name), with_kwargs=True).remove)
            run.call(step.batch.rows(ROWS))
        if found:
            step.record_all("noise.stream", tuple(found), torch.stack(list(found.values())))


def _again(found: dict[str, Tensor], name: str) -> Callable[..., None]:
    inside = False

    def hook(block: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
        nonlocal inside
        x = next((v for v in (*args, *kwargs.values()) if torch.is_tensor(v) and v.is_floating_point()), None)
        if inside or x is None or name in found:
            return
        inside = True
        try:
            # What remembers its calls, as a cache does, may not allow another.
            with contextlib.suppress(RuntimeError, ValueError, IndexError, TypeError):
                first, second = (o[0] if isinstance(o, tuple) else o for o in (output, block(*args, **kwargs)))
                if torch.is_tensor(first) and torch.is_tensor(second) and first.shape == second.shape == x.shape:
                    found[name] = (first - second).abs().amax().float() / x.abs().amax().float()
        finally:
            inside = False

    return hook


@rule(
    "noise.stream",
    title="Nothing random is added to the stream in evaluation",
    reads=("determinism.difference",),
    basis="experiment",
    phase="forward",
)
def noise_stream(history: History) -> Iterator[Symptom]:
    """A block whose parameters are 0 is the identity, or a norm of it: it gives the same answer twice.

    Asked only where evaluation was found to be random. Of several blocks each is asked on its own.
    """
    for name, series in history.each("noise.stream"):
        if found := series.finite.first(series.finite.values > ROUNDING):
            step, seen = found
            text = f"{name} gives two answers to one input, even with all its parameters at 0"
            yield Symptom(at=name, since=step, seen=seen, expected="0", text=text)
