"""Convolutions that stand one place too far to either side, and the causes behind them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Interval

from lab import BadInput, Cause, Fault, fault, torch

if TYPE_CHECKING:
    from torch import Tensor

    from lab import Run

NOT_CAUSAL = Cause(
    id="convolution.not_causal",
    title="A convolution sees later positions",
    must=("convolution.later", "causality.future"),
    may=("causality.leak",),
    repair="Pad the beginning only: F.pad(x, (kernel - 1, 0)) before nn.Conv1d(..., padding=0), or padding=kernel - 1 "
    "and [..., :T] of what comes out. padding='same' and padding=kernel // 2 pad both ends. With a dilation, pad "
    "dilation * (kernel - 1).",
    refute="d out_i / d x_j of the convolution is 0 for all j > i.",
    look="The padding of the convolution named, and what is cut off at which end.",
    source="van den Oord et al., 2016, section 2.1; Bai et al., 2018, section 3.1",
)

SHIFTED = Cause(
    id="convolution.shifted",
    title="A convolution misses the newest position",
    must=("convolution.own",),
    repair="Pad kernel - 1 zeros at the beginning, not kernel. A kernel that leaves out its own position belongs in "
    "the first layer of a model whose targets are its own inputs; where targets are the next tokens it only loses one.",
    refute="The convolution's output at a position depends on its input there.",
    look="How many zeros stand before the beginning, and where the end is cut off.",
    source="van den Oord et al., 2016, PixelRNN, section 3.4 (masks A and B)",
)


class _Moved(Fault):
    """Moves the window of a causal convolution by some positions."""

    at: str = "blocks.0.attn.conv"

    def lab_start(self, run: Run) -> None:
        sites = run.sites.match(f"{self.at}.windows")
        if not sites:
            raise BadInput(f"{self.info.id}: no causal convolution at {self.at!r}")
        for site in sites:
            layer: Any = run.model.get_submodule(site.module)
            self.replace(run, site.name, self._mover(int(layer.kernel)))

    def _mover(self, kernel: int) -> Any:
        return lambda windows: moved(windows, kernel, self.places())

    def places(self) -> int:
        """How many positions to the right."""
        raise NotImplementedError


def moved(windows: Tensor, kernel: int, places: int) -> Tensor:  # [B T K*C] -> [B T K*C]
    """Return the windows that end `places` after their positions, with zeros beyond both ends."""
    length, width = windows.shape[1], windows.shape[2] // kernel
    x = windows[..., -width:]  # [B T C]: a window ends with the position itself
    padded = torch.nn.functional.pad(x, (0, 0, max(kernel - 1 - places, 0), max(places, 0)))
    first = max(places - kernel + 1, 0)
    return torch.cat([padded[:, first + i : first + i + length] for i in range(kernel)], dim=-1)


@fault(
    "convolution.not_causal",
    title="A convolution is padded at both ends",
    cause="convolution.not_causal",
    moves="convolution.later",
    repair=NOT_CAUSAL.repair,
)
class NotCausal(_Moved):
    """Moves the windows of a causal convolution `by` positions towards the end."""

    at: str = "blocks.0.attn.conv"
    by: Annotated[int, Interval(ge=1, le=64)] = 1

    def places(self) -> int:
        return self.by


@fault(
    "convolution.shifted",
    title="A convolution is padded too far",
    cause="convolution.shifted",
    moves="convolution.own",
    repair=SHIFTED.repair,
)
class Shifted(_Moved):
    """Moves the windows of a causal convolution one position back."""

    at: str = "blocks.0.attn.conv"

    def places(self) -> int:
        return -1
