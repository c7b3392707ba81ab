"""Evaluations between the steps of a loop: how many of their answers hold a graph that nobody asks for."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from lab.context import first_tensor
from lab.errors import NotChecked
from lab.session import SOON


class Evaluations:
    """Counts the graphs that an evaluation builds in vain: its answers require a gradient, and none is computed."""

    def __init__(self) -> None:
        self._graphs = 0  # of the evaluation that goes on
        self._rounds = 0  # evaluations that had any

    def answered(self, output: Any) -> None:
        """Note an answer of the model outside of training."""
        if torch.is_grad_enabled():
            with contextlib.suppress(NotChecked):
                self._graphs += first_tensor(output).requires_grad

    def differentiated(self) -> None:
        """Note that the answers may have been wanted for their gradients."""
        self._graphs = 0

    def end(self) -> int:
        """Training goes on: return how many graphs were built in vain, once it is the third evaluation that does."""
        graphs, self._graphs = self._graphs, 0
        self._rounds += bool(graphs)
        return graphs if self._rounds >= SOON else 0
