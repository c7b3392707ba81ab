"""What any activation, feed-forward layer and gated feed-forward layer must do."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lab.errors import BadInput
from lab.spec import Built, equal, explicit_taps, floats, gradients, holds, near, normal, prop, seeds, tapped

if TYPE_CHECKING:
    from collections.abc import Callable

NAMES = ("relu", "sigmoid", "silu", "gelu", "gelu_tanh")  # of functions; in a file a hyphen stands for the underscore
TORCH: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
SLOPES_AT_0 = {"relu": 0.0, "sigmoid": 0.25, "silu": 0.5, "gelu": 0.5, "gelu_tanh": 0.5}

names = st.sampled_from(NAMES)
numbers = st.lists(st.floats(-40, 40), min_size=1, max_size=16)
widths, lengths = st.integers(1, 6), st.integers(1, 5)


def _both(built: Built, name: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """The formula, and the fused kernel."""
    return {each: getattr(built, each) for each in (f"{name}_explicit", name)}


def _against(built: Built, name: str, x: Tensor, expected: Tensor) -> None:
    """Compare torch, the formula and the fused kernel with a closed form, to the last digits of float64."""
    equal(TORCH[name](x), expected, "torch's own operator", rtol=1e-10, atol=1e-14)
    for each, function in _both(built, name).items():
        equal(function(x), expected, each, rtol=1e-10, atol=1e-14)


def _made(thing: Callable[..., Any], seed: int, *args: int, **options: Any) -> Any:
    """Build a layer in float64 with weights of its own seed; biases of 0 would hide a missing one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = thing(*args, **options).double()
    with torch.no_grad():
        for i, (name, p) in enumerate(made.named_parameters()):
            if name.endswith("bias"):
                p.copy_(normal(seed + i + 1, *p.shape))
    return made


@prop(
    "ReLU is not max(x, 0): a slope is left below 0, or a product makes NaN of 0 times infinity.",
    values=numbers,
)
def relu_is_the_larger_of_x_and_0(built: Built, values: list[float]) -> None:
    for inputs in (values, [0.0], [-math.inf], [math.inf], [math.nan]):
        x = torch.tensor(inputs, dtype=torch.float64)
        _against(built, "relu", x, torch.maximum(x, torch.zeros_like(x)))


@prop(
    "Sigmoid is not 1/(1 + e^-x), or is 0 where it should be e^x: the small values left of 0 lost their digits.",
    values=numbers,
)
def sigmoid_is_exact_on_both_sides(built: Built, values: list[float]) -> None:
    x = torch.tensor([*values, -40.0, 40.0], dtype=torch.float64)
    expected = torch.tensor([1 / (1 + math.exp(-v)) for v in x.tolist()], dtype=torch.float64)
    for name, function in _both(built, "sigmoid").items():
        # Relative only: at -40 the value is 4.2e-18.
        equal(function(x), expected, name, rtol=1e-12, atol=0.0)
        ends = function(torch.tensor([-math.inf, math.inf], dtype=torch.float64))
        equal(ends, torch.tensor([0.0, 1.0], dtype=torch.float64), f"{name} of -inf and inf")


