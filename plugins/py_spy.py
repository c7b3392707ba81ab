"""py-spy: samples the process from outside, with Python's functions and those of the libraries below them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lab import Plugin, plugin

if TYPE_CHECKING:
    from lab import Run, Step

FLAME, SPEEDSCOPE = "flame.svg", "speedscope.json"
FORMATS = {FLAME: "flamegraph", SPEEDSCOPE: "speedscope"}
PR_SET_PTRACER = 0x59616D61
BEGINS = "Sampling process"  # what it says when it does
PATIENCE = 20  # seconds that py-spy has to write its file


@plugin("py-spy", title="A flame graph and a speedscope file, sampled from outside")
class PySpy(Plugin):
    """Lets py-spy sample this process, first for ``flame.svg``, then for ``speedscope.json``.

    Where the system forbids one process to look into another, it says so, and the training goes on.

    Attributes:
        wait: Steps before it begins.
        seconds: How long it samples, in all; less where the training ends before.
        rate: Samples a second.
        said: What is missing, and why, in one line; empty where nothing is.
    """

    def __init__(self, wait: int = 24, seconds: float = 4.0, rate: int = 200) -> None:
        self.wait, self.seconds, self.rate = wait, seconds, rate
        self.said = ""
        self._left = [*FORMATS]
        self._process: subprocess.Popen[bytes] | None = None
        self._until = 0.0  # when it has had its time; 0 as long as it does not sample

    def lab_step_end(self, run: Run, step: Step) -> None:
        """Begin, when it is time; go on to the second file, when the first has had its time."""
        if step.index + 1 < self.wait or (self._process is None and not self._left):
            return
        if self._process is None:
            self._begin(run.folder / self._left.pop(0))
        elif self._process.poll() is not None or (self._samples() and time.monotonic() > self._until):
            self._end()

    def lab_end(self) -> None:
        """Let it write what it has."""
        self._end()
        if self._left and not self.said:
            self.said = f"the training ended before py-spy could write {', '.join(self._left)}; more steps"

    def lab_error(self) -> None:
        """The same."""
        self._end()

    def _begin(self, file: Path) -> None:
        command = _command()
        if command is None:
            self._give_up("py-spy is not installed: pip install py-spy")
            return
        self._file, self._told = file, tempfile.TemporaryFile()  # noqa: SIM115 - closed when py-spy has ended
        about = ["--pid", str(os.getpid()), "--format", FORMATS[file.name], "--output", str(file)]
        options = ["--rate", str(self.rate), "--duration", "3600", *(["--native"] if _has_native() else [])]
        self._process = subprocess.Popen(  # noqa: S603 - a fixed command
            [command, "record", *about, *options],
            stdin=subprocess.DEVNULL,
            stdout=self._told,
            stderr=self._told,
        )
        _may_look(self._process.pid)
        self._until = 0.0

    def _samples(self) -> bool:
        """Whether it has begun to sample: first it reads the symbols of every library, which takes a while."""
        if not self._until and BEGINS in self._read():
            self._until = time.monotonic() + self.seconds / len(FORMATS)
        return self._until > 0

    def _read(self) -> str:
        # Not by read: its place in the file is that of py-spy too, which writes there.
        return os.pread(self._told.fileno(), 1 << 16, 0).decode(errors="replace")

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)  # it writes its file
        try:
            process.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        _may_look(0)
        if not self._file.is_file() or not self._file.stat().st_size:
            self._give_up(_reason(self._read()))
        self._told.close()

    def _give_up(self, reason: str) -> None:
        self.said = f"not sampled by py-spy: {reason}"
        self._left.clear()


def _command() -> str | None:
    """Where py-spy is: beside this Python, or on the path."""
    beside = Path(sys.executable).parent / "py-spy"
    return str(beside) if beside.is_file() else shutil.which("py-spy")


def _has_native() -> bool:
    """Whether py-spy can see into libraries here: on Linux with this kind of processor."""
    return sys.platform == "linux" and os.uname().machine == "x86_64"


def _may_look(pid: int) -> None:
    """Under Linux' restricted ptrace a process is looked into by its parents alone; let this one do so too."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PTRACER, ctypes.c_ulong(pid), 0, 0, 0)


def _reason(told: str) -> str:
    """What py-spy said, in one line."""
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    text = next((line for line in lines if "ermission" in line or line.lower().startswith("error")), "")
    # It asks for the name of the program first, which is refused as well, and by another error.
    if "ermission" in text or "executable name" in text:
        return "this system lets no process look into another (ptrace): kernel.yama.ptrace_scope, CAP_SYS_PTRACE"
    return text.removeprefix("Error: ") or "it was ended before its first sample"
