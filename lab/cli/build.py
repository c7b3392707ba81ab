"""``lab build`` and ``lab hint``: write a component of your own."""

from __future__ import annotations

from pathlib import Path

import click

from lab.errors import BadInput, nearest
from lab.projects import PROJECTS, Project


def ready_project(name: str) -> Project:
    """Return the project of this id.

    Raises:
        BadInput: There is none that can be checked.
    """
    ready = [p.id for p in PROJECTS if p.ready]
    if name not in ready:
        raise BadInput(f"{name!r} is no project with a spec{nearest(name, ready)}")
    return next(p for p in PROJECTS if p.id == name)


@click.command("build")
@click.argument("project", required=False)
@click.option("--reset", is_flag=True, help="Begin anew; the old file is kept under another name.")
@click.option("--skip", is_flag=True, help="Pass this project over.")
def build(project: str | None, *, reset: bool, skip: bool) -> None:
    """Write the file in which you build PROJECT: signatures, shapes and docstrings, the bodies yours to write.

    Without PROJECT: go on with the first one that is neither passed nor skipped.
    """
    from lab.learn.progress import Entry, file_of, read_progress, save_progress
    from lab.learn.stub import stub

    folder = Path.cwd()
    progress = read_progress(folder)
    chosen = ready_project(project) if project else progress.next()
    if chosen is None:
        click.echo("every project is passed or skipped; lab list projects shows them")
        return
    if skip:
        progress.entry(chosen).state = "skipped"
        save_progress(folder, progress)
        click.echo(f"{chosen.id} is skipped; lab build goes on, lab build {chosen.id} comes back to it")
        return
    path = folder / file_of(chosen)
    if reset and path.exists():
        kept = _aside(path)
        path.rename(kept)
        progress.projects[chosen.id] = Entry(file=path.name, hints=progress.entry(chosen).hints)
        click.echo(f"the old file is now {kept.name}")
    new = not path.exists()
    if new:
        path.write_text(stub(chosen), encoding="utf-8")
    entry = progress.entry(chosen)
    if entry.state == "skipped":
        entry.state = "begun"
    save_progress(folder, progress)
    click.echo(f"{chosen.number}. {chosen.title}: {'wrote' if new else 'go on in'} {path.name}")
    if not new and entry.of:
        click.echo(f"  {entry.hold} of {entry.of} properties held when it was last checked")
    for what, command in (("why and how", "show"), ("check it", "check"), ("a hint", "hint")):
        click.echo(f"  {what:<12} lab {command} {chosen.id}")


def _aside(path: Path) -> Path:
    numbered = (path.with_name(f"{path.stem}.{number}.old{path.suffix}") for number in range(1, 10_000))
    return next(candidate for candidate in numbered if not candidate.exists())


@click.command("hint")
@click.argument("project")
def hint(project: str) -> None:
    """Show the next hint for PROJECT; how many were shown is counted."""
    from lab.learn.hints import hints
    from lab.learn.progress import read_progress, save_progress

    chosen = ready_project(project)
    progress = read_progress(Path.cwd())
    entry, texts = progress.entry(chosen), hints(chosen)
    if entry.hints >= len(texts):
        raise BadInput(f"{chosen.id}: all {len(texts)} hints were shown; the whole is in lab show {chosen.id}")
    click.echo(texts[entry.hints])
    entry.hints += 1
    save_progress(Path.cwd(), progress)
    click.echo(f"\nhint {entry.hints} of {len(texts)}")
