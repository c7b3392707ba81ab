"""Adapters: whether they can learn, whether they are used, and whether what they stand beside stays as it was."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from lab import NotChecked, Probe, Symptom, probe, rule, torch
from lab import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from lab import History, Run, Step

# The names of the layer, of A [rank in] and of B [out rank], as they are called here and elsewhere.
NAMES = (
    ("base", "a", "b"),
    ("base_layer", "lora_A.default.weight", "lora_B.default.weight"),
    ("linear", "lora.A", "lora.B"),
)
ROWS = 4
NONE = "no adapter in this model"


class Adapter(NamedTuple):
    """An adapted layer: its name, the module, the weight [out in], and the factors [rank in] and [out rank]."""

    name: str
    layer: nn.Module
    weight: Tensor
    a: Tensor
    b: Tensor


def _parameter(module: nn.Module, name: str) -> Tensor | None:
    try:
        return module.get_parameter(name)
    except AttributeError:
        return None


def adapters_of(model: nn.Module) -> list[Adapter]:
    """Return the layers with an adapter: two factors, of which one is trained, with a product of the weight's shape."""
    found = []
    for name, layer in model.named_modules():
        for base, down, up in NAMES:
            weight, a, b = (_parameter(layer, path) for path in (f"{base}.weight", down, up))
            if weight is None or a is None or b is None or not (a.requires_grad or b.requires_grad):
                continue
            if weight.dim() == a.dim() == b.dim() == 2 and (b.shape[0], a.shape[1]) == tuple(weight.shape):
                if a.shape[0] == b.shape[1]:
                    found.append(Adapter(name, layer, weight, a, b))
                break
    return found


@probe(
    "adapters",
    title="Can each adapter learn, is it used, and does the weight beside it stay?",
    cost="a forward pass on four rows, four of each adapted layer, on examined steps; a copy of their weights",
    examines=True,
)
class Adapters(Probe):
    """Gives each adapter two pairs of factors, and compares what its layer answers to the same input.

    Records by layer ``adapter.factor``, the norm of the factor by which the gradient of the other one is multiplied,
    the larger of the two where both are trained; ``adapter.response``, the
    largest difference between the two answers, over the largest input; ``adapter.response_evaluating``, the same in
    evaluation mode, of which the layer is told after the factors have changed; ``adapter.base_moved``, how far the
    weight beside it is from where it was at the start; and ``adapter.base_trainable``, whether that weight takes
    gradients.
    """

    def lab_start(self, run: Run) -> None:
        self._adapters = adapters_of(run.model)
        self._kept = [adapter.weight.detach().clone() for adapter in self._adapters]

    def lab_examine(self, run: Run, step: Step) -> None:
        if not self._adapters:
            raise NotChecked(NONE)
        assert step.batch is not None
        names = tuple(adapter.name for adapter in self._adapters)
        now = [adapter.weight.detach() for adapter in self._adapters]
        moved = torch.stack(torch._foreach_norm(torch._foreach_sub(now, self._kept)))
        step.record_all("adapter.base_moved", names, moved.float())
        factors = [torch.stack(torch._foreach_norm(_multipliers(x))).amax() for x in self._adapters]
        step.record_all("adapter.factor", names, torch.stack(factors))
        for adapter in self._adapters:
            step.record("adapter.base_trainable", float(adapter.weight.requires_grad), adapter.name)
        with torch.no_grad():
            with _inputs(self._adapters) as calls:
                run.call(step.batch.rows(ROWS))
            for adapter in self._adapters:
                if adapter.name in calls:
                    step.record("adapter.response", _response(adapter, *calls[adapter.name]), adapter.name)
                    if adapter.layer.training:  # else nothing says what it keeps from before
                        again = _response(adapter, *calls[adapter.name], evaluating=True)
                        step.record("adapter.response_evaluating", again, adapter.name)


def _multipliers(adapter: Adapter) -> list[Tensor]:
    """The factors of which the other one is trained."""
    return [x.detach() for x, other in ((adapter.a, adapter.b), (adapter.b, adapter.a)) if other.requires_grad]


