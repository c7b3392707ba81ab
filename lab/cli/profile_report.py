"""How a profile looks on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lab.profiling.keep import alike

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from rich.console import RenderableType

    from lab.profiling.gains import Change
    from lab.profiling.profile import Profile, Row

SHOWN, OPERATORS = 14, 6  # places, and operators
COLOUR = {
    "compute": "green",
    "memory": "cyan",
    "dispatch": "yellow",
    "kernel": "blue",
    "Python": "yellow",
    "loader": "magenta",
}


def print_profile(profile: Profile, changes: Sequence[Change], console: Console, title: str, *more: str) -> None:
    """Print where time and memory go, and what to change first."""
    parts: list[RenderableType] = [_head(profile), Text(), _places(profile), Text(), _operators(profile), Text()]
    parts += [_memory(profile), Text()]
    parts += [_changes(profile, changes), *([Text()] if more else []), *(Text(line, "yellow") for line in more)]
    heading = Text.assemble((" profile ", "bold blue reverse"), f" {title} ")
    console.print(Panel(Group(*parts), title=heading, title_align="left", border_style="blue", padding=(1, 2)))


def _head(profile: Profile) -> RenderableType:
    flops = sum(each.cost.flops for each in profile.operators)
    best = profile.machine.seconds(flops, 0) / profile.step
    machine = profile.machine
    lines = _grid()
    lines.add_row("a step", f"{time_of(profile.step)}, {1 / profile.step:.3g} a second{_tokens(profile)}")
    lines.add_row(
        "computes",
        f"{flops / 1e9:.3g} GFLOP, {flops / profile.step / 1e9:.3g} GFLOP/s: {best:.0%} of what this machine can do",
    )
    threads = f"{machine.threads} thread{'s' if machine.threads > 1 else ''}"
    lines.add_row(
        "machine",
        f"{machine.flops['float32'] / 1e9:.0f} GFLOP/s in float32, {machine.bytes / 1e9:.0f} GB/s, "
        f"{machine.operator * 1e6:.1f} us an operator, {threads} on {machine.device} (measured just now)",
    )
    lines.add_row(
        "measured",
        f"{profile.named:.1%} of a step is at a place below, the rest is the loop around them; "
        f"timed steps took {profile.timed / profile.step:.2f}x a plain one",
    )
    return lines


def _tokens(profile: Profile) -> str:
    if len(profile.shape) < 2:
        return ""
    rows, length = profile.shape[:2]
    return f", {rows * length / profile.step:,.0f} positions a second ({rows} x {length})"


def _places(profile: Profile) -> RenderableType:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("place", max_width=22, overflow="ellipsis", no_wrap=True)
    for name in ("share", "fwd ms", "bwd ms", "ops", "GFLOP/s", "GB/s", "roof"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("bound by", no_wrap=True)
    places = alike(profile.grouped())
    for name, rows in places[:SHOWN]:
        table.add_row(*_line(profile, name, rows))
    rest = [row for _, rows in places[SHOWN:] for row in rows]
    if rest:
        table.add_row(*_line(profile, f"{len(places) - SHOWN} more", rest)[:-1], "")
    table.add_row("[dim]the loop itself[/]", f"{profile.loop / profile.step:.1%}", _ms(profile.loop))
    return table


def _line(profile: Profile, name: str, rows: Iterable[Row]) -> list[RenderableType]:
    rows = [*rows]
    back = sum(row.seconds for row in rows if row.direction == "backward")
    seconds = sum(row.seconds for row in rows)
    flops, moved = sum(row.cost.flops for row in rows), sum(row.cost.bytes for row in rows)
    bound = max(rows, key=lambda row: row.seconds).bound
    return [
        escape(name),
        f"{seconds / profile.step:.1%}",
        _ms(seconds - back),
        _ms(back) if back else "",
        f"{sum(row.cost.calls for row in rows)}",
        f"{flops / seconds / 1e9:.0f}" if flops else "",
        f"{moved / seconds / 1e9:.1f}" if moved else "",
        f"{sum(row.roof for row in rows) / seconds:.0%}" if moved else "",
        Text(bound, COLOUR.get(bound, "")),
    ]


def _operators(profile: Profile) -> RenderableType:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("operator", max_width=34, overflow="ellipsis", no_wrap=True)
    for name in ("ms", "calls", "GFLOP", "MB", "GFLOP/s", "GB/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in profile.operators[:OPERATORS]:
        cost, seconds = each.cost, each.seconds or float("inf")
        table.add_row(
            escape(each.name),
            _ms(each.seconds),
            str(cost.calls),
            f"{cost.flops / 1e9:.3g}" if cost.flops else "",
            f"{cost.bytes / 1e6:.3g}",
            f"{cost.flops / seconds / 1e9:.0f}" if cost.flops else "",
            f"{cost.bytes / seconds / 1e9:.1f}",
        )
    return table


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}"


def _memory(profile: Profile) -> RenderableType:
    lines = _grid()
    kinds = ", ".join(f"{kind} {bytes_of(size)}" for kind, size in profile.at_peak().items() if size)
    lines.add_row("memory", f"{bytes_of(profile.peak)} of tensors at the peak: {kinds}")
    held = [each for each in profile.held if each[1] in ("activations", "other")][:4]
    if held:
        lines.add_row("", "most of it made at " + ", ".join(f"{place} {bytes_of(size)}" for place, _, size in held))
    for name, scope in profile.scopes.items():
        if scope.times:
            each = profile.whole(name)
            what = "a token" if scope.tokens else "each"
            lines.add_row(name, f"{time_of(each)} {what}, {len(scope.times)} of them, beside the steps")
    return lines


def _changes(profile: Profile, changes: Sequence[Change]) -> RenderableType:
    if not changes:
        return Text("Nothing that is worth changing first: no change is seen to save 3% of a step.", "green")
    parts: list[RenderableType] = [Text("What to change first", style="bold")]
    for place, change in enumerate(changes, 1):
        heading = Text.assemble((f"{place}. {change.what}", "bold"), (f"  {change.cause}", "dim"))
        grid = _grid()
        if change.at:
            grid.add_row("   where", Text(change.at, "cyan"))
        grid.add_row("   gain", Text(_gain(profile, change)))
        grid.add_row("   measured", Text(change.why))
        parts += [heading, grid]
    return Group(*parts)


def _gain(profile: Profile, change: Change) -> str:
    whole = profile.whole(change.of)
    what = {"step": "a step", "evaluation": "an evaluation", "generation": "a token"}[change.of]
    said = []
    if change.seconds:
        most = "at most " if change.bound else ""
        said.append(f"{most}{time_of(change.seconds)} of {time_of(whole)} {what}: {most}{change.gain:.2f}x as fast")
    if change.bytes:
        said.append(f"{bytes_of(change.bytes)} of memory")
    return "; ".join(said) or "none in time"


def print_files(folder: Path, console: Console) -> None:
    """Print what there is to look at."""
    names = {"trace": "trace", "flame.svg": "flame graph", "speedscope.json": "speedscope"}
    names |= {"roofline.png": "roofline", "memory.png": "memory"}
    there = [f"{name} [dim]({what})[/]" for name, what in names.items() if (folder / name).exists()]
    where = escape(str(folder))
    console.print(f"[dim]kept in[/] {where}[dim]:[/] {', '.join(there)}", soft_wrap=True)
    console.print(f"[dim]look:[/] lab board {where}", soft_wrap=True)


def time_of(seconds: float) -> str:
    """A time for a person."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"


def bytes_of(size: float) -> str:
    """A size for a person."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size:.0f} bytes"


def _grid() -> Table:
    lines = Table.grid(padding=(0, 2))
    lines.add_column(style="dim", no_wrap=True)
    lines.add_column()
    return lines
