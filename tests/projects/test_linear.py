"""The linear layer against `F.linear`, its gradients, and what its initialiser promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lab.projects.linear.component import Linear
from lab.sites import sites_of

quick = settings(max_examples=25, deadline=None, derandomize=True, database=None)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layer(seed: int, inputs: int, outputs: int, *, bias: bool = True) -> Linear:
    made = Linear(inputs, outputs, bias=bias).double()
    with torch.no_grad():
        made.weight.copy_(normal(seed, outputs, inputs))
        if made.bias is not None:
            made.bias.copy_(normal(seed + 1, outputs))
    return made


@quick
@given(
    st.lists(st.integers(0, 4), max_size=3),
    st.integers(1, 9),
    st.integers(1, 9),
    st.booleans(),
    st.integers(0, 999),
)
def test_equals_the_operator_of_torch_for_any_leading_shape(
    lead: list[int], inputs: int, outputs: int, bias: bool, seed: int
) -> None:
    made, x = layer(seed, inputs, outputs, bias=bias), normal(seed + 2, *lead, inputs)
    expected = F.linear(x, made.weight, made.bias)
    assert made(x).shape == expected.shape == (*lead, outputs)
    torch.testing.assert_close(made(x), expected, rtol=1e-12, atol=1e-12)


@quick
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 999))
def test_takes_inputs_that_are_not_contiguous(rows: int, inputs: int, seed: int) -> None:
    made, x = layer(seed, inputs, 3), normal(seed, inputs, rows, 2).permute(2, 1, 0)  # [2 rows inputs]
    torch.testing.assert_close(made(x), made(x.contiguous()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_finite_differences(bias: bool) -> None:
    made = layer(0, 3, 4, bias=bias)
    names, values = zip(*made.named_parameters(), strict=True)

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(made, dict(zip(names, parameters, strict=True)), (x,))  # type: ignore[no-any-return]

    x = normal(1, 2, 5, 3).requires_grad_()
    assert torch.autograd.gradcheck(call, (x, *values))


@pytest.mark.parametrize("gain", [0.5, 1.0, 2.0])
def test_outputs_have_gain_squared_times_the_mean_square_of_the_inputs(gain: float) -> None:
    torch.manual_seed(0)
    made = Linear(400, 400, gain=gain)
    x = 3.0 + 2.0 * normal(1, 100, 400, dtype=torch.float32)  # the mean square, 13, is not the variance, 4
    ratio = float(made(x).detach().square().mean() / (gain**2 * x.square().mean()))
    # The rows share a mean, so that 400 outputs are what the average is over: a spread of sqrt(2 / 400).
    assert ratio == pytest.approx(1.0, abs=4 * (2 / 400) ** 0.5)


def test_starts_with_a_bias_of_zero_or_none() -> None:
    bias = Linear(3, 4).bias
    assert bias is not None
    assert not bias.any()
    assert Linear(3, 4, bias=False).bias is None


def test_its_output_is_a_site() -> None:
    made, x = layer(0, 3, 4), normal(1, 2, 3)
    with sites_of(made).capture("out") as values:
        y = made(x)
    assert values["out"] is y
