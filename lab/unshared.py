"""What two runs do not share at all: places in the model, and what they were told to do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lab.points import INSIDE, compared, way

if TYPE_CHECKING:
    from lab.results import Results
    from lab.store import History

SETTINGS = ("seed", "steps", "model", "data", "train", "fault")  # of a scenario, what a run depends on


def only(a: History, b: History, order: dict[str, int]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The sites, and weights, of which one run recorded a number and the other did not."""
    known = compared(a, b)
    mine, others = (
        {site for metric, stage in known.items() if stage.part in INSIDE for site in history.sites(metric)}
        for history in (a, b)
    )
    alone = [sorted(sites, key=lambda site: (way(site, order), site)) for sites in (mine - others, others - mine)]
    return tuple(alone[0]), tuple(alone[1])


def all_settings(a: Results, b: Results) -> dict[str, tuple[Any, Any]]:
    """What scenario, optimiser and modules were told, and on what they ran, where the two differ."""
    told = []
    for run in (a, b):
        scenario = run.about.get("scenario", {})
        about = {key: scenario[key] for key in SETTINGS if key in scenario}
        about |= {"seed": run.about.get("run", {}).get("seed", about.get("seed"))}
        about |= {"version": run.about.get("versions", {}), "machine": run.about.get("machine", {})}
        for metric, stage in run.history.stages.items():
            if stage.part == "setting":
                for site, series in run.history.each(metric):
                    about.setdefault("set", {})[site] = float(series.values[0])
        told.append(about)
    return settings(told[0], told[1])


def settings(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """What two nested tables do not share, by key."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in [*a, *(key for key in b if key not in a)]:
        x, y = a.get(key), b.get(key)
        if isinstance(x, dict) and isinstance(y, dict):
            found |= settings(x, y, f"{prefix}{key}.")
        elif x != y:
            found[f"{prefix}{key}"] = (x, y)
    return found
