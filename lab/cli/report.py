"""How a diagnosis looks on a terminal."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.markup import escape
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import RenderableType

    from lab.diagnosis.model import Diagnosis, Finding
    from lab.runtime.run import Check, Outcome

UNSEEN = "nothing recorded "
NOTHING = "nothing of the kind happened"
ABSENT = ("no ", "there is one process", "the model takes no ", "the model is told of no ", "the lab's own training ")
COLOUR = {"healthy": "green", "faulty": "red", "inconclusive": "yellow"}


def print_outcome(outcome: Outcome, console: Console) -> None:
    """Print what a scenario showed: the diagnosis, the metrics checked, and whether it is as expected."""
    title = f"{outcome.scenario_id}, seed {outcome.scenario.seed}"
    parts: list[RenderableType] = []
    if outcome.checks:
        parts += [Text("Metrics to check", style="bold"), _checks(outcome.checks), Text()]
    if outcome.as_expected:
        parts.append(Text("As the scenario expects.", style="green"))
    else:
        parts += [Text(f"Not as expected: {difference}", style="red") for difference in outcome.differences]
    print_diagnosis(outcome.diagnosis, console, title, Group(*parts))
    console.print(
        f"[dim]{outcome.seconds:.1f} s · kept in[/] {escape(str(outcome.folder))} "
        f"[dim]· look:[/] lab board {escape(str(outcome.folder))}",
        soft_wrap=True,
    )


def print_diagnosis(
    diagnosis: Diagnosis, console: Console, title: str, *more: RenderableType, whole: bool = False
) -> None:
    """Print what is wrong with a run, where, since when, on what evidence, and how to repair it.

    What was checked comes by subject; with `whole`, each check with what it says.
    """
    colour = COLOUR[diagnosis.verdict]
    parts: list[RenderableType] = []
    for place, cause in enumerate(diagnosis.causes, 1):
        parts += [_cause(place, cause), Text()]
    if diagnosis.unexplained:
        parts.append(Text("No cause that the lab knows explains:", style="bold yellow"))
        parts += [Padding(Text(f"• {symptom.text}"), (0, 0, 0, 3)) for symptom in diagnosis.unexplained]
        parts.append(Text())
    parts += [_each_check(diagnosis) if whole else _coverage(diagnosis), *([Text(), *more] if more else [])]
    heading = Text.assemble((f" {diagnosis.verdict} ", f"bold {colour} reverse"), f" {title} ")
    console.print(Panel(Group(*parts), title=heading, title_align="left", border_style=colour, padding=(1, 2)))


def _cause(place: int, cause: Finding) -> RenderableType:
    heading = Text.assemble((f"{place}. {cause.title}", "bold"), ("  " + cause.id, "dim"))
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column()
    where = cause.at or "the run as a whole"
    also = f" (and {', '.join(cause.also_at[:4])}{', ...' if len(cause.also_at) > 4 else ''})" if cause.also_at else ""
    facts.add_row("where", Text.assemble((where, "bold cyan"), also))
    facts.add_row("since", f"step {cause.since_step}")
    facts.add_row("evidence", Text("\n".join(f"• {text}" for text in cause.evidence)))
    facts.add_row("", Text(f"explains {cause.score:.0%} of what was found", style="dim"))
    facts.add_row("repair", Text(cause.repair))
    if cause.look:
        facts.add_row("look at", Text(cause.look))
    if cause.refute:
        facts.add_row("not it, if", Text(cause.refute))
    return Group(heading, Padding(facts, (0, 0, 0, 3)))


def _good(diagnosis: Diagnosis) -> dict[str, str]:
    """What was checked and found right: id to title."""
    found = {symptom.id for symptom in diagnosis.symptoms}
    return {id: title for id, title in diagnosis.checked.items() if id not in found}


def _each_check(diagnosis: Diagnosis) -> RenderableType:
    """What was checked, in words, and what was not, with the reason: a verdict is worth no more than that."""
    lines = _grid()
    lines.add_row("checked", Text("\n".join(f"✓ {title}" for title in _good(diagnosis).values()) or "nothing", "green"))
    if diagnosis.not_checked:
        text = "\n".join(f"{id}: {reason}" for id, reason in diagnosis.not_checked.items())
        lines.add_row("not checked", Text(text, style="yellow"))
    return lines


def _coverage(diagnosis: Diagnosis) -> RenderableType:
    """The same in short: what was checked by subject, and why the rest was not, and how many checks that are."""
    lines = _grid()
    good = _good(diagnosis)
    subjects = _grouped((id.partition(".")[0], id.partition(".")[2]) for id in good)
    text = Text("; ", "dim").join(
        Text.assemble((f"{subject} ", "green"), (", ".join(names), "dim")) for subject, names in subjects.items()
    )
    lines.add_row("checked", text if good else Text("nothing", "green"))
    reasons = _grouped((_short(reason), id) for id, reason in diagnosis.not_checked.items())
    if reasons:
        absent = sum(len(ids) for reason, ids in reasons.items() if _is_absent(reason))
        said = [
            Text.assemble((reason, "yellow"), (f" ({len(ids)})", "dim"))
            for reason, ids in reasons.items()
            if not _is_absent(reason)
        ]
        if absent:
            said.append(Text.assemble(("there is nothing of the kind here", "yellow"), (f" ({absent})", "dim")))
        lines.add_row("not checked", Text("; ", "dim").join(said))
    told = f"{len(good)} checks found nothing, {len(diagnosis.not_checked)} were not made: "
    lines.add_row("", Text(f"{told}lab diagnose RUN --all says each in words", "dim"))
    return lines


def _is_absent(reason: str) -> bool:
    """Whether it says only that this model or this training lacks what would be checked, and nothing to be done."""
    return ";" not in reason and (reason.startswith(ABSENT) or reason == NOTHING)


def _short(reason: str) -> str:
    """What the first probe says, without its name."""
    first = re.split(r"; (?=[\w-]+: )", reason)[0]
    return NOTHING if first.startswith(UNSEEN) else re.sub(r"^[\w-]+: ", "", first)


def _grid() -> Table:
    lines = Table.grid(padding=(0, 2))
    lines.add_column(style="dim", no_wrap=True)
    lines.add_column()
    return lines


def _grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name, member in pairs:
        groups.setdefault(name, []).append(member)
    return groups


def _checks(checks: tuple[Check, ...]) -> RenderableType:
    lines = Text()
    for check in checks:
        mark = ("✓ ", "green") if check.passed else ("✗ ", "red")
        where = f" at {check.at}" if check.at else ""
        on = {"broken": "on the broken run", "healthy": "on the healthy run", "both": "on both runs"}[check.on]
        values = f"{_number(check.value)} here"
        if check.twin_value is not None:
            values += f", {_number(check.twin_value)} on the healthy twin"
        lines.append_text(Text.assemble(mark, f"{check.metric}{where}: {values}", (f"  ({check.is_} {on})\n", "dim")))
    lines.rstrip()
    return Padding(lines, (0, 0, 0, 3))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
