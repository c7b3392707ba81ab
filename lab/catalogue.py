"""What plugins bring: faults, probes, rules, causes and links to other tools; and the markers that declare them.

A plugin is a module. Whatever stands in it under a marker of this file, or is a `Cause`, joins the catalogue.
Nothing here imports torch: the catalogue is listed before it is used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar, dataclass_transform

from annotated_types import Ge

from lab.diagnosis.model import Basis, Cause, Phase, Symptom
from lab.errors import BadInput, FaultFailed, LabError, nearest, one_line
from lab.names import within

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Mapping
    from types import ModuleType

    from torch import Tensor

    from lab.context import Run, Step
    from lab.sites import Site
    from lab.stages import Stage
    from lab.store import History

    Judge = Callable[[History], Iterable[Symptom]]

T = TypeVar("T")


@dataclass(frozen=True)
class FaultInfo:
    """What a fault says of itself: the cause that a diagnosis should name, and the metric that it should move."""

    id: str
    title: str
    cause: str
    moves: str
    repair: str
    doc: str = ""


@dataclass(frozen=True)
class ProbeInfo:
    """What a probe says of itself. `every` is its cadence in steps; an examination runs in a sandbox.

    `seldom`: its experiment is left out of some examined steps (see `lab.session.Session`). `on_request`: it watches
    at a cost that one may not want to pay on training of one's own. `stages`: where in a step its metrics belong, of
    those by which two runs are compared.
    """

    id: str
    title: str
    every: int
    cost: str
    examines: bool
    seldom: bool = False
    on_request: bool = False
    stages: Mapping[str, Stage] = field(default_factory=dict, hash=False)
    doc: str = ""


@dataclass(frozen=True)
class PluginInfo:
    """What a link to another tool says of itself."""

    id: str
    title: str
    doc: str = ""


@dataclass(frozen=True)
class Rule:
    """Judges metrics: a pure function from a run's history to symptoms, all of them with the rule's id.

    Attributes:
        reads: Metrics without which it cannot judge.
        basis: Where its expectation comes from.
        phase: Which part of a step the metric belongs to; symptoms are ordered by it.
    """

    id: str
    title: str
    reads: tuple[str, ...]
    basis: Basis
    phase: Phase
    judge: Judge
    doc: str = ""


class Plugin:
    """What takes part in a run. Every method named ``lab_...`` is a hook; see ``lab.hookspecs``."""


@dataclass(kw_only=True, eq=False)  # each is itself: a plugin has to be hashable
class Fault(Plugin):
    """Breaks exactly one thing, and is undone when the run ends.

    A subclass under ``@lab.fault`` is a dataclass: its annotated fields are the parameters that a scenario can
    set, and `annotated_types` bounds on them are enforced.

    Attributes:
        at: Where: a site, or the module that holds it; ``*`` stands for one part of a name, ``**`` for any number.
        from_step: The first step at which it is active.
    """

    info: ClassVar[FaultInfo]
    at: str = ""
    from_step: Annotated[int, Ge(0)] = 0

    def active(self, run: Run) -> bool:
        """Whether the run has reached `from_step`."""
        return run.step.index >= self.from_step

    def from_the_start(self) -> None:
        """Refuse a `from_step`: for a fault that acts when the run is built, it could mean nothing.

        Raises:
            BadInput: `from_step` is not 0.
        """
        if self.from_step:
            raise BadInput(f"{self.info.id}: from_step = {self.from_step}; it acts when the run is built: leave it out")

    def holds(self, parameter: str) -> bool:
        """Whether a parameter, by its name, is what `at` names or stands inside it."""
        return within(parameter, self.at)

    def replace(self, run: Run, pattern: str, change: Callable[[Tensor], Tensor], *, grad: bool = False) -> None:
        """Replace the value, or the gradient, at every site that matches `pattern`, from `from_step` on.

        Raises:
            BadInput: No site matches.
        """

        def named(value: Tensor) -> Tensor:
            with naming(self):
                return change(value)

        def active() -> bool:
            with naming(self):
                return self.active(run)

        try:
            run.sites.replace(pattern, named, active, grad=grad)
        except BadInput as error:
            raise BadInput(f"{plugin_id(self)}: at = {self.at!r}: {error}") from None


class Probe(Plugin):
    """Measures, and changes nothing."""

    info: ClassVar[ProbeInfo]
    every: int = 1

    def due(self, step: Step) -> bool:
        """Whether this step is one to measure: the first three, each `every`-th, and those that are examined.

        One that is made seldom, of these last, only in those in which all experiments are made.
        """
        if step.index < 3 or (self.every and step.index % self.every == 0):
            return True
        return step.thorough if self.info.seldom else step.examined

    def read(
        self,
        run: Run,
        pattern: str,
        see: Callable[[Site, Tensor], None],
        *,
        grad: bool = False,
        always: bool = False,
    ) -> list[Site]:
        """Call ``see(site, value)`` for every matching site on steps that are due, or `always`; return those sites.

        The value belongs to the model: `see` must not write into it. If `see` raises, this probe is set aside.
        """
        guarded = run.plugins.guard(self, see)
        return run.sites.read(pattern, guarded, lambda: always or self.due(run.step), grad=grad)

    @staticmethod
    def is_finite(number: Tensor) -> bool | None:
        """Whether a tensor [] is finite; None where it is not in the host's own memory, and would be waited for."""
        return math.isfinite(float(number.detach().float().numpy())) if number.device.type == "cpu" else None


