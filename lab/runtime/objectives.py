"""What is learned, where it is not the next token: each answers a few actions before the engine does."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lab.context import IGNORED, Batch
from lab.errors import BadInput
from lab.projects.alignment.component import dpo_loss, dpo_margin, frozen_copy, sequence_log_probability
from lab.projects.decoder.component import EncoderDecoder
from lab.projects.encoder.component import Encoder
from lab.projects.losses.component import cross_entropy
from lab.runtime.tasks import MaskedText, Pairs, Questions, Reversed

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from torch import nn

    from lab.context import Run, Step
    from lab.runtime.data import Source
    from lab.runtime.engine import Engine

BETA = 0.1  # of DPO


class Objective:
    """A plugin of the core: asked before the engine.

    Args:
        engine: Builds what an objective takes over from it.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.scenario = engine.scenario

    def sized(self, kind: Callable[..., nn.Module], vocabulary: int) -> nn.Module:
        """Build a model of the scenario's size.

        Raises:
            BadInput: The scenario chooses a part that this model does not have.
        """
        m = self.scenario.model
        chosen = m.model_dump(exclude_defaults=True).keys() - {"layers", "width", "heads", "context"}
        if chosen:
            objective = self.scenario.train.objective
            raise BadInput(f"model.{min(chosen)}: train.objective = {objective!r} has no such choice")
        return kind(vocabulary, context=m.context, layers=m.layers, width=m.width, heads=m.heads)


class MaskedTokens(Objective):
    """An encoder says which tokens were hidden (Devlin et al., 2019)."""

    def lab_build_data(self, run: Run) -> Source:
        """Rows of different lengths with hidden tokens."""
        return MaskedText(self.engine.make_source(run), run.seed)

    def lab_build_model(self, run: Run) -> nn.Module:
        """An encoder."""
        return self.sized(Encoder, run.data.vocabulary)

    @torch.no_grad()
    def lab_generate(self, run: Run, step: Step, prompt: Tensor) -> Tensor:
        """Fill in what is hidden."""
        with self.engine.generating(run):
            step.batch = Batch((prompt,))
            step.logits = run.hook.lab_forward(run=run, step=step)
        hidden = prompt == run.data.extra
        return torch.where(hidden, step.logits[..., : run.data.extra].argmax(-1), prompt)


class SequenceToSequence(Objective):
    """An encoder reads a sequence; a decoder, told what it should have said so far, says another."""

    def lab_build_data(self, run: Run) -> Source:
        """Sequences, to be written backward."""
        return Reversed(self.engine.make_source(run), run.seed)

    def lab_build_model(self, run: Run) -> nn.Module:
        """An encoder and a decoder."""
        return self.sized(EncoderDecoder, run.data.vocabulary)

    @torch.no_grad()
    def lab_generate(self, run: Run, step: Step, prompt: Tensor) -> Tensor:
        """Write as many tokens as the source has, each likeliest after those before it."""
        said = torch.full_like(prompt[:, :1], run.data.extra)
        with self.engine.generating(run):
            for _ in range(prompt.shape[1]):
                step.batch = Batch((prompt, said))
                step.logits = run.hook.lab_forward(run=run, step=step)
                said = torch.cat([said, step.logits[:, -1:].argmax(-1)], dim=1)
        return said[:, 1:]