@contextmanager
def _inputs(adapters: list[Adapter]) -> Iterator[dict[str, tuple[Any, Any]]]:
    """Note what each layer is first called with."""
    calls: dict[str, tuple[Any, Any]] = {}
    handles = [
        adapter.layer.register_forward_pre_hook(
            lambda _, args, kwargs, name=adapter.name: calls.setdefault(name, (args, kwargs)) and None,
            with_kwargs=True,
        )
        for adapter in adapters
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _response(adapter: Adapter, args: Any, kwargs: Any, *, evaluating: bool = False) -> Tensor | float:
    """By how much the answer changes when B goes from 0 to 1 / rank, with A of ones: every output moves by sum(x).

    Where it is evaluating, the layer is in training while the factors change: it may merge them when it is told.
    """
    x = next((value for value in (*args, *kwargs.values()) if torch.is_tensor(value)), None)
    if x is None or not x.is_floating_point():
        return float("nan")
    inputs = adapter.a.shape[1]
    kept = adapter.a.clone(), adapter.b.clone()
    # Neither even nor odd, so that no mean of 0, which a norm leaves, cancels it.
    adapter.a.copy_(torch.linspace(0.5, 1.5, inputs, device=x.device).square().expand_as(adapter.a))
    answers = []
    if evaluating:  # whatever else was tried before may have told it to evaluate, and not to train again
        adapter.layer.train()
    for value in (0.0, 1.0 / adapter.a.shape[0]):
        adapter.b.fill_(value)
        if evaluating:
            adapter.layer.eval()
        answers.append(adapter.layer(*args, **kwargs))
        if evaluating:
            adapter.layer.train()
    adapter.a.copy_(kept[0])  # other probes examine the same model after this one
    adapter.b.copy_(kept[1])
    was, now = (answer[0] if isinstance(answer, tuple) else answer for answer in answers)
    change: Tensor = (now - was).float().abs().amax()
    # An input of 0 gives no update, whatever the factors.
    return torch.where(x.abs().amax() > 0, change / x.float().abs().amax(), torch.full_like(change, float("nan")))


def _each(history: History, metric: str) -> list[tuple[str, Any]]:
    found = [(name, series.finite) for name, series in history.each(metric)]
    found = [(name, series) for name, series in found if len(series)]
    if not found:
        raise NotChecked(history.reasons.get("adapters", NONE))
    return found


@rule("adapter.dead", title="Every adapter can learn", reads=(), basis="theory", phase="forward")
def adapter_dead(history: History) -> Iterator[Symptom]:
    """The gradient of A is ``B' g x'`` and that of B is ``g (A x)'``: with both factors 0, both are 0 for ever.

    So is that of A where B is 0 and is not trained, or the other way round.
    """
    for name, series in _each(history, "adapter.factor"):
        if found := series.first(series.values == 0):
            step, seen = found
            text = (
                f"the adapter of {name} has no gradient at step {step}: both of its factors are 0, or the one that is "
            )
            text += "not trained, by which the gradient of the other is multiplied"
            yield Symptom(at=name, since=step, seen=seen, expected="above 0", text=text)


@rule("adapter.unused", title="Every adapter moves its layer's output", reads=(), basis="experiment", phase="forward")
def adapter_unused(history: History) -> Iterator[Symptom]:
    """Two different updates to the same input have to give two outputs. What does not answer at all is not used."""
    for name, series in _each(history, "adapter.response"):
        if found := series.first(series.values == 0):
            step, seen = found
            text = f"the output of {name} is the same whatever the factors of its adapter are, at step {step}"
            yield Symptom(at=name, since=step, seen=seen, expected="above 0", text=text)


@rule(
    "adapter.base_trained",
    title="A weight beside an adapter is not trained",
    reads=(),
    basis="theory",
    phase="update",
)
def adapter_base_trained(history: History) -> Iterator[Symptom]:
    """LoRA writes ``W + B A`` with W fixed (Hu et al., 2021). Only the weight that an adapter wraps is judged."""
    for name, series in _each(history, "adapter.base_moved"):
        trainable = history.series("adapter.base_trainable", name)
        takes = np.isin(series.steps, trainable.steps[trainable.values > 0])
        if found := series.first((series.values > 0) & takes):
            step, seen = found
            text = (
                f"the weight beside the adapter of {name} takes gradients, and has moved by {seen:.3g} at step {step}"
            )
            yield Symptom(at=name, since=step, seen=seen, expected="0", text=text)


@rule(
    "adapter.stale",
    title="Every adapter moves its layer's output in evaluation mode too",
    reads=(),
    basis="experiment",
    phase="forward",
)
def adapter_stale(history: History) -> Iterator[Symptom]:
    """Two updates give two outputs while the layer trains, and one and the same when it is told to evaluate.

    It is told after the factors have changed, so that one which merges them then, as it may, answers with the new ones.
    """
    for name, series in _each(history, "adapter.response_evaluating"):
        training = history.series("adapter.response", name)
        used = np.isin(series.steps, training.steps[training.values > 0])
        if found := series.first((series.values == 0) & used):
            step, seen = found
            text = f"in evaluation mode the output of {name} is the same whatever the factors of its adapter are, "
            text += f"at step {step}; in training it is not"
            yield Symptom(at=name, since=step, seen=seen, expected="above 0", text=text)
