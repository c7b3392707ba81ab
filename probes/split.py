"""Has each head its slice of what the projection gives for its own token? Told by the norms of the slices."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab import NotChecked, Probe, Symptom, probe, rule, torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from lab import History, Run, Site

HEADS = ("q", "k", "v")


@probe(
    "split",
    title="Has each head its slice of its own token?",
    every=0,
    cost="norms of one row's queries, keys and values, on measured steps",
    seldom=True,
)
class Split(Probe):
    """Compares queries, keys and values, for one row of the batch, with the output of the projection of all three.

    Records ``split.error``, the relative distance of the norms of what the heads hold [H T] from those of the slices
    that they should hold, and ``split.bare_error``, from those of a view [H T D] of the same memory. A rotation by the
    position changes neither; of a single head both are the same.
    """

    def lab_start(self, run: Run) -> None:
        self._run = run
        self._kept: dict[str, dict[str, Tensor]] = {}
        names = (*HEADS, "qkv.out")
        layers = set.intersection(
            *({site.name.removesuffix(f".{name}") for site in run.sites.match(f"**.{name}")} for name in names)
        )
        if not layers:
            raise NotChecked("no attention in this model names queries, keys, values and their one projection as sites")
        for layer in sorted(layers):
            for name in names:
                self.read(run, f"{layer}.{name}", self._see)

    def _see(self, site: Site, value: Tensor) -> None:
        projected = site.name.endswith(".qkv.out")
        layer = site.name.removesuffix(".qkv.out") if projected else site.module
        kept = self._kept.setdefault(layer, {})
        kept["qkv" if projected else site.name.rpartition(".")[2]] = value.detach()[0].float()  # [T C] or [H T D]
        if kept.keys() == {*HEADS, "qkv"}:
            del self._kept[layer]
            self._judge(layer, kept.pop("qkv"), kept)

    def _judge(self, layer: str, whole: Tensor, heads: dict[str, Tensor]) -> None:  # [T C], [H T D] each
        widths = [x.shape[0] * x.shape[2] for x in heads.values()]
        if len(whole) < 2 or whole.shape[1] != sum(widths) or any(x.shape[1] != len(whole) for x in heads.values()):
            return
        for (name, x), part in zip(heads.items(), torch.split(whole, widths, dim=-1), strict=True):
            count, length, width = x.shape
            seen = x.norm(dim=-1)  # [H T]
            right = part.reshape(length, count, width).transpose(0, 1).norm(dim=-1)  # [H T]
            bare = part.reshape(count, length, width).norm(dim=-1)  # [H T]
            size = seen.norm().clamp_min(1e-30)
            errors = torch.stack([(seen - right).norm(), (seen - bare).norm()]) / size
            for metric, error in zip(("split.error", "split.bare_error"), errors, strict=True):
                self._run.step.record(metric, error, f"{layer}.{name}")


@rule(
    "split.bare",
    title="Each head holds its slice of its own token",
    reads=("split.error", "split.bare_error"),
    basis="theory",
    phase="forward",
)
def split_bare(history: History) -> Iterator[Symptom]:
    """Norms of a bare view to within the rounding of bfloat16, whose sums of squares lose some 2^-8, and of no split.

    In two looks at least: the norms of heads that are large in all tokens are alike either way.
    """
    found: dict[str, list[tuple[int, float, str]]] = {}
    for site, series in history.each("split.bare_error"):
        right = history.series("split.error", site).values
        wrong = (series.values < 5e-3) & (right > 0.02)
        if len({*series.steps[wrong]}) >= 2:
            layer, _, part = site.rpartition(".")
            found.setdefault(layer, []).append((int(series.steps[wrong][0]), float(right[wrong][0]), part))
    for layer, parts in found.items():
        step, seen, _ = min(parts)
        names = ", ".join(part for *_, part in parts)
        text = f"{names} of {layer} are its projection's output, read as [H T D] as it lies in memory: positions mix"
        yield Symptom(at=layer, since=step, seen=seen, expected="0", text=text)
