"""What any convolution must do."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from lab.sites import sites_of
from lab.spec import Built, equal, explicit_taps, gradients, holds, near, normal, prop, seeds, tapped

batches, widths, lengths, kernels = st.integers(1, 2), st.integers(1, 4), st.integers(1, 9), st.integers(1, 5)
strides, paddings, sides = st.integers(1, 3), st.integers(0, 2), st.integers(5, 8)


def _made(built: Built, name: str, seed: int, *sizes: int, **options: Any) -> Any:
    """Build one in float64 whose biases are not zero; leave torch's generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = getattr(built, name)(*sizes, **options).double()
    for place, (parameter, value) in enumerate(made.named_parameters()):
        if parameter.rpartition(".")[2] == "bias":
            value.data = normal(seed + 1000 + place, *value.shape)
    return made.requires_grad_(False)


def _paths(made: Any) -> tuple[tuple[str, Any], ...]:
    return (("forward", made), ("explicit", made.explicit))


def _formula(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """One position and one step back at a time: no padding at all."""
    kernel = weight.shape[-1]
    out = bias.expand(*x.shape[:2], len(bias)).clone()  # [B T outputs]
    for t in range(x.shape[1]):
        for back in range(min(kernel, t + 1)):
            out[:, t] += x[:, t - back] @ weight[..., kernel - 1 - back].t()
    return out


@prop(
    "A single 1 in the input must write the kernel into the output, the last entry first: it is flipped or shifted.",
    seed=seeds,
    kernel=kernels,
    place=st.integers(0, 3),
)
def an_impulse_gives_the_kernel_back(built: Built, seed: int, kernel: int, place: int) -> None:
    made = _made(built, "CausalConv1d", seed, 2, 3, kernel)
    x = torch.zeros(1, place + kernel + 1, 2, dtype=torch.float64)  # [1 T 2]
    x[0, place, 1] = 1.0
    expected = made.bias.expand(x.shape[1], 3).clone()  # [T 3]
    expected[place : place + kernel] += made.weight[:, 1].flip(-1).t()
    for name, path in _paths(made):
        equal(path(x)[0], expected, f"{name}'s response to an impulse at {place}")


@prop(
    "An output moved when a later input did: the zeros stand at the wrong end, or at both.",
    seed=seeds,
    length=st.integers(2, 9),
    kernel=kernels,
)
def no_output_depends_on_a_later_input(built: Built, seed: int, length: int, kernel: int) -> None:
    x = normal(seed, 1, length, 3)
    paths = (*_paths(_made(built, "CausalConv1d", seed, 3, 2, kernel)),)
    for name, path in (*paths, ("ConvMixer", _made(built, "ConvMixer", seed, 3, kernel=kernel))):
        before = path(x)
        for place in range(1, length):
            moved = x.clone()
            moved[:, place:] += 3.0
            after = path(moved)
            what = f"{name}'s output before position {place}"
            equal(after[:, :place], before[:, :place], what, rtol=0.0, atol=0.0)  # the same bits


@prop(
    "Values differ from those of F.conv1d on a left-padded input: look at the order of the kernel, and at the bias.",
    seed=seeds,
    batch=batches,
    length=lengths,
    inputs=widths,
    outputs=widths,
    kernel=kernels,
)
def causal_conv_equals_the_formula_and_torch(
    built: Built, seed: int, batch: int, length: int, inputs: int, outputs: int, kernel: int
) -> None:
    made, x = _made(built, "CausalConv1d", seed, inputs, outputs, kernel), normal(seed, batch, length, inputs)
    expected = _formula(x, made.weight, made.bias)
    rows = F.pad(x, (0, 0, kernel - 1, 0)).transpose(1, 2)  # [B inputs T+K-1]
    equal(F.conv1d(rows, made.weight, made.bias).transpose(1, 2), expected, "torch's own operator")
    for name, path in _paths(made):
        equal(path(x), expected, f"{name}'s output")


@prop(
    "Sequences shorter than the kernel, of one position or of none are sequences too: they must come out as long.",
    seed=seeds,
    length=st.integers(0, 3),
    kernel=st.integers(4, 6),
)
def takes_sequences_shorter_than_the_kernel(built: Built, seed: int, length: int, kernel: int) -> None:
    made, x = _made(built, "CausalConv1d", seed, 3, 2, kernel), normal(seed, 2, length, 3)
    for name, path in _paths(made):
        equal(path(x), _formula(x, made.weight, made.bias), f"{name}'s output")
    out = _made(built, "ConvMixer", seed, 3, kernel=kernel)(x)
    holds(out.shape == x.shape, f"ConvMixer makes {list(out.shape)} of {list(x.shape)}")


@prop(
    "Values differ from those of F.conv2d: look at stride, padding, and the order of channel, row and column.",
    seed=seeds,
    kernel=st.integers(1, 4),
    stride=strides,
    padding=paddings,
    height=sides,
    width=sides,
)
def conv2d_equals_torch(
    built: Built, seed: int, kernel: int, stride: int, padding: int, height: int, width: int
) -> None:
    made = _made(built, "Conv2d", seed, 2, 3, kernel, stride=stride, padding=padding)
    x = normal(seed, 2, 2, height, width)  # [B C H W]
    expected = F.conv2d(x, made.weight, made.bias, stride, padding)
    for name in ("conv2d_loops", "conv2d_im2col"):
        got = getattr(built, name)(x, made.weight, made.bias, stride=stride, padding=padding)
        equal(got, expected, f"{name}'s output")
    for name, path in _paths(made):
        equal(path(x), expected, f"Conv2d's output ({name})")


@prop(
    "The output size is not the number of places where the kernel fits: floor((n + 2 padding - kernel) / stride) + 1.",
    n=st.integers(5, 12),
    kernel=kernels,
    stride=strides,
    padding=paddings,
)
def output_size_counts_the_places(built: Built, n: int, kernel: int, stride: int, padding: int) -> None:
    places = len(range(-padding, n + padding - kernel + 1, stride))  # where a patch begins
    got = built.output_size(n, kernel, stride, padding)
    holds(got == places, f"output_size({n}, {kernel}, {stride}, {padding}) is {got}, expected {places}")


@prop(
    "A kernel is shared over all places: K^2 Cin Cout weights and Cout biases, K Cin Cout + Cout in one dimension.",
    inputs=widths,
    outputs=widths,
    kernel=kernels,
)
def parameters_do_not_grow_with_the_input(built: Built, inputs: int, outputs: int, kernel: int) -> None:
    for name, power in (("CausalConv1d", 1), ("Conv2d", 2)):
        got = sum(p.numel() for p in _made(built, name, 0, inputs, outputs, kernel).parameters())
        expected = kernel**power * inputs * outputs + outputs
        holds(got == expected, f"{name} has {got} parameters, expected {expected}")


@prop(
    "An output sums inputs x kernel products (kernel^2 in two dimensions): so many divide the weights' variance.",
    seed=seeds,
    kernel=st.integers(2, 5),
    gain=st.sampled_from([0.5, 1.0, 2.0]),
    examples=5,
)
def weights_start_with_the_fan_in_of_the_window(built: Built, seed: int, kernel: int, gain: float) -> None:
    # Over at least 8192 weights the standard deviation is known to about 0.8 %.
    line = _made(built, "CausalConv1d", seed, 64, 64, kernel, gain=gain).weight * (64 * kernel) ** 0.5
    near(float(line.std()), gain, 0.05 * gain, "std of CausalConv1d's weights x sqrt(inputs kernel)")
    plane = _made(built, "Conv2d", seed, 64, 64, kernel).weight * (64 * kernel**2) ** 0.5
    near(float(plane.std()), 1.0, 0.05, "std of Conv2d's weights x sqrt(inputs kernel^2)")


@prop(
    "Backward disagrees with the values: something is detached, or computed without gradient.", seed=seeds, examples=5
)
def gradients_are_those_of_finite_differences(built: Built, seed: int) -> None:
    line, x = _made(built, "CausalConv1d", seed, 2, 2, 3), normal(seed, 1, 4, 2)

    def with_parameters(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return functional_call(line, {"weight": weight, "bias": bias}, (x,))

    gradients(with_parameters, x, line.weight, line.bias)
    image, weight, bias = normal(seed, 1, 2, 4, 4), normal(seed + 1, 2, 2, 2, 2), normal(seed + 2, 2)
    gradients(lambda *given: built.conv2d_loops(*given, stride=2, padding=1), image, weight, bias)
    gradients(lambda *given: built.conv2d_im2col(*given, stride=2, padding=1), image, weight, bias)
    gradients(line.explicit, x)
    sites_of(line).replace("windows", lambda windows: windows)  # the explicit path, parameters and all
    gradients(with_parameters, x, line.weight, line.bias)


@prop("Memory order is no part of the values: a view was made where the layout does not allow it.", seed=seeds)
def takes_inputs_that_are_not_contiguous(built: Built, seed: int) -> None:
    line, x = _made(built, "CausalConv1d", seed, 3, 2, 3), normal(seed, 2, 3, 6).transpose(1, 2)  # [B T C], strided
    for name, path in _paths(line):
        equal(path(x), path(x.contiguous()), f"{name}'s output")
    mixer = _made(built, "ConvMixer", seed, 3)
    equal(mixer(x), mixer(x.contiguous()), "ConvMixer's output")
    image = normal(seed, 2, 5, 6, 3).permute(0, 3, 1, 2)  # [B C H W], channels last
    plane = _made(built, "Conv2d", seed, 3, 2, 3, padding=1)
    for name, path in _paths(plane):
        equal(path(image), path(image.contiguous()), f"Conv2d's output ({name})")


@prop(
    "The mixer must multiply what it convolved by gates in 0..1, and end in a projection that `gain` scales.",
    seed=seeds,
    gain=st.sampled_from([0.0, 0.5, 2.0]),
)
def the_mixer_gates_and_ends_in_its_gain(built: Built, seed: int, gain: float) -> None:
    x = normal(seed, 2, 6, 4)
    made = _made(built, "ConvMixer", seed, 4)
    seen = tapped(made, x)
    holds(((seen["gate"] > 0) & (seen["gate"] < 1)).all(), "a gate is not between 0 and 1")
    equal(seen["gated"], made.conv(x) * seen["gate"], "what passes the gate")
    scaled, nothing = _made(built, "ConvMixer", seed, 4, gain=gain), torch.zeros_like(x)
    for each in (made, scaled):
        each.proj.bias.zero_()
    equal(scaled(x), gain * made(x) if gain else nothing, f"the output with gain {gain}", rtol=1e-5, atol=1e-6)


@prop(
    "Probes and faults find nothing at a site that is not tapped, or a fault at it does not reach the output.",
    seed=seeds,
    examples=3,
)
def taps_windows_patches_and_gates(built: Built, seed: int) -> None:
    line, plane = _made(built, "CausalConv1d", seed, 2, 3, 3), _made(built, "Conv2d", seed, 2, 3, 3)
    x, image = normal(seed, 2, 5, 2), normal(seed, 2, 2, 5, 5)
    explicit_taps(line, ("windows", "out"), x)
    explicit_taps(plane, ("patches", "out"), image)
    own = [name for name in tapped(_made(built, "ConvMixer", seed, 2), x) if "." not in name]
    holds(own == ["gate", "gated", "out"], f"the mixer's own sites tapped are {own}; expected gate, gated, out")
    sites_of(line).replace("windows", torch.zeros_like)
    equal(line(x), line.bias.expand(2, 5, 3), "the output where a fault makes every window 0")
    sites_of(plane).replace("patches", torch.zeros_like)
    equal(plane(image), plane.bias[:, None, None].expand(2, 3, 3, 3), "the output where a fault makes every patch 0")
