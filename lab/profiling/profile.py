"""What a profile found: a table by place and by operator, what bounds each, and what it would be worth to change it."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from lab.names import within
from lab.profiling.costs import Cost
from lab.profiling.machine import typical
from lab.profiling.memory import KINDS
from lab.profiling.places import DATA, LOOP, WATCHING, Place

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from lab.profiling.machine import Machine
    from lab.profiling.memory import Kind
    from lab.profiling.parts import Scope
    from lab.profiling.recorder import Recorder

ROOT = Place("model", "forward")
EXPLAINS = 0.5  # of a place's time: what theory has to account for to be what bounds it


@dataclass
class Row:
    """A place, or several that are alike.

    Attributes:
        name: Of the place; ``*`` stands for the number of a layer.
        direction: ``forward``, ``backward``, ``no gradient``, or empty for a part of the loop.
        seconds: Of a plain step: its share of a timed one.
        share: Of a step.
        calls: How often it was entered in a step; of a way back, 0.
        cost: What it computes in a step.
        formats: Its FLOPs by the name of the format.
        bound: What bounds it: ``compute``, ``memory``, ``dispatch``, ``kernel``, ``Python``, ``loader``, ``host sync``.
        roof: The least seconds that its FLOPs and bytes take on this machine.
        dispatch: The least seconds that calling its operators takes.
    """

    name: str
    direction: str
    seconds: float = 0.0
    share: float = 0.0
    calls: float = 0.0
    cost: Cost = field(default_factory=Cost)
    formats: dict[str, int] = field(default_factory=dict)
    bound: str = ""
    roof: float = 0.0
    dispatch: float = 0.0

    def add(self, other: Row) -> None:
        """Join another."""
        self.seconds += other.seconds
        self.share += other.share
        self.calls += other.calls
        self.cost.add(other.cost)
        for kind, flops in other.formats.items():
            self.formats[kind] = self.formats.get(kind, 0) + flops

    def to_dict(self) -> dict[str, Any]:
        """Give this as JSON types, with what it achieved a second."""
        seconds = self.seconds or float("inf")
        achieved = {"flops_per_second": self.cost.flops / seconds, "bytes_per_second": self.cost.bytes / seconds}
        return {**asdict(self), "bytes": self.cost.bytes, **achieved}


@dataclass
class Operator:
    """An operator, in all of a step: what it costs by theory, and how long it ran, on the host's clock."""

    name: str
    cost: Cost
    seconds: float


@dataclass
class Profile:
    """Where a step's time and memory go.

    Attributes:
        step: Seconds of a step that nothing was measured in, without what is beside the steps.
        timed: Seconds of a step that was timed by place.
        rows: By place, the longest first, without what the training loop itself took.
        loop: Seconds between all places: Python, and whatever the loop does.
        operators: By operator, the longest first; timed in the step that was counted.
        machine: What is possible.
        memory: Bytes of each kind after each operator of a step.
        process: Resident bytes, by number of the operator.
        places: Where each operator ran.
        held: Bytes at the peak by place and kind, the most first.
        passing: The most bytes that a way forward needs, if nothing is kept for a way back.
        scopes: What happened beside the steps.
        shape: Of the first tensor of a batch.
        output: Bytes of what the model answers.
        passes: How often the model is called in a step, to be trained.
        fair: What share of its time a pass takes in as many threads as there are cores; 1 where there are as many.
    """

    step: float
    timed: float
    rows: list[Row]
    loop: float
    operators: list[Operator]
    machine: Machine
    memory: dict[Kind, list[int]]
    process: dict[int, int]
    places: list[Place]
    held: list[tuple[str, Kind, int]]
    passing: int
    scopes: dict[str, Scope]
    shape: tuple[int, ...]
    output: int
    passes: float
    fair: float = 1.0

    @property
    def named(self) -> float:
        """The share of the timed step that is at a place."""
        return 1 - self.loop / self.step

    @property
    def peak(self) -> int:
        """The most bytes that tensors held at once."""
        return max(map(sum, zip(*self.memory.values(), strict=True)))

    def whole(self, of: str) -> float:
        """Seconds of a step, of an evaluation, or of a token that is generated; 0 where there was none."""
        if of == "step":
            return self.step
        scope = self.scopes[of]
        return sum(scope.times) / (scope.tokens or len(scope.times) or 1)

    def at(self, module: str, direction: str = "") -> Row:
        """Join what is in a module, on the way ``forward`` or ``backward``, or on both."""
        return self._join(row for row in self.rows if _is_in(row, module) and direction in ("", row.direction))

    def own(self, module: str, direction: str = "") -> Row:
        """Join what is in a module, without the modules in it."""
        return self._join(row for row in self.rows if row.name == module and direction in ("", row.direction))

    @property
    def model(self) -> Row:
        """All modules, on both ways."""
        return self._join(row for row in self.rows if row.direction in ("forward", "backward"))

    def rate(self, direction: str, but: str) -> float:
        """FLOPs a second that other layers achieve on this way: half of their FLOPs are computed faster; 0 for none."""
        rows = [row for row in self.rows if row.direction == direction and row.cost.flops and not _is_in(row, but)]
        rows.sort(key=lambda row: row.cost.flops / row.seconds if row.seconds else 0.0)
        half = sum(row.cost.flops for row in rows) / 2
        for row in rows:
            half -= row.cost.flops
            if half <= 0 and row.seconds:
                return row.cost.flops / row.seconds
        return 0.0

    def part(self, name: str) -> Row:
        """A part of the loop: ``data``, ``loss``, ``clip``, ``optimizer``, ``zero_grad``."""
        return self._join((row for row in self.rows if not row.direction and row.name == name), name)

    def grouped(self) -> list[Row]:
        """Join the layers that differ by their number alone; the longest first."""
        groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
        for row in self.rows:
            groups[grouped_name(row.name), row.direction].append(row)
        rows = []
        for (name, direction), members in groups.items():
            row = self._join(members)
            row.name, row.direction = name, direction
            rows.append(_judged(row, self.machine))
        return sorted(rows, key=lambda row: -row.seconds)

    def _join(self, rows: Iterable[Row], name: str = "") -> Row:
        whole = Row(name, "")
        for row in rows:
            whole.add(row)
        return _judged(whole, self.machine)

    def to_dict(self) -> dict[str, Any]:
        """Give this as JSON types."""
        return {
            "step_seconds": self.step,
            "timed_step_seconds": self.timed,
            "named": self.named,
            "loop_seconds": self.loop,
            "places": [row.to_dict() for row in self.rows],
            "operators": [{"name": each.name, "seconds": each.seconds, **asdict(each.cost)} for each in self.operators],
            "machine": self.machine.to_dict(),
            "memory": {
                "peak_bytes": self.peak,
                "peak_by_kind": self.at_peak(),
                "timeline": {kind: [*sizes] for kind, sizes in self.memory.items()},
                "process": {str(number): size for number, size in self.process.items()},
                "held": [{"place": place, "kind": kind, "bytes": size} for place, kind, size in self.held],
            },
            "beside": {name: {"seconds": scope.times, "tokens": scope.tokens} for name, scope in self.scopes.items()},
            "batch": [*self.shape],
        }

    def at_peak(self) -> dict[Kind, int]:
        """Bytes of each kind when most is held."""
        totals = [*map(sum, zip(*self.memory.values(), strict=True))]
        when = totals.index(max(totals))
        return {kind: self.memory[kind][when] for kind in KINDS}


