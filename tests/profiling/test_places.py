"""Where a step is: each moment belongs to one place, on the way back too."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lab.profiling.places import DATA, LOOP, LOSS, UPDATE, WATCHING, Place, Places, _owners


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.second(torch.relu(self.first(x)))
        return out


def passed(model: nn.Module, train: object) -> list[Place]:
    """The places that a training goes through, each once for a stay."""
    seen: list[Place] = []
    with Places(model) as places:
        places.follow(seen.append)
        train()  # type: ignore[operator]
    kept = [place for place in seen if place != WATCHING]
    return [place for i, place in enumerate(kept) if i == 0 or place != kept[i - 1]]


def test_a_step_goes_through_its_places_in_order() -> None:
    model = nn.Sequential(Block(), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters())

    def step() -> None:
        model(torch.randn(3, 4)).sum().backward()
        optimizer.step()

    back = [Place(name, "backward") for name in ("1", "0", "0.second", "0", "0.first")]
    forward = [
        Place(name, "forward") for name in ("model", "0", "0.first", "0", "0.second", "0", "model", "1", "model")
    ]
    assert passed(model, step) == [*forward, LOOP, LOSS, *back, LOOP, UPDATE, LOOP]


def test_the_time_of_a_checkpointed_layer_is_its_own() -> None:
    model = nn.Sequential(Block(), Block())

    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.inner[1], self.inner[0](x), use_reentrant=False)  # type: ignore[no-any-return]

    seen = passed(Again(), lambda: None)
    assert seen == []
    again = Again()
    seen = passed(again, lambda: again(torch.randn(3, 4, requires_grad=True)).sum().backward())
    loss = seen.index(LOSS)
    assert Place("inner.1.first", "forward") in seen[loss:]  # computed a second time, on the way back
    assert Place("inner.0.first", "backward") in seen[loss:]


def test_several_passes_in_one_step() -> None:
    model = Block()

    def step() -> None:
        (model(torch.randn(3, 4)) + model(torch.randn(3, 4))).sum().backward()

    seen = passed(model, step)
    assert seen.count(Place("first", "backward")) == 2
    assert seen[-1] == LOOP


def test_evaluation_is_told_apart_and_leads_to_no_loss() -> None:
    model = Block()

    def step() -> None:
        with torch.no_grad():
            model(torch.randn(3, 4))

    seen = passed(model, step)
    assert {place.direction for place in seen} == {"no gradient", ""}
    assert LOSS not in seen


def test_waiting_for_a_loader_is_data() -> None:
    seen = passed(Block(), lambda: [*DataLoader(TensorDataset(torch.randn(4, 2)), batch_size=2)])
    assert seen.count(DATA) == 3  # two batches, and the end


def test_nothing_is_left_behind() -> None:
    model = Block()
    hooks = nn.modules.module._global_forward_hooks
    loader = torch.utils.data.dataloader._BaseDataLoaderIter.__next__
    with Places(model) as places:
        places.follow(lambda _: None)
        assert model._forward_hooks
    assert not model._forward_hooks
    assert not model.first._forward_pre_hooks
    assert torch.utils.data.dataloader._BaseDataLoaderIter.__next__ is loader
    assert nn.modules.module._global_forward_hooks is hooks


def test_it_can_be_turned_on_and_off_inside_an_optimizer_hook() -> None:
    """As the lab does, which ends a step there: PyTorch allows no hook of its own to be added or removed meanwhile."""
    model = Block()
    optimizer = torch.optim.SGD(model.parameters())
    with Places(model) as places:
        handle = register_optimizer_step_post_hook(
            lambda *_: places.rest() if places.following else places.follow(lambda _: None)
        )
        try:
            for _ in range(4):
                model(torch.randn(3, 4)).sum().backward()
                optimizer.step()
        finally:
            handle.remove()


@st.composite
def nested(draw: st.DrawFn) -> list[tuple[int, int, str]]:
    """Calls in each other, in the order in which they end."""
    calls: list[tuple[int, int, str]] = []
    number = 0

    def call(depth: int) -> None:
        nonlocal number
        begun, name = number, f"call-{len(calls)}-{depth}-{number}"
        for _ in range(draw(st.integers(0, 2 if depth < 3 else 0))):
            number += draw(st.integers(0, 2))
            call(depth + 1)
        number += draw(st.integers(0, 2))
        calls.append((begun, number, name))

    call(0)
    return calls


@given(calls=nested())
def test_a_node_belongs_to_the_innermost_call_that_made_it(calls: list[tuple[int, int, str]]) -> None:
    numbers = list(range(calls[-1][1] - 1, -1, -1))
    slow = []
    for number in numbers:
        holding = [call for call in calls if call[0] <= number < call[1]]
        slow.append(min(holding, key=lambda call: (call[1] - call[0], calls.index(call)))[2])
    found = _owners(numbers, calls)
    # Two calls may span the same numbers: then either is right, for the inner one made all of them.
    span = {name: (first, last) for first, last, name in calls}
    assert [span[name] for name in found] == [span[name] for name in slow]
