"""Plugins: the order in which they act, what is refused, and what becomes of one that raises."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import lab
from lab.errors import FaultFailed
from lab.manager import Manager, discover, load_for

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

    from conftest import SmallRun

    from lab import Batch, Run, Step
    from lab.catalogue import Catalogue

breaks = lab.fault("test.fault", title="", cause="", moves="loss", repair="")
watches = lab.probe("test.probe", title="")


@lab.plugin("test.keeper", title="Keeps the run, its losses and its final weights")
class Keeper(lab.Plugin):
    run: Run

    def __init__(self) -> None:
        self.losses: list[Tensor] = []

    def lab_start(self, run: Run) -> None:
        self.run = run

    def lab_step_end(self, step: Step) -> None:
        assert step.loss is not None
        self.losses.append(step.loss.detach().clone())

    def lab_end(self, run: Run) -> None:
        self.weights = [p.detach().clone() for p in run.model.parameters()]

    @property
    def plugins(self) -> Manager:
        return self.run.plugins

    def equals(self, other: Keeper) -> bool:
        same_losses = len(self.losses) == len(other.losses) and all(map(torch.equal, self.losses, other.losses))
        return same_losses and all(map(torch.equal, self.weights, other.weights))


@pytest.fixture
def bare(small_run: SmallRun) -> Keeper:
    """A run that nobody watches or breaks."""
    keeper = Keeper()
    small_run(keeper, probes=False, steps=4)
    return keeper


def loss_of(step: Step) -> Tensor:
    assert step.logits is not None
    assert step.batch is not None
    assert step.batch.targets is not None
    return F.cross_entropy(step.logits.flatten(0, 1), step.batch.targets.flatten())


# ---------------------------------------------------------------- order


@breaks
class Doubles(lab.Fault):
    def lab_loss(self) -> Generator[None, Tensor, Tensor]:
        return 2 * (yield)


@breaks
class Replaces(lab.Fault):
    def lab_loss(self, step: Step) -> Tensor:
        return 2 * loss_of(step)


@watches
class Sees(lab.Probe):
    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []

    def lab_loss(self, step: Step) -> Generator[None, Tensor, Tensor]:
        loss = yield
        self.seen.append((float(loss.detach()), float(loss_of(step).detach())))
        return loss


@lab.plugin("test.tool", title="")
class Tool(lab.Plugin):
    """What a profiler does: it wraps, as a probe does."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []

    lab_loss = Sees.lab_loss


@pytest.mark.parametrize("turned", [False, True], ids=["fault registered first", "watcher registered first"])
@pytest.mark.parametrize("fault", [Doubles, Replaces])
@pytest.mark.parametrize("watcher", [Sees, Tool])
def test_who_wraps_an_action_sees_what_a_fault_made_of_it_whatever_was_registered_first(
    small_run: SmallRun, fault: type[lab.Fault], watcher: type[Sees | Tool], turned: bool
) -> None:
    plugins = [fault(), seer := watcher()]
    small_run(*(reversed(plugins) if turned else plugins), probes=False, steps=2)
    assert len(seer.seen) == 6  # two of training, four of evaluation
    for seen, sound in seer.seen:
        assert seen == pytest.approx(2 * sound, rel=1e-5)


@pytest.mark.parametrize("turned", [False, True])
def test_a_fault_that_wraps_is_nearer_to_the_core_than_a_watcher_on_the_way_in_as_well(
    small_run: SmallRun, turned: bool
) -> None:
    order: list[str] = []

    @breaks
    class Fault(lab.Fault):
        def lab_backward(self) -> Generator[None, bool, bool]:
            order.append("fault in")
            answer = yield
            order.append("fault out")
            return answer

    @watches
    class Probe(lab.Probe):
        def lab_backward(self) -> Generator[None, bool, bool]:
            order.append("probe in")
            answer = yield
            order.append("probe out")
            return answer

    plugins = [Fault(), Probe()]
    small_run(*(reversed(plugins) if turned else plugins), probes=False, steps=1)
    assert order == ["probe in", "fault in", "fault out", "probe out"]


@pytest.mark.parametrize("turned", [False, True])
def test_an_event_reaches_faults_before_probes_whatever_was_registered_first(small_run: SmallRun, turned: bool) -> None:
    order: list[str] = []

    @breaks
    class Fault(lab.Fault):
        def lab_step_end(self) -> None:
            order.append("fault")

    @watches
    class Probe(lab.Probe):
        def lab_step_end(self) -> None:
            order.append("probe")

    plugins = [Fault(), Probe()]
    small_run(*(reversed(plugins) if turned else plugins), probes=False, steps=2)
    assert order == ["fault", "probe"] * 2


