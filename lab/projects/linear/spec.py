"""What any linear layer, and its initialisers, must do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from hypothesis import strategies as st
from torch.nn import functional as F

from lab.spec import Built, equal, explicit_taps, floats, gradients, holds, near, normal, prop, seeds

if TYPE_CHECKING:
    from torch import Tensor

widths, leads = st.integers(1, 8), st.lists(st.integers(1, 4), max_size=3)
gains = st.sampled_from([0.5, 1.0, 2.0])


def _layer(built: Built, seed: int, inputs: int, outputs: int, *, bias: bool = True) -> Any:
    """Build one in float64, with a bias that is not 0: the one it starts with would hide what is done to it."""
    made = built.Linear(inputs, outputs, bias=bias).double()
    with torch.no_grad():
        made.weight.copy_(normal(seed, outputs, inputs))
        if bias:
            made.bias.copy_(normal(seed + 1, outputs))
    return made


def _started(built: Built, seed: int, inputs: int, outputs: int, gain: float) -> Tensor:
    """Return the weights that a new layer starts with, and leave torch's generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        weight: Tensor = built.Linear(inputs, outputs, gain=gain).weight.detach().double()  # [outputs inputs]
    return weight


@prop(
    "An input of zeros must give just the bias: it is lost, scaled, or added more than once.",
    seed=seeds,
    inputs=widths,
    outputs=widths,
)
def zeros_give_the_bias(built: Built, seed: int, inputs: int, outputs: int) -> None:
    made = _layer(built, seed, inputs, outputs)
    equal(made(torch.zeros(2, inputs, dtype=torch.float64)), made.bias.detach().expand(2, outputs))


@prop(
    "Values differ from x W^T + b: look at the transpose of W, which is [outputs inputs], and at the bias.",
    seed=seeds,
    lead=leads,
    inputs=widths,
    outputs=widths,
    bias=st.booleans(),
)
def equals_the_formula_and_torch(
    built: Built, seed: int, lead: list[int], inputs: int, outputs: int, bias: bool
) -> None:
    made, x = _layer(built, seed, inputs, outputs, bias=bias), normal(seed + 2, *lead, inputs)
    expected = (x[..., None, :] * made.weight).sum(-1)  # [... outputs], one sum of products for each output
    if bias:
        expected = expected + made.bias
    equal(F.linear(x, made.weight, made.bias), expected, "torch's own operator")
    equal(made(x), expected)


@prop(
    "All dimensions but the last must come out as they went in, also of length 0 or 1: one was merged or squeezed.",
    seed=seeds,
    lead=st.lists(st.integers(0, 2), max_size=4),
    inputs=widths,
    outputs=widths,
    bias=st.booleans(),
)
def keeps_all_leading_dimensions(
    built: Built, seed: int, lead: list[int], inputs: int, outputs: int, bias: bool
) -> None:
    made, x = _layer(built, seed, inputs, outputs, bias=bias), normal(seed + 2, *lead, inputs)
    equal(made(x), F.linear(x, made.weight, made.bias))


@prop(
    "An output moved with the input of another position: positions are mixed or reordered when they become rows.",
    seed=seeds,
    batch=st.integers(1, 3),
    length=st.integers(2, 4),
)
def each_position_is_mapped_on_its_own(built: Built, seed: int, batch: int, length: int) -> None:
    made, x = _layer(built, seed, 3, 4), normal(seed + 2, batch, length, 3)
    before = made(x)
    for b in range(batch):
        for t in range(length):
            moved = x.clone()
            moved[b, t] += 1.0
            changed = (made(moved) - before).abs().amax(-1) > 1e-9  # [batch length]
            expected = torch.zeros(batch, length, dtype=torch.bool)
            expected[b, t] = True
            holds(torch.equal(changed, expected), f"moving position [{b} {t}] moves other outputs than its own")


@prop(
    "Backward disagrees with the values: the input, the weight or the bias is detached, or changed in place.",
    seed=seeds,
    bias=st.booleans(),
    examples=6,
)
def gradients_are_those_of_finite_differences(built: Built, seed: int, bias: bool) -> None:
    made = _layer(built, seed, 3, 4, bias=bias)
    names = ("weight", "bias") if bias else ("weight",)

    def call(x: Tensor, *parameters: Tensor) -> Any:
        return torch.func.functional_call(made, dict(zip(names, parameters, strict=True)), (x,))

    gradients(call, normal(seed + 2, 2, 3, 3), *(getattr(made, name) for name in names))
    made(normal(seed + 2, 2, 3, 3)).sum().backward()
    for name in names:
        holds(getattr(made, name).grad is not None, f"{name} gets no gradient")