@dataclass_transform(kw_only_default=True)
def fault(id: str, *, title: str, cause: str, moves: str, repair: str) -> Callable[[type[T]], type[T]]:
    """Mark a class as a fault.

    Args:
        id: ``family.name``.
        title: What it does to the model, in one short sentence.
        cause: The id of the cause that a diagnosis should name.
        moves: The metric that it should move.
        repair: How the same mistake is repaired in real code.
    """

    def mark(cls: type[T]) -> type[T]:
        made = dataclass(kw_only=True, eq=False)(cls)
        made.info = FaultInfo(id, title, cause, moves, repair, _doc(cls))  # type: ignore[attr-defined]
        return made

    return mark


def probe(
    id: str,
    *,
    title: str,
    every: int = 1,
    cost: str = "",
    examines: bool = False,
    seldom: bool = False,
    on_request: bool = False,
    stages: Mapping[str, Stage] | None = None,
) -> Callable[[type[T]], type[T]]:
    """Mark a class as a probe: watching, or (`examines`) running experiments in `lab_examine`.

    Args:
        id: Short, the subject of what it measures.
        title: What it measures, in one short sentence.
        every: The cadence in steps; 0 leaves the steps that are examined, and the first three.
        cost: What a measured step costs, in words.
        examines: Whether it experiments on the model, in the sandbox of `lab_examine`.
        seldom: Whether it costs as much as a good part of a training step, so that it does not measure in each step
            that is examined: in the first two and the last, where something is suspected, and now and then between.
        on_request: Whether what it costs in each step is too much for training of one's own, unless asked for. A
            scenario has all probes.
        stages: By metric, where in a step it belongs: these are what ``lab diff`` compares (see `lab.stages.Stage`).
    """

    def mark(cls: type[T]) -> type[T]:
        cls.info = ProbeInfo(id, title, every, cost, examines, seldom, on_request, dict(stages or {}), _doc(cls))  # type: ignore[attr-defined]
        cls.every = every  # type: ignore[attr-defined]
        return cls

    return mark


def plugin(id: str, *, title: str) -> Callable[[type[T]], type[T]]:
    """Mark a class as a link to another tool: it listens to events, and wraps scopes."""

    def mark(cls: type[T]) -> type[T]:
        cls.info = PluginInfo(id, title, _doc(cls))  # type: ignore[attr-defined]
        return cls

    return mark


def rule(id: str, *, title: str, reads: tuple[str, ...], basis: Basis, phase: Phase = "run") -> Callable[[Judge], Rule]:
    """Make a rule of a function that takes a `History` and yields symptoms; it may raise `NotChecked`."""

    def mark(judge: Judge) -> Rule:
        return Rule(id, title, reads, basis, phase, judge, _doc(judge))

    return mark


@contextlib.contextmanager
def naming(fault: object, but: object = None) -> Generator[None, None, None]:
    """Name the fault in whatever is raised in the block, but for `but`, which it was only handed on.

    Raises:
        FaultFailed: Something was raised.
    """
    try:
        yield
    except LabError:
        raise
    except Exception as error:
        if handed_on(error, but):
            raise
        raise FaultFailed(f"the fault {plugin_id(fault)} raised {one_line(error)}") from error