def test_a_fault_that_is_not_active_lets_the_core_answer(small_run: SmallRun, bare: Keeper) -> None:
    @breaks
    class Late(lab.Fault):
        def lab_loss(self, run: Run, step: Step) -> Tensor | None:
            return torch.zeros(()) if self.active(run) else None

    keeper = Keeper()
    small_run(keeper, Late(from_step=99), probes=False, steps=4)
    assert keeper.equals(bare)


# ---------------------------------------------------------------- what is refused


def test_a_misspelt_hook_is_refused_with_the_nearest() -> None:
    class Misspelt(lab.Probe):
        def lab_step_ends(self) -> None: ...

    with pytest.raises(lab.BadInput, match=r"Misspelt: no hook 'lab_step_ends'; did you mean 'lab_step_end'\?"):
        Manager().add(Misspelt())


def test_a_misspelt_argument_is_refused_with_the_nearest() -> None:
    class Misspelt(lab.Probe):
        def lab_step_end(self, stp: Step) -> None: ...

    with pytest.raises(lab.BadInput, match=r"lab_step_end has no argument 'stp'; did you mean 'step'\?"):
        Manager().add(Misspelt())


def test_an_argument_that_only_another_hook_has_is_refused() -> None:
    class Misspelt(lab.Probe):
        def lab_start(self, run: Run, step: Step) -> None: ...

    with pytest.raises(lab.BadInput, match=r"lab_start has no argument 'step'; known: run"):
        Manager().add(Misspelt())


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("lab_forwrd(self, run)", r"no hook 'lab_forwrd'; did you mean 'lab_forward'\?"),
        ("lab_forward(self, rum)", r"lab_forward has no argument 'rum'; did you mean 'run'\?"),
    ],
)
def test_a_plugin_file_with_a_misspelt_hook_is_refused_when_it_loads(tmp_path: Path, written: str, said: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        f"import lab\n\n@lab.probe('mine', title='')\nclass Mine(lab.Probe):\n    def {written}: ...\n",
        encoding="utf-8",
    )
    with pytest.raises(lab.BadInput, match=rf"mine\.py.*class Mine.*{said}"):
        discover([path])


def test_each_shipped_plugin_is_accepted(catalogue: Catalogue) -> None:
    assert catalogue.broken == {}
    manager = Manager()
    for cls in (*catalogue.probes.values(), *catalogue.plugins.values()):
        manager.add(cls())


# ---------------------------------------------------------------- a probe that raises


class Raises(lab.Probe):
    """Raises in step 1, and counts how often it is called from then on."""

    calls = 0

    def fail(self, run: Run) -> None:
        if run.step.index >= 1:
            self.calls += 1
            raise ZeroDivisionError("a stranger's mistake")


@watches
class InAnEvent(Raises):
    def lab_step_end(self, run: Run) -> None:
        self.fail(run)


@watches
class InAnExamination(Raises):
    def lab_examine(self, run: Run) -> None:
        self.calls += 1
        with torch.no_grad():
            next(run.model.parameters()).zero_()
        raise ZeroDivisionError("a stranger's mistake")


@watches
class BeforeTheYield(Raises):
    def lab_forward(self, run: Run) -> Generator[None, Tensor, Tensor]:
        self.fail(run)
        return (yield)


@watches
class AfterTheYield(Raises):
    def lab_forward(self, run: Run) -> Generator[None, Tensor, Tensor]:
        logits = yield
        self.fail(run)
        return logits


@watches
class InATap(Raises):
    def lab_start(self, run: Run) -> None:
        self.read(run, "blocks.0.out", lambda *_: self.fail(run))


@watches
class InsideAttention(Raises):
    def lab_start(self, run: Run) -> None:
        self.read(run, "blocks.*.attn.pattern", lambda *_: self.fail(run))


@watches
class InAGradientTap(Raises):
    def lab_start(self, run: Run) -> None:
        self.read(run, "blocks.*.out", lambda *_: self.fail(run), grad=True)


@pytest.mark.parametrize(
    "culprit",
    [InAnEvent, InAnExamination, BeforeTheYield, AfterTheYield, InATap, InsideAttention, InAGradientTap],
)
def test_a_probe_that_raises_is_set_aside_with_its_traceback_and_the_run_goes_on_as_without_it(
    small_run: SmallRun, bare: Keeper, culprit: type[Raises]
) -> None:
    keeper, probe = Keeper(), culprit()
    diagnosis, history = small_run(keeper, probe, probes=False, steps=4)
    assert keeper.equals(bare)
    assert probe.calls == 1  # it is not asked again, in no place
    assert list(keeper.plugins.set_aside) == ["test.probe"]
    trace = keeper.plugins.set_aside["test.probe"]
    assert trace.startswith("Traceback")
    assert f'"{__file__}"' in trace
    assert history.reasons == {"test.probe": "ZeroDivisionError: a stranger's mistake"}
    assert diagnosis.verdict != "faulty"


