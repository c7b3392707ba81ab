"""Project 6: recurrent networks.

Elman, 1990 (RNN); Hochreiter and Schmidhuber, 1997, with the forget gate of Gers et al., 2000 (LSTM); Cho et al., 2014
(GRU, with the reset gate after the matrix, as in torch.nn).
"""

from __future__ import annotations

from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor, nn

from lab.errors import BadInput, nearest
from lab.projects.linear.component import Linear
from lab.sites import Component


class Recurrence(Component):
    """What the three have in common: weights as in torch.nn, and the projection of all positions at once.

    Args:
        inputs, hidden: The widths C and F. Weights on inputs are normal with standard deviation ``1 / sqrt(inputs)``;
            those on the state are orthogonal, gate by gate; biases are 0.

    Attributes:
        GATES: G, how many blocks of `hidden` rows are stacked in each weight.
    """

    # The last dimension of what is projected is G x F. A fault there reaches every later state; one in `states`
    # changes what is returned, not what the loop carries on.
    SITES = MappingProxyType({"projected": "B T F", "states": "B T F"})
    GATES: ClassVar[int] = 1

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.weight_ih = nn.Parameter(torch.empty(self.GATES * hidden, inputs))
        self.weight_hh = nn.Parameter(torch.empty(self.GATES * hidden, hidden))
        self.bias_ih = nn.Parameter(torch.zeros(self.GATES * hidden))
        self.bias_hh = nn.Parameter(torch.zeros(self.GATES * hidden))
        nn.init.normal_(self.weight_ih, std=inputs**-0.5)
        for block in self.weight_hh.detach().chunk(self.GATES):  # [F F] each, a view of the parameter
            nn.init.orthogonal_(block)

    def project(self, x: Tensor, bias: Tensor) -> Tensor:  # [B T C], [G*F] -> [B T G*F]
        """Multiply all positions by the input weights: nothing here waits for a state, so it is one matmul."""
        rows = x.reshape(-1, x.shape[-1])  # [B*T C]
        projected = torch.addmm(bias, rows, self.weight_ih.t())  # [B*T G*F]
        return self.tap("projected", projected.view(*x.shape[:-1], len(self.weight_ih)))

    def zeros(self, x: Tensor) -> Tensor:  # [B T C] -> [B F]
        """Return the state before the first position."""
        return x.new_zeros(x.shape[0], self.hidden)

    def join(self, states: list[Tensor], x: Tensor) -> Tensor:  # T of [B F] -> [B T F]
        """Put the states side by side; of no positions there are none to stack."""
        joined = torch.stack(states, dim=1) if states else x.new_zeros(x.shape[0], 0, self.hidden)
        return self.tap("states", joined)


class RNN(Recurrence):
    """``h' = tanh(W x + U h + b)``."""

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:  # [B T C] -> [B T F], [B F]
        """Run over the positions from a state (zeros if None); return every state and the last."""
        h = self.zeros(x) if state is None else state  # [B F]
        weight = self.weight_hh.t()  # [F F]
        states = []
        # `unbind` rather than an index at each step, whose backward would fill a [B T F] of zeros every time.
        for part in self.project(x, self.bias_ih + self.bias_hh).unbind(1):  # [B F]
            h = torch.tanh(torch.addmm(part, h, weight))
            states.append(h)
        return self.join(states, x), h


class GRU(Recurrence):
    """Gates r (how much of the past the new content sees) and z (how much of the state stays), new content n."""

    GATES = 3

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:  # [B T C] -> [B T F], [B F]
        """Run over the positions from a state (zeros if None); return every state and the last."""
        h = self.zeros(x) if state is None else state  # [B F]
        weight = self.weight_hh.t()  # [F 3*F]
        states = []
        # The state's bias cannot join the input's: that of n is inside what r multiplies.
        for part in self.project(x, self.bias_ih).unbind(1):  # [B 3*F]
            xr, xz, xn = part.chunk(3, dim=-1)  # [B F] each
            hr, hz, hn = torch.addmm(self.bias_hh, h, weight).chunk(3, dim=-1)  # [B F] each
            r = torch.sigmoid(xr + hr)
            z = torch.sigmoid(xz + hz)
            n = torch.tanh(xn + r * hn)
            h = n + z * (h - n)  # (1 - z) n + z h, with one product fewer
            states.append(h)
        return self.join(states, x), h


class LSTM(Recurrence):
    """Gates i, f, o and new content g; the cell c is a sum that only the forget gate f scales down.

    Args:
        inputs, hidden: As in `Recurrence`.
        forget_bias: Of the forget gate at the start, in ``bias_ih`` (Jozefowicz et al., 2015); ``bias_hh`` is 0.
    """

    GATES = 4

    def __init__(self, inputs: int, hidden: int, *, forget_bias: float = 1.0) -> None:
        super().__init__(inputs, hidden)
        nn.init.constant_(self.bias_ih.detach()[hidden : 2 * hidden], forget_bias)

    def forward(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # [B T C] -> [B T F], ([B F], [B F])
        """Run over the positions from a state h and c (zeros if None); return every h, and the last h and c."""
        h, c = (self.zeros(x), self.zeros(x)) if state is None else state  # [B F] each
        weight = self.weight_hh.t()  # [F 4*F]
        states = []
        for part in self.project(x, self.bias_ih + self.bias_hh).unbind(1):  # [B 4*F]
            i, f, g, o = torch.addmm(part, h, weight).chunk(4, dim=-1)  # [B F] each
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            states.append(h)
        return self.join(states, x), (h, c)


KINDS: MappingProxyType[str, type[Recurrence]] = MappingProxyType({"rnn": RNN, "gru": GRU, "lstm": LSTM})


class RecurrentMixer(Component):
    """A recurrence where attention stands in a block: it mixes positions, and sees none that is later.

    Args:
        width: C, of the input, the state and the output.
        kind: ``rnn``, ``gru`` or ``lstm``.
        gain: Of the output projection, whose output is added to the residual stream.

    Raises:
        BadInput: There is no such kind.
    """

    SITES = MappingProxyType({"out": "B T C"})

    def __init__(self, width: int, *, kind: str = "gru", gain: float = 1.0) -> None:
        super().__init__()
        if kind not in KINDS:
            raise BadInput(f"no recurrence is called {kind!r}{nearest(kind, KINDS)}")
        self.core = KINDS[kind](width, width)
        self.proj = Linear(width, width, gain=gain)

    def forward(self, x: Tensor) -> Tensor:  # [B T C] -> [B T C]
        """Run over the positions, project each state."""
        states, _ = self.core(x)  # [B T C]
        return self.tap("out", self.proj(states))
