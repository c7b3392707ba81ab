"""What must always hold while the lab watches: nothing changes, and the host is asked once a step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import lab

if TYPE_CHECKING:
    from collections.abc import Generator

    from conftest import SmallRun

    from lab import Batch, Row, Run, Site, Step


@lab.plugin("keeper", title="Keeps what a run ends with")
class Keeper(lab.Plugin):
    """Keeps the loss of each step, the final weights, buffers' versions, and the random state."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []

    def lab_update(self, step: Step) -> Generator[None, bool, bool]:
        assert step.loss is not None
        self.losses.append(step.loss.detach().clone())
        return (yield)

    def lab_end(self, run: Run) -> None:
        self.weights = [p.detach().clone() for p in run.model.parameters()]
        self.versions = [p._version for p in run.model.parameters()]
        self.modes = [module.training for module in run.model.modules()]
        self.random = torch.get_rng_state()

    def equals(self, other: Keeper) -> bool:
        return (
            all(map(torch.equal, self.losses, other.losses))
            and all(map(torch.equal, self.weights, other.weights))
            and self.versions == other.versions
            and self.modes == other.modes
            and torch.equal(self.random, other.random)
        )


class Noisy(lab.Probe):
    """Dropout in the model, so that a random number drawn by a probe shows in the losses."""


@lab.plugin("dropout", title="Dropout after each block")
class Dropout(lab.Plugin):
    def lab_start(self, run: Run) -> None:
        run.sites.replace("blocks.*.out", lambda x: torch.nn.functional.dropout(x, 0.1, run.model.training))


def test_watching_changes_nothing(small_run: SmallRun) -> None:
    bare, seen = Keeper(), Keeper()
    small_run(bare, Dropout(), probes=False)
    diagnosis, _ = small_run(seen, Dropout(), probes=True)
    assert diagnosis.verdict == "healthy"
    assert bare.equals(seen)


class Draws(lab.Probe):
    def lab_step_end(self, step: Step) -> None:
        torch.rand(1)


class Writes(lab.Probe):
    def lab_step_end(self, run: Run) -> None:
        with torch.no_grad():
            next(iter(run.model.parameters())).add_(1e-3)


class WritesInPlace(lab.Probe):
    def lab_start(self, run: Run) -> None:
        self.read(run, "blocks.0.out", self.see)

    def see(self, site: Site, value: Tensor) -> None:
        value.data.mul_(1.001)


class Evaluates(lab.Probe):
    def lab_step_end(self, run: Run) -> None:
        run.model.eval()


class ClearsGradients(lab.Probe):
    def lab_before_update(self, run: Run) -> None:
        next(iter(run.parameters.values())).grad = None


@pytest.mark.parametrize("culprit", [Draws, Writes, WritesInPlace, Evaluates, ClearsGradients])
def test_a_probe_that_changes_something_is_seen_by_the_test_above(
    small_run: SmallRun, culprit: type[lab.Probe]
) -> None:
    bare, seen = Keeper(), Keeper()
    small_run(bare, Dropout(), probes=False)
    small_run(seen, Dropout(), culprit(), probes=False)
    assert not bare.equals(seen)


class Vandal(lab.Probe):
    """Does in an examination all that it must not leave behind."""

    def lab_examine(self, run: Run, step: Step) -> None:
        torch.rand(7)
        run.model.eval()
        assert step.batch is not None
        loss = run.call(step.batch).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for p in run.model.parameters():
                p.add_(1.0)
                p.data.mul_(3.0)
        for p in run.model.parameters():
            p.requires_grad_(False)


def test_an_examination_leaves_everything_as_it_was(small_run: SmallRun) -> None:
    bare, seen = Keeper(), Keeper()
    small_run(bare, Dropout(), probes=False)
    small_run(seen, Dropout(), Vandal(), probes=False)
    assert bare.equals(seen)


class HostReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators that bring a tensor's values to the host."""

    def __init__(self, counts: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.equal.default,
            torch.ops.aten.nonzero.default,
        ):
            self.counts.append(str(func))
        return func(*args, **kwargs or {})


class HostCalls(TorchFunctionMode):
    """Counts the methods that bring a tensor's values to the host without an operator, as on the CPU."""

    NAMES = frozenset({"tolist", "numpy", "cpu", "__array__"})

    def __init__(self, counts: list[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        kwargs = kwargs or {}
        if name in self.NAMES - {"numpy"}:  # `.cpu().numpy()` is one transfer: the first call makes it
            self.counts.append(name)
        if name == "to" and any(str(a) == "cpu" for a in (*args[1:], *kwargs.values())):
            self.counts.append("to cpu")
        return func(*args, **kwargs)


@lab.plugin("counter", title="Counts transfers to the host")
class Counter(lab.Plugin):
    """Counts within each step, until what was recorded has reached the host."""

    def __init__(self) -> None:
        self.by_step: list[list[str]] = []

    def lab_step(self, run: Run) -> Generator[None, bool, bool]:
        self.counts: list[str] = []
        self.modes = (HostCalls(self.counts), HostReads(self.counts))
        for mode in self.modes:
            mode.__enter__()  # type: ignore[no-untyped-call]
        return (yield)

    def lab_batch(self) -> Generator[None, Batch, Batch]:
        """A batch is sent to the model's device, which happens to be the host here: the other direction."""
        before = len(self.counts)
        batch = yield
        assert set(self.counts[before:]) <= {"to cpu"}
        del self.counts[before:]
        return batch

    def lab_metrics(self, metrics: Row) -> None:
        if self.modes:
            for mode in reversed(self.modes):
                mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self.by_step.append(self.counts)
            self.modes = ()  # type: ignore[assignment]


def test_at_most_one_transfer_to_the_host_a_step(small_run: SmallRun) -> None:
    counter = Counter()
    small_run(counter, steps=23)
    assert len(counter.by_step) == 23
    wrong = {step: counts for step, counts in enumerate(counter.by_step) if len(counts) != 1}
    assert not wrong, wrong


class Asks(lab.Probe):
    def lab_start(self, run: Run) -> None:
        self.read(run, "blocks.0.out", self.see)

    def see(self, site: Site, value: Tensor) -> None:
        float(value.mean())


def test_a_probe_that_asks_the_host_is_counted(small_run: SmallRun) -> None:
    counter = Counter()
    small_run(counter, Asks(), probes=False, steps=3)
    assert all(any("local_scalar" in name for name in counts) for counts in counter.by_step)


def test_the_same_scenario_and_seed_give_the_same_metrics(small_run: SmallRun) -> None:
    histories = [small_run()[1] for _ in range(2)]
    for metric in histories[0].metrics:
        if not metric.startswith(("memory.process", "loader.")):  # of the machine, and of the time
            for site, series in histories[0].each(metric):
                assert (series.values == histories[1].series(metric, site).values).all(), (metric, site)