@prop("SiLU is not x/(1 + e^-x): look for a factor in the exponent, or an x that is missing.", values=numbers)
def silu_is_x_times_sigmoid(built: Built, values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    expected = torch.tensor([v / (1 + math.exp(-v)) for v in values], dtype=torch.float64)
    _against(built, "silu", x, expected)


@prop(
    "GELU is not x Phi(x): look at the root of 2 in erf(x / sqrt 2), or whether an approximation stands there.",
    values=numbers,
)
def gelu_is_x_times_the_normal_distribution_function(built: Built, values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    expected = torch.tensor([0.5 * v * math.erfc(-v / math.sqrt(2)) for v in values], dtype=torch.float64)
    _against(built, "gelu", x, expected)


@prop(
    "The tanh form of GELU differs from torch's, or by more than 4.8e-4 from GELU: look at 0.044715 and sqrt(2/pi).",
    values=numbers,
)
def gelu_tanh_is_near_gelu_but_not_it(built: Built, values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    tangents = [math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)) for v in values]
    _against(built, "gelu_tanh", x, 0.5 * x * (1 + torch.tensor(tangents, dtype=torch.float64)))
    grid = torch.linspace(-10, 10, 2001, dtype=torch.float64)
    for name, function in _both(built, "gelu_tanh").items():
        gap = float((function(grid) - F.gelu(grid)).abs().max())
        near(gap, 4.73e-4, 1e-6, f"the largest distance of {name} from gelu")


@prop(
    "The slope at 0 is wrong though the values are right: relu 0, sigmoid 1/4, the others 1/2. Look at |x| or at ties.",
    name=names,
    dtype=floats,
)
def the_slope_at_0_is_known(built: Built, name: str, dtype: torch.dtype) -> None:
    for each, function in _both(built, name).items():
        x = torch.zeros(3, dtype=dtype, requires_grad=True)
        (slope,) = torch.autograd.grad(function(x).sum(), x)
        equal(slope, torch.full_like(slope, SLOPES_AT_0[name]), f"the slope of {each} at 0")


@prop(
    "Far from 0 a value or a slope is inf, NaN or not the limit: an exponential or a power overflows on the way.",
    name=names,
    dtype=floats,
)
def huge_inputs_give_the_limits(built: Built, name: str, dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    right = torch.tensor([50.0, 100.0, 300.0, 1e4, 6e4, 6e4 if dtype == torch.float16 else 1e30], dtype=dtype)
    zeros, ones = torch.zeros_like(right), torch.ones_like(right)
    limits = torch.cat([zeros, ones if name == "sigmoid" else right])
    slopes = torch.cat([zeros, zeros if name == "sigmoid" else ones])
    for each, function in _both(built, name).items():
        x = torch.cat([-right, right]).requires_grad_()
        out = function(x)
        equal(out, limits, f"{each} of {dtype}", rtol=4 * eps, atol=1e-12)
        if each != "gelu_tanh":  # the slope of torch's own kernel is NaN where x^2 overflows
            (slope,) = torch.autograd.grad(out.sum(), x)
            equal(slope, slopes, f"the slope of {each} of {dtype}", rtol=4 * eps, atol=1e-12)


@prop(
    "f(x) - f(-x) must be x, for sigmoid f(x) + f(-x) = 1: what is let through on one side is held back on the other.",
    name=names,
    values=numbers,
)
def mirror_images_add_up(built: Built, name: str, values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    for each, function in _both(built, name).items():
        if name == "sigmoid":
            equal(function(x) + function(-x), torch.ones_like(x), f"{each}(x) + {each}(-x)")
        else:
            equal(function(x) - function(-x), x, f"{each}(x) - {each}(-x)", rtol=1e-12, atol=1e-12)


@prop(
    "The result has another dtype or shape than the input, or is further off than that dtype's rounding.",
    name=names,
    dtype=floats,
    seed=seeds,
)
def keeps_dtype_shape_and_order(built: Built, name: str, dtype: torch.dtype, seed: int) -> None:
    dense = normal(seed, 4, 3, 2, dtype=dtype, scale=3.0)
    inputs = (dense, dense.transpose(0, 2), dense[::2, :, 1], dense[0, 0, 0], dense[:0])  # strided, single, empty
    eps = torch.finfo(dtype).eps
    for each, function in _both(built, name).items():
        for x in inputs:
            before, got = x.clone(), function(x)
            holds(got.dtype == dtype, f"{each} of {dtype} is {got.dtype}")
            # A few roundings of numbers up to about 12.
            equal(got.double(), TORCH[name](x.double()), f"{each} of {dtype}", rtol=8 * eps, atol=16 * eps)
            holds(torch.equal(x, before), f"{each} changed its input in place")


@prop(
    "Backward disagrees with the values: something is detached, or computed without gradient.", seed=seeds, examples=5
)
def gradients_are_those_of_finite_differences(built: Built, seed: int) -> None:
    x = normal(seed, 12, scale=2.0)
    x = x + 0.01 * torch.where(x < 0, -1.0, 1.0)  # away from the corner of ReLU
    for name in NAMES:
        for function in _both(built, name).values():
            gradients(function, x)
    inputs = normal(seed + 1, 2, 2, 3)
    gradients(_made(built.FeedForward, seed, 3, 4), inputs)
    gradients(_made(built.GatedFeedForward, seed, 3, 4), inputs)


@prop(
    "FeedForward is not down(activation(up(x))), GELU unless another is named: look at the table of names.",
    seed=seeds,
    name=st.sampled_from(["", *NAMES]),
    length=lengths,
    width=widths,
    hidden=widths,
)
def feed_forward_is_widen_activate_narrow(
    built: Built, seed: int, name: str, length: int, width: int, hidden: int
) -> None:
    option = {"activation": name.replace("_", "-")} if name else {}
    made, x = _made(built.FeedForward, seed, width, hidden, **option), normal(seed, 2, length, width, scale=3.0)
    wide = TORCH[name or "gelu"](F.linear(x, made.up.weight, made.up.bias))  # [2 T F]
    equal(made(x), F.linear(wide, made.down.weight, made.down.bias))
    equal(tapped(made, x)["hidden"], wide, "what passes hidden")


@prop(
    "An unknown activation must be refused with BadInput that says model.activation, what was found and the nearest.",
    wrong=st.sampled_from([("glu", "gelu"), ("gelu_tanh", "gelu-tanh"), ("relU", "relu"), ("sigmoyd", "sigmoid")]),
)
def an_unknown_activation_is_refused_by_name(built: Built, wrong: tuple[str, str]) -> None:
    found, meant = wrong
    holds(
        set(built.ACTIVATIONS) == {name.replace("_", "-") for name in NAMES},
        f"the activations are {', '.join(built.ACTIVATIONS)}",
    )
    try:
        built.FeedForward(2, 3, activation=found)
    except BadInput as error:
        for part in ("model.activation", repr(found), f"did you mean {meant!r}"):
            holds(part in str(error), f"the error does not say {part}: {error}")
    else:
        holds(condition=False, text=f"FeedForward takes activation={found!r}")


@prop(
    "SwiGLU is not down(silu(gate(x)) * up(x)) with 3 C F weights: the wrong branch is gated, or a bias is left.",
    seed=seeds,
    length=lengths,
    width=widths,
    hidden=widths,
)
def gated_is_silu_of_one_times_the_other(built: Built, seed: int, length: int, width: int, hidden: int) -> None:
    made, x = _made(built.GatedFeedForward, seed, width, hidden), normal(seed, 2, length, width, scale=3.0)
    count = sum(p.numel() for p in made.parameters())
    holds(count == 3 * width * hidden, f"{count} parameters, expected 3 C F = {3 * width * hidden}")
    gate = F.silu(F.linear(x, made.gate.weight))  # [2 T F]
    passed = gate * F.linear(x, made.up.weight)  # [2 T F]
    equal(made(x), F.linear(passed, made.down.weight))
    values = tapped(made, x)
    equal(values["gate"], gate, "what passes gate")
    equal(values["hidden"], passed, "what passes hidden")


@prop(
    "An output moved when the input of another position did: a feed-forward layer must not mix positions.",
    seed=seeds,
    length=st.integers(2, 6),
    place=st.integers(0, 5),
)
def each_position_is_computed_on_its_own(built: Built, seed: int, length: int, place: int) -> None:
    place = min(place, length - 1)
    for thing in (built.FeedForward, built.GatedFeedForward):
        made, x = _made(thing, seed, 4, 8), normal(seed, 2, length, 4)
        moved = x.clone()
        moved[0, place] += 1.0
        change = (made(moved) - made(x)).abs().amax(-1)  # [2 T]
        holds(change[0, place] > 0, f"the output at position {place} ignores its own input")
        change[0, place] = 0
        holds(not change.gt(1e-12).any(), f"input {place} moved an output at another position or in another row")


@prop(
    "The gain must scale the last layer's weights and no others: it sets how much is added to the residual stream.",
    seed=seeds,
    gain=st.sampled_from([0.0, 0.25, 0.5, 2.0]),
)
def the_gain_scales_only_the_last_layer(built: Built, seed: int, gain: float) -> None:
    for thing in (built.FeedForward, built.GatedFeedForward):
        one, other = _made(thing, seed, 4, 6), _made(thing, seed, 4, 6, gain=gain)
        for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
            expected = gain * p if name == "down.weight" else p
            equal(q, expected, f"{name} with a gain of {gain:g}", rtol=1e-5, atol=1e-7)


@prop(
    "Probes and faults find nothing at a site that is not tapped, or is tapped in another order.",
    seed=seeds,
    examples=3,
)
def taps_hidden_gate_and_out(built: Built, seed: int) -> None:
    x = normal(seed, 1, 3, 4)
    within = {"hidden": "B T F", "out": "B T C"}
    for thing, sites in ((built.FeedForward, within), (built.GatedFeedForward, {"gate": "B T F", **within})):
        made = _made(thing, seed, 4, 8)
        holds(dict(made.SITES) == sites, f"the sites are {dict(made.SITES)}, expected {sites}")
        linear = ("gate.out", "gate", "up.out", "hidden") if "gate" in sites else ("up.out", "hidden")
        explicit_taps(made, (*linear, "down.out", "out"), x)
        equal(tapped(made, x)["out"], made(x), "what passes out")
