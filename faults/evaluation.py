"""What goes wrong when a model is evaluated. A cause may stand with no injector."""

from __future__ import annotations

from lab import Cause

RANDOM = Cause(
    id="evaluation.random",
    title="Evaluation draws random numbers",
    must=("evaluation.random",),
    place="model",
    repair="Call model.eval() before evaluating, and pass self.training to functional dropout "
    "(F.dropout(x, p, training=self.training)); drop noise that is meant for training only.",
    refute="Two evaluations of one batch agree.",
    look="Functional dropout and sampling inside forward.",
    source="pytorch/pytorch#26338",
)
