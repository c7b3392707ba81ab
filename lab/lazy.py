"""torch, imported when it is first used: a module that names it at the top still loads in no time."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch  # noqa: PLC0414 - exported from here
else:

    class _Torch:
        def __getattr__(self, name: str) -> Any:
            value = getattr(importlib.import_module("torch"), name)
            setattr(self, name, value)  # the next look-up finds it without coming here
            return value

    torch = _Torch()
