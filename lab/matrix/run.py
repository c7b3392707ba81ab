"""Runs the cells of the matrix in several processes, and keeps each row as soon as it is known."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import multiprocessing
import os
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lab.errors import BadInput, one_line
from lab.files import FINDINGS
from lab.matrix.cells import Cell, aimed, aims, configured
from lab.names import within

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lab.catalogue import Catalogue
    from lab.diagnosis.model import Diagnosis
    from lab.matrix.cells import Aim
    from lab.store import History

ROWS = "rows.jsonl"
Row = dict[str, Any]


def run_cells(wanted: Sequence[Cell], folder: Path, *, jobs: int, plugins: Sequence[str] = ()) -> Iterator[Row]:
    """Yield a row for each cell: first those that `folder` holds already, then each as it is done.

    Rows of another version of the code or of the scenarios are kept, and not used.

    Args:
        wanted: What to run.
        folder: Where rows are kept, so that a matrix that was stopped goes on.
        jobs: How many processes.
        plugins: Files and modules of plugins, for each process.
    """
    path, version = folder / ROWS, _version(plugins)
    folder.mkdir(parents=True, exist_ok=True)
    kept = {key: row for key, row in _read(path).items() if row.get("version") == version}
    left = []
    for cell in wanted:
        if cell.key in kept:
            yield kept[cell.key]
        else:
            left.append(cell)
    if not left:
        return
    _make_starts(left)
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin, initargs=(tuple(plugins),)) as pool,
        path.open("a", encoding="utf-8") as file,
    ):
        futures = [pool.submit(run_cell, cell) for cell in left]
        try:
            for future in as_completed(futures):
                row = {**future.result(), "version": version}
                file.write(json.dumps(row) + "\n")
                file.flush()
                yield row
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _make_starts(wanted: Sequence[Cell]) -> None:
    """Train, once, the models that cells start from, before several processes look for them."""
    from lab.runtime.start import find_start, with_start
    from lab.runtime.train import train_start
    from lab.scenario import load_scenario

    for base in dict.fromkeys(cell.base for cell in wanted):
        find_start(with_start(load_scenario(base)[1]), train_start)


def _version(plugins: Sequence[str]) -> str:
    """Return what stands for the code and the scenarios that make a row what it is."""
    digest = hashlib.sha256()
    packages = [importlib.import_module(f"lab{name}") for name in ("", ".faults", ".probes", ".scenarios")]
    roots = [Path(package.__path__[0]) for package in packages]
    files = {file for root in roots for kind in ("py", "toml") for file in root.rglob(f"*.{kind}")}
    for file in sorted(files | {Path(name) for name in plugins if Path(name).is_file()}):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _read(path: Path) -> dict[str, Row]:
    """Return the rows that are kept, by key; a last line that was cut off is left out."""
    rows = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
            rows[row["key"]] = row
        except (ValueError, KeyError, TypeError):
            continue
    return rows


_known: tuple[Catalogue, dict[str, Aim]] | None = None  # of this process


def _begin(plugins: tuple[str, ...]) -> None:
    """Prepare a process: one thread, since there are as many processes as cores; the catalogue, read once."""
    global _known  # noqa: PLW0603 - what a pool's initialiser can leave behind
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    from lab.manager import discover

    torch.set_num_threads(1)
    catalogue = discover(plugins)
    _known = catalogue, aims(catalogue)


def _end_with_parent() -> None:
    """End this process when the one that started it is gone, however that ended: nobody would fetch its rows."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def run_cell(cell: Cell) -> Row:
    """Run one cell; say what was found. A fault that finds no place in a project does not apply there."""
    assert _known is not None
    catalogue, known = _known
    if cell.without:
        causes = {id: cause for id, cause in catalogue.causes.items() if id != cell.without}
        catalogue = dataclasses.replace(catalogue, causes=causes)
    row: Row = {"key": cell.key, "fault": cell.fault, "project": cell.project, "seed": cell.seed}
    begun = time.monotonic()
    try:
        used = [aimed(cell, known[fault]) for fault in cell.faults]
        try:
            ran = _run(cell, used, catalogue)
        except BadInput as error:
            if "from_step" not in str(error):
                raise
            used = [aimed(cell, known[fault], late=False) for fault in cell.faults]
            ran = _run(cell, used, catalogue)
    except BadInput as error:
        return {**row, "applies": False, "reason": str(error)}
    except Exception as error:  # noqa: BLE001 - one cell that fails must not end the matrix
        return {**row, "applies": True, "error": one_line(error), **_nothing()}
    if len(used) == 1 and ran.diagnosis.verdict != "faulty" and _changed_nothing(cell, ran, catalogue):
        return {**row, "applies": False, "reason": "it changes nothing in this run"}
    about = {"finite": ran.finite, "seconds": round(time.monotonic() - begun, 2)}
    return {**row, "applies": True, **judged(ran.diagnosis, used, ran.found_at), **about}


