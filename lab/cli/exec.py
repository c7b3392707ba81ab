"""``lab exec``: run a training script of anybody's, and say what is wrong with its training."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lab.cli.options import RUNS, json_option, load_catalogue, plugin_option, print_json

WAIT = 36  # steps before a trace: by then those are measured that no experiment stands beside

if TYPE_CHECKING:
    from lab.attach.script import Finder
    from lab.diagnosis.model import Diagnosis


@click.command("exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("-m", "module", is_flag=True, help="SCRIPT is the name of a module, as for python -m.")
@click.option("--out", type=click.Path(path_type=Path), help="The run folder; by default a new one in runs.")
@click.option("--every", type=click.IntRange(1, 1_000_000), default=10, show_default=True, help="Steps between looks.")
@click.option(
    "--sites", multiple=True, metavar="PATTERN", help="Read there only: blocks.*.attn, head.**. May be repeated."
)
@click.option("--profile", is_flag=True, help="Measure where time and memory go as well, as lab profile does.")
@click.option("--strict", is_flag=True, help="Exit with 1 when the training is faulty, whatever the script says.")
@json_option
@plugin_option
@click.argument("script")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def exec_(
    script: str,
    arguments: tuple[str, ...],
    *,
    module: bool,
    out: Path | None,
    every: int,
    sites: tuple[str, ...],
    profile: bool,
    strict: bool,
    as_json: bool,
    plugins: tuple[str, ...],
) -> int:
    """Run SCRIPT with its ARGUMENTS as python does, watch what it trains, and say at its end what is wrong with it.

    \b
    lab exec train.py --lr 3e-4
    lab exec --out runs/mine -m mypackage.train
    torchrun --nproc-per-node 2 --no-python lab exec train.py

    Nothing in the script changes: not what it prints, draws or computes. The diagnosis is printed on standard error,
    and kept as diagnosis.json in the run folder. If the script fails or is interrupted, what was seen until then is
    diagnosed.

    Exit status: that of the script. With --strict, 1 when the script ends well and its training is faulty.
    """  # noqa: D301 - to click, the character \b keeps the lines below it apart
    catalogue = load_catalogue(plugins)
    if profile:
        from lab.profiling.quiet import import_quietly

        import_quietly()
    from lab.attach.script import Finder, check_script, ended_well, run_script, show_error, status_of
    from lab.processes import own_folder, place

    folder = out or _new_name()
    rank, _ = place()
    here = own_folder(folder)
    check_script(script, here, module=module)
    measuring = Measuring() if profile else None
    finder = Finder(here, catalogue, every, sites or None, measuring.tools if measuring else ())
    with finder:
        error = run_script(script, arguments, module=module)
    diagnosis = finder.finish(None if ended_well(error) else error)
    if error is not None and not isinstance(error, SystemExit):
        show_error(error)
    status = status_of(error)
    if rank == 0:
        _report(diagnosis, finder, script, here, as_json=as_json)
    if measuring and diagnosis is not None and rank == 0:
        measuring.report(finder, diagnosis, Path(script).name, quiet=as_json)
    return 1 if strict and not status and diagnosis is not None and diagnosis.verdict == "faulty" else status


class Measuring:
    """What measures a script, where that was asked for."""

    def __init__(self) -> None:
        from lab.profiling.recorder import Recorder
        from lab.profiling.tools import make_tools

        self.recorder = Recorder()
        self.tools = [self.recorder, *make_tools(trace=True, sample=True, wait=WAIT)]

    def report(self, finder: Finder, diagnosis: Diagnosis, title: str, *, quiet: bool) -> None:
        """Write what was measured, and unless `quiet` print it."""
        from rich.console import Console

        from lab.cli.profile_report import print_files, print_profile
        from lab.errors import NotChecked
        from lab.profiling.gains import changes
        from lab.profiling.keep import keep
        from lab.profiling.profile import profile_of

        assert finder.watching is not None
        run, console = finder.watching.run, Console(stderr=True)
        try:
            found = profile_of(self.recorder)
        except NotChecked as error:
            click.echo(f"lab: {title}: not profiled: {error}", err=True)
            return
        worth = changes(found, diagnosis, run.history, finder.catalogue)
        keep(found, worth, run.folder)
        if not quiet:
            said = [text for tool in self.tools if (text := getattr(tool, "said", ""))]
            print_profile(found, worth, console, title, *said)
            print_files(run.folder, console)


def _report(diagnosis: Diagnosis | None, finder: Finder, script: str, folder: Path, *, as_json: bool) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(stderr=True)
    if diagnosis is None:
        click.echo(f"lab: {script}: nothing to diagnose: {_why(finder)}", err=True)
        return
    assert finder.watching is not None
    if as_json:
        print_json({"run": str(folder), "scenario": "exec", **diagnosis.to_dict()})
        return
    from lab.cli.report import print_diagnosis

    run = finder.watching.run
    count = sum(p.numel() for p in run.parameters.values())
    title = f"{Path(script).name}: {type(run.model).__name__}, {count:,} weights, {type(run.optimizer).__name__}"
    print_diagnosis(diagnosis, console, title)
    more = finder.made - 1
    if more:
        text = f"more optimisers were made: {more}; what they alone train is not watched"
        console.print(f"[dim]{text}[/]", highlight=False)
    where = escape(str(folder))
    console.print(f"[dim]kept in[/] {where} [dim]· look:[/] lab diagnose {where}", soft_wrap=True)


def _why(finder: Finder) -> str:
    """Why nothing was watched."""
    if finder.why_not:
        return finder.why_not
    if not finder.made:
        return "no optimiser was made while it ran, in this process; others are watched where torchrun starts them"
    compiling = "; what a compiled function calls is not seen" if "torch._dynamo" in sys.modules else ""
    return f"no module that an optimiser trains was called while it ran{compiling}"


def _new_name() -> Path:
    if int(os.environ.get("WORLD_SIZE", "1") or 1) > 1:  # one name for the processes of one launcher
        return RUNS / f"exec-of-{os.getppid()}"
    number = 1
    while (RUNS / f"exec-{number}").exists():
        number += 1
    return RUNS / f"exec-{number}"
