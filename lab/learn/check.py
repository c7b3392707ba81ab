"""Checks an implementation against a project's spec, with a time limit for each property."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.errors import BadInput

if TYPE_CHECKING:
    from collections.abc import Generator

    from lab.projects import Project

LIMIT = 20.0  # seconds a property; the slowest of the reference takes less than two


@dataclass(frozen=True)
class Result:
    """A property that was tried; `failure` is empty where it holds."""

    name: str
    failure: dict[str, Any] | None

    @property
    def passed(self) -> bool:
        """Whether it holds."""
        return self.failure is None


def check(project: Project, file: Path | None, *, limit: float = LIMIT) -> Generator[Result, None, None]:
    """Yield the result of each property as it comes.

    Args:
        project: One that is ready.
        file: The learner's file; None is the reference.
        limit: Seconds a property may take, and the import of the file.

    Raises:
        BadInput: The file cannot be read or imported, lacks a name, or has another signature.
    """
    if file is not None and not file.is_file():
        raise BadInput(f"{file}: no such file")
    done: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        events = Path(folder) / "events"
        while True:
            events.write_text("", encoding="utf-8")
            command = [sys.executable, "-m", "lab.learn.worker", project.id]
            command += [str(file.resolve()) if file else "", str(events), ",".join(done)]
            # What the file prints goes nowhere, however much it is.
            with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:  # noqa: S603
                try:
                    broken = yield from _follow(process, events, done, limit, file)
                finally:
                    process.kill()
            if broken is None:
                return
            done.append(broken.name)  # go on with the others, in a new process
            yield broken


def _follow(
    process: subprocess.Popen[bytes], events: Path, done: list[str], limit: float, file: Path | None
) -> Generator[Result, None, Result | None]:
    """Yield what the worker says until it ends; return the property that ended it, if one did."""
    read, running, since = 0, "", time.monotonic()
    while True:
        ended = process.poll() is not None
        lines = events.read_text(encoding="utf-8").split("\n")[:-1]
        for event in map(json.loads, lines[read:]):
            since = time.monotonic()
            if "refused" in event:
                raise BadInput(event["refused"])
            running = event.get("begin", "")
            if event.get("end", "import") != "import":
                done.append(event["end"])
                yield Result(event["end"], event["failure"])
        read = len(lines)
        late = time.monotonic() - since > limit and bool(running)
        if late or ended:
            if ended and not running and process.returncode == 0:
                return None
            text = f"not done after {limit:g} s: it may loop for ever" if late else _ending(process)
            if running in ("", "import"):
                raise BadInput(f"{file}: while it is imported, {text}")
            return Result(running, {"name": running, "text": text})
        time.sleep(0.02)


def _ending(process: subprocess.Popen[bytes]) -> str:
    return f"the process ended with status {process.returncode}: a component must not exit"
