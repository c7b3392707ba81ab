"""Reads a run folder back: tables, findings, and a new diagnosis of what was recorded."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.diagnosis.diagnose import diagnose
from lab.errors import BadInput, nearest
from lab.files import FINDINGS, METRICS, RUN
from lab.manager import discover
from lab.processes import read_others
from lab.store import read_history

if TYPE_CHECKING:
    import pandas as pd

    from lab.catalogue import Catalogue
    from lab.diagnosis.model import Diagnosis
    from lab.store import History


@dataclass(frozen=True)
class Results:
    """A run, read back.

    Attributes:
        folder: The run folder.
        about: ``run.toml``: scenario, seed, versions, machine.
        history: Every metric, as series.
    """

    folder: Path
    about: dict[str, Any]
    history: History

    @property
    def metrics(self) -> pd.DataFrame:
        """Every number: columns ``step``, ``metric``, ``site``, ``value``."""
        import pandas as pd

        parts = [
            pd.DataFrame({"step": series.steps, "metric": metric, "site": site, "value": series.values})
            for metric in self.history.metrics
            for site, series in self.history.each(metric)
        ]
        if not parts:
            return pd.DataFrame({"step": [], "metric": [], "site": [], "value": []})
        return pd.concat(parts, ignore_index=True).sort_values("step", kind="stable", ignore_index=True)

    def table(self, metric: str) -> pd.DataFrame:
        """One metric: a row a step, a column a site. Of two values in one step the later one.

        Raises:
            BadInput: It was not recorded.
        """
        import pandas as pd

        columns = {site: pd.Series(series.values, series.steps) for site, series in self.history.each(metric)}
        if not columns:
            raise BadInput(f"{self.folder}: no metric {metric!r}{nearest(metric, self.history.metrics)}")
        newest = {site: column[~column.index.duplicated(keep="last")] for site, column in columns.items()}
        return pd.concat(newest, axis=1).sort_index().rename_axis(index="step", columns="site")

    @property
    def findings(self) -> pd.DataFrame:
        """The symptoms, in the order in which they were found."""
        import pandas as pd

        path = self.folder / FINDINGS
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
        return pd.DataFrame([found for line in lines if (found := _json(line)) is not None])

    def diagnosis(self, catalogue: Catalogue | None = None) -> Diagnosis:
        """Diagnose what was recorded, with the rules and causes of today."""
        return diagnose(self.history, catalogue if catalogue is not None else discover())


def _json(line: str) -> Any:
    """Read a line; None for one that a killed run left half written."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def load(path: str | Path) -> Results:
    """Read a run folder, also of a run that is going on or was killed.

    Raises:
        BadInput: It is no run folder, or damaged.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder; give the folder of a run, such as runs/reads-the-future-0")
    if not (folder / METRICS).is_file():
        raise BadInput(f"{folder}: no run folder: it holds no {METRICS}")
    about: dict[str, Any] = {}
    run_file = folder / RUN
    if run_file.is_file():
        try:
            about = tomllib.loads(run_file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{run_file}: damaged: {error}") from None
    history = read_history(folder / METRICS)
    history.others = read_others(folder)
    return Results(folder, about, history)
