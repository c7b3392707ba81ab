"""Rows of a question and an answer in which the wrong part counts, and the causes behind them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from annotated_types import Interval

from lab import BadInput, Cause, Fault, fault, torch

if TYPE_CHECKING:
    from collections.abc import Generator

    from torch import Tensor

    from lab import Batch, Run, Step

IGNORED = -100  # the target that the loss leaves out, as in torch

PROMPT_COUNTED = Cause(
    id="tuning.prompt_counted",
    title="The question counts in training, and not in evaluation",
    must=("answers.prompt",),
    place="targets",
    repair="Set the labels of the prompt to -100 in the training set too. With TRL, completion_only_loss=True for "
    "prompts and completions, assistant_only_loss=True for conversations. If prompts are to be learned, let evaluation "
    "count them as well.",
    refute="The first target of a training row is -100, as that of a held-out row is.",
    look="Which collator the training loader has, and which that of evaluation; decode where labels are not -100.",
    source="Ouyang et al., 2022; Hugging Face TRL documentation: SFTTrainer, train on completion only",
)

MASK_INVERTED = Cause(
    id="tuning.mask_inverted",
    title="The question counts and the answer is ignored: the mask is the wrong way round",
    must=("answers.inverted",),
    place="targets",
    repair="labels[is_prompt] = -100, and not labels[~is_prompt]. masked_fill and where differ in which value of the "
    "mask is replaced.",
    refute="The last token of a training row's answer is a target that counts.",
    look="The line that writes -100 into the labels; decode what is left of one row.",
    source="PyTorch documentation: Tensor.masked_fill, torch.where; CrossEntropyLoss, ignore_index",
)

ANSWERS_CUT = Cause(
    id="targets.answers_cut",
    title="Rows are cut off before their answers: they have nothing to learn",
    must=("answers.cut",),
    may=(
        "value.nonfinite",
        "loss.nonfinite",
        "gradient.nonfinite",
        "weight.nonfinite",  # a batch of which nothing is left has a mean over nothing, which is NaN
        "start.loss_high",  # and one of few targets, of which a trained model may be sure and wrong, another than all
    ),
    place="targets",
    repair="Raise max_length, or drop rows that are longer: a row that is cut after its prompt costs its time and "
    "teaches nothing. If rows must be cut, cut prompts from the left (truncation_side='left').",
    refute="Each row of a training batch has a target that is not -100.",
    look="The largest length that rows are cut to, beside the lengths of the prompts.",
    source="Hugging Face TRL documentation: SFTConfig, max_length; tokenizers, truncation_side",
)

END_IGNORED = Cause(
    id="targets.end_ignored",
    title="The end of a text is never learned: it is ignored as if it were padding",
    must=("answers.end",),
    place="targets",
    repair="Ignore padding by the attention mask (labels[attention_mask == 0] = -100), or give the tokenizer a padding "
    "token of its own. Where pad_token is eos_token, a collator that ignores the padding's token ignores every end.",
    refute="The token that ends a text is a target that counts, once a text.",
    look="tokenizer.pad_token beside tokenizer.eos_token, and how the collator finds padding. A model that writes on "
    "and on is the sign.",
    source="Hugging Face documentation: DataCollatorForLanguageModeling, which ignores the padding's token",
)


class _Answers(Fault):
    """Gives batches of questions and answers other rows: those of training, or all of them."""

    everywhere = False

    def lab_start(self, run: Run) -> None:
        if run.config is None or run.config.train.objective != "sft":
            raise BadInput(f"{self.info.id}: needs the lab's own training with train.objective = 'sft'")

    def lab_batch(self, run: Run, step: Step) -> Generator[None, Batch, Batch]:
        batch = yield
        if not self.active(run) or not (step.mode == "train" or self.everywhere):
            return batch
        assert batch.inputs is not None
        assert batch.targets is not None
        inputs, targets = self.changed(batch.inputs, batch.targets)
        return replace(batch, args=(inputs,), targets=targets)

    def changed(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:  # [B T] each
        """What goes in instead, and what it is compared with."""
        raise NotImplementedError


def questions(inputs: Tensor, targets: Tensor) -> Tensor:  # [B T] -> [B T]
    """The next tokens of the questions, and ignored from the first target that counts on."""
    begun = (targets != IGNORED).cumsum(1) > 0
    following = torch.cat([inputs[:, 1:], inputs[:, -1:]], dim=1)
    return following.masked_fill(begun, IGNORED)


@fault(
    "tuning.prompt_counted",
    title="The tokens of the question are targets too",
    cause="tuning.prompt_counted",
    moves="answers.train",
    repair=PROMPT_COUNTED.repair,
)
class PromptCounted(_Answers):
    """Makes each token of a question a target, in training alone."""

    def changed(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        asked = questions(inputs, targets)
        return inputs, torch.where(asked == IGNORED, targets, asked)


@fault(
    "tuning.mask_inverted",
    title="The question counts, and the answer is ignored",
    cause="tuning.mask_inverted",
    moves="answers.train",
    repair=MASK_INVERTED.repair,
)
class MaskInverted(_Answers):
    """Exchanges what counts and what does not, in training alone; what fills up a row stays ignored."""

    def changed(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return inputs, questions(inputs, targets)


@fault(
    "targets.answers_cut",
    title="Rows are cut off after so many tokens",
    cause="targets.answers_cut",
    moves="answers.train",
    repair=ANSWERS_CUT.repair,
)
class AnswersCut(_Answers):
    """Leaves the first `tokens` of each row in training, before the answers of some begin."""

    tokens: Annotated[int, Interval(ge=4, le=65536)] = 5

    def lab_start(self, run: Run) -> None:
        super().lab_start(run)
        kept = (run.data.batch(0, "train").targets[:, : self.tokens] != IGNORED).any(1)
        if bool(kept.all()) or not bool(kept.any()):
            raise BadInput(f"targets.answers_cut: tokens = {self.tokens} leaves an answer in all rows, or in none")

    def changed(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return inputs[:, : self.tokens].contiguous(), targets[:, : self.tokens].contiguous()


@fault(
    "targets.end_ignored",
    title="The token that ends an answer is ignored",
    cause="targets.end_ignored",
    moves="answers.ends_counted",
    repair=END_IGNORED.repair,
)
class EndIgnored(_Answers):
    """Ignores every target that is the token with which rows are filled up, in training and evaluation."""

    everywhere = True

    def lab_start(self, run: Run) -> None:
        super().lab_start(run)
        self.end = run.data.end

    def changed(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return inputs, targets.masked_fill(targets == self.end, IGNORED)
