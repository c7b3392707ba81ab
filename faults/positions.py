"""Positions that cannot be told apart, and the causes behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge

from lab import BadInput, Cause, Fault, fault, torch

if TYPE_CHECKING:
    from collections.abc import Generator

    from torch import Tensor, nn

    from lab import Run

NONE = Cause(
    id="positions.none",
    title="Positions are not told apart",
    must=("positions.same",),
    module=True,
    repair="Add the table to the tokens, x = tokens + positions[:T], and index it by torch.arange(T): neither by "
    "zeros, nor by the number of the row.",
    refute="The table gives each position another vector.",
    look="The indices that the table is given, and whether what it returns is used.",
    source="Vaswani et al., 2017, section 3.5; Gehring et al., 2017",
)

TRUNCATED = Cause(
    id="positions.truncated",
    title="Late positions share one vector",
    must=("positions.late",),
    may=("generation.*", "positions.uneven"),
    module=True,
    repair="Make the table as long as the longest sequence, and refuse a longer one rather than clamping its indices.",
    refute="The last two positions have different vectors.",
    look="A clamp or a minimum on the indices, and the length of the table.",
    source="Shaw et al., 2018, section 3.2 (clipped distances)",
)

OFF_BY_ONE = Cause(
    id="positions.off_by_one",
    title="The first two positions share one vector",
    must=("positions.early",),
    may=("generation.*", "positions.uneven"),  # with a cache, a clamp at 0 acts on each new position
    module=True,
    repair="Count from 0 without clamping: torch.arange(T), or (mask.cumsum(-1) - 1) where padding stands on the left.",
    refute="Position 0 and position 1 have different vectors.",
    look="How the indices are made: a shift by one, and a clamp at 0 that hides it.",
    source="Hugging Face Transformers: position_ids made from an attention_mask by cumsum",
)

ANGLES_HALF = Cause(
    id="positions.angles_half",
    title="The angles of a table of sines are computed in half precision",
    must=("positions.uneven",),
    cannot=("positions.early", "positions.late"),  # what is repeated is uneven too
    module=True,
    repair="Compute positions, rates and their product in float32, torch.arange(T, dtype=torch.float32), whatever "
    "torch.set_default_dtype says; take sines and cosines, and cast those.",
    refute="From each position to the next, each pair of a sine and a cosine is turned by the same angle.",
    look="The dtype of torch.arange and of the rates, where the table is made.",
    source="Vaswani et al., 2017, section 3.5; huggingface/transformers#29285 (the same in rotary positions)",
)


@fault(
    "positions.none",
    title="The table of positions gives zeros",
    cause="positions.none",
    moves="positions.repeated",
    repair=NONE.repair,
)
class NoPositions(Fault):
    """Replaces every vector of the table by 0."""

    at: str = "positions"

    def lab_start(self, run: Run) -> None:
        self.replace(run, f"{self.at}.out", lambda table: table * 0)


@fault(
    "positions.truncated",
    title="All positions from a limit on are given the same vector",
    cause="positions.truncated",
    moves="positions.repeated",
    repair=TRUNCATED.repair,
)
class Truncated(Fault):
    """Clamps the index of a position to `limit` - 1."""

    at: str = "positions"
    limit: Annotated[int, Ge(2)] = 32

    def lab_start(self, run: Run) -> None:
        for site in run.sites.match(f"{self.at}.out"):
            # The table is a parameter, or a buffer.
            module = run.model.get_submodule(site.module)
            longest = max((len(table) for table in (*module.parameters(), *module.buffers())), default=0)
            if longest <= self.limit:
                raise BadInput(f"positions.truncated: limit = {self.limit}, but {site.module} has {longest} positions")
        rows = run.data.batch(0, "train").inputs
        if rows is not None and rows.shape[-1] <= self.limit:
            raise BadInput(f"positions.truncated: limit = {self.limit}, but rows have {rows.shape[-1]} tokens")
        self.replace(run, f"{self.at}.out", self.change)

    def change(self, table: Tensor) -> Tensor:  # [T C]
        last = min(self.limit, len(table)) - 1
        return table[[min(t, last) for t in range(len(table))]]


@fault(
    "positions.off_by_one",
    title="Each position is given the vector of the one before",
    cause="positions.off_by_one",
    moves="positions.repeated",
    repair=OFF_BY_ONE.repair,
)
class OffByOne(Fault):
    """Gives position t the vector of max(t - 1, 0): the first two share one."""

    at: str = "positions"

    def lab_start(self, run: Run) -> None:
        self.replace(run, f"{self.at}.out", self.change)

    def change(self, table: Tensor) -> Tensor:  # [T C]
        return table[[max(t - 1, 0) for t in range(len(table))]]


@fault(
    "positions.angles_half",
    title="A table of sines is made of angles in bfloat16",
    cause="positions.angles_half",
    moves="positions.unevenness",
    repair=ANGLES_HALF.repair,
)
class AnglesHalf(Fault):
    """Makes the table anew, from positions times rates in bfloat16."""

    at: str = "positions"

    def lab_build_model(self) -> Generator[None, nn.Module, nn.Module]:
        self.from_the_start()
        model = yield
        module = dict(model.named_modules()).get(self.at)
        table = dict(module.named_buffers()).get("table") if module is not None else None
        if table is None:
            raise BadInput(f"positions.angles_half: no table of sines at {self.at!r}: model.positions = 'sinusoidal'")
        context, width = table.shape
        table.copy_(sines(context, width, torch.bfloat16))
        return model


def sines(context: int, width: int, dtype: torch.dtype) -> Tensor:  # -> [T C]
    """Sine and cosine side by side, of angles computed in `dtype`."""
    rates = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)  # [C/2]
    angles = (torch.arange(context).to(dtype)[:, None] * rates.to(dtype)).double()  # [T C/2]
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width].float()