class _Ran(NamedTuple):
    """A run that ended: its diagnosis, the step at which the first symptom was told, whether the loss stayed finite."""

    diagnosis: Diagnosis
    found_at: int | None
    finite: bool
    history: History


def _changed_nothing(cell: Cell, ran: _Ran, catalogue: Catalogue) -> bool:
    """Whether a fault left the run as it was: all losses, and the metric that it says it moves, but for rounding.

    Such as a logarithm of 0 where no probability is as small as that. There is nothing then that could be found.
    """
    healthy = _run(dataclasses.replace(cell, faults=()), (), catalogue, like=cell).history
    for metric in ("loss", "loss.held_out", catalogue.faults[cell.faults[0]].info.moves):
        for site in {*ran.history.sites(metric), *healthy.sites(metric)}:
            here, there = ran.history.series(metric, site).values, healthy.series(metric, site).values
            if len(here) != len(there) or not np.allclose(here, there, rtol=1e-5, atol=0.0, equal_nan=True):
                return False
    return True


def _run(cell: Cell, used: Sequence[Aim], catalogue: Catalogue, like: Cell | None = None) -> _Ran:
    """Run a cell; in the configuration of another, if one is given."""
    from lab.runtime.run import find_device, run_once
    from lab.scenario import make_faults

    scenario = configured(like or cell, used)
    faults = make_faults(scenario, catalogue, cell.key)
    with tempfile.TemporaryDirectory(prefix="lab-matrix-") as folder:
        kept = Path(folder) / "run"
        diagnosis, history = run_once(cell.key, scenario, catalogue, kept, faults, find_device("cpu"), [])
        told = (kept / FINDINGS).read_text(encoding="utf-8").splitlines() if (kept / FINDINGS).is_file() else []
    loss = history.series("loss")
    return _Ran(diagnosis, json.loads(told[0])["step"] if told else None, len(loss) == len(loss.finite), history)


def _nothing() -> Row:
    found: Row = {"detected": False, "named": False, "located": None, "delay": None, "at": "", "causes": []}
    return {
        **found,
        "symptoms": [],
        "checked": [],
        "not_checked": {},
        "finite": True,
        "verdict": "inconclusive",
        "late": False,
        "score": 0.0,
    }


def judged(diagnosis: Diagnosis, used: Sequence[Aim], found_at: int | None) -> Row:
    """Compare a diagnosis with the faults: was anything found, was the cause named first, in its place, how soon?

    Of several faults all have to be named, in the first three causes; places are asked of one fault alone. A place is
    right when it is the one expected, holds it or is held by it, or is one of several that were broken. ``located`` is
    None where none is expected.
    """
    first = diagnosis.causes[0] if diagnosis.causes else None
    row: Row = {
        **_nothing(),
        "detected": diagnosis.verdict == "faulty",
        "verdict": diagnosis.verdict,
        "at": first.at if first else "",
        "causes": [cause.id for cause in diagnosis.causes],
        "score": first.score if first else 0.0,
        "symptoms": sorted({symptom.id for symptom in diagnosis.symptoms}),
        "checked": sorted(diagnosis.checked),
        "not_checked": dict(diagnosis.not_checked),
    }
    if not used:
        return row
    begins = min(aim.from_step for aim in used)
    row["late"] = begins > 0
    if found_at is not None:
        row["delay"] = found_at - begins
    named = row["causes"][: 1 if len(used) == 1 else 3]
    row["named"] = all(aim.cause in named for aim in used)
    (aim, *others) = used
    if aim.at and not others:
        right = first is not None and (within(first.at, aim.at) or within(aim.at, first.at))
        row["located"] = right or (first is not None and bool(aim.reach) and within(first.at, aim.reach))
    return row