def handed_on(error: BaseException, given: object) -> bool:
    """Whether an error that left a generator is the one that was thrown into it."""
    # Python turns a StopIteration that leaves a generator into a RuntimeError.
    return error is given or (isinstance(given, StopIteration) and error.__cause__ is given)


def plugin_id(plugin: object) -> str:
    """Return the id under which a plugin is listed, or the name of its class."""
    info = getattr(plugin, "info", None)
    return info.id if info is not None else type(plugin).__name__


def _doc(thing: Any) -> str:
    return inspect.cleandoc(thing.__doc__ or "")


@dataclass
class Catalogue:
    """All that was found: id to class, rule or cause, in the order in which it was found.

    Attributes:
        broken: What could not be loaded, and why.
        asked: The files and modules that were asked for by name.
    """

    faults: dict[str, type[Fault]] = field(default_factory=dict)
    probes: dict[str, type[Probe]] = field(default_factory=dict)
    plugins: dict[str, type[Plugin]] = field(default_factory=dict)
    rules: dict[str, Rule] = field(default_factory=dict)
    causes: dict[str, Cause] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    asked: tuple[str, ...] = ()
    _home: dict[str, list[str]] = field(default_factory=dict)

    def add_module(self, module: ModuleType, where: str) -> int:
        """Add whatever is marked in `module`; return how many things that was.

        Raises:
            BadInput: An id is taken, or a class is marked but lacks the base class.
        """
        found = 0
        for name, thing in vars(module).items():
            if inspect.isclass(thing) and isinstance(vars(thing).get("info"), ProbeInfo):
                self._home.setdefault(module.__name__, []).append(vars(thing)["info"].id)
            if isinstance(thing, Rule):
                found += self._add(self.rules, thing.id, thing, where)
            elif isinstance(thing, Cause):
                found += self._add(self.causes, thing.id, thing, where)
            elif inspect.isclass(thing) and thing.__module__ == module.__name__ and "info" in vars(thing):
                found += self._add_class(thing, f"{where}: class {name}")
        return found

    def beside(self, rule: Rule) -> list[str]:
        """Return the ids of the probes in the module of a rule: when they cannot measure, it cannot judge."""
        return self._home.get(rule.judge.__module__, [])

    def measuring(self, metric: str) -> list[str] | None:
        """Return the ids of the probes beside the rules that read a metric; None, for all, where no rule does."""
        found = {probe for rule in self.rules.values() if metric in rule.reads for probe in self.beside(rule)}
        return sorted(found) or None

    def _add_class(self, cls: type[Any], where: str) -> int:
        info = cls.info
        if isinstance(info, FaultInfo):
            return self._add(self.faults, info.id, _subclass(cls, Fault, where), where)
        if isinstance(info, ProbeInfo):
            return self._add(self.probes, info.id, _subclass(cls, Probe, where), where)
        return self._add(self.plugins, info.id, _subclass(cls, Plugin, where), where)

    def _add(self, kind: dict[str, Any], id: str, thing: object, where: str) -> int:
        if id in kind and kind[id] is not thing:
            raise BadInput(f"{where}: the id {id!r} is taken by {_origin(kind[id])}; give this one another")
        kind[id] = thing
        return 1

    def fault(self, id: str) -> type[Fault]:
        """Return the fault with this id, or raise BadInput with the nearest."""
        if id not in self.faults:
            raise BadInput(f"no fault {id!r}{nearest(id, self.faults)}")
        return self.faults[id]

    def probe(self, id: str) -> type[Probe]:
        """Return the probe with this id, or raise BadInput with the nearest."""
        if id not in self.probes:
            raise BadInput(f"no probe {id!r}{nearest(id, self.probes)}")
        return self.probes[id]


def _subclass(cls: type[Any], base: type[T], where: str) -> type[T]:
    if not issubclass(cls, base):
        raise BadInput(f"{where} is marked as a {base.__name__.lower()} but is not a lab.{base.__name__}")
    return cls


def _origin(thing: object) -> str:
    return str(getattr(thing, "__module__", None) or type(thing).__name__)


def parameters(cls: type[Fault]) -> dict[str, dataclasses.Field[Any]]:
    """Return the parameters of a fault by name, `at` and `from_step` first."""
    return {f.name: f for f in dataclasses.fields(cls)}
