"""Tables that depend on nothing, and are made anew in each call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from annotated_types import Interval

from lab import Cause, Fault, Saving, fault, torch

if TYPE_CHECKING:
    from torch import Tensor

    from lab import History, Profile, Run


def _table_cost(profile: Profile, _history: History, at: str) -> Saving:
    """Where it is made, tables are most of the whole step's numbers, and so nearly all of that place's way forward."""
    row = profile.own(at, "forward")
    return Saving(row.seconds, f"the way forward takes {row.seconds * 1e3:.3g} ms there, nearly all of it for tables")


TABLES_REBUILT = Cause(
    id="performance.tables_rebuilt",
    title="A table that never changes is computed in each call",
    must=("tables.rebuilt",),
    repair="Compute it once: register_buffer(name, table, persistent=False) in __init__, or keep it until a longer one "
    "is asked for. Make no more rows than the call has positions.",
    refute="Most of the numbers that a step computes depend on its batch or on a parameter.",
    look="torch.arange, torch.ones and torch.full in the forward pass of the module named, and the size that they are "
    "given.",
    source="PyTorch documentation: torch.nn.Module.register_buffer",
    saves=_table_cost,
)


@fault(
    "performance.tables_rebuilt",
    title="A layer makes a mask for 4096 positions in each call",
    cause="performance.tables_rebuilt",
    moves="tables.share",
    repair=TABLES_REBUILT.repair,
)
class TablesRebuilt(Fault):
    """Makes a causal mask for `length` positions where `at` gives out [B T C], and hides what does not see itself."""

    at: str = "blocks.0.mlp"
    length: Annotated[int, Interval(ge=1024, le=16384)] = 4096

    def lab_start(self, run: Run) -> None:
        def change(x: Tensor) -> Tensor:  # [B T C]
            size = max(self.length, x.shape[-2])
            hidden = torch.ones(size, size, dtype=torch.bool, device=x.device).tril().logical_not_()
            return x.masked_fill(hidden.diagonal()[: x.shape[-2], None], 0.0)

        self.replace(run, f"{self.at}.out", change)
