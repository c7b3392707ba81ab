"""``lab bisect`` finds the commit that changed a training, in a repository of its own, and leaves that as it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from lab.cli import status_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TRAIN = """
import sys

import torch
from torch.nn import functional as F

from model import make

torch.manual_seed(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
model = make()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for _ in range(4):
    x = torch.randn(8, 16)
    loss = F.cross_entropy(model(x), x[:, :5].argmax(-1))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(loss.item())
"""
MODEL = """
from torch import nn


def make():
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 5))
"""
# The same sums in another order: only the last bits differ.
BLOCKS = """
import torch
from torch import nn


class Blocks(nn.Linear):
    def forward(self, x):
        parts = zip(x.chunk(4, -1), self.weight.chunk(4, -1))
        return sum(part @ weight.T for part, weight in parts) + self.bias


def make():
    return nn.Sequential(Blocks(16, 32), nn.Tanh(), nn.Linear(32, 5))
"""
SCALED = (
    BLOCKS.replace("    return nn", "    made = nn")
    + """
    with torch.no_grad():
        made[2].weight.mul_(1.01)
    return made
"""
)
# Subjects, and what each commit changes, by file. "scale" is the one that changes the training.
COMMITS: list[tuple[str, dict[str, str]]] = [
    ("begin", {"train.py": TRAIN, "model.py": MODEL, ".gitignore": "__pycache__\n"}),
    ("say more", {"README": "a training\n"}),
    ("sums in blocks", {"model.py": BLOCKS}),
    ("half done", {"model.py": BLOCKS + "\nraise NameError('half done')\n"}),
    ("scale the head", {"model.py": SCALED}),
    ("another name", {"train.py": TRAIN.replace("loss", "error")}),
    ("a comment", {"train.py": "# trains\n" + TRAIN}),
]


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", *who, "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def commit(folder: Path, subject: str, files: dict[str, str]) -> str:
    for name, text in files.items():
        (folder / name).write_text(text)
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", subject)
    return git(folder, "rev-parse", "HEAD")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("repository")
    git(folder, "init", "-q")
    hashes = {subject: commit(folder, subject, files) for subject, files in COMMITS}
    for subject, hashed in hashes.items():
        git(folder, "tag", subject.replace(" ", "-"), hashed)
    return folder, hashes


@pytest.fixture
def hashes(made: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The commits by their subjects; one stands in the repository, which has to be afterwards as it was."""
    folder, known = made
    monkeypatch.chdir(folder)
    yield known
    assert git(folder, "status", "--porcelain") == ""
    assert git(folder, "rev-parse", "HEAD") == known["a comment"]
    assert len(git(folder, "worktree", "list").splitlines()) == 1
    assert not (folder / "runs").exists()


def test_the_commit_that_changes_the_training_is_found(
    hashes: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(["bisect", "begin", "HEAD", "--json", "--", "train.py", "3"]) == 0
    said = capsys.readouterr()
    found: dict[str, Any] = json.loads(said.out)
    assert (found["first"]["commit"], found["first"]["subject"]) == (hashes["scale the head"], "scale the head")
    # What rounds otherwise is the same; what does not run is neither.
    assert (found["parent"]["commit"], found["parent"]["verdict"]) == (hashes["sums in blocks"], "agrees")
    assert [(t["subject"], t["verdict"], t["reason"]) for t in found["between"]] == [
        ("half done", "skipped", "NameError: half done")
    ]
    assert not found["merges"]
    assert (found["difference"]["first"]["at"], found["difference"]["where"]) == ("2.weight", "2.weight")
    assert "The first difference is 2.weight, in the weights before the step, at step 0" in found["explanation"]
    # Fewer are run than there are.
    assert len(found["trials"]) < len(COMMITS)
    assert f"{hashes['sums in blocks'][:10]} agrees" in said.err


def test_it_is_told_in_words(hashes: dict[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    kept = tmp_path / "runs"
    assert status_of(["bisect", "--out", str(kept), "sums-in-blocks", "scale-the-head", "--", "-m", "train"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert f"first to differ {hashes['scale the head'][:10]} scale the head" in told
    assert f"last to agree {hashes['sums in blocks'][:10]} sums in blocks" in told
    assert f"or {hashes['half done'][:10]} half done: NameError: half done" in told
    assert "they part at step 0 at 2.weight, in the weights before the step" in told
    assert "look at 2.weight" in told
    folders = [str(kept / hashes[subject][:12]) for subject in ("sums in blocks", "scale the head")]
    assert status_of(["diff", *folders]) == 1


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], *words: str) -> None:
    assert status_of(["bisect", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    last = said.err.splitlines()[-1]
    assert last.startswith("lab: ")
    assert "Traceback" not in said.err
    for word in words:
        assert word in last


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "HEAD", "--", "train.py"], ["nowhere: no such commit"]),
        (["begin", "--", "train.py"], ["Missing argument"]),
        (["begin", "HEAD", "--", "other.py"], ["other.py: not in the commit begin"]),
        (["begin", "HEAD", "--", "/other.py"], ["/other.py: not in the repository"]),
        (["begin", "HEAD", "--", "-m"], ["-m: takes the name of a module"]),
        (["HEAD", "begin", "--", "train.py"], ["HEAD: not an ancestor of begin"]),
        (["begin", "begin~0", "--", "train.py"], ["the same commit"]),
        (["half-done", "HEAD", "--", "train.py"], ["half-done: does not run: NameError: half done"]),
        (["begin", "half-done", "--", "train.py"], ["half-done: does not run: NameError: half done"]),
        (["begin", "HEAD", "--", "-m", "nowhere"], ["-m nowhere: ImportError: No module named nowhere"]),
        (["begin", "say-more", "--", "train.py"], ["begin and say-more: their runs do not differ", "to the last bit"]),
        (["begin", "HEAD", "--", "README"], ["not in the commit begin"]),
    ],
    ids=lambda value: " ".join(value) if "--" in value else "",
)
@pytest.mark.usefixtures("hashes")
def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]) -> None:
    refused(capsys, arguments, *words)


