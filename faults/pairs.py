"""Preferences that are learned the wrong way round, or from scores that cannot be compared, and their causes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lab import BadInput, Cause, Fault, fault, torch

if TYPE_CHECKING:
    from torch import Tensor

    from lab import Batch, Run

PAIRS_SWAPPED = Cause(
    id="alignment.pairs_swapped",
    title="The answer that was rejected is preferred",
    must=("pairs.swapped",),
    place="loss",
    repair="-logsigmoid(beta * ((policy_chosen - reference_chosen) - (policy_rejected - reference_rejected))). Call "
    "the loss with keywords: four tensors of one shape can be exchanged without an error.",
    refute="The loss falls where the margin that is logged rises.",
    look="The order of the four log-probabilities where the loss is called, and the sign inside the logsigmoid. A "
    "reward margin that falls below 0 is the sign.",
    source="Rafailov et al., 2023, equation 7; Hugging Face TRL documentation: DPOTrainer, rewards/margins",
)

SCORED_APART = Cause(
    id="alignment.reference_averaged",
    title="The reference's scores are means over tokens, the policy's are sums",
    must=("pairs.scored_apart",),
    place="reference",
    repair="Score both models by one function: the sum of the log-probabilities of the answer's tokens, or their mean "
    "in both. Scores of the reference that were computed ahead belong to the settings they were computed with.",
    refute="Before the first update, policy and reference give each answer the same score, and the loss is ln 2.",
    look="The first logged loss beside ln 2 = 0.693, and what average_log_prob or its like is in both calls.",
    source="Rafailov et al., 2023, section 4; Lambert et al., 2024, section 5 (means on both sides)",
)


def pairs_of(run: Run, fault: Fault) -> Any:
    """Return what scores the pairs of a run.

    Raises:
        BadInput: Nothing does.
    """
    for _, plugin in run.plugins.list_name_plugin():
        if hasattr(plugin, "reference_scores"):
            return plugin
    raise BadInput(f"{fault.info.id}: needs a reference model (train.objective = 'dpo')")


@fault(
    "alignment.pairs_swapped",
    title="The chosen and the rejected answer are exchanged in the loss",
    cause="alignment.pairs_swapped",
    moves="pairs.error",
    repair=PAIRS_SWAPPED.repair,
)
class PairsSwapped(Fault):
    """Gives the loss the scores of the two answers in the wrong order; the margin is logged in the right one."""

    at: str = "loss"

    def lab_start(self, run: Run) -> None:
        holder = pairs_of(run, self)
        preferred = holder.preferred

        def exchanged(scores: Any) -> Tensor:
            chosen, rejected, *before = scores
            if self.active(run):
                scores = type(scores)(rejected, chosen, *before[::-1])
            loss: Tensor = preferred(scores)
            return loss

        holder.preferred = exchanged
        run.cleanup.callback(delattr, holder, "preferred")


@fault(
    "alignment.reference_averaged",
    title="The reference's log-probabilities are averaged over tokens in place of summed",
    cause="alignment.reference_averaged",
    moves="pairs.gap",
    repair=SCORED_APART.repair,
)
class ReferenceAveraged(Fault):
    """Divides the score that the reference gives an answer by the number of its tokens."""

    at: str = "reference"

    def lab_start(self, run: Run) -> None:
        holder = pairs_of(run, self)
        summed = holder.reference_scores

        def averaged(batch: Batch) -> Tensor:
            scores: Tensor = summed(batch)
            if not self.active(run) or batch.targets is None:
                return scores
            with torch.no_grad():
                return scores / (batch.targets >= 0).sum(-1)

        holder.reference_scores = averaged
        run.cleanup.callback(delattr, holder, "reference_scores")
