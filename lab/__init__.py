"""breaklab: build every layer of an LLM, break it on purpose, measure what broke.

These names are all that a plugin needs, and all that the built-in ones use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lab.catalogue import Fault, Plugin, Probe, fault, plugin, probe, rule
from lab.diagnosis.model import Cause, Diagnosis, Finding, Saving, Symptom
from lab.errors import BadInput, FaultFound, LabError, LookAgain, NotChecked
from lab.lazy import numpy, torch
from lab.stages import Stage

if TYPE_CHECKING:
    from lab.attach.callback import Watcher as Watcher
    from lab.attach.watch import watch as watch
    from lab.context import Artifact, Batch, Run, Step
    from lab.profiling.profile import Profile
    from lab.results import Results
    from lab.results import load as load
    from lab.sites import Site
    from lab.store import History, Metric, Row, Series

__version__ = "0.1.0"

__all__ = [
    "Artifact",
    "BadInput",
    "Batch",
    "Cause",
    "Diagnosis",
    "Fault",
    "FaultFound",
    "Finding",
    "History",
    "LabError",
    "LookAgain",
    "Metric",
    "NotChecked",
    "Plugin",
    "Probe",
    "Profile",
    "Results",
    "Row",
    "Run",
    "Saving",
    "Series",
    "Site",
    "Stage",
    "Step",
    "Symptom",
    "Watcher",
    "__version__",
    "fault",
    "load",
    "numpy",
    "plugin",
    "probe",
    "rule",
    "torch",
    "watch",
]

# Names that bring in torch or pandas are found when they are first asked for.
_LATER = {
    "Artifact": "lab.context",
    "Batch": "lab.context",
    "Run": "lab.context",
    "Step": "lab.context",
    "Site": "lab.sites",
    "History": "lab.store",
    "Metric": "lab.store",
    "Row": "lab.store",
    "Series": "lab.store",
    "Profile": "lab.profiling.profile",
    "Results": "lab.results",
    "Watcher": "lab.attach.callback",
    "load": "lab.results",
    "watch": "lab.attach.watch",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'lab' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LATER[name]), name)
