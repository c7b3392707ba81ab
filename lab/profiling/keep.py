"""What a profile leaves in the run folder: its numbers, and pictures for people and for TensorBoard."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from lab.files import plain
from lab.profiling.memory import KINDS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.figure import Figure

    from lab.profiling.gains import Change
    from lab.profiling.profile import Profile, Row

NUMBERS, ROOFLINE, MEMORY = "profile.json", "roofline.png", "memory.png"
NAMED = 6  # places that a picture names
MARKS = {"forward": "o", "backward": "s", "no gradient": "^", "": "D"}
COLOURS = {
    "parameters": "#3b528b",
    "gradients": "#21918c",
    "optimizer": "#5ec962",
    "activations": "#fde725",
    "other": "#b0b0b0",
}


def keep(profile: Profile, changes: Sequence[Change], folder: Path) -> None:
    """Write ``profile.json`` and the two pictures, and show these in TensorBoard too."""
    told = {**profile.to_dict(), "changes": [change.to_dict() for change in changes]}
    (folder / NUMBERS).write_text(json.dumps(plain(told), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    figures = {ROOFLINE: roofline(profile), MEMORY: memory(profile)}
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=110)
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder / "tensorboard")) as writer:
        for name, figure in figures.items():
            writer.add_figure(f"profile/{name.removesuffix('.png')}", figure)


def roofline(profile: Profile) -> Figure:
    """FLOPs a second of each place over its FLOPs a byte, below what the machine allows (Williams et al., 2009)."""
    figure, axes = _figure("Roofline: what each place achieves, below what this machine can do")
    machine = profile.machine
    rows = [row for row in profile.grouped() if row.cost.flops and row.seconds]
    used = {kind for row in rows for kind in row.formats} or {"float32"}
    across = [row.cost.flops / max(1, row.cost.bytes) for row in rows] or [1.0]
    left, right = min(across) / 4, max(across) * 4
    for kind in sorted(used & machine.flops.keys()):
        peak = machine.flops[kind]
        knee = peak / machine.bytes
        xs = sorted({left, min(max(knee, left), right), right})
        axes.plot(xs, [min(peak, x * machine.bytes) / 1e9 for x in xs], color="0.3", lw=1.5)
        axes.annotate(f"{kind}, {peak / 1e9:.0f} GFLOP/s", (right, peak / 1e9), ha="right", va="bottom", fontsize=8)
    axes.annotate(
        f"memory, {machine.bytes / 1e9:.0f} GB/s", (left, left * machine.bytes / 1e9), rotation=28, fontsize=8
    )
    most = max((row.seconds for row in rows), default=1.0)
    named = []
    for place, row in enumerate(rows):
        x, y = row.cost.flops / max(1, row.cost.bytes), row.cost.flops / row.seconds / 1e9
        colour = "#21918c" if row.direction == "forward" else "#b5367a"
        axes.scatter([x], [y], s=30 + 300 * row.seconds / most, marker=MARKS[row.direction], alpha=0.65, color=colour)
        if place < NAMED:
            named.append((f"{row.name} {row.direction}", (x, y)))
    axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="GFLOP/s", xlim=(left, right))
    axes.xaxis.set_minor_formatter("")
    axes.yaxis.set_minor_formatter("")
    axes.grid(alpha=0.2)
    _name(figure, axes, named)
    return figure


def _name(figure: Figure, axes: Any, named: Sequence[tuple[str, tuple[float, float]]]) -> None:
    """Write names beside points, the first first, each where it covers no other; else there is none."""
    figure.draw_without_rendering()  # before it nothing has a place
    inside, taken = axes.get_window_extent(), [text.get_window_extent() for text in axes.texts]
    for name, point in named:
        for right, up in ((9, -3), (-9, -3), (9, 9), (-9, 9), (9, -15), (-9, -15)):
            side = "left" if right > 0 else "right"
            text = axes.annotate(name, point, (right, up), textcoords="offset points", fontsize=7, ha=side)
            box = text.get_window_extent()
            if inside.x0 < box.x0 and box.x1 < inside.x1 and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()


def memory(profile: Profile) -> Figure:
    """Bytes of each kind through one step, and of the process."""
    figure, axes = _figure("Memory through one step, by what it is for", pad=18)
    places = range(len(profile.memory["parameters"]))
    lines = [[size / 2**20 for size in profile.memory[kind]] for kind in KINDS]
    axes.stackplot(places, lines, labels=KINDS, colors=[COLOURS[kind] for kind in KINDS])
    for name, begin in _parts(profile):
        axes.axvline(begin, color="0.4", lw=0.8)
        axes.annotate(f" {name}", (begin, 1.01), xycoords=("data", "axes fraction"), fontsize=8)
    axes.set(xlabel="operators", ylabel="MiB of tensors", xlim=(0, max(1, len(places) - 1)), ylim=(0, None))
    figure.legend(loc="outside lower center", ncols=len(KINDS), fontsize=8, frameon=False)
    return figure


def _parts(profile: Profile) -> list[tuple[str, int]]:
    """Where in a step each of its large parts begins."""
    found: dict[str, int] = {}
    for number, place in enumerate(profile.places):
        name = place.direction or place.name
        if name in ("forward", "loss", "backward", "optimizer"):
            found.setdefault(name, number)
    return [*found.items()]


def _figure(title: str, pad: float = 6) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=11, pad=pad)
    return figure, axes


def alike(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Join the ways of a place: its name, and its rows; what takes longest first."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.name, []).append(row)
    return sorted(found.items(), key=lambda each: -sum(row.seconds for row in each[1]))
