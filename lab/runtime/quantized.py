"""What quantizing a trained model costs: its held-out loss by scheme, beside that of the model itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab.projects.quantization.component import SCHEMES, quantize_model

if TYPE_CHECKING:
    from collections.abc import Generator

    from torch import Tensor

    from lab.context import Run, Step
    from lab.runtime.engine import Engine


class QuantizedEvaluation:
    """A plugin of the core: after the last evaluation, evaluates quantized copies of the model."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def lab_evaluate(self, run: Run, step: Step) -> Generator[None, Tensor, Tensor]:
        """Record ``quantized.increase`` in nats a token: by how much each scheme's loss is above the model's own."""
        loss = yield
        if step.index == self.engine.scenario.steps - 1:
            model = run.model
            for scheme in self.engine.scenario.train.quantize:
                run.model = quantize_model(model, *SCHEMES[scheme])
                try:
                    run.step.record("quantized.increase", self.engine.lab_evaluate(run) - loss, scheme)
                finally:
                    run.model = model
        return loss