def test_elsewhere_there_is_nothing_to_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    refused(capsys, ["a", "b", "--", "train.py"], "in no git repository")


def test_what_only_a_checkout_holds_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    git(tmp_path, "init", "-q")
    commit(tmp_path, "one", {"a": "1"})
    commit(tmp_path, "two", {"a": "2"})
    (tmp_path / "train.py").write_text(TRAIN)
    monkeypatch.chdir(tmp_path)
    refused(capsys, ["HEAD~1", "HEAD", "--", "train.py"], "train.py: not in the commit HEAD~1; only what is committed")


def test_a_script_that_draws_otherwise_each_time_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    git(tmp_path, "init", "-q")
    unseeded = TRAIN.replace("torch.manual_seed(", "torch.seed() or (")
    commit(tmp_path, "one", {"train.py": unseeded, "model.py": MODEL})
    commit(tmp_path, "two", {"a": "2"})
    monkeypatch.chdir(tmp_path)
    refused(capsys, ["HEAD~1", "HEAD", "--", "train.py"], "run twice, it does not agree with itself", "seed")


def test_a_side_of_a_merge_is_no_place_to_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    git(tmp_path, "init", "-q", "-b", "main")
    commit(tmp_path, "one", {"train.py": TRAIN, "model.py": MODEL})
    git(tmp_path, "checkout", "-q", "-b", "side")
    commit(tmp_path, "aside", {"b": "1"})
    git(tmp_path, "checkout", "-q", "main")
    commit(tmp_path, "two", {"a": "2"})
    git(tmp_path, "merge", "-q", "--no-ff", "-m", "merged", "side")
    monkeypatch.chdir(tmp_path)
    refused(capsys, ["side", "main", "--", "train.py"], "side: came into main by a merge")


def test_packages_are_those_of_the_commit_from_a_folder_too_and_one_called_lab_is_no_hindrance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    git(tmp_path, "init", "-q")
    for folder in ("src/mine", "lab", "scripts"):
        (tmp_path / folder).mkdir(parents=True)
    train = TRAIN.replace("from model", "from mine.model")
    first = {"src/mine/__init__.py": "", "src/mine/model.py": MODEL, "lab/__init__.py": "", "scripts/train.py": train}
    commit(tmp_path, "one", first)
    commit(tmp_path, "two", {"src/mine/model.py": MODEL.replace("Tanh", "Sigmoid")})
    # As an installed checkout would come first otherwise.
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "src"))
    monkeypatch.chdir(tmp_path / "scripts")
    assert status_of(["bisect", "HEAD~1", "HEAD", "--json", "--", "train.py"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["first"]["subject"], found["difference"]["where"]) == ("two", "1")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_search_leaves_nothing_behind(tmp_path: Path, number: int) -> None:
    repository, temporary = tmp_path / "repository", tmp_path / "temporary"
    repository.mkdir()
    temporary.mkdir()
    git(repository, "init", "-q")
    waits = "import pathlib, time\npathlib.Path(r'{}').touch()\ntime.sleep(600)\n".format(tmp_path / "running")
    commit(repository, "one", {"train.py": waits})
    commit(repository, "two", {"a": "2"})
    # A job behind & in a shell is begun with SIGINT ignored, and so is what it begins.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "from lab.cli import main; main(['bisect', 'HEAD~1', 'HEAD', '--', 'train.py'])"
    environment = {**os.environ, "TMPDIR": str(temporary)}
    search = subprocess.Popen([sys.executable, "-c", code], cwd=repository, env=environment, stderr=subprocess.PIPE)
    until = time.monotonic() + 120
    while not (tmp_path / "running").exists():
        assert search.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    search.send_signal(number)
    _, said = search.communicate(timeout=60)
    assert search.returncode == 130
    assert b"interrupted" in said
    assert b"Traceback" not in said
    assert [*temporary.iterdir()] == []
    assert len(git(repository, "worktree", "list").splitlines()) == 1
    assert git(repository, "status", "--porcelain") == ""
