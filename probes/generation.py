"""Does generation with a cache give what the full pass gives? In exact arithmetic it does."""

from __future__ import annotations

import dataclasses
import inspect
from typing import TYPE_CHECKING, Any

from lab import LabError, NotChecked, Probe, Stage, Symptom, probe, rule, torch
from lab import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from lab import Batch, History, Run, Step

POSITIONS = 8
# Of the largest number: some 10^4 roundings of float32 that all point one way. Lower precision is not judged.
ROUNDING = 1e-3
NOISY = 100.0  # times what rounding does to the same logits in this very model, whose scores may enlarge it
CAUSAL = 1e-6  # as the check of causality allows


class _Memory:
    """The keys and values of one layer, [B K S D]."""

    def __init__(self) -> None:
        self.length = 0
        self._kept: tuple[Tensor, Tensor] | None = None

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the next positions; return all."""
        if self._kept is not None:
            k, v = torch.cat([self._kept[0], k], dim=2), torch.cat([self._kept[1], v], dim=2)
        self._kept = (k, v)
        self.length = k.shape[2]
        return self._kept


class Cache:
    """A memory for each layer that asks for one."""

    def __init__(self) -> None:
        self.memories: dict[int, _Memory] = {}

    def __getitem__(self, layer: int) -> _Memory:
        return self.memories.setdefault(layer, _Memory())

    @property
    def length(self) -> int:
        """How many positions are held."""
        return self.memories[0].length if 0 in self.memories else 0


@probe(
    "generation",
    title="Are the logits with a cache those without?",
    cost="ten passes over one row of at most 8 tokens",
    examines=True,
    seldom=True,
    stages={
        "generation.cached_gap": Stage("experiment", "share", about="cache"),
        "generation.repeat_gap": Stage("experiment", "share"),
        "generation.module_gap": Stage("experiment", "share"),
    },
)
class Generation(Probe):
    """Passes half of a row, then token by token with a cache, and compares with the whole row at once.

    Records ``generation.cached_gap``, the largest difference of a logit over the largest logit, and
    ``generation.repeat_gap``, the same without a cache, of each position as the last of a shorter row. Where there
    was a gap, the next experiment records ``generation.module_gap`` for each module that was given the same and answers
    something else.
    """

    def lab_examine(self, run: Run, step: Step) -> None:
        everywhere = run.history.last("generation.cached_gap") > ROUNDING
        inputs = step.batch.inputs if step.batch is not None else None
        if "cache" not in inspect.signature(run.model.forward).parameters:
            raise NotChecked("the model takes no cache")
        if inputs is None or inputs.dim() != 2 or inputs.is_floating_point() or inputs.shape[1] < 4:
            raise NotChecked("the model is not called with four tokens or more, [B T]")
        if any(p.is_floating_point() and p.dtype not in (torch.float32, torch.float64) for p in run.model.parameters()):
            raise NotChecked("below float32, rounding alone makes a difference")
        if torch.get_float32_matmul_precision() != "highest" or torch.is_autocast_enabled(inputs.device.type):
            raise NotChecked("products are not computed in float32, and rounding alone makes a difference")
        run.model.eval()
        with torch.no_grad():
            self._compare(run, step, inputs[:1, :POSITIONS], everywhere=everywhere)

    def _compare(self, run: Run, step: Step, tokens: Tensor, *, everywhere: bool) -> None:
        batch = step.batch
        assert batch is not None
        length = tokens.shape[1]
        begin, cache = length // 2, Cache()
        whole, again = _Calls(), _Calls()
        with _Listening(run.model, whole, everywhere=everywhere):
            full = alone(run, batch, tokens)
        # Without a cache, from the beginning of the row to each position: how far rounding alone can go here.
        prefixes = [run.call(asked(batch, tokens[:, : t + 1]))[:, -1:] for t in range(begin, length)]
        parts = []
        try:
            parts.append(run.call(asked(batch, tokens[:, :begin], cache)))
            for t in range(begin, length):
                with _Listening(run.model, again, everywhere=everywhere and t == length - 1):
                    parts.append(run.call(asked(batch, tokens[:, t : t + 1], cache)))
        except (LabError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise NotChecked(f"the model's cache is of another kind ({type(error).__name__})") from None
        stepwise = torch.cat(parts, dim=1)
        if cache.length != length or stepwise.shape != full.shape:
            raise NotChecked("the model's cache is of another kind")
        step.record("generation.cached_gap", gap(stepwise, full))
        step.record("generation.repeat_gap", gap(torch.cat(prefixes, dim=1), full[:, begin:]))
        for name, (came, went) in again.made.items():
            # Its inputs agree, and what it makes of them does not.
            if name in whole.made and bool(gap(came, whole.made[name][0]) <= ROUNDING):
                step.record("generation.module_gap", gap(went, whole.made[name][1]), name)


def asked(batch: Batch, tokens: Tensor, cache: Cache | None = None) -> Batch:
    """The call for these tokens, with a cache if there is one."""
    return dataclasses.replace(batch, args=(tokens,), kwargs={} if cache is None else {"cache": cache}, targets=None)


def alone(run: Run, batch: Batch, tokens: Tensor) -> Tensor:
    """What the model answers to tokens and nothing else.

    Raises:
        NotChecked: It has to be told more, as a decoder its source.
    """
    try:
        return run.call(asked(batch, tokens))
    except LabError:
        raise
    except Exception as error:  # noqa: BLE001 - another library's model may raise anything
        raise NotChecked(f"the model cannot be called with tokens alone ({type(error).__name__})") from None


class _Calls:
    """What went into each module and came out of it at the newest position, in the order in which they ended."""

    def __init__(self) -> None:
        self.made: dict[str, tuple[Tensor, Tensor]] = {}


class _Listening:
    """While in the block, notes what modules make of vectors [1 T C], or of nothing but numbers: [T C]."""

    def __init__(self, model: nn.Module, calls: _Calls, *, everywhere: bool) -> None:
        self.model, self.calls, self.everywhere = model, calls, everywhere
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> None:
        for name, module in self.model.named_modules() if self.everywhere else ():
            if name:
                self._handles.append(module.register_forward_hook(self._hook(name)))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Any:
        def note(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if torch.is_tensor(output) and output.dim() in (2, 3) and output.is_floating_point():
                came = next((a for a in args if torch.is_tensor(a)), output.new_zeros(1))
                if came.dim() < 4:
                    newest = came[:, -1] if came.dim() > 1 else came
                    self.calls.made[name] = newest, output[..., -1, :].reshape(-1)

        return note


def gap(one: Tensor, other: Tensor) -> Tensor:
    """The largest difference, over the largest number."""
    other = other.double()
    return (one.double() - other).abs().amax() / other.abs().amax().clamp_min(1e-30)


def _wrong(history: History) -> tuple[int, float] | None:
    """Return the first step with a gap, and the gap, where it can only be the cache's."""
    gaps = history.series("generation.cached_gap").finite
    if not len(gaps):
        raise NotChecked("the outputs were not finite when it was tried")
    if np.any(history.series("causality.future").values > CAUSAL):
        raise NotChecked("outputs depend on later inputs, so no cache can be right")
    noise = history.series("generation.repeat_gap")
    if np.any(noise.values > ROUNDING):
        raise NotChecked("without a cache, the beginning of a row gives other logits than the whole row")
    return gaps.first(gaps.values > np.maximum(ROUNDING, NOISY * noise.values[np.isin(noise.steps, gaps.steps)]))


@rule(
    "generation.cached",
    title="With a cache the logits are those without",
    reads=("generation.cached_gap", "generation.repeat_gap"),
    basis="experiment",
)
def generation_cached(history: History) -> Iterator[Symptom]:
    """In exact arithmetic they are equal; left to rounding are 1e-3 of the largest, and 100 times what it does here."""
    if found := _wrong(history):
        step, gap = found
        text = f"token by token with a cache, a logit differs by {gap:.2g} of the largest from that of the full pass"
        yield Symptom(at="", since=step, seen=gap, expected="0", text=text)


@rule(
    "generation.cached_module",
    title="With a cache every module answers as without",
    reads=("generation.cached_gap", "generation.repeat_gap"),
    basis="experiment",
)
def generation_cached_module(history: History) -> Iterator[Symptom]:
    """The first module that is given the same and answers something else; asked only where the logits differ."""
    found = _wrong(history)
    for name, series in history.each("generation.module_gap") if found else ():
        if wrong := series.first(series.values > ROUNDING):
            step, gap = wrong
            text = f"{name}, given the same, answers otherwise with a cache (by {gap:.2g} of the largest)"
            yield Symptom(at=name, since=step, seen=gap, expected="0", text=text)
            return
