"""Commits of a git repository, each run in a work tree of its own: the checkout that one works in is not touched."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lab.errors import BadInput
from lab.files import METRICS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

# Packages are those of the commit, also where the checkout is installed; but the lab is this one.
EXEC = "import os, sys; from lab.cli import main; sys.path[:0] = sys.argv.pop(1).split(os.pathsep); main(sys.argv[1:])"
OURS = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX")  # of a hook that the lab may be called from
TRACE = "Traceback (most recent call last):"


@dataclass(frozen=True)
class Script:
    """What is run at each commit.

    Attributes:
        target: The path of a script from the root of the repository, or the name of a module.
        arguments: What it is given.
        module: Whether it is a module.
        every: Steps between looks; see ``lab exec``.
    """

    target: str
    arguments: tuple[str, ...] = ()
    module: bool = False
    every: int = 10


def git(*arguments: str, at: Path) -> str:
    """Run git in a folder; return what it prints.

    Raises:
        BadInput: There is no git, or it fails; with what it says.
    """
    command = ["git", "-c", f"core.hooksPath={os.devnull}", "-C", str(at), *arguments]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, env=_environment(), check=False)  # noqa: S603 - no shell
    except FileNotFoundError:
        raise BadInput("git: not found; lab bisect needs it") from None
    if ended.returncode:
        lines = ended.stderr.strip().splitlines()
        raise BadInput(f"git {arguments[0]}: {lines[-1] if lines else f'ended with {ended.returncode}'}")
    return ended.stdout.strip()


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in OURS}


# ---------------------------------------------------------------- what is asked


def root_of(folder: Path) -> Path:
    """The root of the repository that a folder is in.

    Raises:
        BadInput: It is in none.
    """
    try:
        return Path(git("rev-parse", "--show-toplevel", at=folder))
    except BadInput as error:
        if "needs it" in str(error):
            raise
        raise BadInput(f"{folder}: in no git repository") from None


def commit_of(name: str, root: Path) -> str:
    """The hash of a commit, by any name that git knows it by.

    Raises:
        BadInput: There is none of that name.
    """
    try:
        return git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}", at=root)
    except BadInput:
        raise BadInput(f"{name}: no such commit in {root}") from None


def line(good: str, bad: str, root: Path) -> list[str]:
    """The commits after a good one up to a bad one, the oldest first; of a merge, its first parent is before it.

    Raises:
        BadInput: The good one is not before the bad one.
    """
    first, last = commit_of(good, root), commit_of(bad, root)
    if first == last:
        raise BadInput(f"{good} and {bad}: the same commit")
    all_before = git("rev-list", "--first-parent", last, at=root).splitlines()
    if first in all_before:
        return all_before[: all_before.index(first)][::-1]
    if first in git("rev-list", last, at=root).split():
        raise BadInput(f"{good}: came into {bad} by a merge; give the commit that it was merged into, or before it")
    raise BadInput(f"{good}: not an ancestor of {bad}; the good commit has to come first")


def check_script(script: Script, commit: str, name: str, root: Path) -> None:
    """Check that a commit holds the script.

    Raises:
        BadInput: It does not.
    """
    if not script.module:
        try:
            git("cat-file", "-e", f"{commit}:{script.target}", at=root)
        except BadInput:
            raise BadInput(f"{script.target}: not in the commit {name}; only what is committed is run") from None


# ---------------------------------------------------------------- one run


@dataclass
class Bench:
    """Where commits are run.

    Attributes:
        root: Of the repository.
        tree: The work tree.
        inside: The folder in it from which the script is run.
        runs: Where run folders are kept.
    """

    root: Path
    tree: Path
    inside: Path
    runs: Path
    script: Script

    def run(self, commit: str, name: str = "") -> tuple[Path, str]:
        """Run a commit; return its run folder, and why it cannot be used, empty if it can."""
        git("checkout", "--quiet", "--force", "--detach", commit, at=self.tree)
        git("clean", "--quiet", "-ffdx", at=self.tree)
        folder, log = self.runs / (name or commit[:12]), self.runs / f"{name or commit[:12]}.log"
        target = self.script.target if self.script.module else str(self.tree / self.script.target)
        options = ["--out", str(folder), "--every", str(self.script.every), *(["-m"] if self.script.module else [])]
        paths = os.pathsep.join(["", *(str(path) for path in (self.tree, self.tree / "src") if path.is_dir())])
        command = [sys.executable, "-P", "-c", EXEC, paths, "exec", *options, target, *self.script.arguments]
        if not (self.tree / self.inside).is_dir():
            return folder, f"it has no folder {self.inside}"
        with log.open("wb") as file:
            where = self.tree / self.inside
            status = subprocess.run(  # noqa: S603 - the script that was asked for
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, cwd=where, env=_environment(), check=False
            ).returncode
        if status:
            return folder, _reason(log.read_text(encoding="utf-8", errors="replace"), status)
        return folder, "" if (folder / METRICS).is_file() else "nothing was trained that could be watched"


def _reason(log: str, status: int) -> str:
    """The line that says why a script failed: what comes after its last traceback."""
    _, found, trace = log.rpartition(TRACE)
    lines = [text for text in trace.splitlines() if text and not text[0].isspace()]
    said = [text.removeprefix("lab: ") for text in log.splitlines() if text.startswith("lab: ")]
    return lines[0] if found and lines else said[-1] if said else f"it ended with status {status}"


@contextlib.contextmanager
def bench(root: Path, inside: Path, script: Script, commit: str, out: Path | None) -> Iterator[Bench]:
    """A work tree in a temporary folder, while in the block; it is gone afterwards, also if it is left by a signal."""
    with tempfile.TemporaryDirectory(prefix="lab-bisect-") as folder, _ended_by_signal():
        here = Path(folder).resolve()
        tree, runs = here / "tree", out.resolve() if out else here / "runs"
        runs.mkdir(parents=True, exist_ok=True)
        try:
            git("worktree", "add", "--quiet", "--detach", str(tree), commit, at=root)
            yield Bench(root, tree, inside, runs, script)
        finally:
            with contextlib.suppress(BadInput):  # it may not have been made
                git("worktree", "remove", "--force", str(tree), at=root)


@contextlib.contextmanager
def _ended_by_signal() -> Iterator[None]:
    """Let SIGTERM end what is in the block as Ctrl-C does, so that nothing is left behind."""

    def end(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
