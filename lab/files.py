"""The names of the files in a run folder."""

from __future__ import annotations

RUN, METRICS, FINDINGS, DIAGNOSIS = "run.toml", "metrics.db", "findings.jsonl", "diagnosis.json"