def test_one_probe_that_raises_leaves_the_others_at_work(small_run: SmallRun) -> None:
    @lab.probe("test.other", title="")
    class Other(lab.Probe):
        seen = 0

        def lab_step_end(self) -> None:
            self.seen += 1

    other = Other()
    small_run(InAnEvent(), other, probes=False, steps=4)
    assert other.seen == 4


def test_a_probe_whose_wrapper_does_not_yield_or_yields_twice_is_set_aside_with_the_reason(
    small_run: SmallRun, bare: Keeper
) -> None:
    @lab.probe("test.never", title="")
    class Never(lab.Probe):
        def lab_forward(self, run: Run) -> Generator[None, Tensor, Tensor | None]:
            return (yield) if run.step.index < 0 else None

    @lab.probe("test.twice", title="")
    class Twice(lab.Probe):
        def lab_forward(self) -> Generator[None, Tensor, Tensor]:
            yield
            return (yield)

    keeper = Keeper()
    _, history = small_run(keeper, Never(), Twice(), probes=False, steps=4)
    assert keeper.equals(bare)
    reason = "RuntimeError: a hook that wraps must yield once"
    assert history.reasons == {"test.never": reason, "test.twice": reason}


def test_the_person_at_the_keyboard_can_stop_a_run_while_a_probe_is_at_work(small_run: SmallRun) -> None:
    @watches
    class Interrupted(lab.Probe):
        def lab_forward(self) -> Generator[None, Tensor, Tensor]:
            yield
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small_run(Interrupted(), probes=False, steps=2)


# ---------------------------------------------------------------- a probe changes nothing


@watches
class Answers(lab.Probe):
    """Answers actions as if it were the core."""

    def lab_loss(self) -> Tensor:
        return torch.zeros((), requires_grad=True)

    def lab_forward(self, step: Step) -> Tensor:
        return torch.zeros(4, 24, 16, requires_grad=True)

    def lab_update(self) -> bool:
        return True

    def lab_clip(self) -> Tensor:
        return torch.ones(())


@watches
class AnswersInAWrapper(lab.Probe):
    """Gives something else back than what it was given."""

    def lab_build_model(self) -> Generator[None, torch.nn.Module, torch.nn.Module]:
        yield
        return torch.nn.Linear(2, 2)

    def lab_batch(self) -> Generator[None, Batch, Batch]:
        batch = yield
        return lab.Batch((torch.zeros_like(batch.args[0]),), targets=batch.targets)

    def lab_loss(self) -> Generator[None, Tensor, Tensor]:
        return 0 * (yield)

    def lab_evaluate(self) -> Generator[None, Tensor, None]:
        yield

    def lab_step(self) -> Generator[None, bool, bool]:
        yield
        return False


@pytest.mark.parametrize("probe", [Answers, AnswersInAWrapper])
def test_what_a_probe_answers_changes_nothing(small_run: SmallRun, bare: Keeper, probe: type[lab.Probe]) -> None:
    keeper = Keeper()
    small_run(keeper, probe(), probes=False, steps=4)
    assert keeper.plugins.set_aside == {}
    assert keeper.equals(bare)


# ---------------------------------------------------------------- a fault that raises


class Fails(lab.Fault):
    def fail(self, run: Run) -> None:
        if self.active(run):
            raise ZeroDivisionError("half broken")


@breaks
class FailsInAnEvent(Fails):
    def lab_before_update(self, run: Run) -> None:
        self.fail(run)


@breaks
class FailsInAnAction(Fails):
    def lab_batch(self, run: Run) -> None:
        self.fail(run)


@breaks
class FailsBeforeTheYield(Fails):
    def lab_forward(self, run: Run) -> Generator[None, Tensor, Tensor]:
        self.fail(run)
        return (yield)


@breaks
class FailsAfterTheYield(Fails):
    def lab_forward(self, run: Run) -> Generator[None, Tensor, Tensor]:
        logits = yield
        self.fail(run)
        return logits


def passing(fault: Fails, run: Run) -> Any:
    def change(value: Tensor) -> Tensor:
        fault.fail(run)
        return value

    return change


@breaks
class FailsInATap(Fails):
    def lab_start(self, run: Run) -> None:
        self.replace(run, "blocks.0.out", passing(self, run))


