"""What any recurrent network must do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from lab.errors import BadInput
from lab.spec import Built, equal, explicit_taps, floats, gradients, holds, normal, prop, seeds

if TYPE_CHECKING:
    from collections.abc import Callable

NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
KINDS = ("RNN", "GRU", "LSTM")
batches, lengths, widths = st.integers(1, 3), st.integers(1, 7), st.integers(1, 5)
kinds = st.sampled_from(KINDS)


def _filled(module: Any, seed: int, dtype: torch.dtype = torch.float64) -> Any:
    """Give every parameter drawn numbers, so that no bias is 0 and no two gates are alike."""
    module = module.to(dtype)
    with torch.no_grad():
        for place, parameter in enumerate(module.parameters()):
            parameter.copy_(normal(seed + 31 * place, *parameter.shape))
    return module


def _state(kind: str, seed: int, batch: int, hidden: int, dtype: torch.dtype = torch.float64) -> Any:
    h, c = normal(seed + 7, batch, hidden, dtype=dtype), normal(seed + 8, batch, hidden, dtype=dtype)
    return (h, c) if kind == "LSTM" else h


def _flat(state: Any) -> tuple[Tensor, ...]:
    return tuple(state) if isinstance(state, tuple) else (state,)


def _same_state(got: Any, expected: Any, what: str) -> None:
    a, b = _flat(got), _flat(expected)
    holds(len(a) == len(b), f"{what} has {len(a)} parts, expected {len(b)}")
    for name, x, y in zip("hc", a, b, strict=False):
        equal(x, y, f"{name} of {what}")


def _parity(built: Built, kind: str, seed: int, batch: int, length: int, inputs: int, hidden: int) -> None:
    made = _filled(getattr(built, kind)(inputs, hidden), seed)
    reference: Any = getattr(nn, kind)(inputs, hidden, batch_first=True, dtype=torch.float64)
    reference.load_state_dict({f"{name}_l0": getattr(made, name).detach() for name in NAMES})
    x, state = normal(seed + 5, batch, length, inputs), _state(kind, seed, batch, hidden)
    theirs = tuple(part[None] for part in state) if kind == "LSTM" else state[None]  # [1 B F]: torch has layers
    for ours, their, start in ((None, None, "zeros"), (state, theirs, "a given state")):
        expected, last = reference(x, their)
        out, got = made(x, ours)
        equal(out, expected, f"the output of {kind} from {start}")
        _same_state(got, tuple(part[0] for part in last) if kind == "LSTM" else last[0], "the last state")


@prop(
    "Values differ from tanh(W x + b + U h + b'): look at the transposes, both biases, and what the loop carries on.",
    seed=seeds,
    batch=batches,
    length=lengths,
    inputs=widths,
    hidden=widths,
)
def equals_torch_rnn(built: Built, seed: int, batch: int, length: int, inputs: int, hidden: int) -> None:
    _parity(built, "RNN", seed, batch, length, inputs, hidden)


@prop(
    "Values differ from nn.GRU: gates lie in the order r z n, r multiplies U h + b' of n, and z keeps the old state.",
    seed=seeds,
    batch=batches,
    length=lengths,
    inputs=widths,
    hidden=widths,
)
def equals_torch_gru(built: Built, seed: int, batch: int, length: int, inputs: int, hidden: int) -> None:
    _parity(built, "GRU", seed, batch, length, inputs, hidden)


@prop(
    "Values differ from nn.LSTM: gates lie in the order i f g o, g and the cell pass tanh, the others a sigmoid.",
    seed=seeds,
    batch=batches,
    length=lengths,
    inputs=widths,
    hidden=widths,
)
def equals_torch_lstm(built: Built, seed: int, batch: int, length: int, inputs: int, hidden: int) -> None:
    _parity(built, "LSTM", seed, batch, length, inputs, hidden)


@prop(
    "An output moved when a later input did: the loop runs backwards, or positions are mixed up with the batch.",
    seed=seeds,
    kind=kinds,
    length=st.integers(2, 6),
)
def no_output_depends_on_a_later_input(built: Built, seed: int, kind: str, length: int) -> None:
    core = _filled(getattr(built, kind)(3, 3), seed)
    mixer = _filled(built.RecurrentMixer(3, kind=kind.lower()), seed)
    paths: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = ((kind, lambda x: core(x)[0]), ("the mixer", mixer))
    x = normal(seed + 5, 2, length, 3)
    for name, path in paths:
        before = path(x)
        for place in range(1, length):
            moved = x.clone()
            moved[:, place] += 3.0
            equal(path(moved)[:, :place], before[:, :place], f"the output of {name} before position {place}")


@prop(
    "Two pieces with the state carried differ from one: the state given is ignored, or that returned is not the last.",
    seed=seeds,
    kind=kinds,
    first=st.integers(0, 4),
    second=st.integers(0, 4),
)
def two_pieces_are_one(built: Built, seed: int, kind: str, first: int, second: int) -> None:
    made = _filled(getattr(built, kind)(3, 4), seed)
    x = normal(seed + 5, 2, first + second, 3)
    expected, last = made(x)
    head, state = made(x[:, :first])
    tail, state = made(x[:, first:], state)
    equal(torch.cat([head, tail], dim=1), expected, f"the two outputs of {kind}, side by side")
    _same_state(state, last, "the state after both pieces")


@prop(
    "One position must give one state, the last, and no position none: the state then is the one that was given.",
    seed=seeds,
    kind=kinds,
    batch=batches,
)
def one_position_and_none(built: Built, seed: int, kind: str, batch: int) -> None:
    made, state = _filled(getattr(built, kind)(3, 4), seed), _state(kind, seed, batch, 4)
    x = normal(seed + 5, batch, 1, 3)
    out, last = made(x, state)
    equal(out, _flat(last)[0][:, None], f"the output of {kind} at one position")
    out, last = made(x[:, :0], state)
    equal(out, x.new_zeros(batch, 0, 4), f"the output of {kind} at no position")
    _same_state(last, state, "the state after no position")


@prop(
    "Backward through time disagrees with the values: a state is detached, or computed without gradient.",
    seed=seeds,
    kind=kinds,
    examples=6,
)
def gradients_are_those_of_finite_differences(built: Built, seed: int, kind: str) -> None:
    made = _filled(getattr(built, kind)(2, 3), seed)
    parts = _flat(_state(kind, seed, 2, 3))
    weights = [getattr(made, name).detach() for name in NAMES]

    def run(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        given = rest[len(NAMES) :]
        held = dict(zip(NAMES, rest, strict=False))
        out, last = torch.func.functional_call(made, held, (x, given if kind == "LSTM" else given[0]))
        return (out, *_flat(last))

    gradients(run, normal(seed + 5, 2, 3, 2), *weights, *parts)


@prop(
    "Inputs far outside a gate's range gave inf, NaN or another dtype: a gate is written with a bare exponential.",
    seed=seeds,
    kind=kinds,
    dtype=floats,
)
def extremes_stay_finite(built: Built, seed: int, kind: str, dtype: torch.dtype) -> None:
    made = _filled(getattr(built, kind)(3, 4), seed, dtype)
    scale = 1e3 if dtype == torch.float16 else 1e30  # what the dtype itself can hold
    x = normal(seed + 5, 2, 6, 3, scale=scale, dtype=dtype).requires_grad_()
    out, _ = made(x)
    holds(out.dtype == dtype, f"the output of {kind} is {out.dtype}, the input is {dtype}")
    holds((out.abs() <= 1).all(), f"an output of {kind} is not within -1 and 1 for inputs of about {scale:.0e}")
    out.sum().backward()
    holds(x.grad is not None and torch.isfinite(x.grad).all(), f"the gradient of {kind}'s input is not finite")


@prop(
    "The forget gate must start at its bias (1 unless given) and all others at 0: wrong slice, or in both biases.",
    bias=st.sampled_from([0.0, 1.0, 2.5]),
    hidden=widths,
)
def the_forget_bias_is_that_of_the_forget_gate(built: Built, bias: float, hidden: int) -> None:
    for made, expected in ((built.LSTM(3, hidden, forget_bias=bias), bias), (built.LSTM(3, hidden), 1.0)):
        start = (made.bias_ih + made.bias_hh).detach().view(4, hidden)  # i f g o
        wanted = torch.tensor([0.0, expected, 0.0, 0.0])[:, None].expand(4, hidden)
        equal(start, wanted, "the sum of both biases, gates i f g o")


@prop(
    "Memory order is no part of the values: a view was made where the layout does not allow it.", seed=seeds, kind=kinds
)
def takes_inputs_that_are_not_contiguous(built: Built, seed: int, kind: str) -> None:
    made = _filled(getattr(built, kind)(3, 4), seed)
    x = normal(seed + 5, 5, 2, 3).transpose(0, 1)  # [B T C], strided
    equal(made(x)[0], made(x.contiguous())[0], f"the output of {kind}")


@prop(
    "The mixer is the recurrence and then a Linear whose weights have the gain: a part, its kind or the gain is lost.",
    seed=seeds,
    kind=kinds,
    gain=st.sampled_from([0.0, 0.5, 2.0]),
)
def the_mixer_is_the_recurrence_then_a_projection(built: Built, seed: int, kind: str, gain: float) -> None:
    made = []
    for each in (1.0, gain):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made.append(built.RecurrentMixer(4, kind=kind.lower(), gain=each))
    plain, scaled = made
    x = normal(seed + 5, 2, 5, 4, dtype=torch.float32)
    holds(isinstance(plain.core, getattr(built, kind)), f"kind {kind.lower()} made a {type(plain.core).__name__}")
    equal(plain(x), plain.core(x)[0] @ plain.proj.weight.t() + plain.proj.bias)
    equal(scaled(x), gain * plain(x), f"the output with gain {gain:g}")
    try:
        built.RecurrentMixer(4, kind="gruu")
    except BadInput:
        return
    holds(False, "a kind that does not exist raises no BadInput")


@prop(
    "Probes and faults find nothing at a site that is not tapped, or is tapped in another order.",
    seed=seeds,
    examples=3,
)
def taps_what_is_projected_and_the_states(built: Built, seed: int) -> None:
    x = normal(seed, 2, 3, 4, dtype=torch.float32)
    for kind in KINDS:
        explicit_taps(getattr(built, kind)(4, 3), ("projected", "states"), x)
    names = ("core.projected", "core.states", "proj.out", "out")
    explicit_taps(built.RecurrentMixer(4), names, x)
