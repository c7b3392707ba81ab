"""A probe of one's own: the mean of what each block gives out."""

from __future__ import annotations

import lab


@lab.probe("block-means", title="Mean of each block's output")
class BlockMeans(lab.Probe):
    def lab_start(self, run: lab.Run) -> None:
        self.run = run
        self.read(run, "blocks.*.out", self.see)

    def see(self, site: lab.Site, value: lab.torch.Tensor) -> None:
        self.run.step.record("block.mean", value.mean(), site.name)