@breaks
class FailsInsideAttention(Fails):
    def lab_start(self, run: Run) -> None:
        self.replace(run, "blocks.0.attn.scores", passing(self, run))


@breaks
class FailsInAGradientTap(Fails):
    def lab_start(self, run: Run) -> None:
        self.replace(run, "blocks.0.out", passing(self, run), grad=True)


@breaks
class FailsToSayWhetherItIsActive(Fails):
    def lab_start(self, run: Run) -> None:
        self.replace(run, "blocks.0.out", lambda value: value)

    def active(self, run: Run) -> bool:
        raise ZeroDivisionError("half broken")


@pytest.mark.parametrize("fails", Fails.__subclasses__())
@pytest.mark.parametrize("watched", [True, False])
def test_a_fault_that_raises_ends_the_run_with_an_error_that_names_it(
    small_run: SmallRun, fails: type[Fails], watched: bool
) -> None:
    keeper, probe = Keeper(), Sees()
    with pytest.raises(FaultFailed, match=r"^the fault test\.fault raised ZeroDivisionError: half broken$") as caught:
        small_run(keeper, probe, fails(from_step=2), probes=watched, steps=4)
    cause = caught.value.__cause__
    assert isinstance(cause, ZeroDivisionError)
    assert len(keeper.losses) == (0 if fails is FailsToSayWhetherItIsActive else 2)
    assert keeper.plugins.set_aside == {}  # no probe is blamed for it


@breaks
class FailsInAnExperiment(lab.Fault):
    """Breaks only under the few rows of an experiment that a probe makes."""

    def lab_start(self, run: Run) -> None:
        def change(value: Tensor) -> Tensor:
            if run.sites.mode == "examine":
                raise ZeroDivisionError("half broken")
            return value

        self.replace(run, "blocks.0.out", change)


def test_a_fault_that_raises_while_a_probe_experiments_is_named_and_the_probe_is_not(small_run: SmallRun) -> None:
    keeper = Keeper()
    with pytest.raises(FaultFailed, match=r"^the fault test\.fault raised ZeroDivisionError"):
        small_run(keeper, FailsInAnExperiment(), steps=2)
    assert keeper.plugins.set_aside == {}


@breaks
class NeverYields(lab.Fault):
    def lab_forward(self, run: Run) -> Generator[None, Tensor, Tensor | None]:
        return (yield) if run.step.index < 0 else None


@breaks
class YieldsTwice(lab.Fault):
    def lab_forward(self) -> Generator[None, Tensor, Tensor]:
        yield
        return (yield)


@pytest.mark.parametrize("fault", [NeverYields, YieldsTwice])
def test_a_fault_whose_wrapper_does_not_yield_once_is_named(small_run: SmallRun, fault: type[lab.Fault]) -> None:
    with pytest.raises(
        FaultFailed, match=r"^the fault test\.fault raised RuntimeError: a hook that wraps must yield once$"
    ):
        small_run(fault(), probes=False, steps=1)


def test_what_a_fault_refuses_is_said_as_it_said_it(small_run: SmallRun) -> None:
    @breaks
    class Refuses(lab.Fault):
        def lab_start(self, run: Run) -> None:
            self.replace(run, "nowhere", torch.zeros_like)

    with pytest.raises(lab.BadInput, match="no site matches 'nowhere'"):
        small_run(Refuses(), probes=False, steps=1)


# ---------------------------------------------------------------- an error of the core


class Broken:
    """Data that ends in step 2."""

    floor = None

    def __init__(self, source: Any, error: BaseException) -> None:
        self.source, self.error, self.vocabulary = source, error, source.vocabulary

    def batch(self, step: int, split: Any) -> Batch:
        if step == 2:
            raise self.error
        return self.source.batch(step, split)  # type: ignore[no-any-return]


@lab.plugin("test.broken", title="")
class BreaksTheData(lab.Plugin):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def lab_start(self, run: Run) -> None:
        run.data = Broken(run.data, self.error)


@watches
class Passes(lab.Probe):
    def lab_batch(self) -> Generator[None, Batch, Batch]:
        return (yield)

    def lab_step(self) -> Generator[None, bool, bool]:
        try:
            return (yield)
        finally:
            pass


@watches
class Swallows(lab.Probe):
    def lab_step(self) -> Generator[None, bool, bool]:
        try:
            return (yield)
        except BaseException:
            return True


