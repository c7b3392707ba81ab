"""A class that is left out of the loss, and tables for tokens that there are not; the causes behind them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Interval

from lab import BadInput, Cause, Fault, fault, torch

if TYPE_CHECKING:
    from collections.abc import Generator

    from torch import Tensor, nn

    from lab import Run, Step

IGNORED = -100  # the target that the loss leaves out, as in torch

CLASS_IGNORED = Cause(
    id="targets.class_ignored",
    title="The loss ignores a class that is a token like any other",
    must=("vocabulary.class_left_out",),
    place="loss",
    repair="Leave ignore_index at -100, which is no class, and set the targets that should not count to it. "
    "ignore_index=0 is right only where 0 is the padding and nothing else.",
    refute="A target of the class named counts: the loss changes with the logit of that class at its place.",
    look="ignore_index of the loss, and which token has that number: tokenizer.convert_ids_to_tokens(0).",
    source="PyTorch documentation: CrossEntropyLoss, ignore_index",
)

MISMATCH = Cause(
    id="data.vocabulary_mismatch",
    title="The model was made for another vocabulary",
    must=("vocabulary.too_many",),
    place="head",
    repair="Make the model from the tokenizer: vocab_size=len(tokenizer), rounded up to a multiple of 128 at most; or "
    "model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64).",
    refute="The head has as many rows as the tokenizer has tokens, but for rounding up.",
    look="vocab_size in the model's configuration: a default (50257, 50304) is that of another tokenizer. The first "
    "loss is near the logarithm of it.",
    source="Hugging Face documentation: resize_token_embeddings; Karpathy, nanoGPT: vocab_size of meta.pkl, or 50304",
)


@fault(
    "targets.class_ignored",
    title="One class is the number that the loss ignores",
    cause="targets.class_ignored",
    moves="vocabulary.unevenness",
    repair=CLASS_IGNORED.repair,
)
class ClassIgnored(Fault):
    """Leaves the targets that are `token` out of the loss; -1 is the commonest of the first batch."""

    at: str = "loss"
    token: Annotated[int, Ge(-1)] = -1

    def lab_start(self, run: Run) -> None:
        if run.config is None or run.config.train.objective == "dpo":
            raise BadInput(f"{self.info.id}: needs the lab's own training with a cross-entropy")
        targets = run.data.batch(0, "train").targets
        targets = targets[targets != IGNORED]
        self.left_out = int(targets.mode().values) if self.token < 0 else self.token
        if not 0 < int((targets == self.left_out).sum()) < len(targets):
            raise BadInput(f"{self.info.id}: token = {self.token} is no target of the first batch, or each of them")

    def lab_loss(self, run: Run, step: Step) -> Generator[None, Tensor, Tensor]:
        loss = yield
        if not self.active(run):
            return loss
        assert step.logits is not None
        assert step.batch is not None
        assert step.batch.targets is not None
        targets = step.batch.targets.masked_fill(step.batch.targets == self.left_out, IGNORED)
        return torch.nn.functional.cross_entropy(step.logits.flatten(0, -2), targets.flatten())


@fault(
    "data.vocabulary_mismatch",
    title="The model has a row for each token of a much larger vocabulary",
    cause="data.vocabulary_mismatch",
    moves="vocabulary.classes",
    repair=MISMATCH.repair,
)
class VocabularyMismatch(Fault):
    """Builds the model for `rows` tokens: the default is a configuration's that nobody changed."""

    at: str = "head"
    rows: Annotated[int, Interval(ge=2, le=1_000_000)] = 50_257

    def lab_build_model(self, run: Run) -> Generator[None, nn.Module, nn.Module]:
        self.from_the_start()
        if run.config.train.start:
            raise BadInput(f"{self.info.id}: the trained model that this starts from has its table already")
        known = run.data.vocabulary
        if self.rows <= known:
            raise BadInput(f"{self.info.id}: rows = {self.rows}, and there are {known} tokens")
        run.data.vocabulary = self.rows
        try:
            model = yield
        finally:
            run.data.vocabulary = known
        return model