def profile_of(recorder: Recorder) -> Profile:
    """Make the tables.

    Raises:
        NotChecked: The training ended before all was measured.
    """
    step, timed = recorder.steps()
    machine, counter, ledger = typical(recorder.machines), recorder.counter, recorder.ledger
    count = len(timed)
    whole = sum(each.total for each in timed) / count
    # What timing took is spread over all places, and taken off again.
    scale = step / whole
    rows: dict[Place, Row] = {}
    for each in timed:
        for place, spent in each.spent.items():
            row = rows.setdefault(place, Row(*place))
            row.seconds += spent / count * scale
            row.calls += each.entered.get(place, 0) / count
    operators: dict[str, Operator] = {}
    if counter is not None:
        for (place, name), cost in counter.costs.items():
            rows.setdefault(place, Row(*place)).cost.add(cost)
            known = operators.setdefault(name, Operator(name, Cost(), 0.0))
            known.cost.add(cost)
            known.seconds += counter.seconds[place, name]
        for place, formats in counter.formats.items():
            rows[place].formats = dict(formats)
    loop = rows.pop(LOOP, Row(*LOOP)).seconds
    rows.pop(WATCHING, None)
    for row in rows.values():
        row.share = row.seconds / step
        _judged(row, machine)
    longest = sorted(operators.values(), key=lambda each: -each.seconds)
    return Profile(
        step=step,
        timed=whole,
        rows=sorted(rows.values(), key=lambda row: -row.seconds),
        loop=loop,
        operators=[each for each in longest if each.cost.calls],
        machine=machine,
        memory=ledger.timeline() if ledger is not None else {kind: [0] for kind in KINDS},
        process=dict(ledger.process) if ledger is not None else {},
        places=list(ledger.places) if ledger is not None else [],
        held=ledger.held() if ledger is not None else [],
        passing=ledger.passing if ledger is not None else 0,
        scopes=recorder.scopes,
        shape=recorder.shape,
        output=recorder.output,
        passes=rows[ROOT].calls if ROOT in rows else 0.0,
        fair=recorder.fair,
    )


def grouped_name(name: str) -> str:
    """The name of a place, with a ``*`` for each number of a layer."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name)


def _is_in(row: Row, module: str) -> bool:
    return bool(row.direction) and (module == "model" or within(row.name, module))


def _judged(row: Row, machine: Machine) -> Row:
    """Say what bounds a row."""
    compute = sum(flops / machine.flops.get(kind, machine.flops["float32"]) for kind, flops in row.formats.items())
    memory = row.cost.bytes / machine.bytes
    dispatch = (row.cost.calls + row.cost.views) * machine.operator
    row.roof, row.dispatch = max(compute, memory), dispatch
    explained = {"compute": compute, "memory": memory, "dispatch": dispatch}
    largest: Callable[[str], float] = lambda name: explained[name]  # noqa: E731 - beside what it reads
    name = max(explained, key=largest)
    if row.name == DATA.name and not row.direction:
        row.bound = "loader"
    elif explained[name] >= EXPLAINS * row.seconds:
        row.bound = name
    elif row.cost.waits:
        row.bound = "host sync"
    else:
        row.bound = "kernel" if row.roof > dispatch else "Python"
    return row
