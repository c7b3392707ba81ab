"""What goes wrong when a model is evaluated. A cause may stand with no injector, as the first one does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from annotated_types import Interval

from lab import Cause, Fault, fault, torch

if TYPE_CHECKING:
    from torch import Tensor

    from lab import Run

RANDOM = Cause(
    id="evaluation.random",
    title="Evaluation draws random numbers",
    must=("evaluation.random",),
    may=("evaluation.random_site",),
    locate=("evaluation.random_site",),
    place="model",
    repair="Call model.eval() before evaluating, and pass self.training to functional dropout "
    "(F.dropout(x, p, training=self.training)); drop noise that is meant for training only.",
    refute="Two evaluations of one batch agree.",
    look="Functional dropout and sampling inside forward.",
    source="pytorch/pytorch#26338",
)

DROPOUT = Cause(
    id="evaluation.dropout",
    title="Dropout stays on when the model is evaluated",
    must=("evaluation.dropped", "evaluation.random"),
    may=("evaluation.random_site",),
    locate=("evaluation.dropped", "evaluation.random"),
    module=True,
    repair="Pass the mode: F.dropout(x, p, training=self.training), whose default is training=True, and "
    "scaled_dot_product_attention(..., dropout_p=p if self.training else 0.0), which knows no mode. Or use nn.Dropout "
    "and call model.eval().",
    refute="Two evaluations of one batch agree.",
    look="Calls of F.dropout and dropout_p in the module named.",
    source="PyTorch documentation: scaled_dot_product_attention, dropout_p; pytorch/pytorch#26338",
)


@fault(
    "evaluation.dropout",
    title="Dropout does not end with training",
    cause="evaluation.dropout",
    moves="determinism.difference",
    repair=DROPOUT.repair,
)
class Dropout(Fault):
    """Drops a share of a layer's output, and enlarges the rest: in training, which is right, and elsewhere too."""

    at: str = "blocks.*.attn"
    share: Annotated[float, Interval(gt=0, lt=1)] = 0.1

    def lab_start(self, run: Run) -> None:
        self.replace(run, f"{self.at}.out", self.change)

    def change(self, x: Tensor) -> Tensor:
        return torch.nn.functional.dropout(x, self.share)  # training=True, by default