class FineTuning(Objective):
    """Answers to questions; the questions are read, and not learned (Ouyang et al., 2022)."""

    questions: type[Questions] = Questions

    def lab_build_data(self, run: Run) -> Source:
        """Questions with answers.

        Raises:
            BadInput: The scenario names another source.
        """
        section = self.scenario.data
        objective = self.scenario.train.objective
        if section.source != "arithmetic":
            raise BadInput(f"train.objective = {objective!r} needs data.source = 'arithmetic', not {section.source!r}")
        tokenizer = self.engine.make_tokenizer()
        return self.questions(tokenizer, section.batch, self.scenario.model.context, run.seed)

    def lab_evaluate(self, run: Run) -> Generator[None, Tensor, Tensor]:
        """Record which share of the answers would be right, to the last token, if each token were the likeliest."""
        self.right: list[Tensor] = []
        loss = yield
        if self.right:
            run.step.record("answer.exact", torch.cat(self.right).float().mean())
        return loss

    def lab_loss(self, step: Step) -> None:
        """Note the answers that are right; the loss is the engine's."""
        if step.mode == "evaluate" and step.logits is not None and step.batch is not None:
            targets = step.batch.targets
            assert targets is not None
            told = (step.logits.argmax(-1) == targets) | (targets == IGNORED)  # [B T]
            self.right.append(told.all(-1))


class Scores(NamedTuple):
    """Log-probabilities of the two answers to each question, [pairs] each, in the order in which DPO takes them."""

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor


class Preferences(FineTuning):
    """The right one of two answers gets likelier, against a frozen copy of the model (Rafailov et al., 2023).

    Attributes:
        reference: The copy.
        beta: What a nat of distance to it costs.
        scores: Of the newest batch, without a graph, as any such trainer logs them.
    """

    questions = Pairs
    reference: nn.Module
    beta: float = BETA
    scores: Scores | None = None

    def lab_build_model(self, run: Run) -> nn.Module:
        """The model that was trained before, and a frozen copy of it.

        Raises:
            BadInput: There is none.
        """
        if not self.scenario.train.start:
            raise BadInput(
                "train.objective = 'dpo' needs train.start: the scenario whose trained model is preferred to"
            )
        model = self.engine.make_model(run)
        self.reference = frozen_copy(model).to(run.device)
        return model

    def lab_evaluate(self, run: Run) -> Generator[None, Tensor, Tensor]:
        """Record the mean margin on held-out pairs, and which share of them is told apart."""
        self.margins: list[Tensor] = []
        loss = yield
        if self.margins:
            margins = torch.cat(self.margins)
            run.step.record("preference.held_out_margin", margins.mean())
            run.step.record("preference.held_out_right", (margins > 0).float().mean())
        return loss

    def lab_loss(self, step: Step) -> Tensor:  # type: ignore[override]  # here it answers
        """DPO's loss; rows come in pairs. Records the mean margin and the cross-entropy of the preferred answers."""
        assert step.logits is not None
        assert step.batch is not None
        targets = step.batch.targets
        assert targets is not None
        policy = self.policy_scores(step.logits, targets)  # [2 pairs]
        before = self.reference_scores(step.batch)  # [2 pairs]
        scores = Scores(policy[0::2], policy[1::2], before[0::2], before[1::2])
        self.scores = Scores(*(score.detach() for score in scores))
        margin = dpo_margin(*self.scores, beta=self.beta)
        if step.mode == "evaluate":
            self.margins.append(margin)
        else:
            step.record("preference.margin", margin.mean())
            step.record("preference.cross_entropy", cross_entropy(step.logits[0::2].detach(), targets[0::2]))
        return self.preferred(scores)

    def policy_scores(self, logits: Tensor, targets: Tensor) -> Tensor:  # [2 pairs T V], [2 pairs T] -> [2 pairs]
        """The log-probability of each row's answer."""
        return sequence_log_probability(logits, targets)

    @torch.no_grad()
    def reference_scores(self, batch: Batch) -> Tensor:  # -> [2 pairs]
        """The log-probability of each row's answer, by the reference."""
        assert batch.targets is not None
        return sequence_log_probability(self.reference(*batch.args), batch.targets)

    def preferred(self, scores: Scores) -> Tensor:  # -> []
        """The loss of a batch of pairs."""
        return dpo_loss(*scores, beta=self.beta)


OBJECTIVES: MappingProxyType[str, type[Objective]] = MappingProxyType(
    {"masked": MaskedTokens, "seq2seq": SequenceToSequence, "sft": FineTuning, "dpo": Preferences}
)
