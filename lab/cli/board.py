"""``lab board``: TensorBoard on a run."""

from __future__ import annotations

import subprocess
import sys
import webbrowser
from pathlib import Path

import click

from lab.cli.options import RUNS
from lab.errors import BadInput
from lab.files import METRICS


@click.command()
@click.argument("run", required=False, type=click.Path(path_type=Path))
@click.option("--port", type=click.IntRange(0, 65535), default=6006, show_default=True, help="0 takes a free one.")
@click.option("--open/--no-open", "open_", default=True, show_default=True, help="Open it in a browser.")
def board(run: Path | None, *, port: int, open_: bool) -> int:
    """Open TensorBoard on the folder RUN; by default on the newest in ./runs. It listens on 127.0.0.1 only."""
    folder = run if run is not None else newest(RUNS)
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder; give the folder of a run, or a folder of runs")
    if not any(folder.rglob(METRICS)):
        raise BadInput(f"{folder}: no run folder, and none inside it")
    return serve(folder, port, open_=open_)


def newest(root: Path) -> Path:
    """Return the run folder that was written to last.

    Raises:
        BadInput: There is none.
    """
    runs = [path.parent for path in root.glob(f"*/{METRICS}")]
    if not runs:
        raise BadInput(f"{root.absolute()}: no run yet; lab run SCENARIO makes one, or give the folder of a run")
    return max(runs, key=lambda folder: (folder / METRICS).stat().st_mtime)


def serve(folder: Path, port: int, *, open_: bool) -> int:
    """Run TensorBoard until it is interrupted; return its exit status."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--host", "127.0.0.1"]
    process = subprocess.Popen(  # noqa: S603 - our own interpreter, and a folder that exists
        [*command, "--port", str(port)], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if "http://" in line:
                address = "http://" + line.split("http://", 1)[1].split()[0]
                click.echo(f"{folder}: {address} (Ctrl-C ends it)")
                if open_:
                    webbrowser.open(address)
            elif "in use" in line:
                process.wait()
                raise BadInput(f"--port {port}: in use; give another, or 0 for a free one")
        return process.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        process.terminate()
        process.wait()
