"""A fault of one's own: the embedding is multiplied by a constant that someone forgot to remove."""

from __future__ import annotations

import lab


@lab.fault(
    "demo.scale", title="Scaled embedding", cause="demo.scale", moves="activation.rms", repair="Drop the factor."
)
class Scale(lab.Fault):
    at: str = "tokens"
    factor: float = 30.0

    def lab_start(self, run: lab.Run) -> None:
        self.replace(run, f"{self.at}.out", lambda x: x * self.factor)
