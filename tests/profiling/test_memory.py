"""Bytes in memory: by what they are for, from when to when, and at the peak."""

from __future__ import annotations

import torch
from torch import nn

from lab.profiling.counting import Counter
from lab.profiling.memory import KINDS, Ledger
from lab.profiling.places import Place, Places

N, M, B = 30, 20, 10
BYTES = 4


def followed(model: nn.Module, inputs: torch.Tensor) -> Ledger:
    """One step of a model that has been trained for one."""
    optimizer = torch.optim.AdamW(model.parameters())
    for followed_now in (False, True):
        ledger = Ledger(model, optimizer)
        counter = Counter(ledger)
        optimizer.zero_grad()
        with Places(model) as places:
            if followed_now:
                places.follow(counter)
                with counter:
                    model(inputs).square().mean().backward()
                    ledger.updates()
                    optimizer.step()
            else:
                model(inputs).square().mean().backward()
                optimizer.step()
    ledger.updates()
    ledger.close()
    return ledger


def test_every_kind_is_what_it_should_be() -> None:
    ledger = followed(nn.Sequential(nn.Linear(N, M), nn.Tanh(), nn.Linear(M, 1)), torch.randn(B, N))
    lines = ledger.timeline()
    weights = BYTES * (N * M + M + M + 1)
    assert set(lines["parameters"]) == {weights}
    assert lines["gradients"][-1] == weights
    assert lines["optimizer"][-1] == 2 * weights + 4 * BYTES  # two moments, and four counters of steps
    # Kept for the way back: the tanh's output, the model's answer; its input is a view of the batch's memory.
    assert max(lines["activations"]) >= BYTES * (B * M + B)
    assert lines["activations"][-1] <= BYTES * (B * M + 2 * B + 1)


def test_what_is_let_go_of_is_gone() -> None:
    ledger = followed(nn.Sequential(*[nn.Linear(N, N) for _ in range(6)]), torch.randn(B, N))
    lines = ledger.timeline()
    kept = lines["activations"]
    assert kept[-1] < max(kept) / 2
    assert all(len(lines[kind]) == len(ledger.places) + 1 for kind in KINDS)
    assert all(size >= 0 for kind in KINDS for size in lines[kind])


def test_without_a_way_back_one_layer_is_there_at_a_time() -> None:
    depth = 8
    ledger = followed(nn.Sequential(*[nn.Linear(N, N, bias=False) for _ in range(depth)]), torch.randn(B, N))
    one = BYTES * B * N
    assert max(ledger.timeline()["activations"]) >= (depth - 1) * one
    assert 2 * one <= ledger.passing <= 3 * one


def test_the_peak_names_where_it_was_made() -> None:
    ledger = followed(nn.Sequential(nn.Linear(2, N), nn.Tanh(), nn.Linear(N, 1)), torch.randn(50 * B, 2))
    at_peak = {(name, kind): size for name, kind, size in ledger.held()}
    assert at_peak["1", "activations"] == BYTES * 50 * B * N
    totals = [*map(sum, zip(*ledger.timeline().values(), strict=True))]
    assert sum(at_peak.values()) == max(totals)


def test_a_view_is_no_memory_of_its_own() -> None:
    ledger = Ledger(nn.Linear(1, 1), torch.optim.SGD([nn.Parameter(torch.ones(1))]))
    x = torch.ones(100)
    before = ledger.alive
    ledger.made(Place("here"), [x, x[1:], x.view(10, 10)])
    assert ledger.alive - before == 400
    del x
    assert ledger.alive == before
