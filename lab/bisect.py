"""Which commit changed a training: binary search over the history of a git repository, with `lab.diff` as the test.

A commit is good as long as its run agrees with that of the good commit, as far as rounding lets it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lab.commits import bench, check_script, git, line, root_of
from lab.diff import compare_folders
from lab.errors import BadInput
from lab.explain import headline

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from lab.commits import Bench, Script
    from lab.difference import Compared

Verdict = Literal["agrees", "differs", "skipped"]


@dataclass(frozen=True)
class Trial:
    """What became of a commit.

    Attributes:
        commit, subject: Which.
        verdict: Whether its run agrees with that of the good commit; ``skipped`` where it did not run to its end.
        reason: How it differs, or why it is skipped.
    """

    commit: str
    subject: str
    verdict: Verdict
    reason: str = ""


@dataclass(frozen=True)
class Bisected:
    """What the search ended with.

    Attributes:
        first: The first commit that differs.
        parent: The last one before it that agrees.
        between: Commits between the two that were skipped: any of them may be the first, too.
        merges: Whether it is a merge.
        compared: How the two runs part.
        trials: All commits that were run, in that order.
    """

    first: Trial
    parent: Trial
    between: tuple[Trial, ...]
    merges: bool
    compared: Compared
    trials: tuple[Trial, ...]

    def to_dict(self) -> dict[str, Any]:
        """Give this as JSON types."""
        return {
            "first": vars(self.first),
            "parent": vars(self.parent),
            "between": [vars(trial) for trial in self.between],
            "merges": self.merges,
            "difference": self.compared.to_dict(),
            "trials": [vars(trial) for trial in self.trials],
        }


def bisect(
    good: str,
    bad: str,
    script: Script,
    folder: Path,
    *,
    out: Path | None = None,
    tolerance: float | None = None,
    tell: Callable[[Trial], None] = lambda _: None,
) -> Bisected:
    """Find the first commit whose run is no longer that of a good one.

    The good commit is run twice: a script that does not even agree with itself has nothing to be compared by.

    Args:
        good: A commit, by any name.
        bad: A later one.
        script: What to run.
        folder: Where one stands in the repository.
        out: Where to keep the runs; None to drop them.
        tolerance: See `lab.diff.compare`.
        tell: Is told of each commit that was run.

    Raises:
        BadInput: There is no such commit, no repository or no script; the good commit is not before the bad one; one of
            them does not run; the good one differs from itself; or they do not differ.
    """
    root = root_of(folder)
    after = line(good, bad, root)
    first = git("rev-parse", f"{good}^{{commit}}", at=root)
    for commit, name in ((first, good), (after[-1], bad)):
        check_script(script, commit, name, root)
    with bench(root, folder.resolve().relative_to(root.resolve()), script, first, out) as where:
        search = _Search(where, [first, *after], tolerance, tell)
        search.begin((good, bad))
        return search.end(*search.halve())


class _Search:
    """The state of a search: commits from the good one (0) to the bad one, and what became of those that were run."""

    def __init__(
        self, where: Bench, commits: Sequence[str], tolerance: float | None, tell: Callable[[Trial], None]
    ) -> None:
        self.where, self.commits, self.tolerance, self.tell = where, commits, tolerance, tell
        self.trials: dict[int, Trial] = {}
        self.folders: dict[int, Path] = {}

    def begin(self, names: tuple[str, str]) -> None:
        """Run both ends; see that one agrees with itself, and the other does not agree with it."""
        good, bad = names
        last = len(self.commits) - 1
        if self.try_(0).verdict == "skipped":
            raise BadInput(f"{good}: does not run: {self.trials[0].reason}")
        again, reason = self.where.run(self.commits[0], "again")
        differs = reason or self._difference(again)
        if differs:
            raise BadInput(f"{good}: run twice, it does not agree with itself: {differs}; seed what the script draws")
        if self.try_(last).verdict == "skipped":
            raise BadInput(f"{bad}: does not run: {self.trials[last].reason}")
        if self.trials[last].verdict == "agrees":
            raise BadInput(f"{good} and {bad}: their runs do not differ; {self.trials[last].reason}")

    def halve(self) -> tuple[int, int]:
        """Return the places of the last commit that agrees, and of the first that differs, but for skipped ones."""
        low, high = 0, len(self.commits) - 1
        while left := [place for place in range(low + 1, high) if place not in self.trials]:
            middle = min(left, key=lambda place: abs(2 * place - low - high))
            verdict = self.try_(middle).verdict
            low, high = (
                (middle, high) if verdict == "agrees" else (low, middle) if verdict == "differs" else (low, high)
            )
        return low, high

    def end(self, low: int, high: int) -> Bisected:
        """Say how the runs of these two part."""
        compared = compare_folders(self.folders[low], self.folders[high], self.tolerance)
        parents = git("rev-list", "--parents", "-n", "1", self.commits[high], at=self.where.root).split()[1:]
        between = tuple(self.trials[place] for place in range(low + 1, high))
        ends = self.trials[high], self.trials[low]
        return Bisected(*ends, between, len(parents) > 1, compared, tuple(self.trials.values()))

    def try_(self, place: int) -> Trial:
        """Run a commit, and compare it with the good one."""
        commit = self.commits[place]
        subject = git("log", "-1", "--format=%s", commit, at=self.where.root)
        folder, reason = self.where.run(commit)
        self.folders[place] = folder
        if reason:
            trial = Trial(commit, subject, "skipped", reason)
        elif place == 0:
            trial = Trial(commit, subject, "agrees")
        else:
            compared = compare_folders(self.folders[0], folder, self.tolerance).found
            trial = Trial(commit, subject, "agrees" if compared.first is None else "differs", headline(compared))
        self.trials[place] = trial
        self.tell(trial)
        return trial

    def _difference(self, folder: Path) -> str:
        found = compare_folders(self.folders[0], folder, self.tolerance).found
        return "" if found.first is None else headline(found)
