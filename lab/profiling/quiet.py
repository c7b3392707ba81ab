"""Imports torch so that its profiler does not write on the terminal what nobody can act on."""

from __future__ import annotations

import os

QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # read once, when torch is loaded


def import_quietly() -> None:
    """Import torch; what the user has set of these variables holds, and none is left to other processes."""
    ours = [name for name in QUIET if name not in os.environ]
    os.environ.update({name: QUIET[name] for name in ours})
    try:
        import torch  # noqa: F401
    finally:
        for name in ours:
            del os.environ[name]