@prop(
    "Memory order is no part of the values: a view was made where the layout does not allow it.",
    seed=seeds,
    inputs=st.integers(2, 6),
)
def takes_inputs_that_are_not_contiguous(built: Built, seed: int, inputs: int) -> None:
    made, x = _layer(built, seed, inputs, 3), normal(seed + 2, inputs, 5, 2).permute(2, 1, 0)  # [2 5 inputs], strided
    equal(made(x), F.linear(x.contiguous(), made.weight, made.bias))
    one = normal(seed + 3, 2, 1, inputs).expand(2, 5, inputs)  # the same numbers in memory for all five positions
    equal(made(one), F.linear(one.contiguous(), made.weight, made.bias), "the output of an expanded input")


@prop(
    "The output must have the dtype of input and weights, and be as exact as it allows: something is cast on the way.",
    seed=seeds,
    dtype=floats,
    bias=st.booleans(),
)
def keeps_the_dtype(built: Built, seed: int, dtype: torch.dtype, bias: bool) -> None:
    made = _layer(built, seed, 8, 5, bias=bias).to(dtype)
    x = normal(seed + 2, 2, 3, 8).to(dtype)
    weight, shift = made.weight.detach().double(), made.bias.detach().double() if bias else None
    # Products cancel, rounding errors do not: what an error is measured by is the sum of absolute values.
    size = F.linear(x.double().abs(), weight.abs(), None if shift is None else shift.abs()).max()
    error = 8 * torch.finfo(dtype).eps  # one rounding for each of the eight products, if each sum is rounded
    equal(made(x).detach(), F.linear(x.double(), weight, shift).to(dtype), rtol=0.0, atol=error * float(size))


@prop(
    "Weights must start with mean 0 and variance gain^2 / inputs: the wrong width, power or gain is in the formula.",
    seed=seeds,
    gain=gains,
    sides=st.sampled_from([(100, 400), (400, 100), (200, 200)]),
    examples=10,
)
def weights_start_with_variance_gain_squared_over_inputs(
    built: Built, seed: int, gain: float, sides: tuple[int, int]
) -> None:
    inputs, outputs = sides
    unit = _started(built, seed, inputs, outputs, gain) * inputs**0.5 / gain  # [outputs inputs], of variance 1
    # Five standard errors of a mean, and of a variance, of so many normal numbers.
    near(float(unit.mean()), 0.0, 5 * unit.numel() ** -0.5, "the mean of the weights, in units of gain / sqrt(inputs),")
    near(float(unit.var()), 1.0, 5 * (2 / unit.numel()) ** 0.5, "the variance of the weights times inputs / gain^2")


@prop(
    "Two outputs start with the same weights: they get the same gradients, and stay one output for ever.",
    seed=seeds,
    examples=5,
)
def no_two_outputs_start_the_same(built: Built, seed: int) -> None:
    weight = _started(built, seed, 6, 9, 1.0)
    different = len(torch.unique(weight, dim=0))
    holds(different == 9, f"of 9 outputs only {different} start with weights of their own")


@prop(
    "The bias must start at 0, learn, and be None where none is asked for: otherwise outputs start off centre.",
    inputs=widths,
    outputs=widths,
)
def the_bias_starts_at_0(built: Built, inputs: int, outputs: int) -> None:
    made = built.Linear(inputs, outputs)
    holds(isinstance(made.bias, torch.nn.Parameter), "the bias is no parameter")
    equal(made.bias.detach(), torch.zeros(outputs), "the bias at the start")
    without = built.Linear(inputs, outputs, bias=False)
    holds(without.bias is None, "there is a bias though none is asked for")
    holds(len(list(without.parameters())) == 1, "without a bias the weight is the only parameter")


@prop(
    "He is sqrt(2 / inputs), Glorot sqrt(2 / (inputs + outputs)): a width, the 2 or the root is missing.",
    inputs=st.integers(1, 4096),
    outputs=st.integers(1, 4096),
)
def he_and_glorot_are_their_formulas(built: Built, inputs: int, outputs: int) -> None:
    near(built.he_std(inputs) ** 2 * inputs, 2.0, 1e-6, "he_std squared, times inputs,")
    total = inputs + outputs
    near(built.glorot_std(inputs, outputs) ** 2 * total, 2.0, 1e-6, "glorot_std squared, times inputs + outputs,")


@prop("Probes and faults find nothing at a site that is not tapped, or see another tensor.", seed=seeds, examples=3)
def taps_out(built: Built, seed: int) -> None:
    for bias in (True, False):
        explicit_taps(_layer(built, seed, 3, 4, bias=bias), ("out",), normal(seed + 2, 2, 5, 3))
