"""What any quantization to few bits, and a model quantized by it, must do."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lab.errors import BadInput
from lab.projects.decoder.component import Decoder
from lab.projects.linear.component import Linear
from lab.spec import Built, Mismatch, equal, explicit_taps, floats, gradients, holds, near, normal, prop, seeds

if TYPE_CHECKING:
    from collections.abc import Callable

Group = Any  # "tensor", "row" or a number

rows, widths = st.integers(1, 6), st.integers(1, 40)
every_bits = st.integers(2, 8)
groups = st.sampled_from(["tensor", "row", 1, 3, 32])
schemes = st.sampled_from(["int8-tensor", "int8-row", "int4-tensor", "int4-row", "int4-group32"])


def _limit(bits: int) -> int:
    return (1 << (bits - 1)) - 1


def _refused(call: Callable[[], object], what: str) -> None:
    try:
        call()
    except (BadInput, ValueError):
        return
    raise Mismatch(f"{what} was not refused")


def _pieces(x: Tensor, group: Group) -> list[Tensor]:
    """What shares a scale, one piece after another, for x [N W]."""
    if group == "tensor":
        return [x.reshape(-1)]
    each = x.shape[1] if group == "row" else group
    return [piece for row in x for piece in row.split(each)]


def _linear(seed: int, inputs: int, outputs: int, *, bias: bool = True) -> Linear:
    made = Linear(inputs, outputs, bias=bias).double()
    with torch.no_grad():
        made.weight.copy_(normal(seed, outputs, inputs))
        if made.bias is not None:
            made.bias.copy_(normal(seed + 1, outputs))
    return made


def _decoder(seed: int, *, tied: bool) -> Decoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Decoder(17, context=12, layers=2, width=32, heads=2, tied=tied)


@prop(
    "An entry moved by more than half a step of its scale: codes are cut off, not rounded, or belong to another scale.",
    seed=seeds,
    count=rows,
    width=widths,
    bits=every_bits,
    group=groups,
    size=st.sampled_from([1e-6, 1.0, 1e6]),
)
def the_error_is_at_most_half_a_step(
    built: Built, seed: int, count: int, width: int, bits: int, group: Group, size: float
) -> None:
    x = normal(seed, count, width, scale=size)
    back = built.quantize(x, bits, group=group).dequantize()
    holds(back.shape == x.shape, f"a tensor of shape {list(x.shape)} came back as {list(back.shape)}")
    for was, now in zip(_pieces(x, group), _pieces(back, group), strict=True):
        step = float(was.abs().max()) / _limit(bits)
        worst = float((was - now).abs().max())
        holds(worst <= (0.5 + 1e-6) * step, f"the largest error is {worst / step:.4g} steps, expected at most 0.5")


@prop(
    "The scale is not the largest entry of its group over 2^(bits-1) - 1: a code too many, or another's largest.",
    seed=seeds,
    count=rows,
    width=widths,
    bits=every_bits,
    group=groups,
)
def the_largest_entry_gets_the_largest_code(
    built: Built, seed: int, count: int, width: int, bits: int, group: Group
) -> None:
    x = normal(seed, count, width)
    made = built.quantize(x, bits, group=group)
    expected = torch.stack([piece.abs().max() / _limit(bits) for piece in _pieces(x, group)])
    equal(made.scale.reshape(-1), expected, "the scales, row by row")
    for piece in _pieces(made.codes, group):
        holds(int(piece.abs().max()) == _limit(bits), f"the largest code of a group is {int(piece.abs().max())}")


@prop(
    "Codes must be int8, stay within +-(2^(bits-1) - 1), and change sign with the tensor: -128 has no partner.",
    seed=seeds,
    bits=every_bits,
    group=groups,
    dtype=floats,
)
def codes_are_symmetric_and_in_range(built: Built, seed: int, bits: int, group: Group, dtype: torch.dtype) -> None:
    # Multiples of a half: many ties. And numbers near the two ends.
    x = torch.cat([(4 * normal(seed, 3, 20)).round() / 2, normal(seed + 1, 3, 20, scale=30.0)], dim=1).to(dtype)
    made, mirrored = (built.quantize(sign * x, bits, group=group) for sign in (1, -1))
    holds(made.codes.dtype == torch.int8, f"codes are {made.codes.dtype}, not torch.int8")
    holds(made.codes.shape == x.shape, f"codes have shape {list(made.codes.shape)}, the tensor {list(x.shape)}")
    low, high = int(made.codes.min()), int(made.codes.max())
    holds(-_limit(bits) <= low and high <= _limit(bits), f"codes of {bits} bits run from {low} to {high}")
    equal(mirrored.codes, -made.codes, "the codes of -x")


@prop(
    "Values differ from torch's own fake quantization with the same scales: look at ties, which go to the even code.",
    seed=seeds,
    count=rows,
    width=widths,
    bits=every_bits,
    shift=st.integers(-6, 6),
)
def equals_torch_at_exact_scales(built: Built, seed: int, count: int, width: int, bits: int, shift: int) -> None:
    step, limit = 2.0**shift, _limit(bits)
    draw = torch.Generator().manual_seed(seed)
    x = torch.randint(-4 * limit, 4 * limit + 1, (count, width), generator=draw) * (step / 4)  # quarters of a step
    x[:, 0] = limit * step  # so that the scale is a power of two, and nothing else is rounded
    whole = torch.fake_quantize_per_tensor_affine(x, step, 0, -limit, limit)
    steps, zeros = torch.full((count,), step), torch.zeros(count, dtype=torch.int32)
    each = torch.fake_quantize_per_channel_affine(x, steps, zeros, 0, -limit, limit)
    equal(built.quantize(x, bits, group="tensor").dequantize(), whole, "per tensor", rtol=0, atol=0)
    equal(built.quantize(x, bits, group="row").dequantize(), each, "per row", rtol=0, atol=0)


@prop(
    "The mean squared error is not near s^2/12, that of errors evenly spread over a step: rounding favours one side.",
    seed=seeds,
    group=st.sampled_from(["tensor", "row"]),
    examples=5,
)
def the_mean_squared_error_is_that_of_rounding(built: Built, seed: int, group: Group) -> None:
    x = normal(seed, 64, 512)
    made = built.quantize(x, 8, group=group)
    error = made.dequantize() - x
    near((error.square() / (made.scale**2 / 12)).mean(), 1.0, 0.05, "mean squared error over s^2/12")
    near((error / made.scale).mean(), 0.0, 0.01, "mean error over s")


@prop(
    "Multiples of the scale must come back bit by bit, and what came back once must get the same codes again.",
    seed=seeds,
    bits=every_bits,
    group=groups,
)
def what_was_quantized_once_stays(built: Built, seed: int, bits: int, group: Group) -> None:
    limit = _limit(bits)
    draw = torch.Generator().manual_seed(seed)
    x = torch.randint(-limit, limit + 1, (4, 35), generator=draw).double() / 8
    x[:, ::3], x[:, 34] = limit / 8, -limit / 8  # each group of 3 or more holds the largest
    if group != 1:
        equal(built.quantize(x, bits, group=group).dequantize(), x, "multiples of the scale", rtol=0, atol=0)
    once = built.quantize(normal(seed, 4, 35), bits, group=group)
    again = built.quantize(once.dequantize(), bits, group=group)
    equal(again.codes, once.codes, "the codes of what was quantized before")
    equal(again.dequantize(), once.dequantize(), "what came back a second time")


@prop(
    "Rows, groups or the last, shorter group are mixed up: each piece must be quantized as if it were alone.",
    seed=seeds,
    count=rows,
    width=widths,
    group=st.sampled_from(["row", 1, 3, 7, 32]),
)
def each_group_is_quantized_alone(built: Built, seed: int, count: int, width: int, group: Group) -> None:
    x = normal(seed, count, width) * torch.logspace(-3, 3, count * width, dtype=torch.float64).view(count, width)
    made = built.quantize(x, 8, group=group)
    alone = [built.quantize(piece, 8, group="tensor") for piece in _pieces(x, group)]
    for name, whole, parts in (
        ("codes", made.codes, [part.codes for part in alone]),
        ("values", made.dequantize(), [part.dequantize() for part in alone]),
    ):
        equal(whole.reshape(-1), torch.cat(parts), f"the {name}, against those of each piece alone")
    stacked = torch.stack([x, 2 * x])  # [2 N W]: a row is the last axis, however many there are before it
    equal(built.quantize(stacked, 8, group=group).codes[1], made.codes, "the codes of the second of two matrices")


def _denormal(built: Built, bits: int, group: Group, dtype: torch.dtype) -> None:
    """Numbers so small that the largest over the limit, 1.45 of the least there is, would be rounded by a third."""
    info = torch.finfo(dtype)
    x = torch.full((2, 3), round(1.45 * _limit(bits)) * info.eps, dtype=dtype) * info.tiny
    made = built.quantize(x, bits, group=group)
    holds(int(made.codes.abs().max()) <= _limit(bits), f"entries of {float(x[0, 0]):.3g} have codes beyond the limit")
    holds(
        ((made.dequantize() - x).abs() <= x).all(), f"entries of {float(x[0, 0]):.3g} came back farther off than 0 is"
    )


@prop(
    "A row of zeros divided 0 by 0, a tiny scale was rounded, or huge, empty, scalar or strided tensors upset it.",
    group=groups,
    bits=every_bits,
    dtype=floats,
)
def zeros_and_extremes_come_back(built: Built, group: Group, bits: int, dtype: torch.dtype) -> None:
    exact = torch.promote_types(dtype, torch.float32)
    x = torch.zeros(3, 5, dtype=dtype)
    made = built.quantize(x, bits, group=group)
    equal(made.dequantize(), x.to(exact), "zeros", rtol=0, atol=0)
    holds((made.scale > 0).all(), f"the scale of zeros is {float(made.scale.min()):.3g}, by which they were divided")
    _denormal(built, bits, group, exact)
    info = torch.finfo(dtype)
    for size in (info.max / 2, info.tiny, info.tiny / 4):  # the last is denormal
        x[1] = torch.tensor([1.0, -1.0, 0.5, 0.0, 1.0], dtype=dtype) * size
        back = built.quantize(x, bits, group=group).dequantize()
        step = max(float(x.abs().max()) / _limit(bits), torch.finfo(exact).tiny)
        worst = float((back.double() - x.double()).abs().max())
        holds(worst <= 0.51 * step, f"entries of {size:.3g} came back with an error of {worst / step:.3g} steps")
    for shape in ((), (1,), (0,), (0, 3), (3, 0), (2, 1, 3)):
        x = normal(0, math.prod(shape), dtype=dtype).view(shape)
        back = built.quantize(x, 8, group=group).dequantize()
        equal(back, x.to(exact), f"shape {list(shape)}", rtol=0, atol=0.02 * float(x.double().abs().sum()) + 1e-9)
    strided = normal(1, 5, 4, dtype=dtype).t()
    equal(built.quantize(strided, 8, group=group).codes, built.quantize(strided.contiguous(), 8, group=group).codes)


@prop(
    "Inf, NaN, bits that an int8 cannot hold, groups of no entries and tensors of integers must be refused.",
    place=st.integers(0, 11),
    value=st.sampled_from([math.inf, -math.inf, math.nan]),
    group=groups,
)
def what_has_no_scale_is_refused(built: Built, place: int, value: float, group: Group) -> None:
    x = normal(0, 3, 4)
    x.view(-1)[place] = value
    _refused(lambda: built.quantize(x, 8, group=group), f"{value} at place {place}")
    fine = normal(0, 3, 4)
    for bits in (-1, 0, 1, 9, 16):
        _refused(partial(built.quantize, fine, bits, group=group), f"bits = {bits}")
    for wrong in (0, -3, "column"):
        _refused(partial(built.quantize, fine, 8, group=wrong), f"group = {wrong!r}")
    _refused(lambda: built.quantize(torch.ones(3, 4, dtype=torch.int64), 8, group=group), "a tensor of integers")


@prop(
    "Two codes of 4 bits a byte did not come back: signs, an odd number of them, or which of the two comes first.",
    codes=st.lists(st.integers(-8, 7), max_size=9),
)
def packing_int4_is_undone(built: Built, codes: list[int]) -> None:
    given = torch.tensor(codes, dtype=torch.int8)
    packed = built.pack_int4(given)
    filled = [*codes, 0]
    pairs = [(filled[i] & 15) + 16 * (filled[i + 1] & 15) for i in range(0, len(codes), 2)]
    equal(packed, torch.tensor(pairs, dtype=torch.uint8), "the bytes")
    equal(built.unpack_int4(packed, len(codes)), given, "what was unpacked")
    for wrong in (8, -9, 127, -128):
        bad = torch.tensor([*codes, wrong], dtype=torch.int8)
        _refused(partial(built.pack_int4, bad), f"a code of {wrong}, which 4 bits do not hold,")


@prop(
    "A scheme is not what its name says, or bytes are counted wrongly: codes of 4 bits take half a byte, a scale 4.",
    scheme=schemes,
    count=st.integers(1, 5),
    width=st.integers(1, 70),
)
def bytes_are_those_of_codes_and_scales(built: Built, scheme: str, count: int, width: int) -> None:
    bits, group = built.SCHEMES[scheme]
    per_row = {"tensor": 0, "row": 1, "group32": -(-width // 32)}[scheme.partition("-")[2]]
    scales = count * per_row or 1
    expected = (count * width if scheme.startswith("int8") else (count * width + 1) // 2) + 4 * scales
    weight = normal(0, count, width, dtype=torch.float32)
    got = built.quantize(weight, bits, group=group).bytes
    holds(got == expected, f"{scheme} of [{count} {width}] takes {got} bytes, expected {expected}")
    layer = Linear(width, count)
    kept = built.weight_bytes(built.QuantizedLinear.of(layer, bits, group))
    holds(kept == expected + 4 * count, f"a layer in {scheme} takes {kept} bytes, expected {expected + 4 * count}")


@prop(
    "A quantized layer must be the linear layer of its dequantized weight: the bias, transpose or codes are off.",
    seed=seeds,
    scheme=schemes,
    inputs=st.integers(1, 40),
    outputs=st.integers(1, 6),
    bias=st.booleans(),
)
def a_layer_multiplies_by_what_its_codes_stand_for(
    built: Built, seed: int, scheme: str, inputs: int, outputs: int, bias: bool
) -> None:
    bits, group = built.SCHEMES[scheme]
    linear = _linear(seed, inputs, outputs, bias=bias)
    made = built.QuantizedLinear.of(linear, bits, group)
    weight = built.quantize(linear.weight.detach(), bits, group=group).dequantize()
    for x in (
        normal(seed, 2, 3, inputs),
        normal(seed, inputs),
        normal(seed, 2, 0, inputs),
        normal(seed, inputs, 4).t(),
    ):
        equal(made(x), F.linear(x, weight, linear.bias), f"a layer in {scheme} for shape {list(x.shape)}")
    half = made.to(torch.bfloat16)(normal(seed, 3, inputs, dtype=torch.bfloat16))
    holds(half.dtype == torch.bfloat16, f"the output of a bfloat16 input is {half.dtype}")


@prop(
    "A quantized layer must let gradients through to its input, tap its output once, and keep its codes when saved.",
    seed=seeds,
    scheme=schemes,
    examples=5,
)
def a_layer_has_gradients_taps_and_a_state(built: Built, seed: int, scheme: str) -> None:
    bits, group = built.SCHEMES[scheme]
    made, other = (built.QuantizedLinear.of(_linear(seed + i, 5, 3), bits, group) for i in range(2))
    x = normal(seed, 1, 2, 5)
    gradients(made, x)
    explicit_taps(made, ("out",), x)
    other.load_state_dict(made.state_dict())
    equal(other(x), made(x), "the output after its state was loaded")
    equal(copy.deepcopy(made)(x), made(x), "the output of a copy")


@prop(
    "In the copy each Linear must be quantized and nothing else; a tied head and the model itself stay as they are.",
    seed=seeds,
    tied=st.booleans(),
    examples=5,
)
def a_model_is_copied_and_its_linears_quantized(built: Built, seed: int, tied: bool) -> None:
    model = _decoder(seed, tied=tied)
    before = copy.deepcopy(model.state_dict())
    made = built.quantize_model(model, 8, "row")
    left = [name for name, module in made.named_modules() if isinstance(module, Linear)]
    holds(left == (["head"] if tied else []), f"still linear layers: {', '.join(left) or 'none, not even a tied head'}")
    for name, module in model.named_modules():
        if isinstance(module, Linear) and not (tied and name == "head"):
            quantized = made.get_submodule(name)
            holds(isinstance(quantized, built.QuantizedLinear), f"{name} became a {type(quantized).__name__}")
            expected = built.quantize(module.weight.detach(), 8, group="row").dequantize()
            equal(quantized.weight, expected, f"the weight of {name}")
    holds(not tied or made.head.weight is made.tokens.weight, "the head is no longer tied to the embedding")
    with torch.no_grad():
        for p in made.parameters():
            p.zero_()
    for name, value in model.state_dict().items():
        equal(value, before[name], f"{name} of the model that was copied", rtol=0, atol=0)
    alone = built.quantize_model(nn.Sequential(_linear(seed, 4, 3)), 4, 2)(normal(seed, 2, 4))
    single = built.quantize_model(_linear(seed, 4, 3), 4, 2)(normal(seed, 2, 4))
    equal(single, alone, "a model that is one linear layer")


@prop(
    "The logits of the quantized model are far from the model's, or it is no smaller: a layer has lost its scales.",
    seed=seeds,
    tied=st.booleans(),
    examples=5,
)
def logits_stay_close_and_weights_shrink(built: Built, seed: int, tied: bool) -> None:
    model = _decoder(seed, tied=tied)
    tokens = torch.randint(17, (2, 12), generator=torch.Generator().manual_seed(seed))
    size = built.weight_bytes(model)
    expected = sum(4 * p.numel() for p in model.parameters())
    holds(size == expected, f"the model takes {size} bytes, expected {expected}")
    with torch.no_grad():
        logits = model(tokens)
        for scheme, least, share in (("int8-row", 30.0, 0.4), ("int4-group32", 6.0, 0.3)):
            bits, group = built.SCHEMES[scheme]
            made = built.quantize_model(model, bits, group)
            got = built.signal_to_noise(logits, made(tokens))
            holds(got > least, f"logits in {scheme} have {got:.1f} dB, expected at least {least:.0f}")
            shrunk = built.weight_bytes(made) / size
            holds(shrunk < share, f"in {scheme} the model takes {shrunk:.2f} of its bytes, expected below {share}")


@prop(
    "Signal over noise must be 10 log10(sum x^2 / sum (x - y)^2), inf for equal tensors: a root, a sign or the order.",
    seed=seeds,
    db=st.sampled_from([-20.0, 0.0, 3.0, 60.0]),
)
def signal_to_noise_is_in_decibels(built: Built, seed: int, db: float) -> None:
    x, noise = normal(seed, 3, 5), normal(seed + 1, 3, 5)
    noise = noise * (x.norm() / noise.norm()) * 10 ** (-db / 20)
    near(built.signal_to_noise(x, x + noise), db, 1e-6, "the ratio")
    near(built.signal_to_noise(1000 * x, 1000 * (x + noise)), db, 1e-6, "the ratio of both times 1000")
    holds(built.signal_to_noise(x, x.clone()) == math.inf, "equal tensors have no infinite ratio")