@pytest.mark.parametrize("probe", [Passes, Swallows])
@pytest.mark.parametrize("error", [KeyError("no more"), KeyboardInterrupt(), StopIteration("no more")])
def test_an_error_of_the_core_passes_through_a_probe_unchanged_and_is_not_blamed_on_it(
    small_run: SmallRun, probe: type[lab.Probe], error: BaseException
) -> None:
    keeper = Keeper()
    with pytest.raises(type(error)) as caught:
        small_run(keeper, BreaksTheData(error), probe(), probes=False, steps=4)
    assert caught.value is error
    assert keeper.plugins.set_aside == {}


def test_a_probe_that_raises_of_its_own_over_an_error_of_the_core_is_set_aside_and_the_error_stays(
    small_run: SmallRun,
) -> None:
    @watches
    class Stumbles(lab.Probe):
        def lab_batch(self) -> Generator[None, Batch, Batch]:
            try:
                return (yield)
            except KeyError:
                raise ZeroDivisionError("over it") from None

    keeper, error = Keeper(), KeyError("no more")
    with pytest.raises(KeyError) as caught:
        small_run(keeper, BreaksTheData(error), Stumbles(), probes=False, steps=4)
    assert caught.value is error
    assert keeper.plugins.reasons == {"test.probe": "ZeroDivisionError: over it"}


@pytest.mark.parametrize("error", [KeyError("no more"), KeyboardInterrupt(), StopIteration("no more")])
def test_an_error_of_the_core_passes_through_a_fault_unchanged_and_is_not_blamed_on_it(
    small_run: SmallRun, error: BaseException
) -> None:
    @breaks
    class Wraps(lab.Fault):
        def lab_batch(self) -> Generator[None, Batch, Batch]:
            return (yield)

    with pytest.raises(type(error)) as caught:
        small_run(BreaksTheData(error), Wraps(), probes=False, steps=4)
    assert caught.value is error


# ---------------------------------------------------------------- an examination that cannot judge


@watches
class Declines(lab.Probe):
    """Cannot judge in its first experiment, at step 0, and can in those after it."""

    def lab_start(self, run: Run) -> None:
        self.known: list[dict[str, str]] = []

    def lab_step_end(self, run: Run) -> None:
        self.known.append(dict(run.plugins.declined))

    def lab_examine(self, step: Step) -> None:
        if step.index == 0:
            raise lab.NotChecked("too early to say")


def test_an_examination_that_cannot_judge_is_noted_until_one_can(small_run: SmallRun) -> None:
    keeper, probe = Keeper(), Declines()
    _, history = small_run(keeper, probe, probes=False, steps=12)  # experiments at steps 0, 10 and 11
    assert probe.known == [{}, *[{"test.probe": "too early to say"}] * 10, {}]
    assert history.reasons == {}
    assert keeper.plugins.set_aside == {}


def test_a_probe_that_cannot_judge_when_the_run_starts_is_not_asked_again(small_run: SmallRun) -> None:
    asked: list[str] = []

    @watches
    class Never(lab.Probe):
        def lab_start(self) -> None:
            raise lab.NotChecked("not on this model")

        def lab_step(self) -> Generator[None, bool, bool]:
            asked.append("step")
            return (yield)

        def lab_examine(self) -> None:
            asked.append("examine")

    keeper = Keeper()
    _, history = small_run(keeper, Never(), probes=False, steps=3)
    assert asked == []
    assert history.reasons == keeper.plugins.declined == {"test.probe": "not on this model"}


def test_an_examination_that_never_can_judge_is_noted_to_the_end(small_run: SmallRun) -> None:
    @watches
    class Never(lab.Probe):
        def lab_step_end(self) -> None: ...

        def lab_examine(self) -> None:
            raise lab.NotChecked("not on this model")

    keeper = Keeper()
    _, history = small_run(keeper, Never(), probes=False, steps=3)
    assert history.reasons == keeper.plugins.declined == {"test.probe": "not on this model"}
    assert keeper.plugins.set_aside == {}


def test_a_package_may_keep_a_tool_for_who_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = tmp_path / "traced-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Name: traced\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[lab]\ntraced = traced_lab\n")
    (tmp_path / "traced_lab").mkdir()
    (tmp_path / "traced_lab" / "__init__.py").write_text('ON_REQUEST = {"slow": "trace"}\n')
    tool = 'import lab\n\n\n@lab.plugin("test.slow", title="Slow")\nclass Slow(lab.Plugin):\n    pass\n'
    (tmp_path / "traced_lab" / "slow.py").write_text(tool)
    monkeypatch.syspath_prepend(tmp_path)
    assert "test.slow" not in discover().plugins
    assert "Slow" not in {made.__name__ for made in load_for("sample")}
    assert "Slow" in {made.__name__ for made in load_for("trace")}
