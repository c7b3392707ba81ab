"""torch and numpy, imported when they are first used: a module that names them at the top still loads in no time."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as numpy  # noqa: ICN001, PLC0414 - exported from here
    import torch as torch  # noqa: PLC0414 - likewise
else:

    class _Later:
        def __init__(self, name: str) -> None:
            self.__dict__["__name__"] = name

        def __getattr__(self, name: str) -> Any:
            value = getattr(importlib.import_module(self.__name__), name)
            setattr(self, name, value)  # the next look-up finds it without coming here
            return value

    torch, numpy = _Later("torch"), _Later("numpy")
