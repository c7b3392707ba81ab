"""The command line: one module a command. Nothing here imports torch before it is needed."""

from __future__ import annotations

import sys

import click

from lab import __version__
from lab.cli.answer import answer
from lab.cli.bisect import bisect
from lab.cli.board import board
from lab.cli.build import build, hint
from lab.cli.check import check
from lab.cli.compare import compare
from lab.cli.diagnose import diagnose
from lab.cli.diff import diff
from lab.cli.exec import exec_
from lab.cli.list import list_
from lab.cli.matrix import matrix
from lab.cli.profile import profile
from lab.cli.prove import prove
from lab.cli.run import run
from lab.cli.show import show
from lab.errors import BadInput, LabError, shown


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="lab")
def cli() -> None:
    """Build every layer of an LLM, break it on purpose, measure what broke.

    \b
    lab list                   what there is: projects, scenarios, faults, probes, causes, plugins
    lab run reads-the-future   train, break, watch, diagnose
    lab exec train.py          watch a training script of your own
    lab diff RUN RUN           see where two runs part
    lab profile SCENARIO       see where time and memory go, and what to change first
    lab compare RUN RUN        see which is faster, and needs less
    lab board                  look at the newest run in TensorBoard

    Exit status: 0 as expected, 1 something is wrong with the run, 2 bad input.
    """  # noqa: D301 - to click, the character \b keeps the lines below it apart


for command in (
    list_,
    show,
    build,
    hint,
    check,
    run,
    exec_,
    diagnose,
    diff,
    compare,
    bisect,
    profile,
    answer,
    prove,
    matrix,
    board,
):
    cli.add_command(command)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line, and end the process: each error in one line, with the status that it stands for."""
    sys.exit(status_of(arguments))


def status_of(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    try:
        status = cli.main(args=arguments, prog_name="lab", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except (LabError, click.ClickException) as error:
        text = error.format_message() if isinstance(error, click.ClickException) else str(error)
        return _say(text, 2 if isinstance(error, (BadInput, click.ClickException)) else 1)
    except (KeyboardInterrupt, click.Abort):
        return _say("interrupted; what was recorded until now is kept: lab diagnose RUN reads it", 130)
    except OSError as error:  # a folder that may not be entered, a name that is too long, a disk that is full
        return _say(f"{shown(error.filename)}: {error.strerror}" if error.filename else str(error), 2)
    return status if isinstance(status, int) else 0


def _say(text: str, status: int) -> int:
    line = " ".join(text.split())
    click.echo(f"lab: {line}", err=True)
    return status
