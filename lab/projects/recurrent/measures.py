"""Numbers of recurrent networks that theory knows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lab.projects.recurrent.component import GRU, LSTM, RNN, Recurrence
from lab.spec import measure, normal

LENGTH, WIDTH = 50, 32


def _jacobian_norm(matrix: Tensor) -> float:
    """Largest singular value of d h_T / d h_0 at the zero state, where tanh has slope 1: the recurrence is linear."""
    made = RNN(1, WIDTH).double()
    with torch.no_grad():
        made.weight_hh.copy_(matrix)
    x = torch.zeros(1, LENGTH, 1, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(  # type: ignore[no-untyped-call]
        lambda h: made(x, h[None])[1][0], torch.zeros(WIDTH, dtype=torch.float64)
    )  # [F F]
    return float(torch.linalg.matrix_norm(jacobian, 2))


def _orthogonal(seed: int) -> Tensor:
    q: Tensor = torch.linalg.qr(normal(seed, WIDTH, WIDTH))[0]
    return q


@measure("largest singular value of 50 Jacobians, orthogonal weights x 0.9; 0.9^50 = 0.0052")
def jacobian_at_0_9(seed: int) -> float:
    return _jacobian_norm(0.9 * _orthogonal(seed))


@measure("the same x 1.1; 1.1^50 = 117")
def jacobian_at_1_1(seed: int) -> float:
    return _jacobian_norm(1.1 * _orthogonal(seed))


@measure("the same with normal weights of spectral radius 0.9; above 0.0052, for they are no normal matrix")
def jacobian_of_normal_weights_at_0_9(seed: int) -> float:
    matrix = normal(seed, WIDTH, WIDTH)
    return _jacobian_norm(0.9 * matrix / torch.linalg.eigvals(matrix).abs().max())


def _forget_path(seed: int, bias: float) -> float:
    """Mean d c_T / d c_0 when every weight is 0: only the forget gate, at its bias, is left."""
    made = LSTM(1, WIDTH, forget_bias=bias).double()
    with torch.no_grad():
        made.weight_ih.zero_()
        made.weight_hh.zero_()
    c = normal(seed, 1, WIDTH).requires_grad_()
    _, (_, last) = made(torch.zeros(1, LENGTH, 1, dtype=torch.float64), (torch.zeros_like(c), c))
    (grad,) = torch.autograd.grad(last.sum(), c)
    return float(grad.mean())


@measure("d c_50 / d c_0 of an LSTM with forget bias 0; sigmoid(0)^50 = 8.9e-16")
def forget_path_at_0(seed: int) -> float:
    return _forget_path(seed, 0.0)


@measure("the same with forget bias 1; sigmoid(1)^50 = 1.6e-7")
def forget_path_at_1(seed: int) -> float:
    return _forget_path(seed, 1.0)


def _gap(kind: type[Recurrence], reference: Any, seed: int) -> float:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = kind(WIDTH, WIDTH)
    reference.load_state_dict({f"{name}_l0": value for name, value in made.state_dict().items()})
    x = normal(seed, 4, LENGTH, WIDTH, dtype=torch.float32)
    with torch.no_grad():
        return float((made(x)[0] - reference(x)[0]).abs().max())


@measure("largest distance from nn.RNN on the same weights over 50 positions, in float32; 0 but for rounding")
def rnn_error(seed: int) -> float:
    return _gap(RNN, nn.RNN(WIDTH, WIDTH, batch_first=True), seed)


@measure("largest distance from nn.GRU on the same weights over 50 positions, in float32; 0 but for rounding")
def gru_error(seed: int) -> float:
    return _gap(GRU, nn.GRU(WIDTH, WIDTH, batch_first=True), seed)


@measure("largest distance from nn.LSTM on the same weights over 50 positions, in float32; 0 but for rounding")
def lstm_error(seed: int) -> float:
    return _gap(LSTM, nn.LSTM(WIDTH, WIDTH, batch_first=True), seed)
