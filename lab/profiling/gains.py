"""What is most worth changing, and what it would bring: the whole step over what is left of it (Amdahl, 1967)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lab.errors import NotChecked
from lab.profiling.machine import cores

if TYPE_CHECKING:
    from lab.catalogue import Catalogue
    from lab.diagnosis.model import Diagnosis
    from lab.profiling.profile import Profile, Row
    from lab.store import History

MOST = 3  # changes that are told: who is told ten does none
WORTH = 0.03  # of a step: what saves less is not told
HALF = {"float32": "bfloat16"}


@dataclass(frozen=True)
class Change:
    """Something to change.

    Attributes:
        what: In a few words.
        at: Where.
        seconds: What it saves, or with `bound` may save at most.
        of: What of: ``step``, ``evaluation``, or ``generation``.
        gain: How many times as fast that is afterwards.
        bytes: What it saves in memory: at the peak, or for each step that goes on.
        why: What was measured.
        bound: Whether nobody can promise as much.
        cause: The id of the cause that was found, where it is one.
    """

    what: str
    at: str
    seconds: float
    of: str
    gain: float
    why: str
    bytes: float = 0.0
    bound: bool = True
    cause: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Give this as JSON types."""
        return asdict(self)


def amdahl(whole: float, saved: float) -> float:
    """How many times as fast something is without a part of its time."""
    return whole / max(whole - saved, 1e-3 * whole)


def changes(profile: Profile, diagnosis: Diagnosis, history: History, catalogue: Catalogue) -> list[Change]:
    """What to change: first what was found to be wrong, with what it costs here; then what may bring most."""
    found = []
    for finding in diagnosis.causes:
        cause = catalogue.causes.get(finding.id)
        if cause is None or cause.saves is None:
            continue
        try:
            saving = cause.saves(profile, history, finding.at)
        except NotChecked:
            continue
        whole = profile.whole(saving.of)
        gain = amdahl(whole, saving.seconds) if whole else 1.0
        about = (finding.at, saving.seconds, saving.of, gain, saving.why, saving.bytes)
        found.append(Change(finding.title, *about, bound=False, cause=finding.id))
    return found + possible(profile)[: max(0, MOST - len(found))]


def possible(profile: Profile) -> list[Change]:
    """What may bring most, by what bounds each place; what saves most first."""
    rows = profile.rows
    layers = [row for row in rows if row.direction]
    dispatched = [row for row in layers if row.bound in ("dispatch", "Python")]
    moving = [row for row in layers if row.bound in ("memory", "kernel")]
    computing = [row for row in layers if row.bound == "compute"]
    data, update = profile.part("data"), profile.part("optimizer")
    found = [
        _change(
            profile,
            "fewer and larger operators: a larger batch, fused layers, torch.compile",
            dispatched,
            "the time goes into calling operators, not into what they compute",
        ),
        _change(
            profile,
            "other kernels: fused ones that read and write once, contiguous tensors, torch.compile",
            moving,
            "what they compute and what they move would take less on this machine",
        ),
        _change(
            profile,
            "an optimizer that updates all weights in one kernel: fused=True",
            [update],
            f"it takes {update.cost.calls:.0f} operators, and {_times(update)} what its bytes need",
        ),
        Change(
            "batches that are prepared while the model trains: DataLoader(num_workers=...)",
            "data",
            data.seconds,
            "step",
            amdahl(profile.step, data.seconds),
            "the model waits for its data meanwhile",
        ),
        Change(
            "less between the steps: logging, reading numbers back, moving data",
            "loop",
            profile.loop,
            "step",
            amdahl(profile.step, profile.loop),
            "the training loop takes it, outside of the model, the loss and the optimizer",
        ),
        _narrower(profile, computing),
        _threads(profile),
    ]
    worth = [change for change in found if change is not None and change.seconds >= WORTH * profile.step]
    return sorted(worth, key=lambda change: -change.seconds)


def _change(profile: Profile, what: str, rows: list[Row], why: str) -> Change | None:
    """All that is above the roof, of some places."""
    seconds = sum(max(0.0, row.seconds - row.roof) for row in rows)
    if not seconds:
        return None
    return Change(what, _where(rows), seconds, "step", amdahl(profile.step, seconds), why)


def _narrower(profile: Profile, rows: list[Row]) -> Change | None:
    """Products in a narrower format, where this machine was measured to be faster at it."""
    peaks = profile.machine.flops
    saved = 0.0
    for row in rows:
        whole = sum(row.formats.values())
        for kind, flops in row.formats.items():
            faster = peaks.get(HALF.get(kind, ""), 0.0)
            if faster > peaks.get(kind, faster):
                saved += row.seconds * (flops / whole) * (1 - peaks[kind] / faster)
    if not saved:
        return None
    ratio = peaks["bfloat16"] / peaks["float32"]
    why = f"a product in bfloat16 takes 1/{ratio:.1f} of the time here; the format holds 3 digits"
    return Change("products in bfloat16: torch.autocast", _where(rows), saved, "step", amdahl(profile.step, saved), why)


def _threads(profile: Profile) -> Change | None:
    """More threads, which were tried on a pass of the newest batch. Too many of them are a cause of their own."""
    if profile.fair >= 1 or profile.machine.threads >= cores():
        return None
    seconds = (1 - profile.fair) * (profile.model.seconds + profile.part("loss").seconds)
    threads = f"{profile.machine.threads} thread{'s' if profile.machine.threads > 1 else ''}"
    why = f"a pass takes {1 / profile.fair:.2f} times as long in {threads} as with one for each core"
    what = "a thread for each core: torch.set_num_threads, OMP_NUM_THREADS; unless other processes need them"
    return Change(what, "model", seconds, "step", amdahl(profile.step, seconds), why)


def _where(rows: list[Row]) -> str:
    """The places that take most of it."""
    from lab.profiling.profile import grouped_name

    names: dict[str, float] = {}
    for row in rows:
        name = grouped_name(row.name)
        names[name] = names.get(name, 0.0) + row.seconds
    most = sorted(names, key=lambda name: -names[name])
    return ", ".join(most[:3]) + (", ..." if len(most) > 3 else "")


def _times(row: Row) -> str:
    return f"{row.seconds / row.roof:.1f}x" if row.roof else "more than"
