"""How far a learner has come: one file beside the components."""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lab.errors import BadInput
from lab.files import PROGRESS
from lab.projects import PROJECTS, Project

if TYPE_CHECKING:
    from pathlib import Path

FILE = PROGRESS


class Entry(BaseModel):
    """One project.

    Attributes:
        state: ``begun``, ``passed`` or ``skipped``.
        file: The learner's file.
        digest: SHA-256 of the file that passed.
        hold, of: Of the properties, how many held when it was last checked.
        hints: How many were asked for.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    state: Literal["begun", "passed", "skipped"] = "begun"
    file: str = ""
    digest: str = ""
    hold: Annotated[int, Field(ge=0)] = 0
    of: Annotated[int, Field(ge=0)] = 0
    hints: Annotated[int, Field(ge=0)] = 0


class Progress(BaseModel):
    """All projects that were begun or skipped, by id."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    projects: dict[str, Entry] = {}

    def entry(self, project: Project) -> Entry:
        """What is known of a project; a new entry where nothing is."""
        return self.projects.setdefault(project.id, Entry(file=file_of(project)))

    def next(self) -> Project | None:
        """The first project that can be checked and is neither passed nor skipped."""
        done = {name for name, entry in self.projects.items() if entry.state != "begun"}
        return next((p for p in PROJECTS if p.ready and p.id not in done), None)


def file_of(project: Project) -> str:
    """Name the file that a learner writes: ``kv_cache.py``."""
    return f"{project.folder.name}.py"


def digest_of(file: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def read_progress(folder: Path) -> Progress:
    """Read the progress kept in a folder; an empty one where there is none.

    Raises:
        BadInput: The file is damaged. It is left as it is.
    """
    path = folder / FILE
    try:
        return Progress.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Progress()
    except (ValidationError, UnicodeDecodeError):
        raise BadInput(f"{path}: not a progress file of the lab; mend it, or move it away to begin anew") from None


def save_progress(folder: Path, progress: Progress) -> None:
    """Write it so that a kill leaves the old file or the new."""
    path = folder / FILE
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        beside.write_text(json.dumps(progress.model_dump(), indent=2) + "\n", encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
